"""Tasks whose depth can be chosen, or that are convex or nearly so, with data that is made up.

The mixture has 30 clusters of unit variance in 32 dimensions, three of each of ten classes. The
table has rank 5, noise of deviation 0.1, and 500 by 400 entries, of which half are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from paramserver.layout import Layout
from workers.functional import Params, PureLoss
from workers.task import Batch, Data, Task, TensorExamples, build_data, build_model
from workers.tasks import accuracy, cross_entropy, mlp

_INPUTS, _CLASSES, _CLUSTERS = 32, 10, 30
_WIDTH = 48
_APART = 1.0
"""Standard deviation of the clusters' centres in each dimension."""
_TRAIN, _TEST = 8000, 1000

_ROWS, _COLUMNS, _RANK = 500, 400, 5
_ENTRY_NOISE = 0.1


class Nets:
    """Gradients of a task at many points at once: of every worker of every replica."""

    def __init__(self, task: Task, num_workers: int, seeds: Sequence[int]) -> None:
        """Build a model for each of ``seeds``, which is also that of its workers' batches."""
        self._task, self._shape = task, (len(seeds), num_workers)
        self._data = build_data(task)
        self._model = build_model(task, seeds[0])
        self._layout = Layout.of(self._model)
        self._pure = PureLoss(task, self._model, self._layout)
        self._draws = [np.random.default_rng([seed, num_workers]) for seed in seeds]
        self._test = self._data.test.batch(torch.arange(len(self._data.test)))
        self.start = torch.stack([self._layout.flatten(build_model(task, s)) for s in seeds])
        """Where each replica begins, shape ``(replicas, n)``."""

    def gradients(self, points: Tensor, iteration: int) -> Tensor:
        """Return gradients at ``points``, shape ``(replicas, workers, n)``, each on its own batch.

        Batches are drawn with replacement, anew in each call.
        """
        replicas, workers = self._shape
        size = (workers, self._task.batch_size)
        drawn = np.stack([g.integers(len(self._data.train), size=size) for g in self._draws])
        batch = tuple(
            part.unflatten(0, (replicas * workers, -1))
            for part in self._data.train.batch(torch.from_numpy(drawn).flatten())
        )
        slopes = vmap(grad(self._loss))(self._pure.split(points.flatten(0, 1)), batch)
        out = torch.zeros(replicas * workers, points.shape[-1])
        self._pure.join(slopes, out)
        return out.view_as(points)

    def judged(self, point: Tensor) -> float:
        """Return the headline metric on the test data."""
        self._layout.load(self._model, point)
        assert self._task.metrics is not None
        with torch.no_grad():
            return self._task.metrics(self._model, self._test)[self._task.headline]

    def _loss(self, params: Params, batch: Batch) -> Tensor:
        return self._pure.loss(params, batch, 0)


def mixture(depth: int) -> Task:
    """Return the classes of the mixture for a net of ``depth`` hidden layers; 0 is logistic."""
    return Task(
        name=f"mixture, depth {depth}",
        model=partial(mlp, _INPUTS, (_WIDTH,) * depth, _CLASSES),
        data=_mixture,
        loss=cross_entropy,
        metrics=accuracy,
        batch_size=32,
    )


def _mixture() -> Data:
    generator = torch.Generator().manual_seed(0)
    centres = _APART * torch.randn(_CLUSTERS, _INPUTS, generator=generator)
    clusters = torch.randint(_CLUSTERS, (_TRAIN + _TEST,), generator=generator)
    points = centres[clusters] + torch.randn(len(clusters), _INPUTS, generator=generator)
    classes = clusters % _CLASSES
    return Data(
        TensorExamples(points[:_TRAIN], classes[:_TRAIN]),
        TensorExamples(points[_TRAIN:], classes[_TRAIN:]),
    )


def table() -> Task:
    """Return the factors of the table; the loss is half the sum of squares, as in the source."""
    return Task(
        name="matrix factorisation",
        model=_Factors,
        data=_table,
        loss=_half_squares,
        metrics=_mean_square,
        headline="error",
        batch_size=200,
    )


class _Factors(nn.Module):
    """Predicts the entries of a table at pairs of a row and a column."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(_ROWS, _RANK) / _RANK**0.5)
        self.columns = nn.Parameter(torch.randn(_COLUMNS, _RANK) / _RANK**0.5)

    def forward(self, places: Tensor) -> Tensor:
        return (self.rows[places[:, 0]] * self.columns[places[:, 1]]).sum(dim=1)


def _table() -> Data:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, _RANK, generator=generator) / _RANK**0.25
    columns = torch.randn(_COLUMNS, _RANK, generator=generator) / _RANK**0.25
    entries = rows @ columns.T  # of variance 1
    entries += _ENTRY_NOISE * torch.randn(entries.shape, generator=generator)
    order = torch.randperm(entries.numel(), generator=generator)
    places = torch.stack([order // _COLUMNS, order % _COLUMNS], dim=1)
    values = entries.view(-1)[order]
    half = len(order) // 2
    return Data(
        TensorExamples(places[:half], values[:half]),
        TensorExamples(places[half : half + _TEST], values[half : half + _TEST]),
    )


def _half_squares(model: nn.Module, batch: Batch) -> Tensor:
    places, values = batch
    off: Tensor = model(places) - values
    return off.square().sum() / 2


def _mean_square(model: nn.Module, batch: Batch) -> dict[str, float]:
    places, values = batch
    return {"error": (model(places) - values).square().mean().item()}
