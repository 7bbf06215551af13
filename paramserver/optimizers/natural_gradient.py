"""Natural gradient descent: steps measured by how far they move what the model predicts.

With gradient g, Fisher matrix F = E_x E_{y ~ p(y|x)} [∇log p ∇log pᵀ] and z = (F + λI)⁻¹ g:

    kl = δ       x ← x - η √(2δ / gᵀz) z       with η = 1 and λ = 0 the mean KL divergence between
                                               the model before and after is δ, up to O(δ^1.5)
    kl = none    x ← x - η z

The labels y are the model's own, so F needs none of the data's. Where the loss is the negative
log-likelihood of a softmax or a Gaussian, F is the generalised Gauss-Newton matrix.

Source: Amari, "Natural Gradient Works Efficiently in Learning", Neural Computation 10, 1998;
Pascanu & Bengio, "Revisiting Natural Gradient for Deep Networks", ICLR 2014, arXiv:1301.3584
(steps of constant divergence; the metric from samples of its own; z by an iterative solver).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from paramserver.errors import CurvatureError
from paramserver.optimizers.base import check_above_0, check_below_1, check_from_0
from paramserver.optimizers.conjugate_gradient import cg_solve
from paramserver.optimizers.line_search import begin, check_search, stop_at
from paramserver.optimizers.newton import check_count
from paramserver.optimizers.push_form import PushedRule, PushForm, refuse_set
from paramserver.rounds import (
    Answer,
    Ask,
    Request,
    Round,
    RoundProgram,
    Sample,
    Step,
    check_holds,
    dots,
    finite,
)


class NaturalGradientProgram(RoundProgram):
    """One natural gradient step a round; nothing lasts from round to round. z is the subclass's."""

    def round(self, x: Tensor) -> Round:
        """Make one step from ``x``, own slice, shape ``(n,)``.

        Raises:
            CurvatureError: The loss, the gradient or the metric is not finite, or the metric is 0
                along the gradient.
        """
        settings = self.settings
        on = Sample("gradient", settings["batch"])
        start = yield from begin(x, on, {})
        stop = stop_at(start, settings["tolerance"], on)
        if stop is not None or start.square == 0:
            return Step(x, start.loss, stop)

        z = yield from self._solve(
            x, start.gradient, Sample("curvature", settings["curvature_batch"])
        )
        (gz,) = (yield from dots((start.gradient, z))).tolist()
        if not 0 < gz < math.inf:
            raise CurvatureError("gᵀF⁻¹g, the gradient's squared length in the Fisher metric,", gz)
        length = 1.0 if settings["kl"] is None else math.sqrt(2 * settings["kl"] / gz)
        return Step(x.add(z, alpha=-settings["lr"] * length), start.loss)

    @abstractmethod
    def _solve(self, x: Tensor, g: Tensor, on: Sample) -> Generator[Request, Any, Tensor]:
        """Return z, own slice, with F at ``x`` from the sample ``on``."""


class CGProgram(NaturalGradientProgram):
    """z by conjugate gradients, from products with F; on slices."""

    def _solve(self, x: Tensor, g: Tensor, on: Sample) -> Generator[Request, Any, Tensor]:
        settings = self.settings

        def product(v: Tensor) -> Generator[Request, Any, Tensor]:
            answer: Answer = yield Ask("ggnvp", x, on, v)
            return answer.vector.add(v, alpha=settings["damping"])

        solution = yield from cg_solve(
            product,
            g,
            tolerance=settings["cg_tolerance"],
            max_iterations=settings["cg_iterations"],
        )
        return solution.x


class DiagonalProgram(NaturalGradientProgram):
    """z by the diagonal of F; on slices."""

    def _solve(self, x: Tensor, g: Tensor, on: Sample) -> Generator[Request, Any, Tensor]:
        diagonal = (yield Ask("fisher_diagonal", x, on)).vector + self.settings["damping"]
        (trace,) = (yield from dots((diagonal, torch.ones_like(diagonal)))).tolist()
        finite(trace, "the trace of the Fisher matrix")
        # 0: the model does not depend on such a parameter, at least on this sample
        return torch.where(diagonal == 0, 0, g / diagonal)


class DenseProgram(NaturalGradientProgram):
    """z by all of F, on the whole vector."""

    whole: ClassVar[bool] = True

    def _solve(self, x: Tensor, g: Tensor, on: Sample) -> Generator[Request, Any, Tensor]:
        f = (yield Ask("fisher", x, on)).rows.double()
        finite(float(f.sum()), "the sum of the Fisher matrix")
        precision = len(g) * torch.finfo(g.dtype).eps
        z = solve_fisher(f, g.double(), damping=self.settings["damping"], precision=precision)
        return z.to(g.dtype)


