"""Asynchronous training: consistency rules, damping, and the trainer on a parameter server."""
