"""From a real run's record to the delays it is simulated with, and how well those predict it.

A push's delay is the time from its worker's read to its arrival. What slows all workers at once is
taken out first, since it makes no push staler: each delay is divided by the median of those around
it in the order of arrival. What is left says how workers differ and how much one of them varies. It
is kept in two ways:

    a law         a gamma or a lognormal one, whichever makes the delays more likely, with a factor
                  for every worker: the run in a few numbers, for other numbers of workers, too
    `Resampled`   the delays themselves, each drawn from those around its place: processes that
                  share processors keep their order for seconds and lose it for others, which no
                  law does that is the same all the time

Both make as many gradients a second as the run.
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
from async_sgd.trace_laws import Resampled
from async_sgd.traces import read_pushes, without_common

_LEAST_CV = 1e-3
"""Variation below which delays are as good as constant."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Delays that stand for those of a recorded run."""

    folder: Path
    """Of its record."""
    law: DelayLaw
    """What they are like."""
    resampled: DelayLaw
    """What the run is simulated with."""
    gradients_per_s: float
    """Pushes a second while the recorded run went."""
    staleness: Mapping[int, int]
    """The recorded run's applied pushes, by staleness."""


def calibrate(folder: Path) -> Calibration:
    """Fit delays to the record of an asynchronous run.

    Raises:
        RecordError: There is no ledger, or too little in it.
    """
    pushes = read_pushes(folder)
    worker = pushes.worker
    relative = without_common(pushes)
    means = np.bincount(worker, relative) / np.bincount(worker)
    # workers that take m_1, m_2, … seconds make 1 / m_1 + 1 / m_2 + … gradients a second
    mean = float((1 / means).sum() * means.mean()) / pushes.per_s
    law = _most_likely(relative / means[worker], mean, means / means.mean())
    return Calibration(
        folder=folder,
        law=law,
        resampled=Resampled(path=str(folder)),
        gradients_per_s=pushes.per_s,
        staleness=pushes.staleness,
    )


def distance(recorded: Mapping[int, int], simulated: Mapping[int, int]) -> float:
    """Return the total variation distance of two histograms, 0 to 1: half the sum of |p - q|."""
    values = {*recorded, *simulated}
    of, to = max(sum(recorded.values()), 1), max(sum(simulated.values()), 1)
    return sum(abs(recorded.get(v, 0) / of - simulated.get(v, 0) / to) for v in values) / 2


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
