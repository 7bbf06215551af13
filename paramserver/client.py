"""A worker's, or a reader's, way to all shards: reads are consistent cuts, pushes happen once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from paramserver.compression import Payload
from paramserver.errors import ProtocolError
from paramserver.layout import Layout
from paramserver.messages import Kind, Message, raise_failure
from paramserver.transports import Connection, PayloadConnection


@dataclass(frozen=True, slots=True)
class Reading:
    """A consistent cut of the parameters, leased until the next push, read or release."""

    version: int
    params: tuple[Tensor, ...]
    """One vector a shard. Not to be written, and not to be read after the lease."""
    vectors: tuple[Tensor, ...] = ()
    """The vector a round program's product is taken with, one piece a shard; else empty."""
    text: str = ""
    """What a round program asks for; else empty."""
    samples: int = 0
    """Samples of the next gradient; 0 if the run does not change their number."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The run is over; there is nothing more to read or push."""

    reason: str


class Client:
    """One worker (0 or more) or reader (below 0). Used by one thread."""

    def __init__(
        self,
        connections: Sequence[Connection],
        *,
        worker: int,
        incarnation: int,
        clock: int = 0,
        wait_s: float = 120.0,
        while_waiting: Callable[[], None] | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Speak over connections that said hello, the leader's first.

        Args:
            connections: One a shard, in the order of the shards; shard 0 leads.
            worker: Number of the worker, or below 0 for a reader.
            incarnation: Which life of the worker this is.
            clock: Iterations its earlier lives have ended.
            wait_s: Seconds an answer may take, a rule's waiting included.
            while_waiting: Called between a push's messages and its answer; for tests.
            layout: How the parameters lie in the shards' vectors, end to end, where that is known.
        """
        self.layout = layout
        self.worker, self.incarnation, self.clock = worker, incarnation, clock
        self._leader, *self._followers = connections
        self._connections = tuple(connections)
        self._carriers = [
            c for c in self._connections if isinstance(c, PayloadConnection) and c.carries
        ]
        self._wait_s = wait_s
        self._seq = 0
        self._version = 0
        self._last_grants: dict[int, Message] = {}  # of each follower
        self._while_waiting = while_waiting

    @classmethod
    def connect(
        cls,
        address: str,
        token: str,
        ca: Path | str | None = None,
        *,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
        reads: bool = False,
        clear_text: bool = False,
        timeout_s: float = 60.0,
    ) -> Client:
        """Join a run that listens, from any process, without Ray; its `layout` comes with it.

        Args:
            address: Where it listens: ``host:port``, ``unix:path`` or ``unix-abstract:name``.
            token: The run's secret; see ``connect.json`` in its folder.
            ca: PEM file with the authority that signed the run's certificate; without one nothing
                is encrypted, which is taken on this machine only.
            certificate: PEM file with this client's own certificate, if the run wants one.
            key: Its private key.
            reads: Whether to `read` only; else it is a worker, for whom others may wait.
            clear_text: Whether clear text may leave this machine: everybody on the way can then
                read the token and the parameters, and change them.
            timeout_s: Seconds it may take to get in.

        Raises:
            ServerLostError: Nobody listens there, or the certificates do not let the two speak.
            ProtocolError: The token is not this run's, or the protocol another version.
            ResourceError: The run has no place left, or clear text would leave this machine.
        """
        # gRPC is a dependency of those alone who use it
        from paramserver.transports.calls import register  # noqa: PLC0415
        from paramserver.transports.remote import remote_at  # noqa: PLC0415

        remote = remote_at(address, token, ca, certificate, key, clear_text)
        place = register(remote, reads=reads, timeout_s=timeout_s)
        connections = place.connect(remote, timeout_s)
        return cls(
            connections,
            worker=place.worker,
            incarnation=place.incarnation,
            clock=connections[0].welcome.clock,
            wait_s=place.wait_s,
            layout=place.layout,
        )

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """Where the gradient is written before a push, one vector a shard."""
        return tuple(c.slot for c in self._connections)

    @property
    def carries(self) -> bool:
        """Whether payloads travel in the place of vectors; see `Wire`, whose carrier it is then."""
        return len(self._carriers) == len(self._connections)

    def carry(self, shard: int, payload: Payload) -> None:
        """Send ``payload`` to ``shard`` at the next push."""
        self._carriers[shard].carry(payload)

    @property
    def pulled_bytes(self) -> int:
        """Bytes of the payloads that the last read has come as."""
        return sum(connection.pulled_bytes for connection in self._carriers)

    def first_read(self) -> Reading | Ended:
        """Wait for the read that joining brings; a rule may make the worker wait for it."""
        return self._answer(seq=0)

    def push(
        self, *, loss: float = 0.0, norm: float = 0.0, samples: int = 1, layer: str = ""
    ) -> Reading | Ended:
        """Push the gradient in `slots` and read the parameters that the next one is computed on.

        Args:
            loss: Mean loss of the batch at the parameters read.
            norm: 2-norm of the whole gradient; not finite if the gradient is not.
            samples: Samples the gradient is the mean of.
            layer: The first parameter whose gradient is not finite, if one is.

        Raises:
            ServerTimeoutError, ServerLostError: It is not known whether the push was applied;
                `retry` is safe.
            ParamServerError: What ended the run, or why the push was refused.
        """
        self.begin_push(loss=loss, norm=norm, samples=samples, layer=layer)
        return self.end_push()

    def begin_push(
        self,
        *,
        loss: float = 0.0,
        norm: float = 0.0,
        samples: int = 1,
        layer: str = "",
        keeps: bool = False,
        noise: float = 0.0,
    ) -> None:
        """Do the first half of `push`: send. Until `end_push` neither slots nor reading are valid.

        The shard works meanwhile, and the worker can get its next batch ready. With ``keeps`` the
        worker will not take over what it reads then: its next push is of the same read as this one,
        whose version `end_push` returns once more. ``noise`` is what the batch says of tr(S), where
        the server sizes the batches by it.
        """
        self._seq += 1
        self._push = Message(
            Kind.PUSH, worker=self.worker, incarnation=self.incarnation, seq=self._seq,
            clock=self.clock + 1, read_version=self._version, samples=samples, loss=loss, norm=norm,
            text=layer, step=int(keeps), noise=noise,
        )  # fmt: skip
        self._send_push()

    def end_push(self) -> Reading | Ended:
        """Do the second half of `push`: wait for the answer."""
        answer = self._answer(self._seq)
        self.clock = self._push.clock
        if self._push.step and isinstance(answer, Reading):
            self._version = self._push.read_version
            return replace(answer, version=self._version)
        return answer

    def newer_read(self) -> Reading | None:
        """Return the read that was granted in the place of the last one, if that was cancelled.

        Does not wait: None if there is no such read yet. Not between `begin_push` and `end_push`.

        Raises:
            ServerLostError: A shard is gone.
            ParamServerError: What ended the run.
        """
        found = None
        while (message := self._leader.poll()) is not None:
            self._raise_if_failed(message)
            if message.kind == Kind.GRANT and message.step and message.version > self._version:
                found = message
        return None if found is None else self._reading(found)

    def retry(self) -> Reading | Ended:
        """Send the last push again; it is applied once, however often it is sent."""
        self._send_push()
        return self.end_push()

    def _send_push(self) -> None:
        for follower in self._followers:
            follower.send(self._push)
        for follower in self._followers:
            self._await_held(follower)
        self._leader.send(self._push)
        if self._while_waiting is not None:
            self._while_waiting()

    def read(self) -> Reading:
        """Read the parameters as they are now, for a reader that does not push."""
        self._seq += 1  # tells this read's answer from that of one that timed out
        read = Message(Kind.READ, worker=self.worker, incarnation=self.incarnation, seq=self._seq)
        self._leader.send(read)
        answer = self._answer(self._seq)
        assert isinstance(answer, Reading)
        return answer

    def release(self) -> None:
        """End the lease of the last read."""
        self._leader.send(Message(Kind.RELEASE, worker=self.worker, incarnation=self.incarnation))

    def close(self) -> None:
        """Leave; nobody waits for this worker any more."""
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _await_held(self, follower: Connection) -> None:
        while True:
            message = follower.receive(self._wait_s)
            if message.kind == Kind.HELD and message.seq == self._seq:
                return
            self._raise_if_failed(message)

    def _answer(self, seq: int) -> Reading | Ended:
        """Wait for the leader's word, then for the same version from every other shard."""
        while True:
            message = self._leader.receive(self._wait_s)
            self._raise_if_failed(message)
            if message.kind == Kind.END:
                return Ended(message.text)
            if message.kind == Kind.GRANT and message.seq == seq:
                break  # an earlier seq is of a push that was sent twice, or of a cancelled read
        return self._reading(message)

    def _reading(self, message: Message) -> Reading:
        """Wait for what the leader has granted from every other shard.

        Another shard may be ahead: that read was cancelled, and the leader's next grant tells so.
        """
        grants = self._grants(message)
        while (newest := max(grant.version for grant in grants)) > message.version:
            message = self._leader.receive(self._wait_s)
            self._raise_if_failed(message)
            if message.kind == Kind.GRANT and message.version >= newest:
                grants = self._grants(message)
        both = list(zip(self._connections, grants, strict=True))
        self._version = message.version
        return Reading(
            message.version,
            tuple(connection.buffers[granted.buffer] for connection, granted in both),
            tuple(connection.buffers[g.vector] for connection, g in both if g.vector >= 0),
            message.text,
            message.samples,
        )

    def _grants(self, granted: Message) -> list[Message]:
        """Return the leader's grant, and of each other shard that of the same version, or later."""
        return [granted, *(self._await_grant(i, granted) for i in range(len(self._followers)))]

    def _await_grant(self, follower: int, granted: Message) -> Message:
        last = self._last_grants.get(follower)
        while last is None or last.seq != granted.seq or last.version < granted.version:
            message = self._followers[follower].receive(self._wait_s)
            self._raise_if_failed(message)
            if message.kind == Kind.GRANT and message.incarnation in (0, self.incarnation):
                last = self._last_grants[follower] = message
        if last.version > granted.version and not last.step:
            raise ProtocolError(
                f"torn read: the leader granted version {granted.version}, another shard "
                f"{last.version}"
            )
        return last

    @staticmethod
    def _raise_if_failed(message: Message) -> None:
        if message.kind == Kind.FAIL:
            raise_failure(message)
