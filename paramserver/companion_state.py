"""State kept beside an optimizer's in a checkpoint, each companion's under keys of its own.

    optimizer   averager                       compensator
    exp_avg     average.sum, average.updates   compensation.mean_square

It is cut and joined as the optimizer's own state is (`paramserver.reshard`), so a run goes on with
it on any number of shards or ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paramserver.reshard import OptimizerState


def with_companion(rule: Mapping[str, Any], name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` with the ``state`` of its companion ``name``.

    Nothing is copied but the dictionaries.
    """
    if not state:
        return dict(rule)
    own = {f"{name}.{key}": value for key, value in state.items()}
    return {**rule, "state": {**rule["state"], 0: {**rule["state"].get(0, {}), **own}}}


def without_companion(rule: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Undo `with_companion`: return the ``state_dict`` and the companion's state, maybe empty."""
    prefix = f"{name}."
    both = rule["state"].get(0, {})
    state = {k.removeprefix(prefix): v for k, v in both.items() if k.startswith(prefix)}
    own = {k: v for k, v in both.items() if not k.startswith(prefix)}
    return {**rule, "state": {0: own} if own else {}}, state


def has_companion(state: OptimizerState, name: str) -> bool:
    """Whether ``state`` holds vectors of the companion ``name``."""
    return any(key.startswith(f"{name}.") for key in state.tensors)
