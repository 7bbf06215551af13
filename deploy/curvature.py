"""What kind of point a model's parameters are at: both ends of the Hessian's spectrum.

Worker processes compute the products with the Hessian that Lanczos' method takes:

    samples    | piece 0 | piece 1 | piece 2 | …       worker i has pieces i, i + jobs, …
    H v      = the mean of every piece's H v, weighted by its samples

The pieces depend on the samples alone, and their products are added up in order. So the result is
the same, bit for bit, with any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from paramserver.errors import ResourceError, TaskError
from paramserver.layout import Layout
from paramserver.rounds import Kind, Sample
from workers.examples import Examples
from workers.oracles import Oracle
from workers.samples import Piece, num_pieces
from workers.session import ray_session
from workers.spectrum import Spectrum, lanczos, relative_gradient
from workers.task import Task, build_data, build_model, recalibrate_batchnorm
from workers.threads import torch_threads

PIECE = 250
"""Samples that a product is computed of at once, at most."""

CRITICAL = 1e-3
"""A point is called critical where the relative gradient is no larger; see `relative_gradient`."""


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """What is looked at; travels to the workers."""

    task: Task
    layout: Layout
    params: Tensor
    part: str
    """``train``, ``test`` or ``validation``."""
    samples: int
    """So many of the part, at most."""
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """What is known of one point."""

    num_samples: int
    """That the loss is the mean of."""
    loss: float
    gradient: float
    """The norm of the loss's gradient."""
    relative_gradient: float
    spectrum: Spectrum
    dimensions: int
    """Parameters that are trained."""
    lowest: Mapping[str, float]
    """Of the unit vector along which the loss curves downwards most, or upwards least: each
    parameter's share of its square."""

    @property
    def is_critical(self) -> bool:
        """Whether the gradient is as good as 0."""
        return self.relative_gradient <= CRITICAL

    @property
    def verdict(self) -> str:
        """What kind of point it is, in a sentence."""
        what = self.spectrum.verdict()
        count = f"{self.spectrum.num_negative:,}"
        if not self.spectrum.is_whole:
            count = f"at least {count}"
        if not self.is_critical:
            down = f"it curves downwards along {count} directions" if what == "saddle" else ""
            down = down or f"by the Hessian alone it would be: {what}"
            return f"no critical point, the gradient still leads down; {down}"
        return {
            "saddle": f"a saddle: the loss falls along {count} of {self.dimensions:,} directions",
            "minimum": "a minimum: the loss rises along every direction",
            "maximum": "a maximum: the loss falls along every direction",
            "degenerate": "degenerate: along some direction the curvature cannot be told from 0, "
            "and the Hessian does not say whether the loss rises or falls",
        }[what]

    @property
    def largest_rate(self) -> float:
        """The learning rate that plain gradient descent stays stable below, 2 / λ; inf for none."""
        largest = self.spectrum.largest
        return 2 / largest if largest > self.spectrum.noise else math.inf


class Prober:
    """Answers for pieces of the samples in one process."""

    def __init__(self, ground: Ground) -> None:
        """Build the model and load the data.

        Raises:
            TaskError: They cannot be built.
        """
        task = ground.task
        model, data = build_model(task, ground.seed), build_data(task)
        ground.layout.load(model, ground.params)
        recalibrate_batchnorm(task, model, data.train, seed=ground.seed)
        model.eval()
        part: Examples | None = getattr(data, ground.part)
        assert part is not None, "whoever made the ground has seen that there is such a part"
        self._oracle = Oracle(task, model, ground.layout, part, ground.seed)
        self._sample = Sample("curvature", min(ground.samples, len(part)))
        self._params = ground.params
        self.num_pieces = num_pieces(self._sample, len(part), PIECE)
        """Into which the samples are cut."""

    def answer(
        self, kind: Kind, numbers: Sequence[int], vector: Tensor | None
    ) -> list[tuple[int, float, Tensor]]:
        """Return samples, loss and the one row of each piece in ``numbers``; see `Oracle`."""
        pieces = [Piece(self._sample, 0, number, self.num_pieces) for number in numbers]
        return [self._oracle.answer(kind, self._params, piece, vector) for piece in pieces]


