"""Optimizers that run inside each shard, on each gradient that is applied.

`OPTIMIZERS` names them for the command line: ``sgd``, ``momentum:lr=0.05``, ``adam``, ….
"""

from __future__ import annotations

from paramserver.optimizers.adaptive import (
    AdaDelta,
    AdaDeltaRule,
    AdaGrad,
    AdaGradRule,
    Adam,
    AdamRule,
    AdamW,
    AdamWRule,
    RMSProp,
    RMSPropRule,
)
from paramserver.optimizers.base import Optimizer, PushRule
from paramserver.optimizers.from_torch import TorchOptimizer
from paramserver.optimizers.momentum import SGD, Momentum, Nesterov, SGDRule
from paramserver.registry import Registry

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer")
OPTIMIZERS.register("sgd", SGD, source="Robbins & Monro, Ann. Math. Stat. 22(3), 1951")
OPTIMIZERS.register(
    "momentum", Momentum, source="Polyak, USSR Comput. Math. Math. Phys. 4(5), 1964"
)
OPTIMIZERS.register(
    "nesterov", Nesterov, source="Nesterov, 1983, in the form of Sutskever et al., ICML 2013"
)
OPTIMIZERS.register("adagrad", AdaGrad, source="Duchi, Hazan & Singer, JMLR 12, 2011")
OPTIMIZERS.register("adadelta", AdaDelta, source="Zeiler, arXiv:1212.5701, 2012")
OPTIMIZERS.register(
    "rmsprop", RMSProp, source="Tieleman & Hinton, Neural Networks for Machine Learning, 6.5, 2012"
)
OPTIMIZERS.register("adam", Adam, source="Kingma & Ba, ICLR 2015, arXiv:1412.6980")
OPTIMIZERS.register("adamw", AdamW, source="Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101")
OPTIMIZERS.register(
    "torch", TorchOptimizer, source="https://docs.pytorch.org/docs/stable/optim.html"
)

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdaDelta",
    "AdaDeltaRule",
    "AdaGrad",
    "AdaGradRule",
    "Adam",
    "AdamRule",
    "AdamW",
    "AdamWRule",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "PushRule",
    "RMSProp",
    "RMSPropRule",
    "SGDRule",
    "TorchOptimizer",
]
