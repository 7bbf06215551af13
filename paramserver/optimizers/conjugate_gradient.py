"""Conjugate gradients: for linear systems, and for losses that are not quadratic.

Linear, A x = b with A symmetric and positive definite, residual r and direction p:

    α = rᵀr / pᵀA p      x ← x + α p      r⁺ = r - α A p      p ← r⁺ + (r⁺ᵀr⁺ / rᵀr) p

In exact arithmetic it ends after as many steps as A has distinct eigenvalues.

Nonlinear, gradient g and direction d (Polak & Ribière's β, kept from below 0):

    d = -g + β d₋        t by strong Wolfe        x ← x + t d        β = max(0, g⁺ᵀ(g⁺ - g) / gᵀg)

It starts afresh (β = 0) after ``restart`` rounds, and where d does not point clearly downhill.

There is no form in which workers push and shards apply as they come: directions are conjugate only
with respect to one function, and noise in the gradients, by sampling or by staleness, makes it
impossible to keep them so (Schraudolph & Graepel, "Combining Conjugate Direction Methods with
Stochastic Approximation of Gradients", AISTATS 2003). In rounds all gradients of a round are those
of one sample at one point. With ``batch`` the sample differs from round to round, and β then
carries a direction from one to the next that is conjugate to neither; β itself is of one sample.

Sources: Hestenes & Stiefel, J. Res. NBS 49(6), 1952; Polak & Ribière, 1969, with the bound and the
descent test of Gilbert & Nocedal, SIAM J. Optim. 2(1), 1992.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from paramserver.optimizers.base import check_from_0
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
from paramserver.rounds import Request, Round, RoundProgram, Sample, Step, Sum, dots, finite

_CLEARLY_DOWNHILL = 0.01  # Gilbert & Nocedal's σ: dᵀg ≤ -σ gᵀg

Product: TypeAlias = Callable[[Tensor], Generator[Request, Any, Tensor]]
"""Makes the product of the matrix with a vector, own slices, shape ``(n,)``, asking as it needs."""


class End(enum.Enum):
    """Why `cg_solve` ended."""

    CONVERGED = "the residual is small enough"
    NEGATIVE_CURVATURE = "the matrix is not positive definite"
    MAX_ITERATIONS = "the iterations are used up"


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What `cg_solve` found."""

    x: Tensor
    """The solution so far, own slice, shape ``(n,)``."""
    residual: Tensor
    """b - A x, own slice, as the recursion has it."""
    residual_norm: float
    """Its 2-norm, over all slices."""
    iterations: int
    """Products with the matrix, but for the one that ``x0`` costs."""
    end: End
    direction: Tensor | None
    """With `End.NEGATIVE_CURVATURE`, a p with pᵀA p ≤ 0, own slice. Without ``x0``, bᵀp
    is above 0."""
    curvature: float | None
    """Its pᵀA p over all slices, 0 or less."""


