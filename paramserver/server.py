"""What a shard's process does with each message: a leader that orders, followers that obey.

No I/O here: a transport calls `on_message`, `on_gone` and `on_tick`, one at a time, and is handed
what to send. With several shards:

    worker            follower                 leader
      |--- PUSH slice --->| keeps it              |
      |<-- HELD ----------|                       |
      |--- PUSH slice --------------------------->|  version V for this push: the commit
      |                   |<------- ORDER V ------|  applies its slice
      |<-- GRANT V -------| applies, leases V     |
      |<-- GRANT V -------------------------------|  leases V

A worker that dies before its commit has changed nothing; one that dies after it has changed
everything. Every shard executes the same orders in the same order, so all grants for one read name
the same version: a pull is one consistent cut.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from torch import Tensor

from paramserver.errors import (
    ParamServerError,
    ProtocolError,
    ResourceError,
    ServerLostError,
)
from paramserver.messages import Action, Kind, Message, error_of, failure
from paramserver.sequencer import Sequencer
from paramserver.shard import Held, Lease

Conn = Hashable
"""Whatever a transport tells its connections apart by."""

Send = Callable[[Conn, Message], None]
"""Gives a message to a connection; never blocks, and ignores one that is gone."""


class Memory(Protocol):
    """Where a transport keeps the tensors that both sides see."""

    buffers: Sequence[Tensor]
    """Snapshot buffers of the shard, shape ``(n,)`` each."""

    def slot(self, conn: Conn) -> Tensor:
        """Return the gradient slot of a connection, shape ``(n,)``; the same one at each call."""


def grant(order: Message, lease: Lease, text: str = "") -> Message:
    """Return the message that tells a reader what ``order`` leased to it."""
    return Message(
        Kind.GRANT, worker=order.worker, incarnation=order.incarnation, seq=order.seq,
        version=lease.version, samples=order.samples, buffer=lease.buffer, vector=lease.vector,
        step=order.step, text=text,
    )  # fmt: skip


class _Server:
    """What leader and follower have in common: who is who, and grants."""

    def __init__(
        self, shard: Held, memory: Memory, send: Send, *, token: str, fingerprint: str
    ) -> None:
        self.shard = shard
        self._memory, self._send = memory, send
        self._credentials = f"{token} {fingerprint}".encode()
        self._token_length = len(token.encode())
        self._conns: dict[int, Conn] = {}  # worker or reader -> its connection
        self._names: dict[Conn, tuple[int, int]] = {}  # connection -> (worker, incarnation)
        self._answers: dict[int, tuple[int, Message]] = {}  # worker -> its last seq, and the answer

    def _check_hello(self, conn: Conn, m: Message) -> None:
        given, wanted = m.text.encode(), self._credentials
        if not hmac.compare_digest(given[: self._token_length], wanted[: self._token_length]):
            raise ProtocolError("the token is not this run's")
        if given != wanted:
            raise ProtocolError("the model is laid out in another way than the server's")
        if conn in self._names:
            raise ProtocolError("this connection has said hello already")
        before = self._conns.get(m.worker)
        if before is not None and self._names[before][1] >= m.incarnation:
            raise ProtocolError(
                f"worker {m.worker} joined as incarnation {m.incarnation}, but incarnation "
                f"{self._names[before][1]} of it is connected: it has been replaced"
            )
        spare = len(self._memory.buffers) - 1
        if before is None and len(self._conns) >= spare:
            raise ResourceError(
                f"this server was made for {spare} workers and readers, and has them all"
            )

    def _enter(self, conn: Conn, m: Message) -> None:
        self._conns[m.worker] = conn
        self._names[conn] = (m.worker, m.incarnation)

    def _sender(self, conn: Conn, m: Message) -> None:
        if self._names.get(conn) != (m.worker, m.incarnation):
            raise ProtocolError(f"a message of worker {m.worker} came over another's connection")
        if self._conns[m.worker] is not conn:  # a slow shard hears the dead after their successors
            raise ProtocolError(
                f"worker {m.worker}, incarnation {m.incarnation}, does not take part: it has been "
                "replaced"
            )

    def _hold(self, conn: Conn, m: Message) -> None:
        self.shard.hold(m.worker, m.incarnation, m.seq, self._memory.slot(conn))

    def _answer(self, worker: int, seq: int, message: Message) -> None:
        """Send ``message`` to ``worker`` and keep it for a retry of the same push."""
        self._answers[worker] = (seq, message)
        conn = self._conns.get(worker)
        if conn is not None:
            self._send(conn, message)

    def _forget(self, conn: Conn) -> tuple[int, int] | None:
        """Return who is gone with ``conn``; None if nobody, or one with a newer connection."""
        name = self._names.pop(conn, None)
        if name is None or self._conns.get(name[0]) is not conn:
            return None
        del self._conns[name[0]]
        return name


class Follower(_Server):
    """A shard that holds slices and executes the leader's orders."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._leader: Conn | None = None
        self._broken: ParamServerError | None = None

    def on_message(self, conn: Conn, m: Message, now: float) -> None:
        """Handle one message; what is refused is answered with `Kind.FAIL`.

        An order that cannot be executed leaves this shard behind the others for good: every worker
        is told why, so none of them waits for it.
        """
        try:
            if self._broken is not None:
                raise self._broken
            self._handle(conn, m)
        except ParamServerError as error:
            told: list[Conn] = [conn]
            if conn is self._leader:
                told = [] if self._broken else list(self._names)
                self._broken = error
            for each in told:
                self._send(each, failure(error))

    def _handle(self, conn: Conn, m: Message) -> None:
        match m.kind:
            case Kind.ORDER if conn is self._leader:
                self._execute(m)
            case Kind.LEAD:
                if not hmac.compare_digest(m.text.encode(), self._credentials):
                    raise ProtocolError("the leader's token or layout is not this run's")
                if self._leader is not None:
                    raise ProtocolError("this follower has a leader already")
                self._leader = conn
                self._send(conn, Message(Kind.WELCOME))
            case Kind.HELLO:
                self._check_hello(conn, m)
                self._enter(conn, m)
                self._send(conn, Message(Kind.WELCOME, worker=m.worker))
            case Kind.PUSH:
                self._sender(conn, m)
                answered = self._answers.get(m.worker)
                if answered is not None and answered[0] == m.seq:
                    self._send(conn, Message(Kind.HELD, seq=m.seq))
                    self._send(conn, answered[1])
                    return
                self._hold(conn, m)
                self._send(conn, Message(Kind.HELD, seq=m.seq))
            case _:
                raise ProtocolError(f"a follower does not take message {m.kind}")

    def _execute(self, order: Message) -> None:
        lease = self.shard.execute(order)
        if lease is not None:
            self._answer(order.worker, order.seq, grant(order, lease))
        elif order.action == Action.LEAVE:
            self._answers.pop(order.worker, None)

    def on_gone(self, conn: Conn, now: float) -> None:
        """Forget a connection that has ended. What its worker held goes when the leader says so.

        Without its leader this shard is behind for good, and says so to workers that may wait for
        nothing else.
        """
        self._forget(conn)
        if conn is self._leader and self._broken is None:
            self._broken = ServerLostError(0, "being led by it")
            for each in self._names:
                self._send(each, failure(self._broken))

    def on_tick(self, now: float) -> None:
        """Nothing is timed here."""


