"""Damping: the older a gradient, the shorter its step.

A damping is a factor on the step as a function of staleness alone. Under exponential compute times
staleness over ``M`` workers is geometric, so the mean factors are known: ``ln M / (M - 1)`` for
``dynsgd`` and ``(1 + ln M) / M`` for ``inverse``. A learning rate tuned without damping needs to be
that much larger with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from paramserver.registry import Registry
from paramserver.rules import Damping


@dataclass(frozen=True, slots=True, kw_only=True)
class NoDamping:
    """Leaves the step as it is."""

    def scale(self, staleness: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseDamping:
    """Divides the step by the staleness; staleness 0 and 1 both leave it as it is.

    Source: Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI 2016,
    arXiv:1511.05950. The paper's ``1 / staleness`` has no value at 0; the step is kept there.
    """

    def scale(self, staleness: int) -> float:
        """Return ``1 / max(staleness, 1)``."""
        return 1.0 / max(staleness, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynSGD:
    """Divides the step by the staleness plus one.

    Source: Jiang et al., "Heterogeneity-aware Distributed Parameter Servers", SIGMOD 2017, in the
    form of Hermans, "On Scalable Deep Learning and Parallelizing Gradient Descent", 2017.
    """

    def scale(self, staleness: int) -> float:
        """Return ``1 / (staleness + 1)``."""
        return 1.0 / (staleness + 1)


DAMPINGS: Registry[Damping] = Registry("damping")
DAMPINGS.register("none", NoDamping)
DAMPINGS.register("inverse", InverseDamping, source="Zhang et al., IJCAI 2016, arXiv:1511.05950")
DAMPINGS.register("dynsgd", DynSGD, source="Jiang et al., SIGMOD 2017")
