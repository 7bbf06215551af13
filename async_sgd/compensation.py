"""Delay compensation: a stale gradient is corrected by what has changed since it was computed.

With g the gradient that was pushed, r the parameters it was computed at, w those now, τ the
staleness and η the learning rate, element by element:

    dc-asgd            g + λ g² (w - r)
    dc-asgd-adaptive   g + λ₀ g² (w - r) / √(m + ε)     m: running mean of g²
    gap-aware          g / (|w - r| / C + 1)            C: root mean square of an update
    adag               g / ((w - r)² / η + 1)
    fasgd              g / ((τ + 1) (m + ε))            m: running mean of |g|

The first two estimate the gradient at w by Taylor's formula, where g² stands for the diagonal of
the Hessian. The others make a gradient smaller, the more the parameters have moved or the older it
is. A fresh gradient (w = r, τ = 0) stays as it is under all but ``fasgd``.

All were proposed for plain SGD. An optimizer with a memory is given the corrected gradient, and
Adam and its kin hardly notice a factor that is the same for all pushes: shorten their steps by
damping. Damping and a compensation that makes gradients smaller do the same thing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramserver.compensation import Compensation, Compensator, Rate
from paramserver.errors import CheckpointError
from paramserver.optimizers.base import check_above_0, check_below_1, check_eps, check_from_0
from paramserver.registry import Registry


class Vectors:
    """What all compensators here have: vectors that a checkpoint holds, and room to compute in.

    Both are in float32 at least: in 16 bits a slow running mean would stand still.
    """

    def __init__(self, params: Tensor, *kept: str) -> None:
        """Keep vectors of the names ``kept``, each like ``params`` and 0."""
        dtype = torch.promote_types(params.dtype, torch.float32)
        self._kept = {name: torch.zeros_like(params, dtype=dtype) for name in kept}
        self._drift = torch.empty_like(params, dtype=dtype)

    def on_update(self, params: Tensor) -> None:
        """Hear of an update; most compensators don't care."""

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors, by name."""
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see `paramserver.compensation.Compensator`."""
        _check_state(state, self.state_dict())
        for name, vector in self._kept.items():
            vector.copy_(state[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class DCASGD:
    """Adds λ g² (w - r), an estimate of how the gradient has changed from r, then, to w, now.

    This is Taylor's formula with g² for the diagonal of the Hessian.

    Source: Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation", ICML
    2017, arXiv:1609.08326. The default λ is that of MXNet's ``DCASGD``, which has the same formula;
    the authors' own updater for Multiverso has |g| in the place of g².
    """

    strength: float = 0.04
    """λ, 0 or more; 0 corrects nothing. Where λ |g (w - r)| nears 1 a run may diverge."""

    def __post_init__(self) -> None:
        check_from_0("strength", self.strength)

    def build(self, params: Tensor) -> Compensator:
        """Make the compensator for the slice at ``params``."""
        return ConstantDelayCompensator(params, strength=self.strength)


class ConstantDelayCompensator(Vectors):
    """g <- g + λ g² (w - r)."""

    def __init__(self, params: Tensor, *, strength: float) -> None:
        super().__init__(params)
        self._strength = strength

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: Rate
    ) -> None:
        """Move ``grad`` from ``read`` to ``params``."""
        torch.sub(params, read, out=self._drift).mul_(grad)
        grad.addcmul_(grad, self._drift, value=self._strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveDCASGD:
    """Adds what ``dc-asgd`` adds, with λ smaller for elements whose gradients are large.

    λ = λ₀ / √(m + ε) for each element, m a running mean of g².

    Source: Zheng et al., ICML 2017, arXiv:1609.08326, there DC-ASGD-a. m takes up each gradient
    before it is used, as in the authors' updater for Multiverso, whose ε this is. That updater
    keeps an m for each worker; here all workers share one, as all their gradients are of one loss:
    it is warm sooner, and a worker that is replaced loses nothing.
    """

    strength: float = 2.0
    """λ₀, 0 or more; 0 corrects nothing. Where λ₀ |w - r| nears 1 a run may diverge."""

    decay: float = 0.95
    """Share of m that stays with each gradient, 0 or more and below 1."""

    eps: float = 1e-7
    """ε, above 0, in units of a squared gradient."""

    def __post_init__(self) -> None:
        check_from_0("strength", self.strength)
        check_below_1("decay", self.decay)
        check_above_0("eps", self.eps)

    def build(self, params: Tensor) -> Compensator:
        """Make the compensator for the slice at ``params``."""
        return AdaptiveDelayCompensator(
            params, strength=self.strength, decay=self.decay, eps=self.eps
        )


class AdaptiveDelayCompensator(Vectors):
    """m <- ρ m + (1 - ρ) g², then g <- g + λ₀ g² (w - r) / √(m + ε)."""

    def __init__(self, params: Tensor, *, strength: float, decay: float, eps: float) -> None:
        super().__init__(params, "mean_square")
        self._mean_square = self._kept["mean_square"]
        self._root = torch.empty_like(self._mean_square)
        self._strength, self._decay, self._eps = strength, decay, eps
        check_eps(eps, [self._mean_square])

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: Rate
    ) -> None:
        """Take up ``grad``, and move it from ``read`` to ``params``."""
        self._mean_square.mul_(self._decay).addcmul_(grad, grad, value=1 - self._decay)
        torch.add(self._mean_square, self._eps, out=self._root).sqrt_()
        torch.sub(params, read, out=self._drift).mul_(grad).div_(self._root)
        grad.addcmul_(grad, self._drift, value=self._strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class GapAware:
    """Divides each element by how many updates of usual length it has moved since, plus one.

    That number is the gap |w - r| over C, the usual length. Where every update is the same it is τ,
    and g is divided by τ + 1 exactly.

    Source: Barkai, Hakimi & Schuster, "Gap-Aware Mitigation of Gradient Staleness", ICLR 2020,
    arXiv:1909.10802, with C in the form that it has in FTPipe (Eliad, Hakimi, …, Schuster, USENIX
    ATC 2021; the paper's own form was not at hand). There C² is an averaged square of SGD's
    momentum buffer, corrected for its start at 0 as Adam does, times the square of the largest
    learning rate so far. Here it is an averaged square of the updates themselves, so that it serves
    any optimizer, schedule, damping and rule. FTPipe divides weight decay as well; here that is the
    optimizer's, and stays as it is.
    """

    decay: float = 0.999
    """Share of C² that stays with each update, 0 or more and below 1."""

    eps: float = 1e-8
    """Added to C, above 0, in units of a parameter: an element that never moves has C = 0."""

    def __post_init__(self) -> None:
        check_below_1("decay", self.decay)
        check_above_0("eps", self.eps)

    def build(self, params: Tensor) -> Compensator:
        """Make the compensator for the slice at ``params``."""
        return GapCompensator(params, decay=self.decay, eps=self.eps)


class GapCompensator(Vectors):
    """s <- ρ s + (1 - ρ) u² for each update u; after k of them C = √(s / (1 - ρ^k)) + ε.

    g <- g / (|w - r| / C + 1). The parameters after the last update, which u is measured from, are
    no part of the state: it is built at those it goes on from.
    """

    def __init__(self, params: Tensor, *, decay: float, eps: float) -> None:
        super().__init__(params, "mean_square")
        self._mean_square = self._kept["mean_square"]
        self._updates = 0
        self._last = params.clone()
        self._usual = torch.empty_like(self._mean_square)
        self._decay, self._eps = decay, eps
        check_eps(eps, [self._mean_square])

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: Rate
    ) -> None:
        """Divide ``grad`` by its gap plus one."""
        if self._updates == 0:  # nothing has moved, or nobody has seen how far
            return
        share = 1 - self._decay**self._updates
        torch.div(self._mean_square, share, out=self._usual).sqrt_().add_(self._eps)
        torch.sub(params, read, out=self._drift).abs_().div_(self._usual).add_(1)
        grad.div_(self._drift)

    def on_update(self, params: Tensor) -> None:
        """Take up how far the parameters have moved."""
        torch.sub(params, self._last, out=self._drift)
        self._mean_square.mul_(self._decay).addcmul_(
            self._drift, self._drift, value=1 - self._decay
        )
        self._last.copy_(params)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return ``mean_square``, shape ``(n,)``, and the number of ``updates``."""
        return {**super().state_dict(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see `paramserver.compensation.Compensator`."""
        super().load_state_dict(state)
        self._updates = int(state["updates"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ADAG:
    """Divides each element by the square of how far it has moved since, over lr, plus one.

    Source: Hermans, "On Scalable Deep Learning and Parallelizing Gradient Descent", master thesis,
    Maastricht University, 2017, chapter 4. It writes ``‖w - r‖²`` and speaks of a factor for each
    weight, which is what its code computes (dist-keras, ``ExperimentalParameterServer``), and what
    this does. What dist-keras calls ADAG is something else: accumulated gradient normalization.
    """

    def build(self, params: Tensor) -> Compensator:
        """Make the compensator for the slice at ``params``."""
        return DistanceCompensator(params)


class DistanceCompensator(Vectors):
    """g <- g / ((w - r)² / η + 1)."""

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: Rate
    ) -> None:
        """Divide ``grad`` by the squared distance, in units of ``lr``, plus one."""
        torch.sub(params, read, out=self._drift).square_().div_(lr).add_(1)
        grad.div_(self._drift)


@dataclass(frozen=True, slots=True, kw_only=True)
class FASGD:
    """Divides each element by its usual magnitude, times staleness plus one.

    The magnitude is m + ε, m a running mean of |g|. A fresh gradient is divided by it as well, so
    the learning rate is not that of SGD.

    Source: Odena, "Faster Asynchronous SGD", 2016, arXiv:1601.04033, as its code (FRED) has it,
    where m takes up each gradient before it is used. The paper divides by τ, which has no value at
    0, and by a standard deviation of gradients; what its equation (6) averages is the inverse of
    that, and dividing by it would lengthen the steps where gradients vary most.
    """

    decay: float = 0.9
    """Share of m that stays with each gradient, 0 or more and below 1."""

    eps: float = 0.001
    """ε, above 0, in units of a gradient."""

    def __post_init__(self) -> None:
        check_below_1("decay", self.decay)
        check_above_0("eps", self.eps)

    def build(self, params: Tensor) -> Compensator:
        """Make the compensator for the slice at ``params``."""
        return MagnitudeCompensator(params, decay=self.decay, eps=self.eps)


class MagnitudeCompensator(Vectors):
    """m <- γ m + (1 - γ) |g|, then g <- g / ((τ + 1) (m + ε))."""

    def __init__(self, params: Tensor, *, decay: float, eps: float) -> None:
        super().__init__(params, "magnitude")
        self._magnitude = self._kept["magnitude"]
        self._decay, self._eps = decay, eps
        check_eps(eps, [self._magnitude])

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: Rate
    ) -> None:
        """Take up ``grad``, and divide it by its usual magnitude and its age."""
        self._drift.copy_(grad).abs_()
        self._magnitude.mul_(self._decay).add_(self._drift, alpha=1 - self._decay)
        torch.add(self._magnitude, self._eps, out=self._drift).mul_(staleness + 1)
        grad.div_(self._drift)


COMPENSATIONS: Registry[Compensation] = Registry("compensation")
COMPENSATIONS.register(
    "dc-asgd", DCASGD, source="Zheng et al., ICML 2017, arXiv:1609.08326", memory="n"
)
COMPENSATIONS.register(
    "dc-asgd-adaptive",
    AdaptiveDCASGD,
    source="Zheng et al., ICML 2017, arXiv:1609.08326",
    memory="3 n",
)
COMPENSATIONS.register(
    "gap-aware", GapAware, source="Barkai et al., ICLR 2020, arXiv:1909.10802", memory="4 n"
)
COMPENSATIONS.register("adag", ADAG, source="Hermans, master thesis, 2017", memory="n")
COMPENSATIONS.register("fasgd", FASGD, source="Odena, 2016, arXiv:1601.04033", memory="2 n")


def _check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless ``state`` can take the place of ``own``."""
    if state.keys() != own.keys():
        raise CheckpointError(
            f"the saved compensation keeps {', '.join(sorted(state)) or 'nothing'}, and this one "
            f"{', '.join(sorted(own)) or 'nothing'}: resume with the compensation the run had"
        )
    for name, vector in own.items():
        saved = state[name]
        if isinstance(vector, Tensor) and (
            saved.shape != vector.shape or saved.dtype != vector.dtype
        ):
            raise CheckpointError(
                f"the saved {name} is {tuple(saved.shape)} {saved.dtype}, and "
                f"{tuple(vector.shape)} {vector.dtype} is needed"
            )
