"""Bounded staleness: asynchronous, but a gradient that is too old counts less or not at all.

Nobody waits. A push with ``staleness <= limit`` is applied in full. An older one is

- dropped (``action="drop"``), so no update is ever made from a gradient staler than ``limit``.
  ``limit = R - 1`` is the threshold ``R`` of Ringmaster ASGD: `async_sgd.rules.ringmaster`.
- damped (``action="damp"``): its step is scaled by ``(limit + 1) / (staleness + 1)``, the step size
  of Mishchenko et al. with ``limit + 1`` in the place of their number of workers.

Dropping wastes the work of slow workers: one that needs more than ``limit + 1`` of the others'
updates for each gradient contributes nothing at all. The updates still go on, since the gradient
that is read latest is never stale.

Sources: Mishchenko et al., "Asynchronous SGD Beats Minibatch SGD Under Arbitrary Delays", NeurIPS
2022, arXiv:2206.07638 (damp). Koloskova et al., "Sharper Convergence Guarantees for Asynchronous
SGD", NeurIPS 2022, arXiv:2206.08307 (drop).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from paramserver.rules import Accept, Bound, Drop, Push, Rule, Verdict

Action = Literal["drop", "damp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedStaleness:
    """Drops or damps a push that is staler than a limit; nobody waits."""

    limit: int
    """Updates a gradient may be late and still count in full."""

    action: Action = "drop"
    """What happens to a staler one: ``drop`` refuses it, ``damp`` shortens its step."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit must be 0 updates or more, got {self.limit}")
        if self.action not in get_args(Action):
            raise ValueError(f"action must be 'drop' or 'damp', got {self.action!r}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return BoundedStalenessRule("bounded", self.limit, self.action)


class BoundedStalenessRule:
    """Judges each push by its own staleness alone; a `paramserver.rules.Rule`."""

    gathers = False
    tabulates = False

    def __init__(self, name: str, limit: int, action: Action, *, cancel: bool = False) -> None:
        """Take what is at most ``limit`` stale; errors and records call the rule ``name``.

        With ``cancel`` what would be dropped when it arrives is cancelled as soon as that is sure.
        """
        self.name = name
        self.cancel_age: int | None = limit + 1 if cancel else None
        self._limit = limit
        self._action = action

    def on_join(self, worker: int, clock: int) -> None:
        """Do nothing: members are equal, however far each of them is."""

    def on_push(self, push: Push) -> Verdict:
        """Apply ``push`` in full up to the limit; beyond it, drop it or shorten its step."""
        if push.staleness <= self._limit:
            return Accept()
        if self._action == "drop":
            return Drop("stale")
        return Accept(scale=(self._limit + 1) / (push.staleness + 1))

    def on_leave(self, worker: int) -> bool:
        """Do nothing: no update is ever left half gathered."""
        return False

    def waits_for(self, worker: int) -> frozenset[int]:
        """Nobody."""
        return frozenset()

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """Staleness up to the limit when dropping; damping promises nothing."""
        if self._action == "damp":
            return ()
        return (Bound("staleness", self._limit, push.staleness, push.worker),)
