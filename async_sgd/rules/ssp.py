"""Stale synchronous parallel: pushes are applied at once, fast workers run ahead only so far.

A worker that has ended ``c`` clocks may start another only while ``c - min(live clocks) <= s``.
With ``s = 1``:

    worker 0  |-0-|-1-|...|-2-|    ended 2, the slowest 0: waits until worker 1 ends its first
    worker 1  |-----0-----|----1----|

What follows, and is checked at every push:

- The clocks of any two live workers differ by at most ``s + 1``.
- Staleness is at most ``(2s + 1)(P - 1)``, where ``P`` is the largest number of workers that were
  live at once. A worker reads at clock ``c``; every other one has then ended ``c - s`` or more, and
  cannot end more than ``c + s + 1`` before the reader's own push: ``2s + 1`` pushes each. Both
  bounds are tight: heavy-tailed compute times reach them.

**Joining.** A worker starts at the clock it is told, its predecessor's or, if it is new, the
smallest live one. But that clock is moved

- up to the smallest live clock, since those in flight may end too far ahead of a lower one, and
  nobody is to wait while it makes up for clocks the others ended without it;
- up to the largest clock a worker had when it left: the joiner takes over what is left of its
  place. If a place could be used again from a lower clock, two workers in turn could push more than
  ``2s + 1`` times during one flight;
- down to ``s + 1`` above the smallest live clock, where the fastest may be.

Workers that resume together join in the order of their clocks, lowest first; then none is moved.
The rule counts pushes itself, because a worker whose clock was moved does not know it.

Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server", NIPS 2013. The staleness bound in versions is derived above.
"""

from __future__ import annotations

from dataclasses import dataclass

from paramserver.rules import Accept, Bound, Push, Rule, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class SSP:
    """Applies pushes at once; a worker too far ahead of the slowest waits."""

    bound: int = 4
    """Clocks a worker may be ahead of the slowest and still start another; 0 is lock-step."""

    def __post_init__(self) -> None:
        if self.bound < 0:
            raise ValueError(f"bound must be 0 clocks or more, got {self.bound}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return SSPRule(self.bound)


class SSPRule:
    """Keeps the live clocks within ``bound + 1`` of each other; a `paramserver.rules.Rule`."""

    name = "ssp"
    gathers = False
    cancel_age: int | None = None
    tabulates = False

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._clocks: dict[int, int] = {}
        self._at: dict[int, frozenset[int]] = {}  # clock -> live workers there, none empty
        self._slowest = 0  # the smallest live clock
        self._left_at = 0  # the largest clock a worker had when it left
        self._peak = 0  # the largest number of live workers so far

    def on_join(self, worker: int, clock: int) -> None:
        """Start ``worker`` at ``clock``, or as near to it as the promises allow."""
        assert worker not in self._clocks, f"worker {worker} joined twice"
        start = max(clock, self._left_at)
        if self._clocks:
            start = min(max(start, self._slowest), self._slowest + self._bound + 1)
        self._enter(worker, start)
        self._slowest = min(self._at)
        self._peak = max(self._peak, len(self._clocks))

    def on_push(self, push: Push) -> Verdict:
        """Apply ``push``; its worker has ended one more clock."""
        self._enter(push.worker, self._exit(push.worker) + 1)
        if self._slowest not in self._at:
            self._slowest = min(self._at)
        return Accept()

    def on_leave(self, worker: int) -> bool:
        """Let nobody wait for ``worker``; no update is ever left half gathered."""
        if worker in self._clocks:
            self._left_at = max(self._left_at, self._exit(worker))
            self._slowest = min(self._at, default=0)
        return False

    def waits_for(self, worker: int) -> frozenset[int]:
        """Name the slowest workers while ``worker`` is more than the bound ahead of them.

        No others can be too far behind: clocks differ by at most ``bound + 1``.
        """
        if self._clocks[worker] - self._slowest <= self._bound:
            return frozenset()
        return self._at[self._slowest]

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """Bound the distance of the pusher to the slowest worker, and the push's staleness."""
        gap = self._clocks[push.worker] - self._slowest
        stale = (2 * self._bound + 1) * (self._peak - 1)
        return (
            Bound("clock gap", self._bound + 1, gap, push.worker),
            Bound("staleness", stale, push.staleness, push.worker),
        )

    def _enter(self, worker: int, clock: int) -> None:
        self._clocks[worker] = clock
        self._at[clock] = self._at.get(clock, frozenset()) | {worker}

    def _exit(self, worker: int) -> int:
        clock = self._clocks.pop(worker)
        rest = self._at[clock] - {worker}
        if rest:
            self._at[clock] = rest
        else:
            del self._at[clock]
        return clock
