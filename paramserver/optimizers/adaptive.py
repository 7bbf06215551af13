"""Rules that give each parameter its own step size: AdaGrad, AdaDelta, RMSProp, Adam, AdamW.

With parameters θ, gradient g and learning rate η, all operations element by element:

    AdaGrad    G ← G + g²                      θ ← θ - η g / (√G + ε)
    AdaDelta   E ← ρ E + (1 - ρ) g²            Δ = √(D + ε) / √(E + ε) g
               D ← ρ D + (1 - ρ) Δ²            θ ← θ - η Δ
    RMSProp    μ ← α μ + (1 - α) g²            θ ← θ - η g / √(μ + ε)
    Adam       m ← β₁ m + (1 - β₁) g           v ← β₂ v + (1 - β₂) g²
               m̂ = m / (1 - β₁ᵗ)               v̂ = v / (1 - β₂ᵗ)      θ ← θ - η m̂ / (√v̂ + ε)
    AdamW      θ ← θ - η weight_decay θ        and then as Adam

``t`` counts the gradients applied. All but RMSProp run torch's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paramserver.optimizers.base import (
    PushRule,
    check_above_0,
    check_below_1,
    check_eps,
    check_from_0,
    has_fused_kernel,
)


class AdaGradRule(PushRule, torch.optim.Adagrad):
    """torch's Adagrad on pushed gradients."""


class AdaDeltaRule(PushRule, torch.optim.Adadelta):
    """torch's Adadelta on pushed gradients."""


class AdamRule(PushRule, torch.optim.Adam):
    """torch's Adam on pushed gradients."""


class AdamWRule(PushRule, torch.optim.AdamW):
    """torch's AdamW on pushed gradients."""


class RMSPropRule(PushRule):
    """RMSProp with ε inside the root, which torch's does not offer (pytorch/pytorch#23796)."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        alpha: float,
        eps: float,
        eps_inside: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "eps_inside": eps_inside})
        self._roots: dict[Tensor, Tensor] = {}  # scratch, one a parameter; no state, so not saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._roots = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Take one step on the parameters' gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["square_avg"] = torch.zeros_like(p)
                if p not in self._roots:
                    self._roots[p] = torch.empty_like(p)
                g, mu, root = p.grad, state["square_avg"], self._roots[p]
                mu.mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
                if group["eps_inside"]:
                    torch.add(mu, group["eps"], out=root).sqrt_()
                else:
                    torch.sqrt(mu, out=root).add_(group["eps"])
                p.addcdiv_(g, root, value=-group["lr"])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaGrad:
    """Steps shrink with the sum of all squared gradients; good for sparse features."""

    lr: float = 0.01
    """Learning rate η, above 0."""

    initial: float = 0.0
    """Value G starts at, 0 or more."""

    eps: float = 1e-10
    """ε, above 0, in units of the gradient."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * θ is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_from_0("initial", self.initial)
        check_above_0("eps", self.eps)
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> AdaGradRule:
        """Make the rule that updates ``params``."""
        check_eps(self.eps, params)
        return AdaGradRule(
            params,
            lr=self.lr,
            initial_accumulator_value=self.initial,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=has_fused_kernel(params),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaDelta:
    """Steps in the units of the parameters, from two decaying averages; no rate to tune."""

    lr: float = 1.0
    """Factor η on the step, above 0; 1 is the paper's method."""

    rho: float = 0.9
    """Decay of both averages, 0 to below 1."""

    eps: float = 1e-6
    """ε, above 0; sets the length of the first steps."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * θ is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("rho", self.rho)
        check_above_0("eps", self.eps)
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> AdaDeltaRule:
        """Make the rule that updates ``params``."""
        check_eps(self.eps, params)
        return AdaDeltaRule(
            params, lr=self.lr, rho=self.rho, eps=self.eps, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSProp:
    """Steps shrink with a decaying average of squared gradients; ε inside the root."""

    lr: float = 0.001
    """Learning rate η, above 0."""

    alpha: float = 0.9
    """Decay of the average of squared gradients, 0 to below 1."""

    eps: float = 1e-8
    """ε, above 0, in units of the squared gradient: it shortens steps where |g| is near √ε."""

    eps_inside: bool = True
    """False divides by √μ + ε instead, bit for bit as torch.optim.RMSprop does."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("alpha", self.alpha)
        check_above_0("eps", self.eps)

    def build(self, params: Sequence[nn.Parameter]) -> RMSPropRule:
        """Make the rule that updates ``params``."""
        check_eps(self.eps, params)
        return RMSPropRule(
            params, lr=self.lr, alpha=self.alpha, eps=self.eps, eps_inside=self.eps_inside
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Momentum over a decaying average of squared gradients, both corrected for their start."""

    lr: float = 0.001
    """Learning rate η, above 0; about the length of a step in each parameter."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decays β₁ of the gradient's and β₂ of the squared gradient's average, 0 to below 1."""

    eps: float = 1e-8
    """ε, above 0, in units of the gradient."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * θ is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("betas[0]", self.betas[0])
        check_below_1("betas[1]", self.betas[1])
        check_above_0("eps", self.eps)
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> AdamRule:
        """Make the rule that updates ``params``."""
        check_eps(self.eps, params)
        return AdamRule(
            params,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=has_fused_kernel(params),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Adam whose weight decay acts on the parameters and not through the averages."""

    lr: float = 0.001
    """Learning rate η, above 0; about the length of a step in each parameter."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decays β₁ of the gradient's and β₂ of the squared gradient's average, 0 to below 1."""

    eps: float = 1e-8
    """ε, above 0, in units of the gradient."""

    weight_decay: float = 0.01
    """Share of θ, times η, taken off in each step; 0 or more."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("betas[0]", self.betas[0])
        check_below_1("betas[1]", self.betas[1])
        check_above_0("eps", self.eps)
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> AdamWRule:
        """Make the rule that updates ``params``."""
        check_eps(self.eps, params)
        return AdamWRule(
            params,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=has_fused_kernel(params),
        )
