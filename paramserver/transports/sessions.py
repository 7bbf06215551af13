"""A remote client's conversation with one shard, which outlives the streams that carry it.

    client --- frames ---> stream ---> session ---> the shard's shared memory and its socket
                                          |
                            kept: what the client may not have received

Tensors are copied from frames into the shard's own gradient slot as they come, and read for frames
from its own snapshot buffers. So nothing the size of a model is allocated for a client but what any
local one has, and a push reaches the shard only when it has come whole.

A client that compresses has the shard's end of its wire here, too: its payloads come out in the
slot, and what it is shown of a snapshot is kept until it surely has that, since what it is shown
next may be the difference to it.

Parameters that another client on the same machine is sent already are not sent once more: this one
is told who has them (`paramserver.transports.pulls`).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from paramserver.compression import ShardEnd
from paramserver.errors import ParamServerError, ProtocolError, ServerLostError
from paramserver.messages import Kind, Message, failure
from paramserver.transports.frames import Filling, read_frame, read_message, write_message
from paramserver.transports.pulls import Holder, Place, Pulls
from paramserver.transports.shared_memory import SharedMemoryConnection

_TAKEN: Final = frozenset({Kind.PUSH, Kind.READ, Kind.RELEASE, Kind.LEAVE})
"""What a client may say; the rest is between shards."""

_POLL_MS: Final = 250
_NUM_KEPT: Final = 16


@dataclass(slots=True, eq=False)
class _Kept:
    """A message for the client, until it is surely there."""

    number: int
    message: Message
    counts: bool = False
    """Whether what is shown later builds on it."""
    shown: list[Tensor] | None = None
    """What it shows then, once that is made."""


class Session:
    """One client's place at one shard. A stream's two threads use it, and the gateway's own."""

    def __init__(
        self,
        connection: SharedMemoryConnection,
        hello: Message,
        end: ShardEnd | None = None,
        *,
        place: Place | None = None,
        pulls: Pulls | None = None,
    ) -> None:
        """Speak for a client over ``connection``, on which ``hello`` was said.

        Args:
            connection: The client's to the shard.
            hello: What it said.
            end: The shard's end of the wire, for a client that compresses.
            place: Where the client can be found by its neighbours, if it can be.
            pulls: What those have.
        """
        self.hello, self.shard = hello, connection.shard
        self.detached_at: float | None = None
        """When the last stream ended; None while there is one."""
        self.is_over = False
        """Whether the client has left, or was shown out."""
        self._connection = connection
        self._lock = threading.Lock()  # of all below; the connection is closed under it only
        self._end = end
        self._place, self._pulls = place, pulls
        self._granted = 0  # number of the grant whose read is leased
        self._raw = torch.empty(0, dtype=torch.uint8)  # what of a payload has come
        self._showing = threading.Lock()  # what is shown is made once, and in order
        self._last_shown = (-1, -1)  # its seq and version
        self._no_read = 0  # seq of a push whose client takes nothing over from its grant
        self._kept: deque[_Kept] = deque(maxlen=_NUM_KEPT)
        self._number = 0
        self._stream = 0
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closed = False
        self.tell(connection.welcome)

    def tell(self, message: Message) -> None:
        """Keep a message for the client until it is surely there."""
        with self._lock:
            self._number += 1
            if message.kind == Kind.GRANT:  # the read granted before is not leased any more
                for old in [k for k in self._kept if k.message.kind == Kind.GRANT]:
                    if not old.counts:
                        self._kept.remove(old)
                self._granted = self._number
            self._kept.append(_Kept(self._number, message))
            self._wake()

    def attach(self) -> int:
        """Begin a stream in the place of an earlier one; return its number."""
        with self._lock:
            self._stream += 1
            self.detached_at = None
            self._wake()
            return self._stream

    def detach(self, stream: int) -> None:
        """End a stream; the session waits for another one."""
        with self._lock:
            if stream == self._stream and self.detached_at is None:
                self.detached_at = time.monotonic()
            self._wake()

    def is_on(self, stream: int) -> bool:
        """Whether ``stream`` still carries this session."""
        return stream == self._stream and self.detached_at is None and not self._is_closed

    def take(self, encoded: Iterable[bytes], stream: int) -> Iterator[tuple[int, bool]]:
        """Take frames from the client while ``stream`` carries it.

        Yields each one's bytes, and whether a message is whole with it.

        Raises:
            ProtocolError: A frame breaks the contract.
            ServerLostError: The shard is gone.
        """
        filling: Filling | None = None
        for each in encoded:
            if not self.is_on(stream):
                return
            frame = read_frame(each)
            if frame.bye:
                self.is_over = True
                return
            if filling is None:
                message, raw = read_message(frame), None
                self._has(frame.received)
                if message.kind == Kind.PUSH and frame.dtype == "uint8":
                    raw = self._room_for_payload()
                slot = [self._connection.slot] if message.kind == Kind.PUSH else []
                filling = Filling(frame, message, slot if raw is None else [raw])
            else:
                filling.add(frame)
            if is_whole := filling.is_whole:
                if raw is not None and self._end is not None:
                    self._end.pushed(raw, self._connection.slot)
                self._pass_on(filling.message)
                filling = None
            yield len(each), is_whole

    def _room_for_payload(self) -> Tensor:
        size = None if self._end is None else self._end.push_bytes
        if size is None:
            raise ProtocolError("a payload came, and none was agreed on")
        return self._raw.resize_(size)

    def _has(self, received: int) -> None:
        """Forget what the client says that it has."""
        with self._lock:
            while self._kept and self._kept[0].number <= received:
                self._kept.popleft()

    def _pass_on(self, message: Message) -> None:
        if message.kind not in _TAKEN:
            who = "follower" if self.shard else "leader"
            refusal = ProtocolError(f"a {who} does not take message {message.kind} from a client")
            self.tell(failure(refusal))
            return
        with self._lock:
            if message.kind == Kind.PUSH and message.step:
                self._no_read = message.seq
            self._granted = 0
            if not self._is_closed:
                self._connection.send(message)

    def end_with(self, error: ParamServerError) -> None:
        """Tell the client why this is the end."""
        self.tell(failure(error))
        self.is_over = True

    def outgoing(self, stream: int, received: int, anew: int = 0) -> Iterator[bytes]:
        """Yield frames for the client while ``stream`` carries it, from message ``received`` on.

        What message ``anew`` brings is not to be had of a neighbour.
        """
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        poller.register(self._wakeup, select.POLLIN)
        self._has(received)
        while self.is_on(stream):
            for kept in self._after(received):
                received = kept.number
                tensors = self._tensors(kept)
                if tensors is None:
                    continue
                holder = self._holder(kept, kept.number == anew) if tensors else None
                brought = [] if holder is not None else tensors
                yield from write_message(kept.message, kept.number, brought, holder=holder)
            if self.is_over:
                return
            if not self._hear() and self.is_on(stream):
                poller.poll(_POLL_MS)
                self._calm()

    def wake(self) -> None:
        """Let `outgoing` see what has changed."""
        with self._lock:
            self._wake()

    def close(self) -> None:
        """Give the client's place back. Twice is harmless."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = self.is_over = True
            self._wake()
            self._connection.close()
            os.close(self._wakeup)
        if self._place is not None and self._pulls is not None:
            self._pulls.forget(self._place, self.shard)

    def _hear(self) -> bool:
        """Take the shard's next message if it is there."""
        try:
            with self._lock:
                message = None if self._is_closed else self._connection.poll()
        except ServerLostError as error:
            self.end_with(error)
            return True
        if message is None:
            return False
        self.tell(message)
        return True

    def _after(self, received: int) -> list[_Kept]:
        with self._lock:
            return [kept for kept in self._kept if kept.number > received]

    def _tensors(self, kept: _Kept) -> list[Tensor] | None:
        """Return what a message brings the client; None if another one has taken its place."""
        message = kept.message
        if message.kind != Kind.GRANT or message.seq == self._no_read > 0:
            return []
        indices = [message.buffer] if message.vector < 0 else [message.buffer, message.vector]
        vectors = [self._connection.buffers[i] for i in indices]
        if self._end is None or not self._end.compresses_pulls:
            return vectors
        if not self._end.follows:
            return self._end.shows(vectors[0], message.version).as_bytes
        with self._showing:
            with self._lock:
                if kept not in self._kept:
                    return None
                kept.counts = True
            if kept.shown is None:
                kept.shown = self._show(self._end, message, vectors[0])
            return kept.shown

    def _holder(self, kept: _Kept, anew: bool) -> Holder | None:
        """Return the neighbour that has what a grant is of; None if it is to be sent.

        Parameters are the same in the same buffer at the same version, while both are leased.
        """
        if self._place is None or self._pulls is None:
            return None
        if self._end is not None and self._end.compresses_pulls:  # each by a seed of its own
            return None
        m = kept.message
        what = (m.version, m.buffer, m.vector)
        return self._pulls.claim(
            what, self._place, self.shard, kept.number, lambda: self._leases(kept.number), anew=anew
        )

    def _leases(self, number: int) -> bool:
        """Whether what message ``number`` has granted is leased still."""
        return self._granted == number and self.detached_at is None and not self._is_closed

    def _show(self, end: ShardEnd, message: Message, params: Tensor) -> list[Tensor]:
        """Make what is shown next to a client that is sent differences."""
        if (message.seq, message.version) == self._last_shown:  # of a push that came twice
            return []
        self._last_shown = (message.seq, message.version)
        return end.shows(params, message.version).as_bytes

    def _calm(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # it was not what has woken us
            if not self._is_closed:
                os.eventfd_read(self._wakeup)

    def _wake(self) -> None:
        if not self._is_closed:
            os.eventfd_write(self._wakeup, 1)
