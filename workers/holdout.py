"""A part of the training samples that is held out, to judge the run by while it goes.

    training samples      0 1 2 3 4 5 6 7 8 9
    drawn by the seed     held out: 2 7      trained on: 0 1 3 4 5 6 8 9
    of a series           held out: 8 9      trained on: 0 1 2 3 4 5 6 7

Every process draws the same ones, from the seed alone. The windows of a series follow each other,
so its last ones are held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from paramserver.errors import TaskError
from workers.examples import Batch, Data, Examples
from workers.task import Task
from workers.windows import Series

_HELD_OUT = 3
"""First word of the stream's key; `workers.batches` and `workers.samples` have others."""


class Selected:
    """Some samples of others; `workers.examples.Examples`."""

    def __init__(self, examples: Examples, indices: Tensor) -> None:
        """Be the samples ``indices`` of ``examples``, int64 of shape ``(n,)``, in that order."""
        self._examples, self._indices = examples, indices

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._indices)

    def batch(self, indices: Tensor) -> Batch:
        """Return the samples ``indices`` of these."""
        return self._examples.batch(self._indices[indices])


def held_out(task: Task, share: float, seed: int, *, spare_own: bool = False) -> Task:
    """Return ``task`` with a ``share`` of its training samples, above 0 and below 1, held out.

    Args:
        task: What is trained.
        share: Of the training samples; at least one is held out.
        seed: Of the run.
        spare_own: Whether a task that has validation data keeps it and loses no sample; else
            loading its data raises TaskError.
    """
    return replace(task, data=_HoldOut(task.name, task.data, share, seed, spare_own))


@dataclass(frozen=True, slots=True)
class _HoldOut:
    name: str
    data: Callable[[], Data]
    share: float
    seed: int
    spare_own: bool

    def __call__(self) -> Data:
        data = self.data()
        if data.validation is not None:
            if self.spare_own:
                return data
            raise TaskError(
                f"task {self.name!r} has validation data of its own: leave out validation="
                f"{self.share:g}"
            )
        num_train = len(data.train)
        if num_train < 2:
            raise TaskError(
                f"task {self.name!r} has {num_train} training samples, of which none can be held "
                "out for validation"
            )
        number = min(max(1, round(self.share * num_train)), num_train - 1)
        if isinstance(data.train, Series):
            cut = (num_train - number) * data.train.window
            last = data.train.part(range(cut, data.train.num_steps))
            return Data(data.train.part(range(cut)), data.test, validation=last)
        stream = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(_HELD_OUT,)))
        drawn = torch.from_numpy(np.random.Generator(stream).permutation(num_train))
        away, kept = drawn[:number].sort().values, drawn[number:].sort().values
        return Data(
            Selected(data.train, kept),
            data.test,
            validation=Selected(data.train, away),
            difficulty=None if data.difficulty is None else data.difficulty[kept],
        )
