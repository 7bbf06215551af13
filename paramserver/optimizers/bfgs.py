"""BFGS: Newton's method with an inverse Hessian learnt from gradients.

With s the step, y the gradient's change over it and ρ = 1 / yᵀs:

    d = -H g      t by strong Wolfe      H ← (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ

H starts as I, made yᵀs / yᵀy times as large before the first update. A pair is left out where
yᵀs ≤ ε ‖s‖ ‖y‖: H would lose its positive definiteness to rounding. Both gradients of a pair are
of one round, so of one sample.

H takes n² numbers. On a quadratic with exact searches it is the inverse Hessian after n rounds.

Source: Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006: algorithm 6.1, (6.17), (6.20).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from paramserver.optimizers.base import check_below_1
from paramserver.optimizers.line_search import (
    NotFound,
    begin,
    check_search,
    check_wolfe,
    first_step,
    remember,
    search,
    stay,
    stop_at,
)
from paramserver.optimizers.push_form import PairRule, PushForm, first_direction, refuse_set
from paramserver.rounds import Round, RoundProgram, Sample, Step, check_holds, dots


class BFGSProgram(RoundProgram):
    """Dense BFGS with a strong Wolfe search.

    ``memory`` holds ``inverse``, H of shape ``(n, n)``, once there is a pair; and what
    `begin` uses.
    """

    whole: ClassVar[bool] = True

    def round(self, x: Tensor) -> Round:
        """Make one line search and one update of H."""
        settings, memory = self.settings, self.memory
        on = Sample("gradient", settings["batch"])
        start = yield from begin(x, on, memory)
        if (stop := stop_at(start, settings["tolerance"], on)) is not None:
            return Step(x, start.loss, stop)

        g = start.gradient
        inverse: Tensor | None = memory.get("inverse")
        if inverse is None:
            d, slope, first = -g, -start.square, first_step(start, settings["lr"])
        else:
            d, first = -(inverse @ g), settings["lr"]
            (slope,) = (yield from dots((g, d))).tolist()
        found, along_d = yield from search(start, d, slope, on=on, first=first, settings=settings)
        if isinstance(found, NotFound):
            return stay(start, found, on)
        if not along_d:
            inverse = None
        end = found.point
        s, y = end.x - x, end.gradient - g
        sy, ss, yy = (yield from dots((s, y), (s, s), (y, y))).tolist()

        if sy > settings["min_curvature"] * math.sqrt(ss * yy):
            if inverse is None:
                inverse = first_inverse(s, sy / yy if settings["scale"] else 1.0)
            inverse = updated(inverse, s, y, sy)
        if inverse is None:
            memory.pop("inverse", None)
        else:
            memory["inverse"] = inverse
        remember(end, on, memory)
        return Step(end.x, start.loss, stop_at(end, settings["tolerance"], on))


class BFGSPushRule(PairRule):
    """Dense BFGS from pairs that workers made; ``memory`` holds ``inverse``."""

    def learn(self, s: Tensor, y: Tensor, sy: float, yy: float) -> None:
        """Update H."""
        inverse: Tensor | None = self.memory.get("inverse")
        if inverse is None:
            inverse = first_inverse(s, sy / yy if self.settings["scale"] else 1.0)
        self.memory["inverse"] = updated(inverse, s, y, sy)

    def direction(self, g: Tensor) -> Tensor:
        """Return -H g."""
        inverse: Tensor | None = self.memory.get("inverse")
        return first_direction(g) if inverse is None else -(inverse @ g)


def first_inverse(like: Tensor, scale: float) -> Tensor:
    """Return ``scale`` times the identity, for a vector ``like`` this one."""
    return scale * torch.eye(len(like), dtype=like.dtype, device=like.device)


def updated(inverse: Tensor, s: Tensor, y: Tensor, sy: float) -> Tensor:
    """Return (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ in n² operations, with ρ = 1 / sᵀy.

    Args:
        inverse: H, symmetric, shape ``(n, n)``. Not changed.
        s: The step, shape ``(n,)``.
        y: The gradient's change, shape ``(n,)``.
        sy: Their dot product, above 0.
    """
    hy = inverse @ y
    # -ρ (s hyᵀ + hy sᵀ) + (ρ + ρ² yᵀH y) s sᵀ = s uᵀ + u sᵀ, exactly symmetric
    u = hy.mul(-1 / sy).add(s, alpha=0.5 * (1 / sy + torch.dot(y, hy).item() / sy / sy))
    half = torch.outer(s, u)
    return inverse + (half + half.T)


@dataclass(frozen=True, slots=True, kw_only=True)
class BFGS:
    """Quasi-Newton steps with the whole inverse Hessian, learnt from gradients; small models."""

    lr: float = 1.0
    """First step a line search tries, or the step of a push; 1 is Newton's own."""

    batch: int | None = None
    """Training samples of a round or a push; None takes all, or the worker's share of all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0: where it is 0."""

    scale: bool = True
    """Whether H starts with the size of the first pair; False starts it as the identity."""

    min_curvature: float = 1e-8
    """ε: pairs need a yᵀs above this share of ‖s‖ ‖y‖; 0 to below 1."""

    c1: float = 1e-4
    """Least decrease, as a share of the tangent's; above 0 and below ``c2``."""

    c2: float = 0.9
    """Largest slope left, as a share of the first; below 1."""

    max_evaluations: int = 25
    """Steps a line search tries at most."""

    limit: int = 5000
    """Parameters it takes at most; H takes 8 bytes times their square in float64."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        check_below_1("min_curvature", self.min_curvature)
        check_wolfe(self.c1, self.c2, self.max_evaluations)
        if self.limit < 1:
            raise ValueError(f"limit must be 1 parameter or more, got {self.limit}")

    def build(self, params: Sequence[nn.Parameter]) -> BFGSProgram:
        """Make the program for one flat parameter, the whole vector.

        Raises:
            LayoutError: It has more than ``limit`` elements.
        """
        check_holds("bfgs", sum(p.numel() for p in params), self.limit, "lbfgs")
        return BFGSProgram(params, asdict(self))

    def pushes(self) -> PushForm:
        """Return the form in which workers push gradients and pairs, and no line is searched.

        Raises:
            ValueError: A key is set that only rounds have.
        """
        refuse_set("bfgs", self, ("tolerance", "c1", "c2", "max_evaluations"))
        return PushForm(name="bfgs", spec=self, rule=BFGSPushRule, work="pair", whole=True)
