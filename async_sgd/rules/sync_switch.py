"""Sync-Switch: the first updates in lock-step, the others asynchronous.

Each of the first ``N`` updates averages a gradient of every live worker, and all wait for the
slowest, as under ``bsp``. From version ``N`` on every push is applied at once, as under ``asp``.
With ``N = 2``:

    worker 0  |-g-|wait|-g-|wait|-g-|-g-|-g-|
    worker 1  |---g----|---g----|---g----|---g----|
    version   0        1        2   3   45  6

The switch is the moment at which version ``N`` is made, by the push or the leave that completed the
update. Nothing is lost there: every live worker is in that update, so nothing was gathered for
another, nothing is under way, and all who waited read version ``N``. Until then staleness is 0,
which is checked at every push; after it nothing is promised.

Before the switch, joining and leaving is what `async_sgd.rules.gathering` says; after it, members
are equal. A resumed run is past the switch if its version is. An update is the mean of ``M``
gradients before the switch and one gradient after it: a learning rate that was raised for the mean
is to fall there, by a schedule.

Source: Li, Mangoubi, Xu & Guo, "Sync-Switch: Hybrid Parameter Synchronization for Distributed Deep
Learning", ICDCS 2021, arXiv:2104.08364.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_sgd.rules.asynchronous import AsynchronousRule
from async_sgd.rules.gathering import Gathering
from paramserver.rules import Accept, Bound, Push, Rule, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSwitch:
    """Works as bsp for a number of updates, then as asp."""

    after: int
    """Updates made in lock-step; 0 is asynchronous from the start."""

    def __post_init__(self) -> None:
        if self.after < 0:
            raise ValueError(f"after must be 0 updates or more, got {self.after}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return SyncSwitchRule(self.after)


class SyncSwitchRule:
    """Asks one rule until a version is made, and another one then; a `paramserver.rules.Rule`."""

    name = "sync-switch"
    cancel_age: int | None = None
    tabulates = False

    def __init__(self, after: int) -> None:
        self.gathers = after > 0
        self._after = after
        self._version = 0  # of the server, as far as pushes have told
        self._first = Gathering("bsp", needed=None, current_only=True, taken_wait=True)
        self._then = AsynchronousRule()

    def on_join(self, worker: int, clock: int) -> None:
        """Let ``worker`` take part."""
        self._rule.on_join(worker, clock)

    def on_push(self, push: Push) -> Verdict:
        """Take ``push`` into the update that is gathered; after the switch, apply it."""
        self._version = push.version
        verdict = self._rule.on_push(push)
        if isinstance(verdict, Accept) and verdict.step:
            self._version += 1
        return verdict

    def on_leave(self, worker: int) -> bool:
        """Miss ``worker`` no more; the update may be complete without it."""
        is_complete = self._rule.on_leave(worker)
        if is_complete:
            self._version += 1
        return is_complete

    def waits_for(self, worker: int) -> frozenset[int]:
        """Name the workers missing in the update that ``worker`` is in; nobody after the switch."""
        return self._rule.waits_for(worker)

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """No staleness at all before the switch."""
        return self._first.bounds(push) if push.version < self._after else ()

    @property
    def _rule(self) -> Rule:
        return self._first if self._version < self._after else self._then
