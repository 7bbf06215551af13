"""Learning-rate schedules: a function of the number of applied updates, and of nothing else.

Every shard builds the schedule on its own rule and calls ``step()`` once after each applied update,
so all shards have the same rate at the same version. The schedulers are torch's or written like
them. To resume, build the schedule, then load the rule's state, then the schedule's. torch's
``step(epoch)`` is no way to get there: it looks for the last restart through a rounded logarithm
and misses some (``t_mult=3`` at 121 ``t_0``), where ``step()`` counts in whole numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    StepLR,
)

from paramserver.registry import Registry


class Scheduler(Protocol):
    """Sets an optimizer's rates; torch's schedulers are such."""

    def step(self) -> None:
        """Set the rate after another update."""

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the rates themselves are the optimizer's state."""


class Schedule(Protocol):
    """A schedule's configuration."""

    def build(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        """Set the first rate of ``optimizer``, and return what sets the later ones.

        Raises:
            ValueError: The optimizer's rate does not fit the schedule.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineRestarts:
    """Cosine decay with warm restarts (SGDR).

    With T_cur updates since the last restart and T_i from that restart to the next one, the rate is
    eta_min + (eta_max - eta_min) / 2 * (1 + cos(pi * T_cur / T_i)).
    """

    t_0: int
    """Updates until the first restart."""

    t_mult: int = 1
    """Factor on the updates until the next restart, after each one; whole, 1 or more."""

    eta_min: float = 0.0
    """Rate the decay goes to, 0 or more; the restart comes just before it is reached."""

    eta_max: float | None = None
    """Rate the decay starts from, eta_min or more; None takes the optimizer's lr."""

    def __post_init__(self) -> None:
        _check_count("t_0", self.t_0)
        if not (isinstance(self.t_mult, int) and self.t_mult >= 1):
            raise ValueError(f"t_mult must be a whole number, 1 or more, got {self.t_mult}")
        _check_rate("eta_min", self.eta_min)
        if self.eta_max is not None:
            _check_rate("eta_max", self.eta_max)
            if self.eta_max < self.eta_min:
                raise ValueError(
                    f"eta_max must be eta_min ({self.eta_min}) or more, got {self.eta_max}"
                )

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return torch's scheduler, started from ``eta_max``."""
        if self.eta_max is not None:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.eta_max
        _check_reaches(self.eta_min, optimizer)
        return CosineAnnealingWarmRestarts(optimizer, self.t_0, self.t_mult, self.eta_min)


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineOnce:
    """One cosine decay from the optimizer's lr to eta_min, where the rate then stays."""

    updates: int
    """Updates the decay takes."""

    eta_min: float = 0.0
    """Rate at the end, 0 or more."""

    def __post_init__(self) -> None:
        _check_count("updates", self.updates)
        _check_rate("eta_min", self.eta_min)

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return the scheduler; torch's own would rise again after ``updates``."""
        _check_reaches(self.eta_min, optimizer)
        return _CosineOnce(optimizer, self.updates, self.eta_min)


class _CosineOnce(LRScheduler):
    def __init__(self, optimizer: torch.optim.Optimizer, updates: int, eta_min: float) -> None:
        self.updates, self.eta_min = updates, eta_min
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        done = min(self.last_epoch / self.updates, 1.0)
        decay = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * decay for base in self.base_lrs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Multiply the rate by gamma every so many updates."""

    every: int
    """Updates between two changes."""

    gamma: float = 0.1
    """Factor on the rate, above 0 and at most 1."""

    def __post_init__(self) -> None:
        _check_count("every", self.every)
        _check_factor("gamma", self.gamma)

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return torch's scheduler."""
        return StepLR(optimizer, self.every, self.gamma)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiStep:
    """Multiply the rate by gamma after each of the given updates."""

    milestones: tuple[int, ...]
    """Updates after which the rate changes, rising."""

    gamma: float = 0.1
    """Factor on the rate, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if not self.milestones or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must be one or more, rising, got {self.milestones}")
        for milestone in self.milestones:
            _check_count("milestones", milestone)
        _check_factor("gamma", self.gamma)

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return torch's scheduler."""
        return MultiStepLR(optimizer, list(self.milestones), self.gamma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential:
    """Multiply the rate by gamma after every update."""

    gamma: float
    """Factor on the rate, above 0 and at most 1; 0.999 halves the rate in 693 updates."""

    def __post_init__(self) -> None:
        _check_factor("gamma", self.gamma)

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return torch's scheduler."""
        return ExponentialLR(optimizer, self.gamma)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWarmup:
    """Raise the rate in equal parts from a fraction of the optimizer's lr to the whole of it."""

    updates: int
    """Updates until the rate is the optimizer's lr, where it then stays."""

    start: float = 0.1
    """Fraction of the lr to start with, above 0 and at most 1."""

    def __post_init__(self) -> None:
        _check_count("updates", self.updates)
        _check_factor("start", self.start)

    def build(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return torch's scheduler."""
        return LinearLR(optimizer, start_factor=self.start, total_iters=self.updates)


SCHEDULES: Registry[Schedule] = Registry("schedule")
SCHEDULES.register(
    "cosine", CosineRestarts, source="Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983"
)
SCHEDULES.register(
    "cosine-once", CosineOnce, source="Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983"
)
SCHEDULES.register("step", Step)
SCHEDULES.register("multistep", MultiStep)
SCHEDULES.register("exponential", Exponential)
SCHEDULES.register("linear", LinearWarmup, source="Goyal et al., arXiv:1706.02677, 2017")


def _check_count(name: str, count: int) -> None:
    if not (isinstance(count, int) and count >= 1):
        raise ValueError(f"{name} must be a whole number of updates, 1 or more, got {count}")


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < math.inf:
        raise ValueError(f"{name} must be 0 or more, got {rate}")


def _check_factor(name: str, factor: float) -> None:
    if not 0 < factor <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {factor}")


def _check_reaches(eta_min: float, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if group["lr"] < eta_min:
            raise ValueError(
                f"eta_min must be at most the optimizer's lr ({group['lr']}), got {eta_min}"
            )
