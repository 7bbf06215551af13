"""FedBuff: a buffer of gradients of any version, each damped by its own staleness.

The ``K``-th gradient in the buffer completes it: the update is the sum over the buffer of
``g / sqrt(1 + staleness)``, divided by ``K``. Nobody waits and nothing is dropped. With ``K = 3``:

    worker 0  |-g-|-g-|-g-|-g-|
    worker 1  |----g----|----g----|
    worker 2  |------g------|---g---|
    version   0         1     2     worker 2's first is of version 0: it counts 1 / sqrt(2)

Staleness counts updates, not gradients: over ``M`` workers its mean is ``(M - 1) / K``. It has no
bound. A worker goes on as soon as it has pushed, so a fast one may be in a buffer several times.
Federated clients are many and sampled anew, and seldom are; where a worker may be in an update only
once, use ``k-of-n:mode=async``, under which it waits, with the damping below.

The machine is that of `async_sgd.rules.gathering`: ``k-of-n:mode=batch-async`` with the damping
``polynomial:power=0.5`` as a part of the rule. A run's own damping comes on top of it.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
arXiv:2106.06639.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_sgd.damping import PolynomialDamping
from async_sgd.rules.gathering import Gathering
from paramserver.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class FedBuff:
    """Averages a buffer of gradients of any version, the staler the less; nobody waits."""

    size: int = 10
    """Gradients in an update."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be 1 gradient or more, got {self.size}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return Gathering(
            "fedbuff",
            needed=self.size,
            current_only=False,
            taken_wait=False,
            damping=PolynomialDamping(power=0.5),
        )
