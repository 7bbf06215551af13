"""An optimizer's state for the whole flat vector, and its parts in shards.

    3 shards                               whole                      2 shards
    exp_avg (128,), step 7 ─┐                                     ┌─ exp_avg (256,), step 7
    exp_avg (192,), step 7 ─┼─ gather ─ exp_avg (512,), step 7 ─ scatter
    exp_avg (192,), step 7 ─┘                                     └─ exp_avg (256,), step 7

Any elementwise optimizer of torch can be cut so, and any round program that is not ``whole``: what
has the length of the shard as its last dimension is cut there, such as a history of shape
``(k, n)``, and what is a single value is the same in all shards.

A ``whole`` program is never cut. Its state, such as a matrix of shape ``(n, n)``, passes through
here in one part that is everything; nothing here can tell it from a history, so whoever asks for
several parts must know that the program may have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramserver.errors import CheckpointError, LayoutError

Scalar = Tensor | float | int


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer knows, for the whole flat vector."""

    tensors: dict[str, Tensor]
    """For each key, such as ``exp_avg``, a tensor whose last dimension is ``layout.numel``."""
    scalars: dict[str, Scalar]
    """Values all shards share, such as ``step``; what torch keeps as a tensor of one element is
    one here, of the same dtype."""
    groups: dict[str, Any]
    """The settings of torch's parameter group: ``lr``, ``betas``, …"""
    schedule: dict[str, Any] | None = None
    """The ``state_dict`` of the learning-rate scheduler; None without one."""


def gather_state(parts: Sequence[tuple[range, Mapping[str, Any]]]) -> OptimizerState:
    """Join the states of all shards' optimizers.

    Args:
        parts: Each shard's range, in order, and the ``state_dict`` of its optimizer, which holds
            one flat parameter of the range's length.

    Raises:
        CheckpointError: The ranges leave a gap, or the shards differ in what they share, which
            means they were not saved at one version.
    """
    at = 0
    for part, _ in parts:
        if part.start != at:
            raise CheckpointError(f"the shards' ranges leave a gap or overlap at element {at}")
        at = part.stop
    states = [dict(saved["state"].get(0, {})) for _, saved in parts]
    _agreed("the keys of the optimizer's state", [sorted(state) for state in states])
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    for key in states[0]:
        values = [state[key] for state in states]
        if all(
            isinstance(v, Tensor) and v.ndim > 0 and v.shape[-1] == len(part)
            for v, (part, _) in zip(values, parts, strict=True)
        ):
            _agreed(f"the shape of {key}, without its length,", [v.shape[:-1] for v in values])
            _agreed(f"the dtype of {key}", [v.dtype for v in values])
            tensors[key] = torch.cat(values, dim=-1)
        else:
            scalars[key] = _agreed(key, values)
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        for _, saved in parts
        for group in saved["param_groups"]
    ]
    return OptimizerState(tensors, scalars, _agreed("param_groups", groups))


def scatter_state(state: OptimizerState, part: range) -> dict[str, Any]:
    """Return the ``state_dict`` for an optimizer whose one parameter is the elements of ``part``.

    Raises:
        LayoutError: ``part`` reaches past the end of a state's tensor.
    """
    own: dict[str, Scalar] = {}
    for key, tensor in state.tensors.items():
        if part.stop > tensor.shape[-1]:
            raise LayoutError(
                f"{key} has {tensor.shape[-1]} elements, so it cannot be cut at {part}"
            )
        # A copy: torch would step on the state's own memory, and pickle would send all of it.
        own[key] = tensor[..., part.start : part.stop].clone(memory_format=torch.contiguous_format)
    for key, value in state.scalars.items():
        own[key] = value.clone() if isinstance(value, Tensor) else value
    return {"state": {0: own} if own else {}, "param_groups": [{**state.groups, "params": [0]}]}


def _agreed(what: str, values: Sequence[Any]) -> Any:
    """Return the one value all shards have."""
    first = values[0]
    for shard, value in enumerate(values):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise CheckpointError(
                f"{what} of shard {shard} has shape {tuple(value.shape)}: only tensors whose last "
                "dimension is the shard's length and single values can be cut anew"
            )
        if value != first or getattr(value, "dtype", None) != getattr(first, "dtype", None):
            raise CheckpointError(
                f"{what} is {value} on shard {shard} and {first} on shard 0: save all shards at "
                "one version"
            )
    return first
