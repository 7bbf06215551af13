"""Leader and followers under a round program.

    leader                               follower
      |  a request is answered              |
      |--- ORDER TAKE, step --------------->|  both go on with the program: it wants a sum
      |<-- PARTIAL, its share --------------|
      |--- ORDER SUM, the total ----------->|  both go on: the next request
      |  opens it: workers that waited get a piece each

All shards run one program and are given the same numbers, so they make the same requests. Vectors
stay where they are; shares of sums are all that travels between shards.
"""

from __future__ import annotations

import json
import math
from typing import Any, cast

from torch import Tensor

from paramserver.errors import ProtocolError
from paramserver.messages import Action, Kind, Message, pack_numbers, unpack_numbers
from paramserver.round_shard import RoundShard, partial
from paramserver.rounds import Ask, Sample
from paramserver.rules import PieceRule
from paramserver.server import Conn, Follower, Leader

PIECES_PER_WORKER = 4
"""Pieces of a request for each worker: enough to even out speeds, few enough to cost little."""

MAX_PIECE = 1024
"""Most samples in a piece; a worker computes a piece in one go."""


def num_pieces(size: int, num_workers: int) -> int:
    """Return into how many pieces a sample of ``size`` is cut for ``num_workers``."""
    return max(min(PIECES_PER_WORKER * num_workers, size), math.ceil(size / MAX_PIECE))


class RoundFollower(Follower):
    """A shard that runs the program on its slice as the leader orders."""

    shard: RoundShard

    def _handle(self, conn: Conn, m: Message) -> None:
        super()._handle(conn, m)
        if m.kind == Kind.LEAD:
            self.shard.begin()
        if m.kind in (Kind.LEAD, Kind.ORDER):
            self._tell_share(m)

    def _tell_share(self, m: Message) -> None:
        """Bring this shard's share of a sum, if the program has come to one."""
        moved = (
            m.kind == Kind.LEAD or m.action == Action.SUM or (m.action == Action.TAKE and m.step)
        )
        share = partial(self.shard) if moved else None
        if share is not None:
            self._send(self._leader, Message(Kind.PARTIAL, text=pack_numbers(share)))


class RoundLeader(Leader):
    """The shard that orders; it opens the program's requests and adds up the shards' shares."""

    shard: RoundShard

    def __init__(
        self,
        *args: Any,
        num_examples: int,
        num_workers: int,
        rounds: int | None,
        **kwargs: Any,
    ) -> None:
        """Lead a program.

        Args:
            *args: As `Leader`; the sequencer's rule hands out pieces.
            num_examples: Training samples there are.
            num_workers: Workers that are expected.
            rounds: Rounds after which the run ends; None if they do not end it.
            **kwargs: As `Leader`.
        """
        super().__init__(*args, **kwargs)
        self._rule = cast(PieceRule, self.sequencer.rule)
        self._num_examples, self._num_workers, self._rounds = num_examples, num_workers, rounds
        self._shares: dict[Conn, str] = {}
        self._open: Ask | None = None
        self._open_pieces = 0
        self._open_round = -1
        self._settled: dict[Sample, tuple[int, ...]] = {}  # the pieces a sample is in this round

    def begin(self, now: float) -> None:
        """Make the program's first request."""
        self.shard.begin()
        self._drive(now)

    def _handle(self, conn: Conn, m: Message, now: float) -> None:
        if m.kind == Kind.PARTIAL:
            if conn not in self._followers or conn in self._shares:
                raise ProtocolError("a share of a sum came from nobody that was asked for one")
            self._shares[conn] = m.text
        else:
            super()._handle(conn, m, now)
        self._drive(now)

    def _drive(self, now: float) -> None:
        """Take the program to its next request of samples, as far as the shares are here."""
        runner, sequencer = self.shard.runner, self.sequencer
        while sequencer.ended is None:
            if self.shard.error is not None:
                sequencer.fail(self.shard.error)
            elif self._rounds is not None and runner.rounds >= self._rounds:
                sequencer.stop(f"{runner.rounds} updates")
            elif runner.stop is not None:
                sequencer.stop(runner.stop)
            elif isinstance(runner.request, Ask):
                if runner.request is not self._open:
                    self._open_request(runner.request, now)
                return
            elif len(self._shares) < len(self._followers):
                return
            else:
                order = self._order(Action.SUM, -1)._replace(text=pack_numbers(self._total()))
                self._carry_out([order])
        self._tell_if_ended()

    def _open_request(self, ask: Ask, now: float) -> None:
        runner = self.shard.runner
        if self._open is not None and self._open_round == runner.rounds:
            self._settled.setdefault(self._open.on, self._rule.answered_by())
        else:
            self._settled.clear()
        self._open, self._open_round = ask, runner.rounds
        size = self._num_examples if ask.on.size is None else ask.on.size
        self._open_pieces = num_pieces(size, self._num_workers)
        self._rule.open(self._settled.get(ask.on, range(self._open_pieces)))
        self.sequencer.counts = ask.kind == "gradient"
        self._carry_out(self.sequencer.release(now))

    def _total(self) -> Tensor:
        """Add up all shards' shares, in the order of the shards."""
        own = partial(self.shard)
        assert own is not None, "a total is made when the program waits for one"
        total = own
        for follower in self._followers:
            total = total + unpack_numbers(self._shares.pop(follower), own.shape)
        return total

    def _told(self, worker: int) -> str:
        """Describe the piece that ``worker`` has been given."""
        if worker < 0:
            return ""
        assert self._open is not None, "a worker is let go on once a request is open"
        return json.dumps(
            {
                "kind": self._open.kind,
                "sample": self._open.on.name,
                "size": self._open.on.size,
                "round": self._open_round,
                "piece": self._rule.piece(worker),
                "of": self._open_pieces,
            }
        )
