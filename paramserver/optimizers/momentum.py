"""SGD, momentum and Nesterov's accelerated gradient: torch's SGD with three sets of settings.

With parameters θ, gradient g, learning rate η, momentum ρ and velocity v:

    SGD        θ ← θ - η g
    momentum   v ← ρ v + (1 - dampening) g    θ ← θ - η v
    Nesterov   v ← ρ v + g                    θ ← θ - η (g + ρ v)

torch starts with v = g, so dampening acts from the second step on. Its Nesterov θ already is the
look-ahead point: a worker that pulls it evaluates the gradient where the method wants it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paramserver.optimizers.base import (
    PushRule,
    check_above_0,
    check_below_1,
    check_from_0,
    has_fused_kernel,
)

_torchs_step = inspect.unwrap(torch.optim.SGD.step)


class SGDRule(PushRule, torch.optim.SGD):
    """torch's SGD on pushed gradients; momentum and Nesterov are settings of it."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Call torch's fused kernel, where there is one.

        torch's own step first sorts the parameters by device and dtype, which takes longer than the
        kernel does on a small model. A shard's are all alike.
        """
        if not self.defaults["fused"]:
            _torchs_step(self)
            return
        for group in self.param_groups:
            params, momentum = group["params"], group["momentum"]
            states = [self.state[p] for p in params] if momentum != 0 else []
            is_first = bool(states) and "momentum_buffer" not in states[0]
            if is_first:
                for p, state in zip(params, states, strict=True):
                    state["momentum_buffer"] = torch.empty_like(p)  # the kernel fills it
            torch._fused_sgd_(
                params,
                [p.grad for p in params],
                [state["momentum_buffer"] for state in states],
                weight_decay=group["weight_decay"],
                momentum=momentum,
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                is_first_step=is_first,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """Stochastic gradient descent."""

    lr: float = 0.01
    """Learning rate η, above 0."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * θ is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> SGDRule:
        """Make the rule that updates ``params``."""
        return SGDRule(
            params, lr=self.lr, weight_decay=self.weight_decay, fused=has_fused_kernel(params)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Momentum:
    """SGD along a decaying sum of the gradients (the heavy ball)."""

    lr: float = 0.01
    """Learning rate η, above 0. Steps in a lasting direction grow to η / (1 - momentum)."""

    momentum: float = 0.9
    """Decay of the velocity, 0 to below 1. Stale gradients add to it: lower it then."""

    dampening: float = 0.0
    """Share of a gradient that is kept out of the velocity, 0 to 1."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * θ is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("momentum", self.momentum)
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"dampening must be 0 to 1, got {self.dampening}")
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> SGDRule:
        """Make the rule that updates ``params``."""
        return SGDRule(
            params,
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            fused=has_fused_kernel(params),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesterov:
    """Momentum whose gradient is taken one velocity step ahead."""

    lr: float = 0.01
    """Learning rate η, above 0. Steps in a lasting direction grow to η / (1 - momentum)."""

    momentum: float = 0.9
    """Decay of the velocity, above 0 and below 1."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * θ is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        if not 0 < self.momentum < 1:
            raise ValueError(f"momentum must be above 0 and below 1, got {self.momentum}")
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> SGDRule:
        """Make the rule that updates ``params``."""
        return SGDRule(
            params,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=True,
            fused=has_fused_kernel(params),
        )
