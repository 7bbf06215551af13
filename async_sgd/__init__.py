"""Asynchronous training on a parameter server: rules, policies, the trainer and the simulator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from async_sgd.simulator import Simulator
    from async_sgd.trainer import AsyncTrainer

__all__ = ["AsyncTrainer", "Simulator"]

_HOMES = {"AsyncTrainer": "async_sgd.trainer", "Simulator": "async_sgd.simulator"}


def __getattr__(name: str) -> object:
    """Import a class when it is asked for: Ray takes a second, and the simulator needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
