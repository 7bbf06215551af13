"""Push forms of round programs: each worker pushes what the rule needs, and none waits for others.

A round program sums over all workers before it moves. In its push form a worker computes on samples
of its own, at the parameters it has read, and pushes several rows of numbers instead of a gradient:

    block            where the coordinates of its block go, and where they were read
    pair             g, and s and y between the last two points it read, on one sample
    hessian          H, g and x
    fisher_diagonal  g, and the diagonal of the Fisher matrix
    fisher           g, and the Fisher matrix

What staleness does to each is told where its rule is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from paramserver.lean import FlatOptimizer
from paramserver.optimizers.base import PushRule

Work = Literal["block", "pair", "hessian", "fisher_diagonal", "fisher"]
"""What a worker computes for one push."""


class Place(NamedTuple):
    """Where a rule's slice lies, and for how many it works."""

    cut: range
    """The slice's range of the whole vector."""
    numel: int
    """Elements of the whole vector."""
    num_workers: int


class PushedRule(PushRule, FlatOptimizer):
    """One update for each push of several rows; it knows whose they are."""

    elementwise: ClassVar[bool] = False

    def __init__(
        self, params: Sequence[nn.Parameter], settings: dict[str, Any], place: Place
    ) -> None:
        super().__init__(params, settings)
        self.place = place
        self.worker = self.clock = self.samples = 0

    def came_from(self, worker: int, clock: int, samples: int) -> None:
        """Keep whose push `apply` is called with next, which it is, and of how many samples."""
        self.worker, self.clock, self.samples = worker, clock, samples

    def touches(self) -> bool:
        """Whether the push that comes changes this slice."""
        return True

    def apply(self, grads: Sequence[Tensor], scale: float = 1.0) -> None:
        """Take one step on the rows that are in ``grads``, one flat tensor of ``k * n`` numbers.

        Args:
            grads: The rows.
            scale: Factor on the step, above 0.

        Raises:
            CurvatureError: There is no step from them; parameters and state are as they were.
        """
        (rows,) = grads
        x = self._param.data
        with torch.no_grad():
            self.update(x, rows.view(-1, len(x)), scale)
        self._opt_called = True  # a scheduler warns of updates that it thinks are missing

    @abstractmethod
    def update(self, x: Tensor, rows: Tensor, scale: float) -> None:
        """Change ``x``, own slice, shape ``(n,)``, by a step made ``scale`` times as long.

        Args:
            x: The parameters.
            rows: What was pushed, shape ``(k, n)``; not to be kept.
            scale: The damping's.
        """


class PairRule(PushedRule):
    """Quasi-Newton steps; pairs are made by a worker, on one sample, of points it has really read.

    Differences of pushed gradients would be of different samples, and of different points than the
    server thinks: their curvature is mostly noise. Staleness leaves these pairs exact, and only the
    gradient is old.
    """

    def update(self, x: Tensor, rows: Tensor, scale: float) -> None:
        """Learn from the pair, if it has curvature, and step along the new direction."""
        g, s, y = rows
        wide = rows[1:].double()  # the curvature test is far below float32's rounding
        (ss, sy), (_, yy) = (wide @ wide.T).tolist()
        if sy > self.settings["min_curvature"] * math.sqrt(ss * yy):
            self.learn(s, y, sy, yy)
        x.add_(self.direction(g), alpha=scale * self.settings["lr"])

    @abstractmethod
    def learn(self, s: Tensor, y: Tensor, sy: float, yy: float) -> None:
        """Take up a pair; ``sy`` and ``yy`` are its dot products, above 0."""

    @abstractmethod
    def direction(self, g: Tensor) -> Tensor:
        """Return -H g, a new tensor; before the first pair, -g at most 1 long."""


def first_direction(g: Tensor) -> Tensor:
    """Return -g, at most 1 long: nothing is known of the curvature yet."""
    return -g / max(1.0, float(torch.linalg.vector_norm(g)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PushForm:
    """A round program's push form: what workers compute, and the rule that takes it."""

    name: str
    """The optimizer's."""
    spec: Any
    """Its configuration: ``lr``, ``batch`` and ``build``, and the keys that ``work`` needs."""
    rule: type[PushedRule]
    work: Work
    whole: bool = False
    """Whether the rule needs the whole vector in one place."""
    place: Place | None = None
    """Where the shard that builds the rule is; None is alone."""

    @property
    def lr(self) -> float:
        """The configuration's learning rate."""
        lr: float = self.spec.lr
        return lr

    def num_rows(self, numel: int) -> int:
        """Return the rows of a push for a vector of ``numel``."""
        return {
            "block": 2,
            "pair": 3,
            "hessian": numel + 2,
            "fisher_diagonal": 2,
            "fisher": numel + 1,
        }[self.work]

    def build(self, params: Sequence[nn.Parameter]) -> PushedRule:
        """Make the rule for one flat parameter, the own slice.

        Raises:
            LayoutError: It has more elements than the optimizer can hold.
        """
        self.spec.build(params)  # refuses what is too large
        numel = sum(p.numel() for p in params)
        return self.rule(params, asdict(self.spec), self.place or Place(range(numel), numel, 1))


def refuse_set(name: str, spec: Any, keys: Sequence[str]) -> None:
    """Raise ValueError if one of ``keys``, which only rounds use, is not as it is by default."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in keys and value != field.default:
            raise ValueError(
                f"{name}: {field.name}={value} is for rounds, and workers that push by themselves "
                f"have none: leave it out, or use rule pieces"
            )
