"""What a round program cannot be combined with, in either mode."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from workers.config import RunConfig


def check_config(name: str, config: RunConfig) -> None:
    """Raise ValueError for what optimizer ``name``, a round program, cannot be run with."""
    if config.clip is not None:
        raise ValueError(
            f"{name} needs more than gradients: clipping would break its searches and products"
        )
    if config.curriculum is not None:
        raise ValueError(
            f"{name} draws its samples by name, the same for all requests of a round, and a "
            "curriculum would draw others: use a push rule, such as sgd or adam"
        )
    if config.gradient != "reverse":
        raise ValueError(f"{name} needs exact gradients: use gradient=reverse")


def check_samples(name: str, spec: Any, num_train: int) -> None:
    """Raise ValueError if ``spec`` draws more samples than the ``num_train`` there are."""
    for field in fields(spec):
        size = getattr(spec, field.name)
        if field.name.endswith("batch") and size is not None and size > num_train:
            raise ValueError(
                f"{name}: {field.name}={size} is more than the {num_train} training samples"
            )
