"""Krylov subspace descent: the best step among those that a few curvature products span.

Each round draws three samples. With gradient g from the first, curvature matrix H from the second
and, if wanted, D the Fisher matrix's diagonal with a floor (otherwise D = I):

    V   ← an orthonormal basis of  D⁻¹g, D⁻¹H D⁻¹g, …, (D⁻¹H)ᴷ⁻¹ D⁻¹g  and the previous step
    c   ← min f(x + V c) on the third sample, by BFGS from c = 0
    x   ← x + V c

The search evaluates the loss itself, so it needs no damping, and H may have negative eigenvalues.
Vectors stay in slices: the basis takes dot products only, and so does the gradient within the
subspace, Vᵀ∇f. VᵀHV takes a few more of them; BFGS starts from its inverse, eigenvalues made
positive, so that on a quadratic its first step is its last.

Source: Vinyals & Povey, "Krylov Subspace Descent for Deep Learning", AISTATS 2012, PMLR 22:1261.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paramserver.errors import CurvatureError
from paramserver.optimizers.bfgs import updated
from paramserver.optimizers.line_search import (
    NotFound,
    Point,
    begin,
    check_search,
    evaluate,
    remember,
    stop_at,
    strong_wolfe,
)
from paramserver.optimizers.newton import check_count, check_curvature, check_share
from paramserver.rounds import (
    Ask,
    Kind,
    Request,
    Round,
    RoundProgram,
    Sample,
    Step,
    Sum,
    Sums,
    dots,
    finite,
)


class KrylovProgram(RoundProgram):
    """Builds the subspace and searches it, on slices.

    ``memory`` holds ``step``, the previous step; and what `begin` uses.
    """

    def round(self, x: Tensor) -> Round:
        """Make one step from ``x``, own slice, shape ``(n,)``.

        Raises:
            CurvatureError: A loss, a gradient or a product that was asked for is not finite.
        """
        settings, memory = self.settings, self.memory
        on = Sample("gradient", settings["batch"])
        search_on = Sample("search", settings["search_batch"])
        start = yield from begin(x, on, memory)
        if (stop := stop_at(start, settings["tolerance"], on)) is not None:
            return Step(x, start.loss, stop)

        space = yield from self._subspace(x, start.gradient)
        if not space.basis:
            return Step(x, start.loss)
        alike = on.size is None and search_on.size is None  # both samples are all there are
        origin = start
        if not alike:
            origin = yield from evaluate(x, search_on)
            finite(origin.loss, "the loss of the search sample")
            finite(origin.square, "the squared norm of the search sample's gradient")
        end, c = yield from search_within(
            space, origin, on=search_on, first=settings["lr"], max_steps=settings["search_steps"]
        )
        if isinstance(end, NotFound):
            sizes = (settings[k] for k in ("batch", "curvature_batch", "search_batch"))
            repeats = all(size is None for size in sizes)  # the next round would be the same
            return Step(x, start.loss, f"in the Krylov space, {end}" if repeats else None)

        memory["step"] = space.combine(c)
        if alike:
            remember(end, on, memory)
            stop = stop_at(end, settings["tolerance"], on)
        return Step(end.x, start.loss, stop)

    def _subspace(self, x: Tensor, g: Tensor) -> Generator[Request, Any, Subspace]:
        """Return the span of the Krylov vectors and of the previous step."""
        settings = self.settings
        on = Sample("curvature", settings["curvature_batch"])
        kind: Kind = "ggnvp" if settings["curvature"] == "gauss-newton" else "hvp"
        scale = torch.ones_like(g)
        if settings["precondition"]:
            answer = yield Ask("fisher_diagonal", x, on)
            scale = (yield from floored(answer.vector, floor=settings["floor"])).reciprocal()

        def ask(v: Tensor) -> Ask:
            return Ask(kind, x, on, v)

        space = Subspace()
        vector = g
        for _ in range(settings["vectors"]):
            product = yield from space.extend(vector * scale, ask)
            if product is None:  # the Krylov space ends here
                break
            vector = product
        if "step" in self.memory:
            yield from space.extend(self.memory["step"], ask)
        return space


def search_within(
    space: Subspace, start: Point, *, on: Sample, first: float, max_steps: int
) -> Generator[Request, Any, tuple[Point | NotFound, Tensor]]:
    """Minimise the loss over ``start.x`` + V c by BFGS on the coefficients c, from 0.

    Args:
        space: V and VᵀHV.
        start: Where c = 0; loss and gradient are finite.
        on: The sample of ``start`` and of every trial.
        first: The first step that each line search tries.
        max_steps: Line searches at most.

    Returns:
        The lowest point, or `NotFound` if the first line search found none; and its c, float64.
    """
    here, g = start, (yield from space.project(start.gradient))
    goal = 1e-4 * float(g.norm())
    c = torch.zeros_like(g)
    inverse = positive_inverse(space.curvature(), floor=math.sqrt(torch.finfo(start.x.dtype).eps))
    for _ in range(max_steps):
        if float(g.norm()) <= goal:
            break
        d = -(inverse @ g)
        found = yield from strong_wolfe(here, space.combine(d), float(g @ d), on=on, first=first)
        if isinstance(found, NotFound):
            return (found if here is start else here), c
        here, last = found.point, g
        g = yield from space.project(here.gradient)
        s, y = found.step * d, g - last
        c = c + s
        if (sy := float(s @ y)) > 1e-8 * float(s.norm() * y.norm()):
            inverse = updated(inverse, s, y, sy)
    return here, c


class Subspace:
    """An orthonormal basis V in own slices, and what is known of the curvature within."""

    def __init__(self) -> None:
        self.basis: list[Tensor] = []
        """The columns of V, own slices."""
        self._columns: list[Tensor] = []  # of VᵀHV, down to the diagonal

    def extend(
        self, vector: Tensor, ask: Callable[[Tensor], Ask]
    ) -> Generator[Request, Any, Tensor | None]:
        """Add the direction of ``vector`` that is new.

        Args:
            vector: Any vector, own slice; not changed.
            ask: Makes the request for H times a vector.

        Returns:
            H times the new column of V, or None if there is nothing new to within rounding.

        Raises:
            CurvatureError: The vector or the product is not finite.
        """
        v = vector.clone()
        squares = [float((yield from dots((v, v))))]
        for _ in range(2):  # rounding leaves some of the old directions after one pass
            if self.basis:
                for u, share in zip(self.basis, (yield from self.project(v)).tolist(), strict=True):
                    v.sub_(u, alpha=share)
            squares.append(float((yield from dots((v, v)))))
        before, _, after = squares
        finite(before, "the squared norm of a vector of the Krylov space")
        if after <= before * torch.finfo(v.dtype).eps ** (4 / 3):
            return None
        v.div_(math.sqrt(after))
        self.basis.append(v)
        product: Tensor = (yield ask(v)).vector
        column = yield from self.project(product)
        finite(float(column.sum()), "a curvature product within the Krylov space")
        self._columns.append(column)
        return product

    def curvature(self) -> Tensor:
        """Return VᵀHV, float64, shape ``(k, k)``; H is taken to be symmetric."""
        k = len(self._columns)
        h = self._columns[0].new_zeros(k, k)
        for i, column in enumerate(self._columns):
            h[: i + 1, i] = h[i, : i + 1] = column
        return h

    def project(self, vector: Tensor) -> Sums:
        """Return Vᵀ times ``vector``, float64, shape ``(k,)``."""
        return dots(*((u, vector) for u in self.basis))

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return V times ``coefficients``, own slice."""
        out = torch.zeros_like(self.basis[0])
        for u, c in zip(self.basis, coefficients.tolist(), strict=True):
            out.add_(u, alpha=c)
        return out


