"""Synchronous training: all-reduce between workers, every replica equal after every step."""

from sync.trainer import SyncTrainer

__all__ = ["SyncTrainer"]
