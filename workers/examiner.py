"""How good one version of the parameters is: its metrics on each part of the data.

    loss, accuracy, …              on the test data
    validation_loss, …             on the validation data, if there are any
    train_loss, …                  on a sample of the training data, if somebody asks for it

Whoever holds a snapshot examines it: an evaluator's process while workers go on, or the simulator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paramserver.layout import Layout
from paramserver.packing import Packed, pack
from paramserver.rounds import Sample
from workers.diagnostics import Diagnosis, Diagnostics
from workers.gradients import BoundModel
from workers.holdout import Selected
from workers.samples import Piece
from workers.samples import indices as drawn
from workers.task import Data, Task, evaluate, is_minimised, recalibrate_batchnorm

DIAGNOSED_SHARE = 0.05
"""Share of the time that looking at the net may take, in the process that evaluates."""


@dataclass(frozen=True, slots=True)
class Keep:
    """When the parameters that are examined are to be kept."""

    metric: str
    """By which they are judged; see `workers.task.is_minimised`."""
    best: float | None
    """What they must be better than; None keeps any."""
    always: bool = False
    """Whether they are kept however they are judged."""

    def better(self, value: float) -> bool:
        """Whether ``value`` is better than the best; NaN is not."""
        if self.best is None:
            return not math.isnan(value)
        return value < self.best if is_minimised(self.metric) else value > self.best

    def wants(self, metrics: Mapping[str, float]) -> bool:
        """Whether to keep parameters of these ``metrics``."""
        return self.always or self.better(metrics.get(self.metric, math.nan))


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """What evaluations look at, beside the test and validation data."""

    train: bool = False
    """Training samples: as many as the validation data have, the same ones every time."""
    inside: bool = False
    """The net itself, see `workers.diagnostics`, as long as that takes less than `DIAGNOSED_SHARE`
    of the time."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What came of one version."""

    version: int
    metrics: dict[str, float]
    params: Packed | None = None
    """The parameters, if they are to be kept."""
    diagnosis: Diagnosis | None = None
    """What the net looks like, if it was looked at."""


class Examiner:
    """Examines one version after the other."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        data: Data,
        layout: Layout,
        cuts: Sequence[range],
        *,
        seed: int,
        looks: Looks = Looks(),  # frozen
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Make ready.

        Args:
            task: Gives loss and metrics.
            model: The task's; it is not to be used otherwise.
            data: The task's.
            layout: Of ``model``.
            cuts: The ranges that parameters come in.
            seed: Of the run.
            looks: At what, beside the test and validation data.
            clock: Seconds, by which that time is told.
        """
        self._task, self._model, self._data, self._seed = task, model, data, seed
        self._bound = BoundModel(model, layout, cuts)
        self._parts = {"": data.test}
        if data.validation is not None:
            self._parts["validation_"] = data.validation
        if looks.train:
            size = min(len(data.validation or data.test), len(data.train))
            piece = Piece(Sample("examined", size), round=0, number=0, of=1)
            indices = drawn(piece, len(data.train), seed)
            self._parts["train_"] = Selected(data.train, indices)
        self._clock, self._next_look = clock, -math.inf
        self._diagnostics = (
            Diagnostics(task, model, layout, data.train, seed=seed) if looks.inside else None
        )

    def examine(self, version: int, params: Sequence[Tensor], keep: Keep | None = None) -> Examined:
        """Return the metrics of ``params``, a vector a cut, and a copy of them if ``keep`` says so.

        Raises:
            TaskError: The task's loss or metrics failed.
        """
        self._bound.read(params)
        recalibrate_batchnorm(self._task, self._model, self._data.train, seed=self._seed)
        metrics = {
            part + name: value
            for part, examples in self._parts.items()
            for name, value in evaluate(self._task, self._model, examples).items()
        }
        is_kept = keep is not None and keep.wants(metrics)
        return Examined(
            version,
            metrics,
            pack(torch.cat(list(params))) if is_kept else None,
            self._look(version),
        )

    def _look(self, version: int) -> Diagnosis | None:
        """Look at the net, unless it is too early for that."""
        start = self._clock()
        if self._diagnostics is None or start < self._next_look:
            return None
        diagnosis = self._diagnostics.look(version)
        now = self._clock()
        self._next_look = now + (now - start) / DIAGNOSED_SHARE
        return diagnosis
