"""Newton's method: the step to the bottom of the quadratic that fits where one stands.

With gradient g, Hessian H, damping λ and learning rate η:

    Newton             d = -(H + λI)⁻¹ g      λ grows until H + λI is positive definite
    NewtonCG           d ≈ -(H + λI)⁻¹ g      by conjugate gradients, until the residual is at most
                                              min(½, √|g|) |g|; where they meet pᵀHp ≤ 0, d = p
    SaddleFreeNewton   d = -(|H| + λI)⁻¹ g    |H| has H's eigenvectors and their eigenvalues' sizes
    all                x ← x + t d            t = η, shortened until the loss falls enough

Newton's method itself is drawn to saddle points: on x² - y² its first step ends on one. ``Newton``
does that with ``plain`` (λ as given, t = η); otherwise all three go downhill.

``Newton`` and ``SaddleFreeNewton`` hold H, n x n, and each owner all of x. ``NewtonCG`` needs
products with H only and runs on slices.

Source: Nocedal & Wright, "Numerical Optimization", 2006, algorithms 3.2, 3.3 and 7.1; Martens,
"Deep learning via Hessian-free optimization", ICML 2010 (Gauss-Newton products); Dauphin et al.,
"Identifying and attacking the saddle point problem in high-dimensional non-convex optimization",
NIPS 2014, arXiv:1406.2572. Pushes: Rodomanov & Kropotov, "A Superlinearly-Convergent Proximal
Newton-type Method for the Optimization of Finite Sums", ICML 2016; Kovalev, Mishchenko & Richtárik,
"Stochastic Newton and Cubic Newton Methods with Simple Local Linear-Quadratic Rates",
arXiv:1912.01597, 2019.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from paramserver.optimizers.base import check_from_0
from paramserver.optimizers.conjugate_gradient import Product, cg_solve
from paramserver.optimizers.line_search import (
    NotFound,
    Point,
    backtracking,
    begin,
    check_search,
    remember,
    stop_at,
    strong_wolfe,
)
from paramserver.optimizers.newton_steps import dense_direction, saddle_free_step
from paramserver.optimizers.push_form import PushedRule, PushForm, refuse_set
from paramserver.rounds import (
    Answer,
    Ask,
    Kind,
    Request,
    Round,
    RoundProgram,
    Sample,
    Step,
    check_holds,
    dots,
    finite,
)

_LIMIT = 2000


class _DenseProgram(RoundProgram):
    """A step from the whole Hessian, and a search along it. ``memory`` holds what `begin` uses."""

    whole: ClassVar[bool] = True

    def round(self, x: Tensor) -> Round:
        """Make one step from ``x``, shape ``(n,)``.

        Raises:
            CurvatureError: The loss, the gradient or the Hessian is not finite.
        """
        settings, memory = self.settings, self.memory
        on = Sample("gradient", settings["batch"])
        start = yield from begin(x, on, memory)
        if (stop := stop_at(start, settings["tolerance"], on)) is not None or start.square == 0:
            return Step(x, start.loss, stop)

        answer = yield Ask("hessian", x, Sample("curvature", settings["curvature_batch"]))
        h = answer.rows.double()
        finite(float(h.sum()), "the sum of the Hessian")
        h = (h + h.T) / 2  # rounding leaves it not quite symmetric
        d = self._direction(h, start.gradient.double()).to(x.dtype)
        if settings.get("plain"):
            return Step(x.add(d, alpha=settings["lr"]), start.loss)

        (slope,) = (yield from dots((start.gradient, d))).tolist()
        found = yield from backtracking(start, d, slope, on=on, first=settings["lr"])
        if isinstance(found, NotFound):
            return _stay(start, found, settings)
        end = found.point
        remember(end, on, memory)
        return Step(end.x, start.loss, stop_at(end, settings["tolerance"], on))

    @abstractmethod
    def _direction(self, h: Tensor, g: Tensor) -> Tensor:
        """Return d from the Hessian and the gradient, float64."""


class NewtonProgram(_DenseProgram):
    """Newton's method with the whole Hessian."""

    def _direction(self, h: Tensor, g: Tensor) -> Tensor:
        return dense_direction(self.settings, h, g, self._param.dtype)


class SaddleFreeNewtonProgram(_DenseProgram):
    """Newton's method with the Hessian's eigenvalues made positive."""

    def _direction(self, h: Tensor, g: Tensor) -> Tensor:
        settings = self.settings
        return saddle_free_step(h, g, damping=settings["damping"], floor=settings["floor"])


