"""The subgradient method: for convex losses with kinks, such as hinge loss and L1 norms.

With any subgradient h of f at θ, and k the updates so far, this one included:

    θ ← θ - α h     constant   α = a              goes near the optimum and circles there
                    sqrt       α = a / √k         converges
                    harmonic   α = a / k          converges; early steps matter most
                    polyak     α = a (f(θ) - f*) / ‖h‖²

A step may raise the loss however short it is, so the best point is kept beside the parameters.
After K steps from a point at distance R of the optimum, with ‖h‖ at most G,

    best f - f* ≤ (R² + G² Σ α²) / (2 Σ α)

Automatic differentiation picks one subgradient at a kink: 0 for |x| and relu at 0.

Source: Shor, Minimization Methods for Non-Differentiable Functions, 1985; Polyak, USSR Comput.
Math. Math. Phys. 9(3), 1969 (the step that knows f*); Nedić, Bertsekas & Borkar, 2001 (shrinking
steps with delayed subgradients).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paramserver.optimizers.base import PushRule, check_above_0

StepSize = Literal["constant", "sqrt", "harmonic", "polyak"]


class SubgradientRule(PushRule):
    """The subgradient method on pushed subgradients.

    `told` keeps the parameters whenever the loss is below all before. That is the point the loss
    was computed at only if the gradient is of these very parameters: at staleness 0, as in
    synchronous runs. With staleness τ the parameters have moved by τ updates since, and what is
    kept is a point near the one that had the loss. A loss of a batch is kept as it is, so over
    small batches the best is a lucky batch's: use it where the loss is that of all samples, or
    evaluate it before it is trusted.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], *, lr: float, step: StepSize, optimum: float | None
    ) -> None:
        super().__init__(params, {"lr": lr, "step": step, "optimum": optimum})
        self._loss, self._norm = math.nan, math.nan

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._loss, self._norm = math.nan, math.nan

    @torch.no_grad()
    def told(self, loss: float, norm: float) -> None:
        """Keep the parameters if ``loss`` is the lowest so far; see `PushRule.told`."""
        self._loss, self._norm = loss, norm
        if not loss < self.best_loss:
            return
        for p in self._params:
            state = self.state[p]
            if "best" not in state:
                state["best"] = torch.empty_like(p)
            state["best"].copy_(p)
            state["best_loss"] = loss

    @property
    def best_loss(self) -> float:
        """The lowest loss told so far; inf before the first."""
        first: float = self.state.get(self._params[0], {}).get("best_loss", math.inf)
        return first

    def best(self) -> Tensor | None:
        """Return the parameters kept at `best_loss`, shape ``(n,)``; None before a loss was told.

        The tensor is the rule's own and changes with the next loss below; there is one parameter.
        """
        (param,) = self._params
        found: Tensor | None = self.state.get(param, {}).get("best")
        return found

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Take one step on the parameters' gradients.

        Raises:
            ValueError: Polyak's step was not told a loss and a norm since the last step; nothing
                was changed.
        """
        factors = [self._factor(group) for group in self.param_groups]
        self._loss, self._norm = math.nan, math.nan
        for group, factor in zip(self.param_groups, factors, strict=True):
            for p in group["params"]:
                self.state[p]["k"] = self._k(p)
                p.add_(p.grad, alpha=-group["lr"] * factor)

    def _factor(self, group: dict[str, Any]) -> float:
        """Return α / a for the step that comes."""
        match group["step"]:
            case "constant":
                return 1.0
            case "sqrt":
                return 1 / math.sqrt(self._k(group["params"][0]))
            case "harmonic":
                return 1 / self._k(group["params"][0])
        if not (math.isfinite(self._loss) and math.isfinite(self._norm)):
            raise ValueError(
                f"Polyak's step needs the loss and the gradient's norm before each step, got loss "
                f"{self._loss} and norm {self._norm}"
            )
        above = self._loss - group["optimum"]
        if above <= 0 or self._norm == 0:
            return 0.0  # at the optimum, or at a batch whose loss is below it
        return float(above / self._norm**2)

    def _k(self, param: Tensor) -> int:
        """Return the number of the step that comes, from 1."""
        k: int = self.state.get(param, {}).get("k", 0) + 1
        return k

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgradient:
    """Steps along subgradients, for losses with kinks; keeps the best point it came by."""

    lr: float = 1.0
    """a, above 0: the step per unit of subgradient, at first where it shrinks. For Polyak's step a
    factor, of which 1 is Polyak's own and below 2 converges."""

    step: StepSize = "sqrt"
    """How the step depends on the update: constant, sqrt, harmonic or polyak."""

    optimum: float | None = None
    """f*, the least loss there is, in units of the loss; for Polyak's step alone. With too low a
    value the steps never end and circle; with too high a one they end early."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        if self.step not in ("constant", "sqrt", "harmonic", "polyak"):
            raise ValueError(
                f"step must be 'constant', 'sqrt', 'harmonic' or 'polyak', got {self.step!r}"
            )
        if self.step == "polyak":
            if self.optimum is None or not math.isfinite(self.optimum):
                raise ValueError(f"step='polyak' needs a finite optimum, got {self.optimum}")
        elif self.optimum is not None:
            raise ValueError(f"optimum is for step='polyak', and step is {self.step!r}")

    @property
    def norm_needed(self) -> bool:
        """Whether the rule must be told the gradient's norm; if not, nobody need measure it."""
        return self.step == "polyak"

    def build(self, params: Sequence[nn.Parameter]) -> SubgradientRule:
        """Make the rule that updates ``params``."""
        return SubgradientRule(params, lr=self.lr, step=self.step, optimum=self.optimum)
