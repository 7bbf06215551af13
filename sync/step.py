"""One synchronous step, as every rank takes it.

    exchange   n_i, loss_i, |g_i| of every rank i; all gradients are complete
    reduce     g = Σ w_i g_i        mean: w_i = n_i / Σ n_j        sum: w_i = 1
    clip       g to its bound, by the norm of the whole g; that takes one more exchange
    update     θ with g, the optimizer's rule on this rank's slice
    publish    θ, or what the rule shows for it; the next gradients are computed on that
    average    θ after this update, on this rank's slice, if the run has an average

"mean" is the gradient of the mean loss over the joined batch: as if one process had read all of it.
"sum" adds the gradients of the ranks' own mean losses, whatever their numbers of samples. A step
with a gradient that is not finite is left out by all ranks alike.

Source: synchronous SGD with sharded optimizer state (ZeRO-1), Rajbhandari et al., SC 2020,
arXiv:1910.02054.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from paramserver.averaged_state import with_average, without_average
from paramserver.averaging import Average
from paramserver.clipping import Clip
from paramserver.optimizers import Optimizer, PushRule
from paramserver.optimizers.base import needs_norm
from paramserver.schedules import Schedule
from sync.collective import Collective, Sent

Reduce = Literal["mean", "sum"]
"""How the ranks' gradients become one."""


class Report(NamedTuple):
    """What a rank tells in each step, beside the gradient in its slot: a row of the exchange."""

    samples: float
    """Samples the gradient is the mean of, 1 or more."""
    loss: float
    """The mean loss over them."""
    norm: float
    """The gradient's 2-norm, before any clipping."""
    seconds: float
    """Time it took to compute."""
    bad_layer: float = -1.0
    """Number of the first layer whose gradient is not finite; below 0 if all of it is finite."""
    stop: float = 0.0
    """1 if the run is to end after this step."""
    save: float = 0.0
    """Number of the latest save that is wanted; a new one is made after this step."""
    show: float = 0.0
    """1 if this rank wants a snapshot after this step."""
    noise: float = 0.0
    """Estimate of tr(S), S the covariance of one sample's gradient, if it is measured."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step, the same on every rank."""

    reports: tuple[Report, ...]
    """By rank."""
    applied: bool
    """False if a gradient was not finite: the parameters are as they were."""

    @property
    def culprit(self) -> int:
        """The first rank whose gradient was not finite."""
        return next(rank for rank, report in enumerate(self.reports) if report.bad_layer >= 0)


class Stepper:
    """One rank's part in the group's steps: it owns the rule for this rank's slice."""

    def __init__(
        self,
        collective: Collective,
        optimizer: Optimizer,
        *,
        reduce: Reduce = "mean",
        clip: Clip | None = None,
        schedule: Schedule | None = None,
        average: Average | None = None,
    ) -> None:
        """Update the slice that ``collective`` gives this rank.

        Args:
            collective: The group.
            optimizer: Builds the rule.
            reduce: How gradients become one.
            clip: Applied to the reduced gradient.
            schedule: Changes the learning rate with every update.
            average: Of the parameters after each update.
        """
        self._collective, self._reduce, self._clip = collective, reduce, clip
        cut = collective.cut
        self._shown = collective.params[cut.start : cut.stop]
        self._param = nn.Parameter(self._shown, requires_grad=False)
        self.rule: PushRule = optimizer.build([self._param])
        if self.rule.shows:
            self._param.data = self._shown.clone()
        self._norm_needed = needs_norm(optimizer) or (clip is not None and clip.norm_needed)
        self.scheduler = None if schedule is None else schedule.build(self.rule)
        self.averager = None if average is None else average.build(self._param.data)

    @property
    def params(self) -> Tensor:
        """The parameters of this rank's slice, to be written before `show` only."""
        return self._param.data

    def show(self) -> None:
        """Publish the point of the next gradients: the parameters, or what the rule shows."""
        if self.rule.shows:
            self.rule.show(self._shown)
        self._collective.publish()

    def evaluated(self) -> Tensor | None:
        """Return what is evaluated of this rank's slice, if it is not what `show` has published."""
        mean = None if self.averager is None else self.averager.average()
        return self.params if mean is None and self.rule.shows else mean

    def saved(self) -> dict[str, Any]:
        """Return a copy of the state of the rule and the average."""
        return copy.deepcopy(with_average(self.rule.state_dict(), self.averager))

    def restore(self, rule: dict[str, Any], scheduler: dict[str, Any] | None) -> None:
        """Go on with what `saved` gave and a schedule's saved state."""
        rule, average = without_average(rule)
        self.rule.load_state_dict(rule)
        if self.averager is not None:
            self.averager.load_state_dict(average)
        if self.scheduler is not None and scheduler is not None:
            self.scheduler.load_state_dict(scheduler)

    def step(self, number: int, report: Report, sent: Sent | None = None) -> Outcome:
        """Take step ``number`` with the gradient in the collective's slot, perhaps compressed.

        Raises:
            PeerLostError: A rank is gone or silent; parameters may be old, new or a mix.
            ProtocolError: The ranks are not at the same step.
        """
        reports = tuple(map(Report._make, self._collective.exchange(number, report)))
        if any(r.bad_layer >= 0 for r in reports):
            return Outcome(reports, applied=False)
        factors = weights(self._reduce, [r.samples for r in reports])
        grad = self._collective.reduce(factors, sent)
        norm = math.nan
        if self._norm_needed:
            norms = self._collective.exchange(number, (_norm(grad),))
            norm = math.hypot(*(of_slice for (of_slice,) in norms))
        samples = sum(r.samples for r in reports)
        self.rule.told(sum(r.loss * r.samples for r in reports) / samples, norm)
        if self._clip is not None:
            self._clip.apply_(grad, norm)
        self.rule.apply([grad])
        if self.scheduler is not None:
            self.scheduler.step()
        self.show()
        if self.averager is not None:
            self.averager.update(self._param.data)
        return Outcome(reports, applied=True)


def _norm(vector: Tensor) -> float:
    """Return the 2-norm, also where the squares of elements pass the dtype's range."""
    norm = float(torch.linalg.vector_norm(vector))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(vector.double()))


def weights(reduce: Reduce, samples: Sequence[float]) -> list[float]:
    """Return each rank's factor in the reduced gradient."""
    if reduce == "sum":
        return [1.0] * len(samples)
    total = math.fsum(samples)
    return [n / total for n in samples]
