"""Local steps: a worker trains by itself for a while, and pushes how far it has come.

    read w   x = w --step--> x --step--> … --step--> x   push w - x
                   batch cH      batch cH + 1    batch cH + H - 1 of the worker's stream

The clock c counts pushes; H is the number of steps between a read and a push. What is pushed takes
the place of a gradient, and the server's optimizer applies it with a learning rate of its own, the
outer one, which a schedule and damping change; those of the steps, the inner ones, stay.

    --local   server's optimizer                rule      what it is
    sgd       sgd:lr=1                          bsp       local SGD, or federated averaging
    sgd       sgd:lr=1                          asp       local SGD, asynchronous
    sgd       sgd:lr=1                          fedbuff   FedBuff
    adamw     nesterov:lr=0.7,momentum=0.9      bsp       DiLoCo
    adamw     delayed-nesterov:lr=0.7           asp       asynchronous local SGD
    downpour  adagrad                           asp       Downpour SGD
    elastic   sgd:lr=1                          asp       elastic averaging

A clip at the worker shortens the gradient of each step. In a mean of pushes each weighs as many
samples as it took, as in federated averaging. Momentum and moments of the steps are a worker's own:
they stay with it from push to push, as in DiLoCo, and are lost when it dies or the run is resumed.
One that takes over reads the batches the lost one would have read, and starts without them.

Sources: McMahan et al., AISTATS 2017, arXiv:1602.05629 (federated averaging). Stich, "Local SGD
Converges Fast and Communicates Little", ICLR 2019, arXiv:1805.09767. Douillard et al., "DiLoCo",
2023, arXiv:2311.08105. Liu et al., "Asynchronous Local-SGD Training for Language Modeling", 2024,
arXiv:2401.09135 (with ``speeds``, its dynamic local updates). Those of the others are beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from paramserver.optimizers import AdamW, Momentum
from paramserver.optimizers.base import check_above_0, check_below_1
from paramserver.registry import Registry
from workers.own import Accrued, Own, Tethered, Travelled


class Local(Protocol):
    """What a worker does between a read and a push; it travels, and the record holds it."""

    @property
    def num_kept(self) -> int:
        """Vectors as long as the parameters that a worker keeps from push to push."""

    @property
    def as_it_is(self) -> bool:
        """Whether the server must add up what is pushed, and neither scale nor average it."""

    @property
    def keeps_reads(self) -> bool:
        """Whether a worker may go on after a push without taking over what it reads then."""

    def check(self, num_workers: int) -> None:
        """Make sure that it fits workers 0 to ``num_workers`` - 1; ValueError if not."""

    def num_steps(self, worker: int) -> int:
        """Return how many steps ``worker`` takes between a read and a push, 1 or more."""

    def build(self) -> Own:
        """Make a worker's own parameters, at the beginning of its life."""