class _MemoryRule(PushedRule):
    """Newton's step from what each worker pushed last: Hessian Hᵢ and gradient gᵢ at its point xᵢ.

    The gradient at x is taken to be the mean of gᵢ + Hᵢ (x - xᵢ) over the workers. On a quadratic
    that is exact as soon as each worker has pushed once, however old the pushes are; otherwise the
    error is of second order in how far the parameters have moved since. ``memory`` holds
    ``hessian.i``, ``gradient.i``, ``point.i`` and ``samples.i`` of each worker i.
    """

    def update(self, x: Tensor, rows: Tensor, scale: float) -> None:
        """Put the worker's latest in the place of its earlier one, and step."""
        n = len(x)
        names = ("hessian", "gradient", "point", "samples")
        pushed = (rows[:n].clone(), rows[n].clone(), rows[n + 1].clone(), self.samples)
        new = {f"{name}.{self.worker}": v for name, v in zip(names, pushed, strict=True)}
        latest = self.memory | new
        # A checkpoint may be of more workers than take part: what those pushed stays out.
        workers = [i for i in range(self.place.num_workers) if f"samples.{i}" in latest]
        total = sum(latest[f"samples.{i}"] for i in workers)
        h, g = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        for i in workers:
            share, own = latest[f"samples.{i}"] / total, latest[f"hessian.{i}"].double()
            h.add_(own, alpha=share)
            g.add_(latest[f"gradient.{i}"], alpha=share)
            g.add_(own @ (x.double() - latest[f"point.{i}"].double()), alpha=share)
        d = self._direction((h + h.T) / 2, g)
        self.memory.update(new)
        x.add_(d.to(x.dtype), alpha=scale * self.settings["lr"])

    @abstractmethod
    def _direction(self, h: Tensor, g: Tensor) -> Tensor:
        """Return d from the mean of the Hessians and the gradient, float64."""


class NewtonPushRule(_MemoryRule):
    """Newton's method with the workers' latest Hessians."""

    def _direction(self, h: Tensor, g: Tensor) -> Tensor:
        return dense_direction(self.settings, h, g, self._param.dtype)


class SaddleFreePushRule(_MemoryRule):
    """The same, with the eigenvalues of the mean made positive."""

    def _direction(self, h: Tensor, g: Tensor) -> Tensor:
        settings = self.settings
        return saddle_free_step(h, g, damping=settings["damping"], floor=settings["floor"])


class NewtonCGProgram(RoundProgram):
    """Newton's method by products with the Hessian, on slices. ``memory``: what `begin` uses."""

    def round(self, x: Tensor) -> Round:
        """Make one step from ``x``, own slice, shape ``(n,)``.

        Raises:
            CurvatureError: The loss, the gradient or a product is not finite.
        """
        settings, memory = self.settings, self.memory
        on = Sample("gradient", settings["batch"])
        start = yield from begin(x, on, memory)
        if (stop := stop_at(start, settings["tolerance"], on)) is not None or start.square == 0:
            return Step(x, start.loss, stop)

        solution = yield from cg_solve(
            self._product(x),
            -start.gradient,
            tolerance=min(0.5, start.norm**0.5),
            max_iterations=settings["cg_iterations"],
        )
        # a direction of negative curvature has no length of its own: that search also goes further
        bent = solution.direction
        d, search = (solution.x, backtracking) if bent is None else (bent, strong_wolfe)
        (slope,) = (yield from dots((start.gradient, d))).tolist()
        found = yield from search(start, d, slope, on=on, first=settings["lr"])
        if isinstance(found, NotFound):
            return _stay(start, found, settings)
        end = found.point
        remember(end, on, memory)
        return Step(end.x, start.loss, stop_at(end, settings["tolerance"], on))

    def _product(self, x: Tensor) -> Product:
        """Return what multiplies by H + λI at ``x``."""
        settings = self.settings
        kind: Kind = "ggnvp" if settings["curvature"] == "gauss-newton" else "hvp"
        sample = Sample("curvature", settings["curvature_batch"])

        def product(v: Tensor) -> Generator[Request, Any, Tensor]:
            answer: Answer = yield Ask(kind, x, sample, v)
            return answer.vector.add(v, alpha=settings["damping"])

        return product