class Leader(_Server):
    """The shard that orders, and does what it ordered itself."""

    def __init__(
        self,
        shard: Held,
        memory: Memory,
        send: Send,
        sequencer: Sequencer,
        *,
        followers: Sequence[Conn] = (),
        token: str,
        fingerprint: str,
    ) -> None:
        """Lead ``followers``, connections on which each of them has said welcome."""
        super().__init__(shard, memory, send, token=token, fingerprint=fingerprint)
        self.sequencer = sequencer
        self._followers = tuple(followers)

    def on_message(self, conn: Conn, m: Message, now: float) -> None:
        """Handle one message; what is refused is answered with `Kind.FAIL`."""
        try:
            self._handle(conn, m, now)
        except ParamServerError as error:
            self._send(conn, failure(error))
        self._tell_if_ended()

    def _handle(self, conn: Conn, m: Message, now: float) -> None:
        match m.kind:
            case Kind.PUSH:
                self._sender(conn, m)
                if self.sequencer.is_duplicate(m):
                    self._answer_again(conn, m)
                    return
                self._hold(conn, m)
                self._carry_out(self.sequencer.on_push(m, now))
            case Kind.HELLO:
                self._check_hello(conn, m)
                if m.worker < 0:
                    self._enter(conn, m)
                    self._send(conn, Message(Kind.WELCOME, worker=m.worker))
                    return
                orders = self.sequencer.on_join(m.worker, m.incarnation, now)  # or refuse it
                self._enter(conn, m)
                self._answers.pop(m.worker, None)
                clock = self.sequencer.clock(m.worker)
                self._send(conn, Message(Kind.WELCOME, worker=m.worker, clock=clock))
                self._carry_out(orders)
            case Kind.READ:
                self._sender(conn, m)
                if m.worker >= 0:
                    raise ProtocolError("a worker reads by pushing; only readers read without")
                self._carry_out([self._order(Action.READ, m.worker)._replace(seq=m.seq)])
            case Kind.RELEASE:
                self._sender(conn, m)
                self._carry_out([self._order(Action.RELEASE, m.worker)])
            case Kind.LEAVE:
                self._sender(conn, m)
                self._carry_out(self.sequencer.on_leave(m.worker, now))
            case Kind.FAIL if conn in self._followers:  # why the way to it has ended
                if self.sequencer.ended is None:
                    self._break(error_of(m))
            case _:
                raise ProtocolError(f"a leader does not take message {m.kind}")

    def on_gone(self, conn: Conn, now: float) -> None:
        """Handle the end of a connection, by its worker's will or death, or a follower's."""
        if conn in self._followers and self.sequencer.ended is None:
            shard = 1 + self._followers.index(conn)
            self._break(ServerLostError(shard, "leading it"))
            return
        name = self._forget(conn)
        if name is None:
            return
        worker, incarnation = name
        if worker < 0:
            self._carry_out([self._order(Action.RELEASE, worker)])
        elif self.sequencer.is_live(worker, incarnation):
            self._carry_out(self.sequencer.on_leave(worker, now))
        self._tell_if_ended()

    def on_tick(self, now: float) -> None:
        """Check how long workers have waited."""
        self.sequencer.on_tick(now)
        self._tell_if_ended()

    def stop(self, reason: str) -> None:
        """End the run; every worker is told at its next push, those that wait at once."""
        self.sequencer.stop(reason)
        self._tell_if_ended()

    def save(self) -> int:
        """Make every shard save itself at one version; return that version."""
        self._carry_out([self._order(Action.SAVE, -1)])
        return self.sequencer.version

    def _order(self, action: Action, reader: int) -> Message:
        return Message(Kind.ORDER, action, reader, version=self.sequencer.version)

    def _carry_out(self, orders: Sequence[Message]) -> None:
        for order in orders:
            for follower in self._followers:
                self._send(follower, order)
            try:
                lease = self.shard.execute(order)
            except ParamServerError as error:
                self._break(error)
                return
            if lease is not None:
                granted = grant(order, lease, self._told(order.worker))
                self._answer(order.worker, order.seq, granted)

    def _told(self, worker: int) -> str:
        """Return what ``worker`` is told with its read; a push rule has nothing to say."""
        return ""

    def _break(self, error: ParamServerError) -> None:
        """End the run: this shard is behind its own orders for good. Tell every worker why."""
        self.sequencer.fail(error)
        assert self.sequencer.error is not None
        for worker in self.sequencer.live():
            seq = self.sequencer.seq(worker)
            self._answer(worker, seq, failure(self.sequencer.error)._replace(seq=seq))

    def _answer_again(self, conn: Conn, m: Message) -> None:
        """Repeat the answer to a push; one that still waits gets its answer when it comes."""
        answered = self._answers.get(m.worker)
        if answered is not None and answered[0] == m.seq:
            self._send(conn, answered[1])

    def _tell_if_ended(self) -> None:
        """Tell workers that have pushed and will be granted nothing that the run has ended."""
        sequencer = self.sequencer
        if sequencer.ended is None:
            return
        for worker in sequencer.live():
            if sequencer.is_computing(worker):
                continue  # still computing: it is told when it pushes
            seq = sequencer.seq(worker)
            answered = self._answers.get(worker)
            if answered is not None and answered[0] == seq and answered[1].kind != Kind.GRANT:
                continue
            error = sequencer.error
            end = Message(Kind.END, worker=worker, seq=seq, text=sequencer.ended)
            self._answer(worker, seq, end if error is None else failure(error)._replace(seq=seq))