def cg_solve(
    product: Product,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> Generator[Request, Any, Solution]:
    """Solve A x = b on slices; for ``yield from`` in a round program.

    Args:
        product: Multiplies by A, which is symmetric.
        b: Right-hand side, own slice, shape ``(n,)``. Not changed.
        x0: Where to start, own slice; None is 0 and saves one product.
        tolerance: Ends when the residual's 2-norm is at most this times that of ``b``.
        max_iterations: Products with A at most.

    Raises:
        CurvatureError: A product is NaN or infinite.
        ValueError: ``tolerance`` is below 0, or ``max_iterations`` is.
    """
    check_from_0("tolerance", tolerance)
    check_from_0("max_iterations", max_iterations)
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - (yield from product(x))
    rr, bb = (yield from dots((r, r), (b, b))).tolist()
    finite(rr, "the squared norm of the residual in conjugate gradients")
    goal = tolerance * tolerance * bb
    p, iterations = r, 0

    def solved(end: End, curvature: float | None = None) -> Solution:
        direction = None if curvature is None else p
        return Solution(x, r, math.sqrt(rr), iterations, end, direction, curvature)

    while rr > goal:
        if iterations >= max_iterations:
            return solved(End.MAX_ITERATIONS)
        ap = yield from product(p)
        iterations += 1
        (pap,) = (yield from dots((p, ap))).tolist()
        if finite(pap, "the curvature pᵀA p in conjugate gradients") <= 0:
            return solved(End.NEGATIVE_CURVATURE, pap)
        alpha = rr / pap
        x = x.add(p, alpha=alpha)
        r = r.sub(ap, alpha=alpha)
        last = rr
        (rr,) = (yield from dots((r, r))).tolist()
        finite(rr, "the squared norm of the residual in conjugate gradients")
        p = r.add(p, alpha=rr / last)
    return solved(End.CONVERGED)


def conjugate_gradient(
    matrix: Tensor | Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    x0: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
) -> Solution:
    """Solve A x = b in this process.

    Args:
        matrix: A, symmetric: shape ``(n, n)``, or a function that multiplies by it.
        b: Right-hand side, shape ``(n,)``, of the matrix's dtype.
        x0: Where to start; None is 0.
        tolerance: Ends when the residual's 2-norm is at most this times that of ``b``.
        max_iterations: Products with A at most; None is 10 n.

    Raises:
        CurvatureError: A product is NaN or infinite.
        ValueError: ``tolerance`` or ``max_iterations`` is below 0.
    """
    multiply = matrix.mv if isinstance(matrix, Tensor) else matrix

    def product(v: Tensor) -> Generator[Request, Any, Tensor]:
        yield from ()
        return multiply(v)

    most = 10 * len(b) if max_iterations is None else max_iterations
    solving = cg_solve(product, b, x0=x0, tolerance=tolerance, max_iterations=most)
    reply: Tensor | None = None
    while True:
        try:
            request = solving.send(reply)
        except StopIteration as ended:
            solution: Solution = ended.value
            return solution
        assert isinstance(request, Sum), "the product asks for nothing"
        reply = request.values


class ConjugateGradientProgram(RoundProgram):
    """Nonlinear conjugate gradients, Polak-Ribière+, with a strong Wolfe search.

    ``memory`` holds the last direction, β, the rounds since the last fresh start and, for the next
    first step, ``fall``, the last step times its first slope; and what `begin` uses.
    """

    def round(self, x: Tensor) -> Round:
        """Make one line search."""
        settings, memory = self.settings, self.memory
        on = Sample("gradient", settings["batch"])
        start = yield from begin(x, on, memory)
        if (stop := stop_at(start, settings["tolerance"], on)) is not None:
            return Step(x, start.loss, stop)

        g = start.gradient
        d, slope, since = -g, -start.square, 0
        if memory.get("since", 0) and memory["beta"] > 0:
            last: Tensor = memory["direction"]
            slope = (yield from dots((g, last)))[0].item() * memory["beta"] - start.square
            if slope <= -_CLEARLY_DOWNHILL * start.square:
                d, since = d.add(last, alpha=memory["beta"]), memory["since"]
            else:
                slope = -start.square
        first = first_step(start, settings["lr"])
        # The loss is to change by as much as it would have on the last line.
        if "fall" in memory and slope < 0:
            first = settings["lr"] * memory["fall"] / slope

        found, along_d = yield from search(start, d, slope, on=on, first=first, settings=settings)
        if isinstance(found, NotFound):
            return stay(start, found, on)
        if not along_d:
            d, slope, since = -g, -start.square, 0
        end = found.point
        across, own = (yield from _products(end.gradient, g, len(x))).tolist()
        since += 1
        every = settings["restart"] or round(own)

        memory["direction"] = d
        memory["beta"] = max(0.0, (end.square - across) / start.square)
        memory["since"] = since if since < every else 0
        memory["fall"] = found.step * slope
        remember(end, on, memory)
        return Step(end.x, start.loss, stop_at(end, settings["tolerance"], on))


def _products(g_new: Tensor, g: Tensor, n: int) -> Generator[Sum, Tensor, Tensor]:
    """Return g⁺ᵀg and the number of parameters, over all slices."""
    return (
        yield Sum(
            torch.stack(
                [
                    torch.dot(g_new.double(), g.double()),
                    torch.tensor(n, dtype=torch.float64, device=g.device),
                ]
            )
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConjugateGradient:
    """Steps along directions that do not undo one another; needs three vectors of memory."""

    lr: float = 1.0
    """Length of the first step tried, at most; later a factor on the step the last one suggests."""

    batch: int | None = None
    """Training samples of a round; None takes all. Conjugacy holds on one sample only."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0: where it is 0."""

    restart: int = 0
    """Rounds after which to start afresh from steepest descent; 0: as many as parameters."""

    c1: float = 1e-4
    """Least decrease, as a share of the tangent's; above 0 and below ``c2``."""

    c2: float = 0.1
    """Largest slope left, as a share of the first; below 0.5 keeps directions downhill."""

    max_evaluations: int = 25
    """Steps a line search tries at most."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        check_wolfe(self.c1, self.c2, self.max_evaluations)
        if self.restart < 0:
            raise ValueError(f"restart must be 0 rounds or more, got {self.restart}")

    def build(self, params: Sequence[nn.Parameter]) -> ConjugateGradientProgram:
        """Make the program for one flat parameter, the own slice."""
        return ConjugateGradientProgram(params, asdict(self))
