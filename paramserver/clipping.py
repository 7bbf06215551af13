"""Gradient clipping, one slice at a time.

Whoever has the whole gradient measures its L2 norm once, before anything is cut, and the norm
travels with every slice. Clipping the slices is then the same as clipping the whole, and shards
have nothing to ask each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from paramserver.registry import Registry

Where = Literal["auto", "worker", "reduced"]
"""Which gradient is clipped: each worker's own, or the reduced one (their mean) before the step.
``auto`` is the one that is applied: the worker's in asynchronous runs, the reduced one else."""


class Clip(Protocol):
    """A way to bound a gradient."""

    @property
    def where(self) -> Where:
        """Which gradient is clipped."""

    @property
    def norm_needed(self) -> bool:
        """Whether `apply_` reads ``norm``; if not, nobody need measure it."""

    def apply_(self, grad: Tensor, norm: float) -> None:
        """Clip ``grad`` in place.

        Args:
            grad: A flat gradient or any slice of one.
            norm: L2 norm of the whole gradient, 0 or more.

        Raises:
            ValueError: ``norm`` is needed and is negative or not finite; ``grad`` is untouched.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipValue:
    """Keep every element between two bounds: g = min(high, max(low, g))."""

    low: float
    """Lower bound, 0 or less; -inf for none."""

    high: float
    """Upper bound, 0 or more; inf for none."""

    where: Where = "auto"
    """Which gradient is clipped: auto, worker or reduced."""

    norm_needed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.low <= 0:
            raise ValueError(f"low must be 0 or less, got {self.low}")
        if not self.high >= 0:
            raise ValueError(f"high must be 0 or more, got {self.high}")
        if self.low == self.high:
            raise ValueError("low and high must not both be 0: no gradient would be left")
        _check_where(self.where)

    def apply_(self, grad: Tensor, norm: float) -> None:
        """Clip ``grad`` in place; ``norm`` is not read."""
        grad.clamp_(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipNorm:
    """Bound the length of the whole gradient, and keep its direction."""

    max_norm: float
    """Length to shorten to, above 0."""

    mode: Literal["clip", "normalize"] = "clip"
    """``clip`` shortens longer gradients only: g * min(1, max_norm / norm). ``normalize`` gives
    every gradient but zero that length, shorter ones too: g * max_norm / norm."""

    where: Where = "auto"
    """Which gradient is clipped: auto, worker or reduced."""

    norm_needed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm must be above 0, got {self.max_norm}")
        if self.mode not in ("clip", "normalize"):
            raise ValueError(f"mode must be 'clip' or 'normalize', got {self.mode!r}")
        _check_where(self.where)

    def apply_(self, grad: Tensor, norm: float) -> None:
        """Scale ``grad`` in place by what ``norm`` asks for.

        Raises:
            ValueError: ``norm`` is negative or not finite; ``grad`` is untouched.
        """
        if not 0 <= norm < math.inf:
            raise ValueError(f"norm must be finite and 0 or more, got {norm}")
        if norm > self.max_norm:
            grad.mul_(self.max_norm / norm)
        elif self.mode == "normalize" and norm > 0:
            grad.div_(norm).mul_(self.max_norm)  # max_norm / norm may exceed float32's range


CLIPS: Registry[Clip] = Registry("clip")
CLIPS.register("value", ClipValue, source="Mikolov, PhD thesis, Brno 2012")
CLIPS.register("norm", ClipNorm, source="Pascanu, Mikolov & Bengio, ICML 2013, arXiv:1211.5063")


def _check_where(where: Where) -> None:
    if where not in ("auto", "worker", "reduced"):
        raise ValueError(f"where must be 'auto', 'worker' or 'reduced', got {where!r}")
