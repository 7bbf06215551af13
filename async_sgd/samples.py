"""The samples that workers of a simulated run read: those their processes would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.batches import Batches
from workers.curriculum import Course
from workers.estimate import Given
from workers.examples import Batch, Examples
from workers.task import Task, batches_of
from workers.windows import Windows


class Step(NamedTuple):
    """One step of a worker."""

    worker: int
    number: int
    """Its clock, or as `workers.local.steps_of` counts them."""
    version: int
    """That the worker has read."""
    samples: int = 0
    """How many it draws; 0 if the run does not change their number."""


class Samples:
    """The samples of every worker of a simulated run, by step: those its process would read."""

    def __init__(
        self,
        task: Task,
        examples: Examples,
        batch_size: int,
        num_workers: int,
        *,
        seed: int,
        course: Course | None = None,
    ) -> None:
        self.batch_size, self.seed, self._course = batch_size, seed, course
        self._task, self._examples, self._num_workers = task, examples, num_workers
        self._batches: dict[int, Batches | Windows] = {}

    def read(self, step: Step) -> Given:
        """Return what the worker of ``step`` reads at it."""
        batches = self._of(step.worker)
        if isinstance(batches, Windows):
            return batches.read(self._examples, step.number)
        return self.batch([step])

    def batch(self, steps: Sequence[Step]) -> Batch:
        """Return the samples of all ``steps``, one step's after the other's; never windows."""
        return self._examples.batch(torch.cat([self._indices(*step) for step in steps]))

    def _indices(self, worker: int, number: int, version: int, samples: int) -> Tensor:
        batches = self._of(worker)
        assert isinstance(batches, Batches), "windows are read one by one"
        return batches.indices(number, version, samples or None)

    def _of(self, worker: int) -> Batches | Windows:
        batches = self._batches.get(worker)
        if batches is None:
            batches = self._batches[worker] = batches_of(
                self._task,
                self._examples,
                self.batch_size,
                seed=self.seed,
                worker=worker,
                num_workers=self._num_workers,
                course=self._course,
            )
        return batches
