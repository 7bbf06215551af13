"""The parameter server: layout, shards, optimizers, transports, client, server actor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paramserver.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """Import the client when it is asked for: torch takes a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("paramserver.client"), name)
