"""Pieces of one request: the rule a round program runs under on the parameter server.

A program's open request (`paramserver.rounds`) is cut into pieces. Each worker that may go on gets
one, computes it at the request's point, and pushes it; the request is answered when enough are in.

    worker 0  |-p0-|-p1-|-p3-|-p2'-|          p2' is a backup copy: worker 1 is slow
    worker 1  |-----------p2-----------|      late: the request was answered without it
    version   0                   1

- A piece counts once, whoever brings it first; a second copy is dropped as ``copy``.
- A piece of a request that has been answered is dropped as ``late``; nothing stale is ever used.
- A worker without a piece of its own takes a copy of one that another holds, once it has done
  `patience` pieces since the other one was given that piece. The rule reads no clock.
- With a quorum below 1 a request is answered by the first pieces that make it up, and for the rest
  of the round every request on the same sample is asked of just those: a line search must compare
  one function with itself.

Source: Dean et al., NIPS 2012 (Sandblaster: small portions, backup copies); Berahas, Nocedal &
Takac, NIPS 2016, arXiv:1605.06049 (one sample for all gradients that are compared).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paramserver.rules import Accept, Bound, Drop, PieceRule, Push, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Answers a round program's requests piece by piece, with backup copies for stragglers."""

    quorum: float = 1.0
    """Share of a request's pieces that answer it, above 0 to 1; 1 waits for all of them."""

    patience: int = 2
    """Pieces an idle worker has done since a piece was given out before it copies that piece."""

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise ValueError(f"quorum must be above 0 and at most 1, got {self.quorum}")
        if self.patience < 1:
            raise ValueError(f"patience must be 1 piece or more, got {self.patience}")

    def build(self, num_workers: int) -> PieceRule:
        """Make the state machine; it works with any number of workers."""
        return PiecesRule(self.quorum, self.patience)


@dataclass(slots=True)
class _Given:
    """A piece that a worker has."""

    piece: int
    request: int
    done_then: dict[int, int]
    """How many pieces each worker had done when this one was given out."""


class PiecesRule:
    """Hands out the open request's pieces; a `paramserver.rules.PieceRule`."""

    name = "pieces"
    gathers = True
    cancel_age: int | None = None
    tabulates = False

    def __init__(self, quorum: float, patience: int) -> None:
        """Start without a request."""
        self._quorum, self._patience = quorum, patience
        self._live: set[int] = set()
        self._given: dict[int, _Given] = {}  # worker -> the piece it has
        self._done: dict[int, int] = {}  # worker -> pieces it has done
        self._request = 0
        self._fresh: list[int] = []  # pieces nobody has, the next one last
        self._missing: set[int] = set()  # pieces not in yet, while a request is open
        self._in: list[int] = []
        self._needed = 0

    def open(self, pieces: Sequence[int]) -> None:
        """Begin a request that is asked of ``pieces``."""
        assert not self._missing, "a request is opened after the last one was answered"
        self._request += 1
        self._fresh = list(reversed(pieces))
        self._missing = set(pieces)
        self._in = []
        self._needed = math.ceil(self._quorum * len(pieces))

    def piece(self, worker: int) -> int:
        """Return the piece that ``worker`` was given when it was let go on."""
        return self._given[worker].piece

    def answered_by(self) -> tuple[int, ...]:
        """Return the pieces the last request was answered by, in order of their numbers."""
        return tuple(sorted(self._in))

    def on_join(self, worker: int, clock: int) -> None:
        """``worker`` takes part; it has no piece yet."""
        self._live.add(worker)

    def on_push(self, push: Push) -> Verdict:
        """Take the worker's piece, unless its request has been answered or it is there already."""
        given = self._given.pop(push.worker)
        self._done[push.worker] = self._done.get(push.worker, 0) + 1
        if given.request != self._request or not self._missing:
            return Drop("late")
        if given.piece not in self._missing:
            return Drop("copy")
        self._missing.remove(given.piece)
        self._in.append(given.piece)
        is_answered = len(self._in) >= self._needed
        if is_answered:
            self._missing, self._fresh = set(), []
        return Accept(step=is_answered)

    def on_leave(self, worker: int) -> bool:
        """Give the piece of ``worker`` to somebody else; a request is never answered by a leave."""
        self._live.discard(worker)
        given = self._given.pop(worker, None)
        if given is not None and given.request == self._request and given.piece in self._missing:
            held = {g.piece for g in self._given.values() if g.request == self._request}
            if given.piece not in held:
                self._fresh.append(given.piece)
        return False

    def waits_for(self, worker: int) -> frozenset[int]:
        """Give ``worker`` a piece, and name nobody; else name those whose pieces are missing.

        Between two requests it waits for the server: the set has -1 in it then.
        """
        if worker in self._given:
            return frozenset()
        piece = self._next_piece(worker)
        if piece is not None:
            self._given[worker] = _Given(piece, self._request, dict(self._done))
            return frozenset()
        if not self._missing:
            return frozenset({-1})
        return frozenset(w for w, g in self._given.items() if g.request == self._request)

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """Every piece that is used was computed at its request's own point."""
        return (Bound("staleness", 0, push.staleness, push.worker),)

    def _next_piece(self, worker: int) -> int | None:
        """Return a piece nobody has, else one whose holder is slow."""
        if self._fresh:
            return self._fresh.pop()
        mine = self._done.get(worker, 0)
        slow = [
            given
            for given in self._given.values()
            if given.request == self._request
            and given.piece in self._missing
            and mine - given.done_then.get(worker, 0) >= self._patience
        ]
        copies = [g.piece for g in self._given.values() if g.request == self._request]
        slow.sort(key=lambda given: (copies.count(given.piece), given.piece))
        return slow[0].piece if slow else None
