"""The parameter server: layout, shards, optimizers, transports, client, server actor."""
