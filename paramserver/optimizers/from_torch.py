"""The other optimizers of torch that work one element at a time, by the name torch gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paramserver.optimizers.base import PushRule, check_above_0, check_eps


class AdamaxRule(PushRule, torch.optim.Adamax):
    """torch's Adamax on pushed gradients."""


class NAdamRule(PushRule, torch.optim.NAdam):
    """torch's NAdam on pushed gradients."""


class RAdamRule(PushRule, torch.optim.RAdam):
    """torch's RAdam on pushed gradients."""


_RULES: dict[str, type[AdamaxRule] | type[NAdamRule] | type[RAdamRule]] = {
    "Adamax": AdamaxRule,
    "NAdam": NAdamRule,
    "RAdam": RAdamRule,
}

_REFUSED = {
    "ASGD": "its learning rate acts one step late, so a step cannot be scaled",
    "Adafactor": "it works on rows and columns of a matrix, which shards cut",
    "LBFGS": "it needs line searches and dot products over the whole vector, which shards cut",
    "Muon": "it orthogonalizes whole matrices, which shards cut",
    "Rprop": "its steps do not follow the learning rate, so a step cannot be scaled",
    "SparseAdam": "it takes sparse gradients only, and pushed ones are dense",
    "Adadelta": "it is the optimizer 'adadelta' here",
    "Adagrad": "it is the optimizer 'adagrad' here",
    "Adam": "it is the optimizer 'adam' here",
    "AdamW": "it is the optimizer 'adamw' here",
    "RMSprop": "it is the optimizer 'rmsprop' here, with eps_inside=False",
    "SGD": "it is the optimizer 'sgd', 'momentum' or 'nesterov' here",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOptimizer:
    """An optimizer of torch by its name, with torch's settings but for the learning rate."""

    algorithm: str
    """Adamax, NAdam or RAdam."""

    lr: float
    """Learning rate, above 0."""

    def __post_init__(self) -> None:
        if self.algorithm not in _RULES:
            why = _REFUSED.get(self.algorithm)
            raise ValueError(
                f"algorithm must be one of {', '.join(_RULES)}, got {self.algorithm!r}"
                + (f": {why}" if why else "")
            )
        check_above_0("lr", self.lr)

    def build(self, params: Sequence[nn.Parameter]) -> PushRule:
        """Make the rule that updates ``params``."""
        rule = _RULES[self.algorithm](params, lr=self.lr)
        check_eps(rule.defaults["eps"], params)
        return rule