def _stay(start: Point, found: NotFound, settings: dict[str, Any]) -> Step:
    """Return the end of a round that found no lower point; if the next would too, of the run."""
    repeats = settings["batch"] is None and settings["curvature_batch"] is None
    return Step(start.x, start.loss, f"along Newton's direction, {found}" if repeats else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Newton:
    """Newton steps with the whole Hessian, kept downhill; small models."""

    lr: float = 1.0
    """First step tried along Newton's direction, or the step of a push; 1 is Newton's own."""

    damping: float = 0.0
    """λ, 0 or more, in units of H; it grows where H + λI is not positive definite."""

    plain: bool = False
    """Whether to take each step as it is, uphill and onto saddle points too."""

    batch: int | None = None
    """Training samples of a round, for loss and gradient, or of a push; None takes all, or the
    worker's share of all."""

    curvature_batch: int | None = None
    """Training samples of a round, for H; None takes all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0 never."""

    limit: int = _LIMIT
    """Parameters it takes at most; H takes 8 bytes times their square."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        check_from_0("damping", self.damping)
        check_count("curvature_batch", self.curvature_batch)
        check_count("limit", self.limit)

    def build(self, params: Sequence[nn.Parameter]) -> NewtonProgram:
        """Make the program for one flat parameter, the whole vector.

        Raises:
            LayoutError: It has more than ``limit`` elements.
        """
        check_holds("newton", sum(p.numel() for p in params), self.limit, "newton-cg")
        return NewtonProgram(params, asdict(self))

    def pushes(self) -> PushForm:
        """Return the form in which the server keeps each worker's latest Hessian.

        Raises:
            ValueError: A key is set that only rounds have.
        """
        refuse_set("newton", self, ("tolerance", "curvature_batch"))
        return PushForm(name="newton", spec=self, rule=NewtonPushRule, work="hessian", whole=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaddleFreeNewton:
    """Newton steps that are repelled by saddle points, with the whole Hessian; small models."""

    lr: float = 1.0
    """First step tried along the direction, or the step of a push; 1 is Newton's own."""

    damping: float = 0.0
    """λ, 0 or more, in units of H."""

    floor: float = 1e-4
    """Least size of an eigenvalue of H, as a share of the largest; above 0, 1 at most. Steps along
    flat directions are that much longer, at most, than steepest descent's."""

    batch: int | None = None
    """Training samples of a round, for loss and gradient, or of a push; None takes all, or the
    worker's share of all."""

    curvature_batch: int | None = None
    """Training samples of a round, for H; None takes all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0 never."""

    limit: int = _LIMIT
    """Parameters it takes at most; H takes 8 bytes times their square."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        check_from_0("damping", self.damping)
        check_share("floor", self.floor)
        check_count("curvature_batch", self.curvature_batch)
        check_count("limit", self.limit)

    def build(self, params: Sequence[nn.Parameter]) -> SaddleFreeNewtonProgram:
        """Make the program for one flat parameter, the whole vector.

        Raises:
            LayoutError: It has more than ``limit`` elements.
        """
        check_holds("saddle-free", sum(p.numel() for p in params), self.limit, "newton-cg")
        return SaddleFreeNewtonProgram(params, asdict(self))

    def pushes(self) -> PushForm:
        """Return the form in which the server keeps each worker's latest Hessian.

        Raises:
            ValueError: A key is set that only rounds have.
        """
        refuse_set("saddle-free", self, ("tolerance", "curvature_batch"))
        return PushForm(
            name="saddle-free", spec=self, rule=SaddleFreePushRule, work="hessian", whole=True
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewtonCG:
    """Newton steps by conjugate gradients, from products with the Hessian; models of any size."""

    lr: float = 1.0
    """First step tried along the direction; 1 is Newton's own."""

    curvature: Literal["hessian", "gauss-newton"] = "hessian"
    """The matrix H: the Hessian, or the generalised Gauss-Newton matrix, never negative."""

    damping: float = 0.0
    """λ, 0 or more, in units of H."""

    cg_iterations: int = 50
    """Iterations of conjugate gradients a round at most, each one product."""

    batch: int | None = None
    """Training samples of a round, for loss and gradient; None takes all."""

    curvature_batch: int | None = None
    """Training samples of a round, for H; None takes all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0 never."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        check_curvature(self.curvature)
        check_from_0("damping", self.damping)
        check_count("cg_iterations", self.cg_iterations)
        check_count("curvature_batch", self.curvature_batch)

    def build(self, params: Sequence[nn.Parameter]) -> NewtonCGProgram:
        """Make the program for one flat parameter, the own slice."""
        return NewtonCGProgram(params, asdict(self))


def check_count(name: str, value: int | None) -> None:
    """Raise ValueError unless ``value`` is 1 or more, or None."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is above 0 and 1 at most."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def check_curvature(value: str) -> None:
    """Raise ValueError unless ``value`` names a matrix that products are taken with."""
    if value not in ("hessian", "gauss-newton"):
        raise ValueError(f"curvature must be hessian or gauss-newton, got {value!r}")
