"""Optimizers: push rules, applied to each gradient, and round programs, which ask for more.

`OPTIMIZERS` names them for the command line: ``sgd``, ``momentum:lr=0.05``, ``adam``, ….
"""

from __future__ import annotations

from typing import TypeAlias

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
from paramserver.optimizers.bfgs import BFGS
from paramserver.optimizers.conjugate_gradient import ConjugateGradient, conjugate_gradient
from paramserver.optimizers.coordinate import CoordinateDescent
from paramserver.optimizers.from_torch import TorchOptimizer
from paramserver.optimizers.krylov import KrylovSubspaceDescent
from paramserver.optimizers.lbfgs import LBFGS
from paramserver.optimizers.momentum import SGD, Momentum, Nesterov, SGDRule
from paramserver.optimizers.natural_gradient import NaturalGradient
from paramserver.optimizers.newton import Newton, NewtonCG, SaddleFreeNewton
from paramserver.optimizers.placement import (
    DANA,
    DANARule,
    DANASlim,
    DelayedNesterov,
    DelayedNesterovRule,
    LocalMomentum,
    LocalMomentumRule,
)
from paramserver.optimizers.subgradient import Subgradient, SubgradientRule
from paramserver.registry import Registry
from paramserver.rounds import RoundOptimizer

AnyOptimizer: TypeAlias = Optimizer | RoundOptimizer
"""What can be named as an optimizer: one that builds a push rule, or a round program."""

OPTIMIZERS: Registry[AnyOptimizer] = Registry("optimizer")
_PUSH = {"kind": "push rule", "asynchronous": "pushes"}
_ROUNDS = {"kind": "round program", "asynchronous": "rounds"}
_WHOLE = {"kind": "round program, 1 shard", "asynchronous": "rounds"}
_APART = {"kind": "push rule", "asynchronous": "pushes, under a rule that averages none"}
_BOTH = {"asynchronous": "rounds, or pushes under another rule than pieces"}

for _name, _factory, _source, _facts in (
    ("sgd", SGD, "Robbins & Monro, Ann. Math. Stat. 22(3), 1951", {**_PUSH, "memory": "0"}),
    (
        "momentum",
        Momentum,
        "Polyak, USSR Comput. Math. Math. Phys. 4(5), 1964",
        {**_PUSH, "memory": "n"},
    ),
    (
        "nesterov",
        Nesterov,
        "Nesterov, 1983, in the form of Sutskever et al., ICML 2013",
        {**_PUSH, "memory": "n"},
    ),
    (
        "local-momentum",
        LocalMomentum,
        "Hermans & Louppe, 2018, arXiv:1805.08469, eq. 24",
        {**_APART, "memory": "n a worker"},
    ),
    (
        "dana",
        DANA,
        "Hakimi et al., 2019, arXiv:1907.11612 (DANA-Zero)",
        {**_APART, "memory": "n a worker, and n"},
    ),
    (
        "dana-slim",
        DANASlim,
        "Hakimi et al., 2019, arXiv:1907.11612 (DANA-Slim)",
        {**_APART, "memory": "n a worker"},
    ),
    (
        "delayed-nesterov",
        DelayedNesterov,
        "Liu et al., 2024, arXiv:2401.09135",
        {**_PUSH, "memory": "2 n"},
    ),
    ("adagrad", AdaGrad, "Duchi, Hazan & Singer, JMLR 12, 2011", {**_PUSH, "memory": "n"}),
    ("adadelta", AdaDelta, "Zeiler, arXiv:1212.5701, 2012", {**_PUSH, "memory": "2 n"}),
    (
        "rmsprop",
        RMSProp,
        "Tieleman & Hinton, Neural Networks for Machine Learning, 6.5, 2012",
        {**_PUSH, "memory": "n"},
    ),
    ("adam", Adam, "Kingma & Ba, ICLR 2015, arXiv:1412.6980", {**_PUSH, "memory": "2 n"}),
    (
        "adamw",
        AdamW,
        "Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101",
        {**_PUSH, "memory": "2 n"},
    ),
    (
        "torch",
        TorchOptimizer,
        "https://docs.pytorch.org/docs/stable/optim.html",
        {**_PUSH, "memory": "1 n to 2 n"},
    ),
    (
        "subgradient",
        Subgradient,
        "Shor, 1962; Nedic, Bertsekas & Borkar, 2001 (asynchronous)",
        {**_PUSH, "memory": "n, the best point"},
    ),
    (
        "coordinate",
        CoordinateDescent,
        "Wright, Math. Program. 151, 2015, arXiv:1502.04759",
        {**_ROUNDS, **_BOTH, "memory": "0"},
    ),
    (
        "cg",
        ConjugateGradient,
        "Polak & Ribiere, 1969; Nocedal & Wright, ch. 5",
        {**_ROUNDS, "memory": "3 n"},
    ),
    ("bfgs", BFGS, "Nocedal & Wright, alg. 6.1", {**_WHOLE, **_BOTH, "memory": "n x n"}),
    (
        "lbfgs",
        LBFGS,
        "Nocedal, 1980; vector-free: Chen, Wang & Zhou, NIPS 2014",
        {**_ROUNDS, **_BOTH, "memory": "2 history n"},
    ),
    (
        "newton",
        Newton,
        "Nocedal & Wright, ch. 3.4; pushes: Rodomanov & Kropotov, ICML 2016",
        {**_WHOLE, **_BOTH, "memory": "n x n; in pushes for each worker"},
    ),
    (
        "newton-cg",
        NewtonCG,
        "Nocedal & Wright, alg. 7.1; Martens, ICML 2010",
        {**_ROUNDS, "memory": "4 n"},
    ),
    (
        "saddle-free",
        SaddleFreeNewton,
        "Dauphin et al., NIPS 2014, arXiv:1406.2572",
        {**_WHOLE, **_BOTH, "memory": "n x n; in pushes for each worker"},
    ),
    (
        "ksd",
        KrylovSubspaceDescent,
        "Vinyals & Povey, AISTATS 2012, arXiv:1111.4259",
        {**_ROUNDS, "memory": "(vectors + 1) n"},
    ),
    (
        "natural",
        NaturalGradient,
        "Amari, 1998; Pascanu & Bengio, ICLR 2014, arXiv:1301.3584",
        {**_ROUNDS, **_BOTH, "memory": "4 n; dense n x n, 1 shard"},
    ),
):
    OPTIMIZERS.register(_name, _factory, source=_source, **_facts)

__all__ = [
    "BFGS",
    "DANA",
    "LBFGS",
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
    "AnyOptimizer",
    "ConjugateGradient",
    "CoordinateDescent",
    "DANARule",
    "DANASlim",
    "DelayedNesterov",
    "DelayedNesterovRule",
    "KrylovSubspaceDescent",
    "LocalMomentum",
    "LocalMomentumRule",
    "Momentum",
    "NaturalGradient",
    "Nesterov",
    "Newton",
    "NewtonCG",
    "Optimizer",
    "PushRule",
    "RMSProp",
    "RMSPropRule",
    "SGDRule",
    "SaddleFreeNewton",
    "Subgradient",
    "SubgradientRule",
    "TorchOptimizer",
    "conjugate_gradient",
]
