"""Ringmaster ASGD: asynchronous, but a gradient with a delay of the threshold or more is ignored.

Every worker computes all the time; a push of staleness ``R`` or more is dropped as ``stale``, and
its worker reads the new version and goes on. With ``R = 2``:

    worker 0  |-g-|-g-|-g-|-g-|
    worker 1  |------g------|--g--|
    version   0   1   2   3 ^ of version 0, staleness 3: dropped

So no update is ever made from a gradient staler than ``R - 1``, which is checked at every push.
``limit=1`` takes gradients of the current version alone. The machine is that of
`async_sgd.rules.bounded`, whose ``limit`` is the largest staleness that is taken, ``R - 1``.

This is the paper's first version (Algorithm 4). ``cancel=true`` is its second (Algorithm 5), which
stops a computation as soon as its delay reaches ``R``: that spares slow workers the rest of a
gradient that would be ignored, and has them read the version that made it so.

    worker 0  |-g-|-g-|-g-|-g-|
    worker 1  |---g---|-----g-|--
    version   0   1   2   3     worker 1 began anew at version 2

Then any ``R`` updates in a row take at most ``2 min_m [m / Σ_{i≤m} (1/τ_i) · (1 + R/m)]`` if worker
i takes τ_i for a gradient, the fastest coming first. How a worker hears of it: `workers.loop`.

Source: Maranjyan, Tyurin & Richtarik, "Ringmaster ASGD: The First Asynchronous SGD with Optimal
Time Complexity", ICML 2025, arXiv:2501.16168. Its theory sets ``R`` to the variance of a gradient
over the squared gradient norm aimed at, rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_sgd.rules.bounded import BoundedStalenessRule
from paramserver.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Ringmaster:
    """Drops a push whose staleness has reached a threshold; nobody waits."""

    limit: int
    """The threshold R, in updates: the least staleness that is dropped."""

    cancel: bool = False
    """Whether a gradient under way is cancelled when it reaches the threshold."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be 1 update or more, got {self.limit}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return BoundedStalenessRule("ringmaster", self.limit - 1, "drop", cancel=self.cancel)