def positive_inverse(h: Tensor, *, floor: float) -> Tensor:
    """Return the inverse of a symmetric matrix whose eigenvalues were made positive.

    Args:
        h: The matrix, float64, shape ``(k, k)``.
        floor: The least size of an eigenvalue, as a share of the largest; a matrix of zeros counts
            as the identity.
    """
    values, vectors = torch.linalg.eigh(h)
    sizes = values.abs()
    largest = float(sizes.max())
    sizes = sizes.clamp(min=floor * largest) if largest > 0 else torch.ones_like(sizes)
    inverse: Tensor = (vectors / sizes) @ vectors.T
    return inverse


def floored(diagonal: Tensor, *, floor: float) -> Generator[Request, Any, Tensor]:
    """Return ``diagonal``, own slice, with no element below ``floor`` times the mean.

    The mean is that of the elements above 0 of all slices: padding does not count.

    Raises:
        CurvatureError: An element is not finite, or none is above 0.
    """
    shares = torch.stack([diagonal.double().sum(), (diagonal > 0).double().sum()])
    total, count = (yield Sum(shares)).tolist()
    if not 0 < total < math.inf:
        raise CurvatureError("the trace of the Fisher matrix", total)
    return diagonal.clamp(min=floor * total / count)


@dataclass(frozen=True, slots=True, kw_only=True)
class KrylovSubspaceDescent:
    """Searches the span of a few curvature products and the previous step; any model, no damping.

    It takes ``vectors`` + 2 times the model's memory.
    """

    lr: float = 1.0
    """First step that each line search in the subspace tries; 1 is Newton's own."""

    vectors: int = 20
    """K, the Krylov vectors at most; each costs a curvature product, and so does the last step."""

    curvature: Literal["hessian", "gauss-newton"] = "gauss-newton"
    """The matrix H: the Hessian, or the generalised Gauss-Newton matrix."""

    precondition: bool = False
    """Whether to divide the Krylov vectors by the Fisher matrix's diagonal D."""

    floor: float = 0.01
    """Least element of D, as a share of the mean of those above 0; above 0, 1 at most. (The paper
    takes a share of the largest.)"""

    search_steps: int = 10
    """Line searches in the subspace at most, each one evaluation or more."""

    batch: int | None = None
    """Training samples of a round, for the gradient; None takes all."""

    curvature_batch: int | None = None
    """Training samples of a round, for H and D; None takes all."""

    search_batch: int | None = None
    """Training samples of a round, for the search; None takes all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0 never."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        check_count("vectors", self.vectors)
        check_curvature(self.curvature)
        check_share("floor", self.floor)
        check_count("search_steps", self.search_steps)
        check_count("curvature_batch", self.curvature_batch)
        check_count("search_batch", self.search_batch)

    def build(self, params: Sequence[nn.Parameter]) -> KrylovProgram:
        """Make the program for one flat parameter, the own slice."""
        return KrylovProgram(params, asdict(self))
