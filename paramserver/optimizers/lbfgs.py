"""L-BFGS on slices: BFGS from the last few pairs, with one reduction a round for the direction.

With the last k steps s₁ … s_k and the gradient's changes over them y₁ … y_k, the two-loop recursion
makes d = -H g out of the 2k + 1 vectors s, y and g, and needs only dot products among them. So the
owners of slices sum one matrix of dot products, run the recursion on 2k + 1 coefficients, all with
the same numbers, and each forms its own slice of d.

A pair is left out where yᵀs ≤ ε ‖s‖ ‖y‖. Both gradients of a pair are of one round, so of one
sample: with ``batch``, y is never the difference between two samples.

Sources: Liu & Nocedal, Math. Programming 45, 1989; Chen, Wang & Zhou, "Large-scale L-BFGS using
MapReduce", NIPS 2014. Pushes: Schraudolph, Yu & Günter, "A Stochastic Quasi-Newton Method for
Online Convex Optimization", AISTATS 2007.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
from paramserver.rounds import Round, RoundProgram, Sample, Step, dots, gram


class LBFGSProgram(RoundProgram):
    """Vector-free L-BFGS with a strong Wolfe search.

    ``memory`` holds the pairs, oldest first, as ``steps`` and ``changes`` of shape ``(k, n)``, once
    there are any; and what `begin` uses.
    """

    def round(self, x: Tensor) -> Round:
        """Make one line search and keep one pair."""
        settings, memory = self.settings, self.memory
        on = Sample("gradient", settings["batch"])
        start = yield from begin(x, on, memory)
        if (stop := stop_at(start, settings["tolerance"], on)) is not None:
            return Step(x, start.loss, stop)

        g = start.gradient
        none = x.new_empty(0, len(x))
        steps: Tensor = memory.get("steps", none)
        changes: Tensor = memory.get("changes", none)
        if len(steps):
            products = yield from gram([*steps, *changes, g])
            c = coefficients(products)
            d = combined(c, steps, changes, g)
            slope, first = torch.dot(c, products[-1]).item(), settings["lr"]
        else:
            d, slope, first = -g, -start.square, first_step(start, settings["lr"])
        found, along_d = yield from search(start, d, slope, on=on, first=first, settings=settings)
        if isinstance(found, NotFound):
            return stay(start, found, on)
        if not along_d:
            steps = changes = none
        end = found.point
        s, y = end.x - x, end.gradient - g
        sy, ss, yy = (yield from dots((s, y), (s, s), (y, y))).tolist()

        if sy > settings["min_curvature"] * math.sqrt(ss * yy):
            oldest = max(0, len(steps) + 1 - settings["history"])
            steps = torch.cat([steps[oldest:], s[None]])
            changes = torch.cat([changes[oldest:], y[None]])
        if len(steps):
            memory.update(steps=steps, changes=changes)
        else:
            memory.pop("steps", None)
            memory.pop("changes", None)
        remember(end, on, memory)
        return Step(end.x, start.loss, stop_at(end, settings["tolerance"], on))


def coefficients(products: Tensor) -> Tensor:
    """Return the coefficients of d = -H g over s₁ … s_k, y₁ … y_k and g: the two-loop recursion.

    Args:
        products: Their dot products, shape ``(2k + 1, 2k + 1)`` with k of 1 or more; each sᵢᵀyᵢ
            is above 0.
    """
    b = products.tolist()
    k = len(b) // 2
    c = [0.0] * (2 * k) + [-1.0]

    def dot(i: int) -> float:
        return math.fsum(cj * row[i] for cj, row in zip(c, b, strict=True))

    alpha = [0.0] * k
    for i in reversed(range(k)):
        alpha[i] = dot(i) / b[i][k + i]
        c[k + i] -= alpha[i]
    scale = b[k - 1][2 * k - 1] / b[2 * k - 1][2 * k - 1]
    c = [scale * cj for cj in c]
    for i in range(k):
        beta = dot(k + i) / b[i][k + i]
        c[i] += alpha[i] - beta
    return products.new_tensor(c)


class LBFGSPushRule(PairRule):
    """L-BFGS from pairs that workers made; ``memory`` as that of `LBFGSProgram`."""

    def learn(self, s: Tensor, y: Tensor, sy: float, yy: float) -> None:
        """Keep the pair, and forget the oldest of too many."""
        for name, new in (("steps", s), ("changes", y)):
            kept = self.memory.get(name, new.new_empty(0, len(new)))
            oldest = max(0, len(kept) + 1 - self.settings["history"])
            self.memory[name] = torch.cat([kept[oldest:], new[None]])

    def direction(self, g: Tensor) -> Tensor:
        """Return -H g by the two-loop recursion."""
        if "steps" not in self.memory:
            return first_direction(g)
        steps, changes = self.memory["steps"], self.memory["changes"]
        vectors = torch.cat([steps, changes, g[None]]).double()
        return combined(coefficients(vectors @ vectors.T), steps, changes, g)


def combined(c: Tensor, steps: Tensor, changes: Tensor, g: Tensor) -> Tensor:
    """Return the own slice of the sum of s, y and g, each times its coefficient in ``c``."""
    k = len(steps)
    c = c.to(g)
    return (c[:k] @ steps).add_(c[k : 2 * k] @ changes).add_(g * c[2 * k])


@dataclass(frozen=True, slots=True, kw_only=True)
class LBFGS:
    """Quasi-Newton steps from the last few gradients; works on any number of parameters."""

    lr: float = 1.0
    """First step a line search tries, or the step of a push; 1 is Newton's own."""

    batch: int | None = None
    """Training samples of a round or a push; None takes all, or the worker's share of all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0: where it is 0."""

    history: int = 10
    """Pairs kept, 1 or more; each takes two vectors."""

    min_curvature: float = 1e-8
    """ε: pairs need a yᵀs above this share of ‖s‖ ‖y‖; 0 to below 1."""

    c1: float = 1e-4
    """Least decrease, as a share of the tangent's; above 0 and below ``c2``."""

    c2: float = 0.9
    """Largest slope left, as a share of the first; below 1."""

    max_evaluations: int = 25
    """Steps a line search tries at most."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        if self.history < 1:
            raise ValueError(f"history must be 1 pair or more, got {self.history}")
        check_below_1("min_curvature", self.min_curvature)
        check_wolfe(self.c1, self.c2, self.max_evaluations)

    def build(self, params: Sequence[nn.Parameter]) -> LBFGSProgram:
        """Make the program for one flat parameter, the own slice."""
        return LBFGSProgram(params, asdict(self))

    def pushes(self) -> PushForm:
        """Return the form in which workers push gradients and pairs, and no line is searched.

        Raises:
            ValueError: A key is set that only rounds have.
        """
        refuse_set("lbfgs", self, ("tolerance", "c1", "c2", "max_evaluations"))
        return PushForm(name="lbfgs", spec=self, rule=LBFGSPushRule, work="pair", whole=True)