def steps_of(local: Local | None, worker: int, clock: int) -> range:
    """Return the numbers of the steps of ``worker`` at ``clock``; without local steps, the clock.

    A step's number stands for the clock in all that is random in it: its batch, dropout.
    """
    count = 1 if local is None else local.num_steps(worker)
    return range(clock * count, (clock + 1) * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """How many steps each worker takes."""

    steps: int = 10
    """Steps between a read and a push, H, 1 or more; of the fastest worker, if they differ."""

    speeds: tuple[float, ...] | None = None
    """Steps a second of each worker, in any unit, above 0: one of speed v takes max(1, floor(H v /
    the largest v)) steps, so that all push about as often (DyLU). None: every worker takes H."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")
        for worker, speed in enumerate(self.speeds or ()):
            check_above_0(f"the speed of worker {worker}", speed)

    @property
    def num_kept(self) -> int:
        """Nothing."""
        return 0

    @property
    def as_it_is(self) -> bool:
        """Like a gradient, it may be scaled and averaged."""
        return False

    @property
    def keeps_reads(self) -> bool:
        """Each push is of what was read last."""
        return False

    def check(self, num_workers: int) -> None:
        """Refuse speeds that are not one a worker."""
        _check_speeds(self.speeds, num_workers)

    def num_steps(self, worker: int) -> int:
        """Return the steps that its speed allows ``worker``."""
        return _steps_at(self.steps, self.speeds, worker)


def _check_speeds(speeds: tuple[float, ...] | None, num_workers: int) -> None:
    if speeds is not None and len(speeds) != num_workers:
        raise ValueError(
            f"speeds must be one for each of the {num_workers} workers, got {len(speeds)}"
        )


def _steps_at(steps: int, speeds: tuple[float, ...] | None, worker: int) -> int:
    """Return how many of ``steps`` the speed of ``worker`` allows."""
    if speeds is None:
        return steps
    share = steps * speeds[worker] / max(speeds)
    return max(1, math.floor(share + 1e-9))  # 100 * 0.29 is 28.999999999999996


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSGD(_Steps):
    """Takes steps of SGD, and pushes how far they led."""

    lr: float = 0.01
    """Learning rate of the steps, above 0."""

    momentum: float = 0.0
    """Decay of the worker's velocity, 0 to below 1."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more."""

    def __post_init__(self) -> None:
        _Steps.__post_init__(self)
        self._optimizer()

    @property
    def num_kept(self) -> int:
        """The velocity."""
        return int(self.momentum > 0)

    def build(self) -> Own:
        """Make the worker's own parameters."""
        return Travelled(self._optimizer())

    def _optimizer(self) -> Momentum:
        return Momentum(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAdamW(_Steps):
    """Takes steps of AdamW, and pushes how far they led."""

    lr: float = 0.001
    """Learning rate of the steps, above 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the gradient's and of the squared gradient's average, 0 to below 1."""

    eps: float = 1e-8
    """In units of the gradient, above 0."""

    weight_decay: float = 0.01
    """Share of the parameters, times lr, taken off in each step; 0 or more."""

    def __post_init__(self) -> None:
        _Steps.__post_init__(self)
        self._optimizer()

    @property
    def num_kept(self) -> int:
        """Both averages."""
        return 2

    def build(self) -> Own:
        """Make the worker's own parameters."""
        return Travelled(self._optimizer())

    def _optimizer(self) -> AdamW:
        return AdamW(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Downpour:
    """Takes steps of SGD, pushes the sum of their gradients, and fetches parameters less often.

    With push=2 and fetch=6, a worker's own parameters x:

        fetch w                                                      fetch w
        x ← w  step step push   step step push   step step push      x ← w  step step push …

    These are the paper's n_push and n_fetch; there both are 1. A push is answered here, and only
    every third answer is taken over, so fetch must be a multiple of push. Staleness counts from the
    fetch: what a worker has pushed since is in its own x, but what others have is not. The servers
    of the paper run AdaGrad; with SGD of the steps' own lr a single worker's pushes lead the server
    where the worker is, whenever it fetches.

    Source: Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, algorithm 7.1.
    """

    push: int = 10
    """Steps to each push, 1 or more; of the fastest worker, if they differ."""

    fetch: int | None = None
    """Steps to each fetch of the parameters, a multiple of ``push``; None: with every push."""

    speeds: tuple[float, ...] | None = None
    """Steps a second of each worker, as those of the other local steps: a slow one takes fewer to
    each push, and fetches with as many pushes as the others. None: every worker takes ``push``."""

    lr: float = 0.01
    """Learning rate of the worker's steps, above 0; the server has its own."""

    def __post_init__(self) -> None:
        if self.push < 1:
            raise ValueError(f"push must be 1 step or more, got {self.push}")
        if self.fetch is not None and (self.fetch < 1 or self.fetch % self.push):
            raise ValueError(
                f"fetch must be a multiple of push, {self.push}, got {self.fetch}: a worker "
                "fetches with the answer to a push"
            )
        for worker, speed in enumerate(self.speeds or ()):
            check_above_0(f"the speed of worker {worker}", speed)
        check_above_0("lr", self.lr)

    @property
    def num_kept(self) -> int:
        """The worker's parameters, where it goes on with them after a push."""
        return int(self.keeps_reads)

    @property
    def as_it_is(self) -> bool:
        """Like a gradient, it may be scaled and averaged."""
        return False

    @property
    def keeps_reads(self) -> bool:
        """Several pushes may be of one read."""
        return self._pushes_a_fetch > 1

    def check(self, num_workers: int) -> None:
        """Refuse speeds that are not one a worker."""
        _check_speeds(self.speeds, num_workers)

    def num_steps(self, worker: int) -> int:
        """Return the steps to a push that its speed allows ``worker``."""
        return _steps_at(self.push, self.speeds, worker)

    def build(self) -> Own:
        """Make a worker's own parameters."""
        return Accrued(self.lr, self._pushes_a_fetch)

    @property
    def _pushes_a_fetch(self) -> int:
        return 1 if self.fetch is None else self.fetch // self.push


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic(_Steps):
    """Keeps parameters of its own, which an elastic force ties to the server's.

    What the server has is the centre, and with the force e = alpha (x - centre) a worker does
    ``x ← x - e`` while the centre does ``centre ← centre + e``. Between two forces lie ``steps``
    steps of SGD, or with momentum of Nesterov's method (EAMSGD).

    The paper's worker stops the centre for this. Here the force is that of the read which answers
    the last push, x gives in to it in the step after, as in the paper, and the centre hears of it
    with the push that follows ``steps`` steps later, when others have moved it. A single worker's
    run is the paper's own; of several the centre is late by the pushes in between.

    A push that is dropped, and the last one of a worker that dies, is a force that x has felt and
    the centre has not. One that takes over begins at the centre.

    Source: Zhang, Choromanska & LeCun, "Deep learning with Elastic Averaging SGD", NIPS 2015,
    arXiv:1412.6651. For one worker on a quadratic of curvature 1 and steps=1 it is stable if
    0 <= lr <= 2 and 0 <= alpha <= (4 - 2 lr) / (4 - lr).
    """

    lr: float = 0.01
    """Learning rate of the worker's steps, above 0."""

    alpha: float = 0.1
    """Strength of the force, above 0 and below 1; in the paper 0.9 over the number of workers."""

    momentum: float = 0.0
    """Decay of the worker's velocity, 0 to below 1."""

    def __post_init__(self) -> None:
        _Steps.__post_init__(self)
        check_above_0("lr", self.lr)
        check_above_0("alpha", self.alpha)
        check_below_1("alpha", self.alpha)
        check_below_1("momentum", self.momentum)

    @property
    def num_kept(self) -> int:
        """The worker's parameters, and its velocity."""
        return 1 + int(self.momentum > 0)

    @property
    def as_it_is(self) -> bool:
        """The force acts on both sides alike."""
        return True

    def build(self) -> Own:
        """Make the worker's own parameters."""
        return Tethered(self.lr, self.alpha, self.momentum)


LOCALS: Registry[Local] = Registry("local")
LOCALS.register("sgd", LocalSGD, source="McMahan et al., AISTATS 2017, arXiv:1602.05629")
LOCALS.register("adamw", LocalAdamW, source="Douillard et al. (DiLoCo), 2023, arXiv:2311.08105")
LOCALS.register("downpour", Downpour, source="Dean et al., NIPS 2012")
LOCALS.register("elastic", Elastic, source="Zhang et al., NIPS 2015, arXiv:1412.6651")
