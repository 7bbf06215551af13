"""From a real run's record to the delay law it is simulated with, and how well that predicts it.

A push's delay is the time from its worker's read to its arrival. Where processes share processors,
something slows all workers at once, and what they have in common changes no order: it makes delays
longer, not pushes staler. So each delay is divided by the mean of those around it in the order of
arrival, about two of each worker, and what is left says how workers differ and how much one of them
varies. That is fitted by a gamma or a lognormal law, whichever makes it more likely, with a factor
for every worker; the seconds are such that the law makes as many gradients a second as the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from async_sgd.delays import DelayLaw, Gamma, LogNormal
from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.record import RunFolder

_LEAST_PUSHES = 20
"""Pushes of every worker that it takes to say something about its delays."""

_LEAST_CV = 1e-3
"""Variation below which delays are as good as constant."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A delay law that stands for a recorded run."""

    folder: Path
    """Of its record."""
    law: DelayLaw
    num_workers: int
    pushes: int
    """Delays it was fitted to."""
    gradients_per_s: float
    """Pushes a second while the recorded run went."""
    staleness: Mapping[int, int]
    """The recorded run's applied pushes, by staleness."""


def calibrate(folder: Path) -> Calibration:
    """Fit a delay law to the record of an asynchronous run.

    Raises:
        RecordError: There is no ledger, or too little in it.
    """
    ledger = Ledger.load(RunFolder(folder).updates)
    rows = ledger.rows(0)
    reasons = np.array(ledger.reasons())[rows["dropped"]]
    rows = rows[reasons != "ended"]  # a worker that is told to stop may have been held up by that
    delays = rows["end"] - rows["start"]
    worker = rows["worker"]
    num_workers = int(worker.max(initial=-1)) + 1
    each = np.bincount(worker, minlength=num_workers)
    if num_workers == 0 or each.min() < _LEAST_PUSHES:
        least = int(each.min()) if num_workers else 0
        raise RecordError(
            f"{folder} has {least} pushes of one worker: it takes {_LEAST_PUSHES} of each to fit a "
            "delay law"
        )
    if not (delays > 0).all():
        raise RecordError(f"{folder} has pushes that took no time: no law fits them")
    relative = delays / _around(delays, 2 * num_workers + 1)
    means = np.bincount(worker, relative) / each
    seconds = float(rows["end"].max() - rows["start"].min())
    # workers that take m_1, m_2, … seconds make 1 / m_1 + 1 / m_2 + … gradients a second
    mean = float((1 / means).sum() * means.mean()) * seconds / len(rows)
    law = _most_likely(relative / means[worker], mean, means / means.mean())
    return Calibration(
        folder, law, num_workers, len(rows), len(rows) / seconds, ledger.staleness.histogram()
    )


def distance(recorded: Mapping[int, int], simulated: Mapping[int, int]) -> float:
    """Return the total variation distance of two histograms, 0 to 1: half the sum of |p - q|."""
    values = {*recorded, *simulated}
    of, to = max(sum(recorded.values()), 1), max(sum(simulated.values()), 1)
    return sum(abs(recorded.get(v, 0) / of - simulated.get(v, 0) / to) for v in values) / 2


def _around(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of each value and its neighbours, ``window`` in all, fewer at the ends."""
    ones = np.ones(window)
    sums = np.convolve(values, ones, mode="same")
    counts = np.convolve(np.ones_like(values), ones, mode="same")
    means: NDArray[np.float64] = sums / counts
    return means


def _most_likely(x: NDArray[np.float64], mean: float, factors: NDArray[np.float64]) -> DelayLaw:
    """Return the law under which ``x``, of mean 1, is most likely, scaled to ``mean`` seconds."""
    each: Any = {"factors": tuple(_rounded(f) for f in factors) if len(factors) > 1 else None}
    mean, cv = _rounded(mean), _rounded(max(float(x.std()), _LEAST_CV))
    shape, sigma2 = 1 / cv**2, math.log1p(cv**2)
    log = np.log(x)
    likelihood: dict[DelayLaw, float] = {
        Gamma(mean=mean, cv=cv, **each): float(
            np.mean((shape - 1) * log - shape * x) + shape * math.log(shape) - math.lgamma(shape)
        ),
        LogNormal(mean=mean, cv=cv, **each): float(
            np.mean(-log - (log + sigma2 / 2) ** 2 / (2 * sigma2))
            - math.log(2 * math.pi * sigma2) / 2
        ),
    }
    return max(likelihood, key=lambda law: likelihood[law])


def _rounded(value: float) -> float:
    """Return ``value`` with as many digits as a fit has."""
    return float(f"{value:.4g}")
