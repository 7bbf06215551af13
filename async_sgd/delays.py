"""Delays: how many virtual seconds a worker takes for a gradient, or a server for a push.

All laws but ``trace`` and ``resampled`` are closed forms, most with known order statistics and
queues, so that what is simulated with them can be checked. Those two have what real processes took.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from async_sgd.trace_laws import Resampled, Trace
from paramserver.registry import Registry

_MIN_CV, _MAX_CV = 1e-6, 10.0
"""Range of a coefficient of variation; far outside, a gamma in float64 is constant or mostly 0."""


class DelayLaw(Protocol):
    """How delays are distributed; holds no state of a run."""

    def check(self, num_workers: int) -> None:
        """Make sure that there are delays for workers 0 to ``num_workers`` - 1; comes first.

        Raises:
            ValueError: The law does not fit so many workers.
            RecordError: A file of delays cannot be read; it is read once, at the first call.
        """

    def draws(
        self, worker: int, num_workers: int, generator: Generator
    ) -> Callable[[int], NDArray[np.float64]]:
        """Return what draws the next ``n`` delays of ``worker``, in seconds, shape ``(n,)``.

        Each is 0 or more and finite. They do not depend on how many are drawn at a time.

        Args:
            worker: Whose delays, 0 to ``num_workers`` - 1.
            num_workers: As given to `check`.
            generator: The worker's own stream, at its beginning.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class _Law(ABC):
    """What every law but the trace has: workers that differ by a constant factor."""

    factors: tuple[float, ...] | None = None
    """What each worker's delays are multiplied by, above 0, one a worker; None is 1 for all."""

    spread: float = 0.0
    """Draws each worker's factor, once, from a gamma with mean 1 and this coefficient of variation;
    0 is 1 for all. Source: the coefficient-of-variation-based method of Ali et al., Tamkang Journal
    of Science and Engineering 3(3), 2000."""

    def __post_init__(self) -> None:
        for worker, factor in enumerate(self.factors or ()):
            _check_above_0(f"the factor of worker {worker}", factor)
        if self.spread != 0:
            _check_cv("spread", self.spread)
            if self.factors is not None:
                raise ValueError("factors and spread both say how workers differ: give only one")
        self._check_keys()

    def check(self, num_workers: int) -> None:
        """Refuse factors that are not one a worker."""
        if self.factors is not None and len(self.factors) != num_workers:
            raise ValueError(
                f"factors must be one for each of the {num_workers} workers, "
                f"got {len(self.factors)}"
            )

    def draws(
        self, worker: int, num_workers: int, generator: Generator
    ) -> Callable[[int], NDArray[np.float64]]:
        """Return what draws the delays of ``worker``: its factor times those of the law."""
        factor = 1.0 if self.factors is None else self.factors[worker]
        if self.spread != 0:
            factor = generator.gamma(*_gamma_shape_and_scale(1.0, self.spread))
        return lambda n: factor * self._draw(generator, n)

    @abstractmethod
    def _check_keys(self) -> None:
        """Refuse values of the law's own keys that are out of range."""

    @abstractmethod
    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        """Return ``n`` delays of a worker whose factor is 1, shape ``(n,)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(_Law):
    """The same time, always; equal workers then take turns."""

    time: float = 1.0
    """Seconds, 0 or more."""

    def _check_keys(self) -> None:
        _check_not_below_0("time", self.time)

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        return np.full(n, self.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential(_Law):
    """Memoryless times; the staleness of equal workers is then geometric.

    Source: Mitliagkas et al., "Asynchrony begets Momentum", Allerton 2016, arXiv:1605.09774.
    """

    mean: float = 1.0
    """Mean, in seconds, above 0."""

    def _check_keys(self) -> None:
        _check_above_0("mean", self.mean)

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        return generator.exponential(self.mean, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedExponential(_Law):
    """A least time plus an exponential one.

    Source: Lee et al., "Speeding Up Distributed Machine Learning Using Codes", IEEE Transactions on
    Information Theory 64(3), 2018, arXiv:1512.02673; Dutta et al., AISTATS 2018, arXiv:1803.01113.
    """

    shift: float = 0.5
    """Least delay, in seconds, 0 or more."""

    mean: float = 0.5
    """Mean of what comes on top of ``shift``, in seconds, above 0."""

    def _check_keys(self) -> None:
        _check_not_below_0("shift", self.shift)
        _check_above_0("mean", self.mean)

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        return self.shift + generator.exponential(self.mean, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma(_Law):
    """Times that vary by a given share of their mean: shape 1 / cv**2, scale mean * cv**2.

    With ``spread`` it is the heterogeneous cluster of Ali et al., which DANA uses with cv=0.1 and
    spread=0.6.

    Source: Ali et al., "Representing Task and Machine Heterogeneities for Heterogeneous Computing
    Systems", Tamkang Journal of Science and Engineering 3(3), 2000.
    """

    mean: float = 1.0
    """Mean, in seconds, above 0."""

    cv: float = 0.1
    """Coefficient of variation, the standard deviation over the mean."""

    def _check_keys(self) -> None:
        _check_above_0("mean", self.mean)
        _check_cv("cv", self.cv)

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        shape, scale = _gamma_shape_and_scale(self.mean, self.cv)
        return generator.gamma(shape, scale, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto(_Law):
    """Heavy tail: P(delay > x) = (scale / x)**alpha, with mean scale * alpha / (alpha - 1).

    The variance is infinite up to alpha=2. Source: Wang et al., "Efficient Straggler Replication in
    Large-scale Parallel Computing", 2015, arXiv:1503.03128.
    """

    alpha: float = 2.5
    """Exponent of the tail, above 1."""

    scale: float = 0.6
    """Least delay, in seconds, above 0."""

    def _check_keys(self) -> None:
        _check_above_0("scale", self.scale)
        if not 1 < self.alpha < math.inf:
            raise ValueError(
                f"alpha must be above 1 and finite, got {self.alpha}: up to 1 there is no mean, "
                "and the time of a run says nothing"
            )

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        return self.scale * (1 + generator.pareto(self.alpha, n))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal(_Law):
    """exp of a normal, with variance ln(1 + cv**2) and mean ln(mean) less half of that."""

    mean: float = 1.0
    """Mean of the delays, in seconds, above 0."""

    cv: float = 0.5
    """Coefficient of variation, the standard deviation over the mean."""

    def _check_keys(self) -> None:
        _check_above_0("mean", self.mean)
        _check_cv("cv", self.cv)

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        variance = math.log1p(self.cv**2)
        return generator.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), n)


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfNormal(_Law):
    """plus + |N(0, s)|, where s is sqrt(pi / 2) times the mean of that part.

    Source: Nguyen et al., AISTATS 2022, arXiv:2106.06639 (FedBuff); with ``plus``, the experiments
    of Maranjyan et al., arXiv:2501.16168 (Ringmaster ASGD).
    """

    mean: float = 1.0
    """Mean of what comes on top of ``plus``, in seconds, above 0."""

    plus: float = 0.0
    """Least delay, in seconds, 0 or more."""

    def _check_keys(self) -> None:
        _check_above_0("mean", self.mean)
        _check_not_below_0("plus", self.plus)

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        return self.plus + np.abs(generator.normal(0.0, self.mean * math.sqrt(math.pi / 2), n))


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(_Law):
    """Any time between two, equally likely."""

    low: float = 0.5
    """Least delay, in seconds, 0 or more."""

    high: float = 1.5
    """Largest delay, in seconds, above ``low``."""

    def _check_keys(self) -> None:
        _check_not_below_0("low", self.low)
        if not self.low < self.high < math.inf:
            raise ValueError(f"high must be above low ({self.low}) and finite, got {self.high}")

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        return generator.uniform(self.low, self.high, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler(_Law):
    """The same time but for some gradients, of any worker, that take several times as long."""

    time: float = 0.8
    """What a gradient takes as a rule, in seconds, above 0."""

    factor: float = 6.0
    """How many times as long it takes otherwise, above 0."""

    probability: float = 0.05
    """Share of the gradients that take longer, 0 to 1."""

    def _check_keys(self) -> None:
        _check_above_0("time", self.time)
        _check_above_0("factor", self.factor)
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be 0 to 1, got {self.probability}")

    def _draw(self, generator: Generator, n: int) -> NDArray[np.float64]:
        straggles = generator.random(n) < self.probability
        return np.where(straggles, self.factor * self.time, self.time)


def _gamma_shape_and_scale(mean: float, cv: float) -> tuple[float, float]:
    return 1 / cv**2, mean * cv**2


def _check_above_0(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value}")


def _check_not_below_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be 0 or more and finite, got {value}")


def _check_cv(name: str, value: float) -> None:
    if not _MIN_CV <= value <= _MAX_CV:
        raise ValueError(f"{name} must be {_MIN_CV:g} to {_MAX_CV:g}, got {value}")


DELAYS: Registry[DelayLaw] = Registry("delay")
DELAYS.register("constant", Constant)
DELAYS.register(
    "exponential", Exponential, source="Mitliagkas et al., Allerton 2016, arXiv:1605.09774"
)
DELAYS.register(
    "shifted-exponential",
    ShiftedExponential,
    source="Lee et al., IEEE Trans. Inf. Theory 2018, arXiv:1512.02673; Dutta et al., "
    "arXiv:1803.01113",
)
DELAYS.register("gamma", Gamma, source="Ali et al., Tamkang J. Sci. Eng. 2000")
DELAYS.register("pareto", Pareto, source="Wang et al., 2015, arXiv:1503.03128")
DELAYS.register("lognormal", LogNormal)
DELAYS.register(
    "half-normal",
    HalfNormal,
    source="Nguyen et al., AISTATS 2022, arXiv:2106.06639; Maranjyan et al., arXiv:2501.16168",
)
DELAYS.register("uniform", Uniform)
DELAYS.register("straggler", Straggler)
DELAYS.register("trace", Trace)
DELAYS.register("resampled", Resampled)
