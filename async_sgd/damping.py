"""Damping: the older a gradient, the shorter its step.

A damping is a factor on the step as a function of the staleness ``t`` and of the number ``M`` of
workers that take part now. It is 1 for a fresh gradient and never rises with staleness. Under
exponential compute times staleness over ``M`` workers is geometric, so the mean factors are known,
with ``p = 1 - 1/M``:

    damping      factor                               mean factor
    inverse      1 / max(t, 1)                        (1 + ln M) / M
    dynsgd       1 / (t + 1)                          ln M / (M - 1)
    polynomial   1 / (t + 1)^power                    Li_power(p) / (M - 1)
    hinge        1 / (slope max(t - start, 0) + 1)    1 - p^start + p^start F / M,
                                                      F = 2F1(1, 1/slope; 1 + 1/slope; p)
    exponential  rate^t                               1 / (M - rate (M - 1))
    mishchenko   M / max(M, t + 1)                    to 1 - 1/e + E1(1) = 0.85 for large M
    koloskova    M / max(M, t)                        the same

A learning rate tuned without damping needs to be divided by the mean factor with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paramserver.registry import Registry
from paramserver.rules import Damping

LEAST = 1e-12
"""The smallest factor of those that fall fast. A mean is divided by the sum of its factors, so a
factor that is 0 in float32 would make NaN of a mean of such gradients alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDamping:
    """Leaves the step as it is."""

    def scale(self, staleness: int, workers: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseDamping:
    """Divides the step by the staleness; staleness 0 and 1 both leave it as it is.

    Source: Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI 2016,
    arXiv:1511.05950. The paper's ``1 / staleness`` has no value at 0; the step is kept there.
    """

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``1 / max(staleness, 1)``."""
        return 1.0 / max(staleness, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynSGD:
    """Divides the step by the staleness plus one.

    Source: Jiang et al., "Heterogeneity-aware Distributed Parameter Servers", SIGMOD 2017, in the
    form of Hermans, "On Scalable Deep Learning and Parallelizing Gradient Descent", 2017.
    """

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``1 / (staleness + 1)``."""
        return 1.0 / (staleness + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolynomialDamping:
    """Divides the step by a power of the staleness plus one; power 1 is dynsgd.

    Source: Xie, Koyejo & Gupta, "Asynchronous Federated Optimization", OPT 2020, arXiv:1903.03934.
    """

    power: float = 0.5
    """How fast the step falls, 0 or more; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ValueError(f"power must be 0 or more, got {self.power}")

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``1 / (staleness + 1)^power``."""
        return max(math.pow(staleness + 1, -self.power), LEAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class HingeDamping:
    """Leaves the step as it is up to a staleness, then divides it by one plus a multiple.

    The first update above ``start`` already leaves ``1 / (slope + 1)`` of the step.

    Source: Xie, Koyejo & Gupta, "Asynchronous Federated Optimization", OPT 2020, arXiv:1903.03934.
    """

    slope: float = 10.0
    """What each update above ``start`` adds to the divisor, 0 or more."""

    start: int = 4
    """Updates a gradient may be late and still count in full."""

    def __post_init__(self) -> None:
        if not 0 <= self.slope < math.inf:
            raise ValueError(f"slope must be 0 or more and finite, got {self.slope}")
        if self.start < 0:
            raise ValueError(f"start must be 0 updates or more, got {self.start}")

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``1 / (slope * max(staleness - start, 0) + 1)``."""
        return max(1.0 / (self.slope * max(staleness - self.start, 0) + 1.0), LEAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialDamping:
    """Multiplies the step by the same rate for every update a gradient is late.

    Zhang et al. (arXiv:1511.05950) object that a gradient hundreds of updates late then counts for
    nothing, and with hundreds of workers every gradient is. Choose ``1 / (1 - rate)`` no smaller
    than their number.

    Source: Chan & Lane, "Distributed Asynchronous Optimization of Convolutional Neural Networks",
    INTERSPEECH 2014.
    """

    rate: float = 0.9
    """What is left of the step for each update a gradient is late, above 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate}")

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``rate^staleness``."""
        return max(self.rate**staleness, LEAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class MishchenkoDamping:
    """Leaves the step as it is while staleness is below the number of workers.

    Workers that push in turn are never damped: each is one less stale than there are workers.

    Source: Mishchenko et al., "Asynchronous SGD Beats Minibatch SGD Under Arbitrary Delays",
    NeurIPS 2022, arXiv:2206.07638; their delay is the staleness plus one.
    """

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``workers / max(workers, staleness + 1)``."""
        return workers / max(workers, staleness + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KoloskovaDamping:
    """Leaves the step as it is up to a limit, by default the number of workers.

    The paper's step is ``eta`` while staleness is at most the concurrency, the number of workers
    that compute, and ``min(eta, 1 / (4 L staleness))`` above it, where ``L`` is the smoothness of
    the loss. As a factor on ``eta`` the second is ``min(1, limit / staleness)``, where ``limit``
    stands for ``1 / (4 L eta)``, which nobody knows. The default, the concurrency, is right for the
    largest ``eta`` at which the two meet without a jump, and a smaller ``eta`` has a larger limit.
    So the factor is continuous at the limit and at most 1. A limit of 1 is ``inverse``.

    Source: Koloskova, Stich & Jaggi, "Sharper Convergence Guarantees for Asynchronous SGD for
    Distributed and Federated Learning", NeurIPS 2022, arXiv:2206.08307.
    """

    limit: int | None = None
    """Updates a gradient may be late and still count in full, 1 or more; None: as many as there
    are workers."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 update or more, got {self.limit}")

    def scale(self, staleness: int, workers: int) -> float:
        """Return ``min(1, limit / staleness)``."""
        limit = workers if self.limit is None else self.limit
        return limit / max(limit, staleness)


_XIE = "Xie et al., OPT 2020, arXiv:1903.03934"

DAMPINGS: Registry[Damping] = Registry("damping")
DAMPINGS.register("none", NoDamping)
DAMPINGS.register("inverse", InverseDamping, source="Zhang et al., IJCAI 2016, arXiv:1511.05950")
DAMPINGS.register("dynsgd", DynSGD, source="Jiang et al., SIGMOD 2017")
DAMPINGS.register("polynomial", PolynomialDamping, source=_XIE)
DAMPINGS.register("hinge", HingeDamping, source=_XIE)
DAMPINGS.register("exponential", ExponentialDamping, source="Chan & Lane, INTERSPEECH 2014")
DAMPINGS.register(
    "mishchenko", MishchenkoDamping, source="Mishchenko et al., NeurIPS 2022, arXiv:2206.07638"
)
DAMPINGS.register(
    "koloskova", KoloskovaDamping, source="Koloskova et al., NeurIPS 2022, arXiv:2206.08307"
)
