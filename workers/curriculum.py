"""Curriculum learning: easy samples first, harder ones as the run goes on.

    a worker's samples, easy to hard    a b c d e f g h
    pace .25 at version 0               a b                 drawn: b a a b …
    pace .5 at version 500              a b c d             drawn: d a c b …
    pace 1 from version 1000 on         all                 drawn as without a curriculum

The pace follows the parameters' version, so workers of an asynchronous run keep step however fast
each is. What is drawn is a function of (seed, worker, clock, version) alone. Each batch is the one
a run without curriculum reads, with every sample that is still too hard replaced by the one at
``place * n // size`` of the ``n`` easiest; so each of those comes up equally often, and at pace 1
the batches are those without a curriculum, bit for bit.

Sources: Bengio et al., "Curriculum Learning", ICML 2009; Hacohen & Weinshall, "On The Power of
Curriculum Learning in Training Deep Networks", ICML 2019, arXiv:1904.03626 (fixed exponential
pacing, scoring by the model's own loss, harder first and no order as controls); Platanios et al.,
NAACL 2019, arXiv:1903.09848 (linear and root pacing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from paramserver.registry import Registry

Order = Literal["easy", "hard", "none"]
"""Which samples come first: ``hard`` and ``none`` are for comparison."""


class Pacing(Protocol):
    """How much of the training data is drawn from, by version."""

    @property
    def order(self) -> Order:
        """Which samples come first."""

    def share(self, version: int) -> float:
        """Return the share of a worker's samples drawn from at ``version``, above 0, at most 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """The share grows by the same amount with each update."""

    start: float = 0.2
    """Share at version 0, above 0, at most 1."""

    over: int = 1000
    """Updates until all samples are drawn from, 1 or more."""

    order: Order = "easy"
    """What comes first: easy, hard, or none in particular."""

    def __post_init__(self) -> None:
        _check(self)

    def share(self, version: int) -> float:
        """Return ``start + (1 - start) version / over``."""
        return min(1.0, self.start + (1 - self.start) * version / self.over)


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """The share's square grows by the same amount: new samples come fast at first, then slower."""

    start: float = 0.2
    """Share at version 0, above 0, at most 1."""

    over: int = 1000
    """Updates until all samples are drawn from, 1 or more."""

    order: Order = "easy"
    """What comes first: easy, hard, or none in particular."""

    def __post_init__(self) -> None:
        _check(self)

    def share(self, version: int) -> float:
        """Return the root of ``start² + (1 - start²) version / over``."""
        square = self.start**2
        return min(1.0, math.sqrt(square + (1 - square) * version / self.over))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The share is multiplied now and then, after equally many updates each time."""

    start: float = 0.2
    """Share at version 0, above 0, at most 1."""

    over: int = 1000
    """Updates until all samples are drawn from, 1 or more."""

    factor: float = 1.9
    """What the share is multiplied by, above 1."""

    order: Order = "easy"
    """What comes first: easy, hard, or none in particular."""

    def __post_init__(self) -> None:
        _check(self)
        if not 1 < self.factor < math.inf:
            raise ValueError(f"factor must be above 1, got {self.factor}")

    def share(self, version: int) -> float:
        """Return ``start * factor ** (version // length)`` with ``over`` the end of the last."""
        number = math.ceil(math.log(1 / self.start) / math.log(self.factor))
        if version >= self.over or number == 0:
            return 1.0
        return min(1.0, self.start * self.factor ** (version * number // self.over))


PACINGS: Registry[Pacing] = Registry("curriculum")
PACINGS.register("linear", Linear, source="Platanios et al. 2019, arXiv:1903.09848")
PACINGS.register("root", Root, source="Platanios et al. 2019, arXiv:1903.09848")
PACINGS.register("steps", Steps, source="Hacohen & Weinshall 2019, arXiv:1904.03626")


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """A pacing, and the order it goes through the training data in."""

    pacing: Pacing
    places: Tensor
    """Each training sample's place, first to last, int64 of shape ``(num_train,)``."""


class Lessons:
    """What one worker reads of the samples it owns."""

    def __init__(self, course: Course, part: Tensor) -> None:
        """Order ``part``, the indices the worker owns, int64."""
        self._share = course.pacing.share
        by_place = torch.argsort(course.places[part])
        self._ordered = part[by_place]
        self._sorted, by_index = part.sort()
        own_place = torch.empty_like(by_place)
        own_place[by_place] = torch.arange(len(part))
        self._places = own_place[by_index]  # of each of _sorted

    def drawn(self, indices: Tensor, version: int) -> Tensor:
        """Return what is read at ``version`` for ``indices``, all of them the worker's."""
        share, size = self._share(version), len(self._ordered)
        if share >= 1:
            return indices
        num_easy = math.ceil(share * size)
        places = self._places[torch.searchsorted(self._sorted, indices)]
        return self._ordered[places * num_easy // size]


def _check(pacing: Any) -> None:
    if not 0 < pacing.start <= 1:
        raise ValueError(f"start must be above 0 and at most 1, got {pacing.start}")
    if pacing.over < 1:
        raise ValueError(f"over must be 1 update or more, got {pacing.over}")
    if pacing.order not in get_args(Order):
        raise ValueError(f"order must be {', '.join(get_args(Order))}, got {pacing.order!r}")