def curvature(
    ground: Ground,
    *,
    steps: int,
    jobs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curvature:
    """Return what kind of point ``ground`` is about.

    Args:
        ground: The parameters, and what the loss is computed on.
        steps: Products with the Hessian, at most.
        jobs: Worker processes; 1 computes in this one.
        progress: Told how many products are done, of how many.

    Raises:
        TaskError: The task's loss failed, or is not finite or not twice differentiable.
        ResourceError: A worker was lost, or Ray cannot be started.
    """
    with torch_threads(1), _pool(ground, jobs) as pool:
        num_samples, loss, gradient = pool.mean("gradient", None)
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
            raise TaskError(
                f"the loss of task {ground.task.name!r} or its gradient is not finite here: there "
                "is no curvature to speak of"
            )
        padding = torch.ones(ground.layout.numel, dtype=torch.bool)
        for slot in ground.layout.slots:
            padding[slot.offset : slot.end] = False
        dimensions = int((~padding).sum())
        steps, done = min(steps, dimensions), 0

        def product(vector: Tensor) -> Tensor:
            nonlocal done
            image = pool.mean("hvp", vector)[2]
            done += 1
            progress(done, steps)
            return image

        progress(0, steps)
        try:
            spectrum = lanczos(
                product,
                ground.layout.numel,
                steps=steps,
                seed=ground.seed,
                dtype=ground.layout.dtype,
                padding=padding,
            )
        except ValueError as error:
            raise TaskError(f"the Hessian of task {ground.task.name!r}: {error}") from error
    squares = spectrum.lowest.square()
    return Curvature(
        num_samples=num_samples,
        loss=loss,
        gradient=float(gradient.norm()),
        relative_gradient=relative_gradient(ground.params.double(), gradient, loss),
        spectrum=spectrum,
        dimensions=dimensions,
        lowest={s.name: float(squares[s.offset : s.end].sum()) for s in ground.layout.slots},
    )


class _Here:
    """Answers in this process."""

    def __init__(self, ground: Ground) -> None:
        self._prober = Prober(ground)

    def mean(self, kind: Kind, vector: Tensor | None) -> tuple[int, float, Tensor]:
        """Return the samples, their mean loss and the mean of their rows, in float64."""
        return _mean(self._prober.answer(kind, range(self._prober.num_pieces), vector))


class _ProberActor:
    """A worker process."""

    def __init__(self, ground: Ground) -> None:
        torch.set_num_threads(1)
        self._ground = ground
        self._prober: Prober | None = None

    def num_pieces(self) -> int:
        if self._prober is None:  # not when it starts: Ray hides what a constructor raises
            self._prober = Prober(self._ground)
        return self._prober.num_pieces

    def answer(
        self, kind: Kind, numbers: Sequence[int], vector: Tensor | None
    ) -> list[tuple[int, float, Tensor]]:
        assert self._prober is not None
        return self._prober.answer(kind, numbers, vector)


class _There:
    """Answers by worker processes side by side."""

    def __init__(self, probers: Sequence[Any]) -> None:
        self._probers = probers
        self._pieces = self._get([prober.num_pieces.remote() for prober in probers])[0]

    def mean(self, kind: Kind, vector: Tensor | None) -> tuple[int, float, Tensor]:
        shared = None if vector is None else ray.put(vector)
        jobs = len(self._probers)
        shares = [range(self._pieces)[number::jobs] for number in range(jobs)]
        found = self._get(
            [p.answer.remote(kind, s, shared) for p, s in zip(self._probers, shares, strict=True)]
        )
        in_order = {
            number: answer
            for numbers, answers in zip(shares, found, strict=True)
            for number, answer in zip(numbers, answers, strict=True)
        }
        return _mean([in_order[number] for number in range(self._pieces)])

    def _get(self, refs: Sequence[Any]) -> list[Any]:
        try:
            return list(ray.get(list(refs)))
        except TaskError:
            raise
        except RayError as error:
            said = str(error).strip().partition("\n")[0]
            raise ResourceError(f"a worker that computed the Hessian was lost: {said}") from error


@contextmanager
def _pool(ground: Ground, jobs: int) -> Iterator[_Here | _There]:
    if jobs == 1:
        yield _Here(ground)
        return
    with ray_session(None, jobs):
        make: Any = ray.remote(num_cpus=1, max_restarts=0)(_ProberActor)
        shared = ray.put(ground)
        probers = [make.remote(shared) for _ in range(jobs)]
        try:
            yield _There(probers)
        finally:
            for prober in probers:
                ray.kill(prober)


def _mean(answers: Sequence[tuple[int, float, Tensor]]) -> tuple[int, float, Tensor]:
    total = sum(num for num, _, _ in answers)
    loss = sum(num * loss for num, loss, _ in answers) / total
    rows = sum(num * row[0].double() for num, _, row in answers)
    assert isinstance(rows, Tensor)
    return total, loss, rows / total
