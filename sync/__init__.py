"""Synchronous training: all-reduce between workers, every replica equal after every step."""
