"""Settings with which each push rule reaches the optimum of ``quadratic:noise=0,dim=256``."""

from __future__ import annotations

from paramserver.optimizers import OPTIMIZERS, AnyOptimizer

RATED_UPDATES = 6000
"""With a learning rate that falls to 0 over them."""

RATES = {
    "sgd": 0.3, "momentum": 0.02, "nesterov": 0.02, "adagrad": 0.3,
    "adadelta": 1.0, "adam": 0.02, "adamw": 0.02, "rmsprop": 0.01,
    "local-momentum": 0.02, "dana": 0.02, "dana-slim": 0.02, "delayed-nesterov": 0.08,
}  # fmt: skip


def at_its_rate(name: str) -> AnyOptimizer:
    decay = {"weight_decay": 0.0} if name == "adamw" else {}
    return OPTIMIZERS.build({"name": name, "lr": RATES[name], **decay})
