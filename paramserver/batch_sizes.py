"""Batch sizes that follow the noise of the gradients: more samples where a step needs them.

    F    mean loss                                        moving averages, by `decay`, over the
    S    covariance of one sample's gradient; tr(S)       gradients that were applied
    lr   rate of the step that is taken next              by the schedule, at the next version

    next batch   m = lr tr(S) / F     rounded, then kept between least and most        (CABS)

A gradient of m samples has variance tr(S) / m, so this holds lr times that variance at F: early on,
where the loss is large, few samples do; as it falls, the batch grows, and the rate need not shrink.
It takes a loss whose least value is 0, or near it.

Both averages begin at 0 and are divided by the weight they have gathered, which their quotient does
without. With momentum the rate is what a lasting direction moves by: lr (1 - dampening) / (1 -
momentum). Several workers whose gradients make one update draw m together.

Source: Balles, Romero & Hennig, "Coupling Adaptive Batch Sizes with Learning Rates", UAI 2017,
arXiv:1612.05086, for plain SGD; rounding, limits and averages as in the authors' program, whose
average of the loss begins at 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from paramserver.errors import TaskError
from paramserver.optimizers.base import Optimizer, PushRule
from paramserver.registry import Registry
from paramserver.schedules import Schedule, Scheduler


class AdaptiveBatch(Protocol):
    """How many samples the next update takes, from what the gradients so far were like."""

    @property
    def least(self) -> int:
        """Samples of a worker's smallest batch, 2 or more."""

    @property
    def most(self) -> int:
        """Samples of a worker's largest batch; fewer if it owns fewer."""

    @property
    def decay(self) -> float:
        """Weight that the averages keep at each gradient, 0 to below 1."""

    @property
    def chunks(self) -> int:
        """Parts of a batch whose gradients' spread tells the noise, 2 or more."""

    def samples(self, rate: float, noise: float, loss: float) -> float:
        """Return the samples of an update: ``rate`` of its step, averages of tr(S) and the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CABS:
    """Samples so that the variance of a step falls with the loss: lr tr(S) / F."""

    least: int = 16
    """Samples of a worker's smallest batch, 2 or more."""

    most: int = 2048
    """Samples of a worker's largest batch; fewer if it owns fewer."""

    decay: float = 0.95
    """Weight that the averages of noise and loss keep at each gradient, 0 to below 1."""

    chunks: int = 2
    """Parts of a batch whose gradients' spread tells the noise, 2 or more. On digits in batches of
    32 the average noise is off by 5 % with 2, and by 3 % with 4, which take twice as long."""

    def __post_init__(self) -> None:
        if self.least < 2:
            raise ValueError(f"least must be 2 samples or more, which have a spread: {self.least}")
        if self.most < self.least:
            raise ValueError(f"most must be least ({self.least}) or more, got {self.most}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be 0 or more and below 1, got {self.decay}")
        if self.chunks < 2:
            raise ValueError(f"chunks must be 2 or more, got {self.chunks}")

    def samples(self, rate: float, noise: float, loss: float) -> float:
        """Return ``rate * noise / loss``; infinity if there is no loss left."""
        return rate * noise / loss if loss > 0 else math.inf


ADAPTIVE_BATCHES: Registry[AdaptiveBatch] = Registry("adaptive batch")
ADAPTIVE_BATCHES.register(
    "cabs", CABS, source="Balles, Romero & Hennig, UAI 2017, arXiv:1612.05086"
)


@dataclass(frozen=True, slots=True)
class Averages:
    """Moving averages of what gradients were like, times the weight they have gathered."""

    weight: float = 0.0
    """1 minus the decay to the number of gradients."""
    noise: float = 0.0
    loss: float = 0.0

    def after(self, noise: float, loss: float, decay: float) -> Averages:
        """Return the averages with one more gradient."""
        new = 1 - decay
        return Averages(
            decay * self.weight + new,
            decay * self.noise + new * noise,
            decay * self.loss + new * loss,
        )

    def state(self) -> dict[str, float]:
        """Return them as a checkpoint holds them."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Averages:
        """Return what `state` gave; None is no gradient yet."""
        return cls() if state is None else cls(**state)


class Rate:
    """The rate of the step that follows each version; asked for rising ones."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule | None) -> None:
        """Follow ``schedule`` from the optimizer's own rate on."""
        self._optimizer, self._schedule = optimizer, schedule
        momentum = getattr(optimizer, "momentum", 0.0)
        self._factor = (1 - getattr(optimizer, "dampening", 0.0)) / (1 - momentum)
        self._version = 0

    def at(self, version: int) -> float:
        """Return the rate at ``version``, that of a lasting direction if there is momentum."""
        rule, scheduler = self._stepped
        while scheduler is not None and self._version < version:
            rule.apply([torch.zeros(1)])
            scheduler.step()
            self._version += 1
        return float(rule.rate) * self._factor

    @cached_property
    def _stepped(self) -> tuple[PushRule, Scheduler | None]:
        # made where it is used: torch's schedulers do not travel to another process
        rule = self._optimizer.build([nn.Parameter(torch.zeros(1), requires_grad=False)])
        return rule, None if self._schedule is None else self._schedule.build(rule)


class Sizer:
    """Sizes the batches of one run. The same calls give the same sizes."""

    def __init__(
        self,
        spec: AdaptiveBatch,
        rate: Rate,
        *,
        first: int,
        owned: int,
        num_sharing: int = 1,
        averages: Averages = Averages(),
    ) -> None:
        """Size batches by ``spec``.

        Args:
            spec: How.
            rate: Of the steps.
            first: Samples of a worker's batch before anything is known of the noise.
            owned: Samples that a worker owns, at least: no batch is larger.
            num_sharing: Workers whose gradients make one update.
            averages: What is known of the noise.
        """
        self.averages = averages
        self._spec, self._rate, self._first, self._num_sharing = spec, rate, first, num_sharing
        self._least, self._most = spec.least, largest(spec, owned)

    def size(self, version: int) -> int:
        """Return how many samples a worker draws for an update that follows ``version``."""
        known = self.averages
        if known.weight == 0:
            wanted = float(self._first)
        else:
            rate = self._rate.at(version)
            wanted = self._spec.samples(rate, known.noise, known.loss) / self._num_sharing
        return max(self._least, round(min(wanted, self._most)))

    def add(self, noise: float, loss: float) -> None:
        """Hear of a gradient that is applied: its estimate of tr(S), and its mean loss.

        Raises:
            TaskError: The loss is below 0 on average.
        """
        self.averages = self.averages.after(noise, loss, self._spec.decay)
        if self.averages.loss < 0:
            mean = self.averages.loss / self.averages.weight
            raise TaskError(
                f"the loss is {mean:.3g} on average, and an adaptive batch counts on a least value "
                "of 0: add a constant to the loss, or leave adaptive_batch out"
            )


def largest(spec: AdaptiveBatch, owned: int) -> int:
    """Return the samples of the largest batch of a worker that owns so many.

    Raises:
        ValueError: They are fewer than the smallest batch has.
    """
    if owned < spec.least:
        raise ValueError(
            f"adaptive_batch: least={spec.least} is more than the {owned} samples a worker owns: "
            "use fewer workers or a smaller least"
        )
    return min(spec.most, owned)
