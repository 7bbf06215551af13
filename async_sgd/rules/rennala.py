"""Rennala SGD: a batch of gradients at one version, from whoever computes them.

A push counts if it was computed on the current version, else it is dropped as ``late``. The
``S``-th that counts completes the batch, whose mean is the update. Nobody waits, so a fast worker
gives a batch as many gradients as it can, and ``S`` may exceed the number of workers. With
``S = 4``:

    worker 0  |-g-|-g-|-g-|-g-|-g-|
    worker 1  |----g----|----g----|
    version   0           1       worker 1's second is of version 0: late

Nothing in a batch is stale, which is checked at every push. What is under way when a batch is
completed will be late: one gradient of every other worker, so ``S`` is best well above their number
``M``. With ``S = M`` and equal speeds almost half of all are: ``M`` updates take the time of
``2M - 1`` gradients, in which BSP makes ``2M - 1`` updates.

With ``cancel=true`` it is cancelled at that moment instead: its worker is spared the rest of a
gradient that nobody takes, and begins one of the new version.

The machine is that of `async_sgd.rules.gathering`; ``k-of-n:mode=batch-sync`` is the same rule.

Source: Tyurin & Richtarik, "Optimal Time Complexities of Parallel Stochastic Optimization Methods
Under a Fixed Computation Model", NeurIPS 2023, arXiv:2305.12387.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_sgd.rules.gathering import Gathering
from paramserver.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Rennala:
    """Averages a batch of gradients at one version, several of a fast worker; nobody waits."""

    batch: int
    """Gradients in an update."""

    cancel: bool = False
    """Whether gradients under way are cancelled when a batch is completed without them."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be 1 gradient or more, got {self.batch}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return Gathering(
            "rennala",
            needed=self.batch,
            current_only=True,
            taken_wait=False,
            cancel=self.cancel,
        )
