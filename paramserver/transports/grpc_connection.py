"""A client's connection to a shard on another machine, or to any as if it were.

The slot and the buffers are the client's own memory; frames bring them to the shard's and back. A
read granted in the place of a cancelled one comes into the other of two buffers, so a reading stays
as it is until the next one is asked for.

Payloads, where they are agreed on, travel in the place of slot and parameters. A pull may bring the
difference to what the one before has brought, so each is taken once and in order.

Parameters that another client on this machine has are copied of that one
(`paramserver.transports.neighbours`), and asked for anew if they are not to be had there.

A stream that breaks is opened again while an answer is waited for, and what was not answered is
sent once more; the shard does it once. Where nobody listens any more there is nothing to wait for:
a gateway that has ended does not come back in its run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import grpc
import torch
from torch import Tensor

from paramserver.compression import Agreed, Payload
from paramserver.errors import ParamServerError, ProtocolError, ServerLostError, ServerTimeoutError
from paramserver.messages import Kind, Message
from paramserver.transports import schema
from paramserver.transports.frames import (
    Filling,
    read_frame,
    read_message,
    write_bye,
    write_message,
)
from paramserver.transports.link import machine
from paramserver.transports.neighbours import Neighbours, Shelf
from paramserver.transports.remote import Remote
from paramserver.transports.shared_memory import raise_refusal

_NUM_BUFFERS: Final = 4  # two readings, of parameters and a vector
_CLOSE_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 1.0
_BROKEN: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
    }
)
"""How a stream ends whose network has broken."""


class _Stream:
    """One stream, from its call to its end."""

    def __init__(self, call: Any, outgoing: queue.SimpleQueue[Message | None]) -> None:
        self.call, self.outgoing = call, outgoing
        self.error: BaseException | None = None
        self.is_over = False


class GrpcConnection:
    """A client's connection to a shard over the network."""

    def __init__(
        self,
        remote: Remote,
        shard: int,
        numel: int,
        hello: Message,
        *,
        dtype: torch.dtype = torch.float32,
        slot_rows: int = 1,
        timeout_s: float = 60.0,
        agreed: Agreed | None = None,
    ) -> None:
        """Connect and say ``hello``, whose text is the layout's fingerprint.

        With ``agreed`` payloads travel, as they are agreed on.

        Raises:
            ServerLostError: Nobody listens there, or the certificates do not let the two speak.
            ServerTimeoutError: The shard did not answer.
            ParamServerError: The shard refused, and why.
        """
        self.shard = shard
        self.num_sent = 0
        """Messages that were put on their way, again or for the first time."""
        self._channel = remote.channel()
        self.slot = torch.zeros(slot_rows * numel, dtype=dtype)
        self._pull_end = None if agreed is None else agreed.pull_end(shard)
        self._shelf: Shelf | None = None
        self._found_at: list[tuple[str, str | bytes]] = []
        if sys.platform.startswith("linux") and self._pull_end is None:
            self._shelf = Shelf(remote.token, _NUM_BUFFERS, numel, dtype)
            self.buffers: Sequence[Tensor] = self._shelf.buffers
            self._found_at = [
                ("paramserver-machine", machine()),
                ("paramserver-shelf", self._shelf.name),
            ]
        else:  # shared memory is Linux's, and payloads are each client's own
            self.buffers = [torch.zeros(numel, dtype=dtype) for _ in range(_NUM_BUFFERS)]
        self.carries = agreed is not None
        self._payload: Payload | None = None  # of the push that is not answered yet
        self._raw = torch.empty(0, dtype=torch.uint8)  # what of a payload has come
        self._remote, self._hello = remote, hello
        self._session = os.urandom(16)
        self._condition = threading.Condition()  # guards what follows
        self._inbox: deque[Message] = deque()
        self._received = 0
        self._anew = 0  # the last message whose tensors no neighbour had
        self._unanswered: Message | None = None
        self._is_closing = False
        self._current = 0  # the buffer of the last read
        self._number = 0
        with self._condition:
            self._stream = self._open()
        try:
            self.welcome = self._first(timeout_s)
        except BaseException:
            self._channel.close()
            self._close_shelf()
            raise
        if self.welcome.kind != Kind.WELCOME:
            self.close()
            raise_refusal(self.welcome)

    @property
    def pulled_bytes(self) -> int:
        """Of the payload that the last read has come as, its header included."""
        return 0 if self._pull_end is None else self._pull_end.num_bytes

    def carry(self, payload: Payload) -> None:
        """Send ``payload`` at the next push, in the place of what is in the slot."""
        self._payload = payload

    def send(self, message: Message) -> None:
        """Put ``message`` on its way, with what is in the slot if it is a push."""
        with self._condition:
            if message.kind in (Kind.PUSH, Kind.READ):
                self._unanswered = message
            if not self._stream.is_over:
                self._put(message)
            elif self._stream.error is None and not self._inbox:
                raise ServerLostError(self.shard, "sending")

    def receive(self, timeout_s: float) -> Message:
        """Wait for the shard's next message; open the stream again if it breaks meanwhile."""
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._inbox or self._stream.is_over, deadline - time.monotonic()
                )
                if self._inbox:
                    return self._inbox.popleft()
                if time.monotonic() >= deadline:
                    break
                if self._stream.is_over:
                    self._check_broken("waiting for an answer", timeout_s)
                    self._condition.wait(min(pause_s, max(0.0, deadline - time.monotonic())))
                    pause_s = min(2 * pause_s, _LAST_PAUSE_S)
                    self._begin_again()
        raise ServerTimeoutError(self.shard, "waiting for an answer", timeout_s)

    def poll(self) -> Message | None:
        """Return the shard's next message if it is here already."""
        with self._condition:
            if self._inbox:
                return self._inbox.popleft()
            if self._stream.is_over:
                self._check_broken("looking for a message", 0.0)
            return None

    def close(self) -> None:
        """Leave, and wait until the shard has heard it, for a moment."""
        with self._condition:
            self._is_closing = True
            stream = self._stream
            stream.outgoing.put(None)
            if not stream.is_over:
                self._condition.wait_for(lambda: stream.is_over, _CLOSE_S)
        self._channel.close()
        self._close_shelf()

    def _close_shelf(self) -> None:
        if self._shelf is not None:
            self._shelf.close()

    def _first(self, timeout_s: float) -> Message:
        with self._condition:
            self._condition.wait_for(lambda: self._inbox or self._stream.is_over, timeout_s)
            if self._inbox:
                return self._inbox.popleft()
            error = self._stream.error
        if isinstance(error, grpc.RpcError):
            self._remote.raise_named(error, self.shard, "connecting", timeout_s)
        if error is not None:
            raise error
        raise ServerTimeoutError(self.shard, f"connecting to {self._remote.address}", timeout_s)

    def _put(self, message: Message) -> None:
        self.num_sent += 1
        self._stream.outgoing.put(message)

    def _check_broken(self, doing: str, timeout_s: float) -> None:
        """Raise unless the stream ended because the network broke, and somebody may be there."""
        error = self._stream.error
        if error is None:
            raise ServerLostError(self.shard, doing)
        if not isinstance(error, grpc.RpcError):
            raise error
        if error.code() not in _BROKEN:
            self._remote.raise_named(error, self.shard, doing, timeout_s)
        if self._remote.is_deserted():
            where = f"{doing} at {self._remote.address} (its gateway has ended)"
            raise ServerLostError(self.shard, where) from error

    def _begin_again(self) -> None:
        """Open another stream in the place of one that is over; say again what is not answered."""
        self._stream = self._open()
        if self._unanswered is not None:
            self._put(self._unanswered)

    def _open(self) -> _Stream:
        """Begin a stream, and a thread that reads from it."""
        outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        metadata = self._remote.metadata(
            ("paramserver-session-bin", self._session),
            ("paramserver-shard", str(self.shard)),
            ("paramserver-worker", str(self._hello.worker)),
            ("paramserver-incarnation", str(self._hello.incarnation)),
            ("paramserver-model-bin", self._hello.text.encode()),
            ("paramserver-received", str(self._received)),
            ("paramserver-anew", str(self._anew)),
            *self._found_at,
            *([("paramserver-payloads", "1")] if self.carries else []),
        )
        call = self._channel.stream_stream(schema.method("Exchange"))(
            self._frames(outgoing), metadata=metadata
        )
        stream = _Stream(call, outgoing)
        name = f"grpc-shard-{self.shard}"
        threading.Thread(target=self._read, args=(stream,), name=name, daemon=True).start()
        return stream

    def _frames(self, outgoing: queue.SimpleQueue[Message | None]) -> Iterator[bytes]:
        """Yield the frames of what is put into ``outgoing``; gRPC takes one when it has room."""
        for message in iter(outgoing.get, None):
            self._number += 1
            tensors = self._pushed() if message.kind == Kind.PUSH else []
            yield from write_message(message, self._number, tensors, received=self._received)
        yield write_bye()

    def _pushed(self) -> list[Tensor]:
        """Return what a push brings: a payload, or what is in the slot."""
        payload = self._payload
        return [self.slot] if payload is None else payload.as_bytes

    def _read(self, stream: _Stream) -> None:
        error: BaseException | None = None
        asks_anew = False
        try:
            with Neighbours(self._remote.token, self.buffers[0]) as neighbours:
                self._anew = self._take(stream, neighbours)
            asks_anew = self._anew > 0
        except (grpc.RpcError, ParamServerError) as caught:
            error = caught
        if error is not None or asks_anew:
            with contextlib.suppress(grpc.RpcError):
                stream.call.cancel()
        with self._condition:
            stream.error, stream.is_over = error, True
            if asks_anew and not self._is_closing:  # at once: others may wait for what it brings
                self._begin_again()
            self._condition.notify_all()
        stream.outgoing.put(None)  # else gRPC's thread waits for the next frame for ever

    def _take(self, stream: _Stream, neighbours: Neighbours) -> int:
        """Take frames until the stream ends, or a message's tensors are not where it says.

        Returns that message's number, or 0.
        """
        filling: Filling | None = None
        for encoded in stream.call:
            frame = read_frame(encoded)
            if self._shelf is not None:
                self._shelf.moves()
            elif frame.holder is not None:
                raise ProtocolError("a neighbour is named to a client that has none")
            if filling is not None:
                filling.add(frame)
            else:
                message = read_message(frame)
                message, tensors = self._place(message, bool(frame.length or frame.holder))
                if frame.holder is not None:
                    if not neighbours.copy(frame.holder, tensors):
                        return frame.number
                    tensors = []
                filling = Filling(frame, message, tensors)
            if filling.is_whole:
                self._arrived(stream, filling)
                filling = None
        return 0

    def _place(self, message: Message, comes: bool) -> tuple[Message, list[Tensor]]:
        """Choose the buffers that a grant's tensors go to, if any come with it."""
        if message.kind != Kind.GRANT:
            return message, []
        other = 1 - self._current if comes else self._current  # else it is of what was read before
        vector = -1 if message.vector < 0 else 2 + other
        message = message._replace(buffer=other, vector=vector)
        if not comes:
            return message, []
        if self._shelf is not None:
            self._shelf.take_away(_buffers(message))
        if self._pull_end is not None:
            return message, [self._raw.resize_(self._pull_end.next_bytes)]
        return message, [self.buffers[i] for i in _buffers(message)]

    def _arrived(self, stream: _Stream, filling: Filling) -> None:
        message = filling.message
        with self._condition:
            if stream is not self._stream or filling.number <= self._received:
                return
            self._received = filling.number
            brought: tuple[int, ...] = ()
            if message.kind == Kind.GRANT and message.buffer != self._current:
                if self._pull_end is not None:
                    before, out = self.buffers[self._current], self.buffers[message.buffer]
                    self._pull_end.pulled(self._raw, before, out)
                self._current = message.buffer
                brought = _buffers(message)
            if self._unanswered is not None and (
                message.kind in (Kind.END, Kind.FAIL)
                or (message.kind == Kind.GRANT and message.seq == self._unanswered.seq)
            ):
                self._unanswered = self._payload = None
            self._inbox.append(message)
            self._condition.notify_all()
        if self._shelf is not None:
            self._shelf.put(filling.number, brought)


def _buffers(grant: Message) -> tuple[int, ...]:
    """Return which buffers a grant's tensors are in."""
    return (grant.buffer,) if grant.vector < 0 else (grant.buffer, grant.vector)
