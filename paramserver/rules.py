"""What a consistency rule decides, and what the sequencer tells it.

A rule is a plain state machine: it is told of joins, pushes and departures, and answers with small
frozen decisions. It never waits, sleeps, reads a clock or touches a tensor; the runtime does. The
same calls give the same answers, so a run can be replayed. Implementations: `async_sgd.rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Push:
    """A gradient that has arrived, before anything was decided about it."""

    worker: int
    clock: int
    """Iterations the worker has ended, this one included: 1 for its first push."""
    read_version: int
    """The version the gradient was computed on."""
    version: int
    """The server's version now."""
    samples: int = 1
    """Samples the gradient is the mean of."""

    @property
    def staleness(self) -> int:
        """Updates applied between the read and now."""
        return self.version - self.read_version


@dataclass(frozen=True, slots=True)
class Accept:
    """Take the gradient into the update that is being gathered."""

    scale: float = 1.0
    """Factor on this gradient's step, above 0."""
    step: bool = True
    """Whether the update is complete and is applied now."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Do not use the gradient. The worker reads again and goes on."""

    reason: str
    """One word; the ledger counts drops by it."""


Verdict = Accept | Drop


@dataclass(frozen=True, slots=True)
class Bound:
    """An invariant the runtime checks after every event: ``value <= limit``."""

    name: str
    limit: float
    value: float
    """The quantity now."""
    worker: int
    """The worker it concerns."""


class Rule(Protocol):
    """Decides what a push does and who may go on.

    Calls come one at a time, in the order the sequencer works. A worker pushes only after it
    joined, and again only after `waits_for` was empty for it and it has read.
    """

    name: str
    gathers: bool
    """Whether one update may average several gradients."""
    tabulates: bool
    """Whether an update is the mean over the workers of what each of them has pushed lately, from
    a `paramserver.gradient_table.GradientTable`, instead of that of the gradients since the last
    one. Such a rule gathers as well."""
    cancel_age: int | None
    """Updates after whose read a gradient that is still computed is cancelled: its worker reads
    anew at once. None: never."""

    def on_join(self, worker: int, clock: int) -> None:
        """``worker`` takes part from now on, having ended ``clock`` iterations."""

    def on_push(self, push: Push) -> Verdict:
        """Decide about a gradient. Called once a push, never for a duplicate."""

    def on_leave(self, worker: int) -> bool:
        """Forget ``worker``, alive or dead; unknown workers are ignored.

        Returns whether the update that is being gathered is complete now, and is to be applied.
        """

    def waits_for(self, worker: int) -> frozenset[int]:
        """Workers that must push before ``worker`` may read and start another iteration."""

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """Invariants to check after ``push`` was accepted; empty if the rule promises nothing."""


class PieceRule(Rule, Protocol):
    """A rule that hands out pieces of a round program's open request.

    `waits_for` gives a worker its piece when it names nobody; a worker that already has one keeps
    it. Between requests every worker waits.
    """

    def open(self, pieces: Sequence[int]) -> None:
        """Begin a request that is asked of ``pieces``; the last one has been answered."""

    def piece(self, worker: int) -> int:
        """Return the piece that ``worker`` was given when it was let go on."""

    def answered_by(self) -> tuple[int, ...]:
        """Return the pieces the last request was answered by, in order of their numbers."""


class Damping(Protocol):
    """Scales the step of a stale gradient."""

    def scale(self, staleness: int, workers: int) -> float:
        """Return the factor on the step: 1 if fresh, above 0, and never rising with staleness.

        Args:
            staleness: The gradient's, 0 or more.
            workers: Workers that take part now, the pusher among them.
        """


class RuleSpec(Protocol):
    """A rule's configuration: what the command line names, a record stores and a run builds."""

    def build(self, num_workers: int) -> Rule:
        """Make the state machine for ``num_workers`` expected workers.

        Raises:
            ValueError: The configuration cannot work with so many workers.
        """
