"""Asynchronous training: consistency rules, damping, and the trainer on a parameter server."""

from async_sgd.trainer import AsyncTrainer

__all__ = ["AsyncTrainer"]