class NaturalPushRule(PushedRule):
    """Natural gradient steps with a running mean of the metrics that workers push.

    The gradient is the push's own, so damping acts on it; the metric F̄ is the mean of many pushes,
    each ``decay`` times as heavy as the next, and changes slowly: that it is late matters little.
    ``memory`` holds ``metric``, the decayed sum, and ``weight``, what it is to be divided by.
    """

    def update(self, x: Tensor, rows: Tensor, scale: float) -> None:
        """Take up the metric, and step.

        Raises:
            CurvatureError: F̄ is 0 along the gradient.
        """
        s, g, new = self.settings, rows[0], rows[1:]
        before = self.memory.get("metric", torch.zeros_like(new))
        metric = before * s["decay"] + new * (1 - s["decay"])
        weight = self.memory.get("weight", 0.0) * s["decay"] + 1 - s["decay"]
        z = self._solve(metric / weight, g)
        length = 1.0
        if s["kl"] is not None and bool(g.any()):
            gz = float(torch.dot(g, z))
            if not 0 < gz < math.inf:
                raise CurvatureError("gᵀF⁻¹g, the gradient's squared length in the metric,", gz)
            length = math.sqrt(2 * s["kl"] / gz)
        self.memory.update(metric=metric, weight=weight)
        x.sub_(z, alpha=scale * s["lr"] * length)

    def _solve(self, metric: Tensor, g: Tensor) -> Tensor:
        """Return z from the metric's rows."""
        damping = self.settings["damping"]
        if self.settings["metric"] == "diagonal":
            diagonal = metric[0] + damping
            return torch.where(diagonal == 0, 0, g / diagonal)
        precision = len(g) * torch.finfo(g.dtype).eps
        z = solve_fisher(metric.double(), g.double(), damping=damping, precision=precision)
        return z.to(g.dtype)


def solve_fisher(f: Tensor, g: Tensor, *, damping: float, precision: float) -> Tensor:
    """Return z = (F + λI)⁻¹ g, without the directions in which the model does not change.

    Args:
        f: The Fisher matrix F, positive semi-definite, shape ``(n, n)``, float64.
        g: The gradient, shape ``(n,)``, float64.
        damping: λ, 0 or more, in units of F.
        precision: Share of the largest eigenvalue up to which another counts as 0. Such directions
            are padding, units that are never active, or adding to all inputs of a softmax.
    """
    values, vectors = torch.linalg.eigh((f + f.T) / 2)
    keep = values > precision * values.max()
    along = vectors[:, keep]
    z: Tensor = along @ ((along.T @ g) / (values[keep] + damping))
    return z


_PROGRAMS: dict[str, type[NaturalGradientProgram]] = {
    "cg": CGProgram,
    "diagonal": DiagonalProgram,
    "dense": DenseProgram,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NaturalGradient:
    """Steps that change the model's predictions by a constant KL divergence."""

    lr: float = 1.0
    """Factor η on the step, above 0. Steps of constant divergence never shrink by themselves: let
    a schedule lower it."""

    kl: float | None = 0.01
    """KL divergence δ of a step, above 0, in nats, mean over the samples; None steps by η F⁻¹g."""

    metric: Literal["cg", "diagonal", "dense"] = "cg"
    """What is known of F: products, for conjugate gradients; its diagonal; or all of it, n x n,
    for small models."""

    damping: float = 1e-4
    """λ, 0 or more, in units of F."""

    cg_iterations: int = 50
    """Iterations of conjugate gradients a round at most, each one product."""

    cg_tolerance: float = 1e-3
    """Conjugate gradients end when the residual is at most this share of the gradient."""

    decay: float = 0.95
    """Share of the metric that is kept at each push, 0 to below 1; rounds compute F afresh."""

    batch: int | None = None
    """Training samples of a round, for the gradient, or of a push; None takes all, or the worker's
    share of all."""

    curvature_batch: int | None = None
    """Training samples of a round, for F; None takes all."""

    tolerance: float = 1e-5
    """The run ends when the gradient's 2-norm is at most this; 0 never."""

    limit: int = 2000
    """Parameters that ``dense`` takes at most; F takes 8 bytes times their square."""

    def __post_init__(self) -> None:
        check_search(self.lr, self.batch, self.tolerance)
        if self.kl is not None:
            check_above_0("kl", self.kl)
        if self.metric not in _PROGRAMS:
            raise ValueError(f"metric must be {', '.join(_PROGRAMS)}, got {self.metric!r}")
        check_from_0("damping", self.damping)
        check_count("cg_iterations", self.cg_iterations)
        check_above_0("cg_tolerance", self.cg_tolerance)
        check_count("curvature_batch", self.curvature_batch)
        check_count("limit", self.limit)
        check_below_1("decay", self.decay)

    def build(self, params: Sequence[nn.Parameter]) -> NaturalGradientProgram:
        """Make the program for one flat parameter, the own slice; ``dense`` needs all of it.

        Raises:
            LayoutError: The metric is ``dense`` and it has more than ``limit`` elements.
        """
        if self.metric == "dense":
            num_parameters = sum(p.numel() for p in params)
            check_holds("natural:metric=dense", num_parameters, self.limit, "natural")
        return _PROGRAMS[self.metric](params, asdict(self))

    def pushes(self) -> PushForm:
        """Return the form in which the server keeps a running mean of the metric.

        Raises:
            ValueError: The metric is ``cg``, of which nothing can be kept; or a key is set that
                only rounds have.
        """
        refuse_set(
            "natural", self, ("tolerance", "curvature_batch", "cg_iterations", "cg_tolerance")
        )
        if self.metric == "cg":
            raise ValueError(
                "natural: a server can keep a metric, diagonal or dense, but no products as "
                "metric=cg asks for: set metric, or use rule pieces"
            )
        is_dense = self.metric == "dense"
        return PushForm(
            name="natural",
            spec=self,
            rule=NaturalPushRule,
            work="fisher" if is_dense else "fisher_diagonal",
            whole=is_dense or self.kl is not None,  # gᵀz is a sum over the whole vector
        )
