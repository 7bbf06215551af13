"""An average's state in a checkpoint, beside the optimizer's: keys that begin ``average.``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paramserver.averaging import Average, Averager
from paramserver.companion_state import has_companion, with_companion, without_companion
from paramserver.errors import CheckpointError
from paramserver.reshard import OptimizerState, scatter_state

_NAME = "average"


def with_average(rule: Mapping[str, Any], averager: Averager | None) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` with the state of its averager, if there is one.

    Nothing is copied but the dictionaries.
    """
    return with_companion(rule, _NAME, {} if averager is None else averager.state_dict())


def without_average(rule: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Undo `with_average`: return an optimizer's ``state_dict`` and its averager's, maybe empty."""
    return without_companion(rule, _NAME)


def check_average(state: OptimizerState | None, average: Average | None) -> None:
    """Check that a run goes on with an average only if it had one.

    Whether it is the same average is seen when its state is loaded.

    Raises:
        CheckpointError: ``state`` has an average and ``average`` is None, or the other way round.
    """
    if state is None:
        return
    had = has_companion(state, _NAME)
    if had and average is None:
        raise CheckpointError("the run had an average of its iterates: resume with it")
    if average is not None and not had:
        raise CheckpointError("the run had no average of its iterates: resume without one")


def averaged(
    params: Tensor, state: OptimizerState | None, average: Average | None, cuts: Sequence[range]
) -> Tensor:
    """Return what is to be evaluated: the average in ``state``, or ``params`` if it has none yet.

    Args:
        params: The parameters, shape ``(numel,)``.
        state: What was saved with them; None before the first update.
        average: The run's average; None if it has none.
        cuts: Ranges to average one at a time, none larger than the memory limit of ``average``
            lets it be; together everything.
    """
    if average is None or state is None:
        return params
    slices = []
    for cut in cuts:
        of_cut = params[cut.start : cut.stop]
        averager = average.build(of_cut)
        averager.load_state_dict(without_average(scatter_state(state, cut))[1])
        mean = averager.average()
        slices.append(of_cut if mean is None else mean)
    return torch.cat(slices)
