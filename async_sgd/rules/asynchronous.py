"""Asynchronous SGD: every push is applied when it arrives, and nobody waits.

    worker 0  |--g0--|--g1--|--g2--|
    worker 1  |----g0'----|----g1'----|
    version   0      1    2 3      4  5

Staleness is whatever the workers' speeds make it: over ``M`` workers that never pause its mean is
``M - 1``, however fast each of them is, and it has no bound.

Source: Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012 (Downpour SGD).
"""

from __future__ import annotations

from dataclasses import dataclass

from paramserver.rules import Accept, Bound, Push, Rule, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Asynchronous:
    """Applies every push at once; nobody waits and nothing is dropped."""

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return AsynchronousRule()


class AsynchronousRule:
    """Takes everything, remembers nothing; a `paramserver.rules.Rule`."""

    name = "asp"
    gathers = False
    cancel_age: int | None = None
    tabulates = False

    def on_join(self, worker: int, clock: int) -> None:
        """Do nothing: members are equal, however far each of them is."""

    def on_push(self, push: Push) -> Verdict:
        """Apply ``push`` in full."""
        return Accept()

    def on_leave(self, worker: int) -> bool:
        """Do nothing: no update is ever left half gathered."""
        return False

    def waits_for(self, worker: int) -> frozenset[int]:
        """Nobody."""
        return frozenset()

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """Nothing is promised."""
        return ()
