"""What staleness is a proxy for, measured at every push: how far, which way, how long a step.

    gap      ‖w - r‖                  how far the parameters have moved since they were read
    cosine   -⟨g, d⟩ / (‖g‖ ‖d‖)      whether a step along g goes on the way of the update before
    step     ‖u‖                      how far this push's update moved the parameters

w are the parameters when the push is taken, r what the worker was shown (under `dana` a look-ahead
point, so that its gap is the one that DANA makes small), g the gradient as it was pushed, before
any compensation, d the change that the latest update made, and u the one that this push's makes.

With staleness 0 the gap is 0, unless the rule shows workers something else. If every update is the
same vector, the gap is staleness times ‖u‖; under SGD and one constant gradient the cosine is 1.
A cosine near 1 means that gradients agree along the path, and then a stale one points where a fresh
one would; where it is near 0 or below, staleness does harm.

There is no number (NaN) for a dropped push; for the step of a push that completes no update (an
update that a leave completes counts with the push taken last); and for the cosine of the first push
after a start or a resume, where no update has been seen.

A shard sees its own slice alone, so it keeps squares and dot products, a row a push that it takes.
All shards take the same pushes in the same order, and sums over the shards make the measures of the
whole vector: `measured` joins them when a run is saved.

They cost passes over memory and vectors: the gap a pass and one vector of room, each of the others,
or both, two passes after an update and two vectors; the cosine two more passes.

Sources: Barkai et al., "Gap-Aware Mitigation of Gradient Staleness", ICLR 2020, arXiv:1909.10802,
and Hakimi et al., arXiv:1907.11612 (the gap, there a root mean square: divide by √n for theirs).
Dai et al., "Toward Understanding the Impact of Staleness in Distributed Machine Learning", ICLR
2019, arXiv:1810.03264 (gradient coherence along the path; the cosine here is to an update, which
the server has, in the place of an earlier gradient, which it has not kept).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEASURES = ("gap", "cosine", "step")
"""What can be measured at a push."""

_SUMS = ("gap²", "⟨g, d⟩", "‖g‖²", "‖d‖²", "step²")
"""What a shard keeps of each push it takes: columns of `Gauge.sums`."""


def measures_of(text: str | None) -> tuple[str, ...]:
    """Read ``gap,cosine,step``, or some of them; None is none.

    Raises:
        ValueError: There is no measure of such a name, or one comes twice.
    """
    names = tuple(name.strip() for name in (text or "").split(",")) if text else ()
    check_measures(names)
    return names


def check_measures(names: Sequence[str]) -> None:
    """Raise ValueError unless each of ``names`` is a measure, and comes once."""
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"measure must be some of {', '.join(MEASURES)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"each measure is named once, got {','.join(names)}")


class Gauge:
    """Measures the pushes that one shard takes; calls come one at a time."""

    def __init__(
        self, names: Sequence[str], params: Tensor, cuts: Sequence[range] | None = None
    ) -> None:
        """Measure ``names`` of the slice that is at ``params`` now, which are not kept.

        Args:
            names: Some of `MEASURES`.
            params: Shape ``(n,)``.
            cuts: Ranges of the slice that are summed apart, and then added up, as so many shards
                would: a replay has the bits of the run then. None: the slice is summed as one.
        """
        # In float32 at least: in 16 bits the squares of a long vector would not add up.
        self._dtype = torch.promote_types(params.dtype, torch.float32)
        self._cuts = None if cuts is None or len(cuts) == 1 else cuts
        self._has_cosine, self._has_step = "cosine" in names, "step" in names
        room = torch.empty_like(params, dtype=self._dtype)
        self._drift = room if "gap" in names else None
        self._last = params.clone() if self._has_cosine or self._has_step else None
        self._change = torch.zeros_like(room) if self._last is not None else None
        self._change_square: float | None = None  # of the latest update; None before the first
        self._rows = np.full((1024, len(_SUMS)), math.nan)
        self._num_rows = 0

    def on_take(self, grad: Tensor, params: Tensor, read: Tensor) -> None:
        """Measure a push that is taken, before anything is done with it.

        Args:
            grad: What was pushed, shape ``(n,)``.
            params: The parameters now, shape ``(n,)``.
            read: What the worker was shown, shape ``(n,)``.
        """
        if self._num_rows == len(self._rows):
            self._rows = np.concatenate([self._rows, np.full_like(self._rows, math.nan)])
        row = self._rows[self._num_rows]
        self._num_rows += 1
        if self._drift is not None:
            row[0] = self._gap_squared(self._drift, params, read)
        if self._has_cosine and self._change is not None and self._change_square is not None:
            wide = grad.to(self._dtype)
            row[1] = self._dot(wide, self._change)
            row[2], row[3] = self._square(wide), self._change_square

    def on_update(self, params: Tensor) -> None:
        """Measure the update that has led to ``params``, shape ``(n,)``."""
        if self._last is None or self._change is None:
            return
        torch.sub(params, self._last, out=self._change)
        self._last.copy_(params)
        self._change_square = self._square(self._change)
        if self._has_step:
            self._rows[self._num_rows - 1, 4] = self._change_square

    def sums(self) -> NDArray[np.float64]:
        """Return a copy of what was kept: a row a push taken, in order."""
        return self._rows[: self._num_rows].copy()

    def _gap_squared(self, drift: Tensor, params: Tensor, read: Tensor) -> float:
        if params.data_ptr() == read.data_ptr():  # the very version that it has read
            return 0.0
        torch.sub(params, read, out=drift)
        return self._square(drift)

    def _dot(self, a: Tensor, b: Tensor) -> float:
        if self._cuts is None:
            return float(torch.dot(a, b))
        return sum(float(torch.dot(a[c.start : c.stop], b[c.start : c.stop])) for c in self._cuts)

    def _square(self, vector: Tensor) -> float:
        if self._cuts is None:
            return float(torch.linalg.vector_norm(vector)) ** 2
        parts = (vector[c.start : c.stop] for c in self._cuts)
        return sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts)


def measured(
    names: Sequence[str], sums: Sequence[NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Return the measures ``names`` of the whole vector, a value a push that was taken.

    Args:
        names: Some of `MEASURES`.
        sums: `Gauge.sums` of each shard, in their order. One that broke off before the others is
            joined as far as it goes.
    """
    num_rows = min(map(len, sums))
    total = sum(rows[:num_rows] for rows in sums)
    assert isinstance(total, np.ndarray)
    gap2, dot, grad2, change2, step2 = total.T
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.clip(-dot / (np.sqrt(grad2) * np.sqrt(change2)), -1.0, 1.0)
    values = {"gap": np.sqrt(gap2), "cosine": cosine, "step": np.sqrt(step2)}
    return {name: values[name] for name in MEASURES if name in names}


def summary(columns: dict[str, NDArray[Any]]) -> dict[str, dict[str, float | None]]:
    """Return what a run's record says of its measures: mean and largest, None without a value."""
    found: dict[str, dict[str, float | None]] = {}
    for name in MEASURES:
        if name in columns:
            values = columns[name][~np.isnan(columns[name])]
            has_values = len(values) > 0
            found[name] = {
                "mean": float(values.mean()) if has_values else None,
                "max": float(values.max()) if has_values else None,
            }
    return found
