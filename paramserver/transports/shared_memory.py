"""Workers on the shard's own machine: tensors in shared memory, messages as doorbells.

    worker process                              shard process
    gradient slot (memfd, written by worker) == the very memory the optimizer reads
    model's parameters (memfd, read only)    == the snapshot buffer it leased
           PUSH  ---- Unix socket --------->
                 <--- Unix socket ---- GRANT

Segments are memfds whose descriptors travel over the socket (`paramserver.transports.segment`,
`paramserver.transports.link`). Only processes of the same user are let in, and only with the run's
token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from paramserver.errors import (
    ParamServerError,
    ProtocolError,
    ResourceError,
    ServerLostError,
    ServerTimeoutError,
)
from paramserver.messages import Kind, Message, raise_failure
from paramserver.transports import Server
from paramserver.transports.link import SERVER_SPIN_S, Link, is_of_this_user, listening
from paramserver.transports.segment import Segment, check_memory

logger = logging.getLogger(__name__)

_TICK_S = 0.25


class Host:
    """A shard's process: its segments, its listening socket, and the thread that serves both."""

    def __init__(
        self,
        address: str,
        numel: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        *,
        slot_rows: int = 1,
    ) -> None:
        """Listen at ``address`` with room for ``capacity`` snapshot buffers of ``numel`` elements.

        A slot has room for ``slot_rows`` times as many.

        Raises:
            ResourceError: Not Linux, too little memory, or the address is taken.
        """
        if not sys.platform.startswith("linux"):
            raise ResourceError("the shared memory transport needs Linux (memfd_create)")
        # a snapshot and a gradient a reader
        check_memory((1 + slot_rows) * capacity * numel * dtype.itemsize)
        self._slot_numel, self._dtype = slot_rows * numel, dtype
        try:
            self._listener = listening(address, 128)
        except OSError as error:
            raise ResourceError(f"cannot listen at {address}: {error}") from error
        self._snapshots = Segment.create("paramserver-snapshots", capacity, numel, dtype)
        self.buffers = self._snapshots.rows
        self._slots: dict[Hashable, Segment] = {}
        self._wakeup, self._waker = socket.socketpair()
        self._links: dict[int, Link] = {}
        self._followers: list[Link] = []
        self._poller = select.epoll()
        self._server: Server | None = None
        self._started = time.monotonic()
        self._next_tick = 0.0
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self.lock = threading.Lock()
        """Held while a message is handled; take it to look at the server from another thread."""
        self.failure: BaseException | None = None
        """What ended the serving thread, if something did."""

    def now(self) -> float:
        """Seconds since this host was made."""
        return time.monotonic() - self._started

    def slot(self, conn: Hashable) -> Tensor:
        """Return the gradient slot of a connection."""
        return self._slot(conn).rows[0]

    def send(self, conn: Hashable, message: Message) -> None:
        """Send ``message``; a connection that does not take it is ended."""
        assert isinstance(conn, Link)
        fds = []
        if message.kind == Kind.WELCOME:
            fds = [self._snapshots.fd, self._slot(conn).fd]
        try:
            conn.send(message, fds)
        except OSError:  # its end is noticed, and told, when it is next polled
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_RDWR)

    def lead(self, address: str, hello: Message, timeout_s: float) -> Link:
        """Connect as leader to the follower at ``address``.

        Raises:
            ServerLostError: Nobody is there.
            ParamServerError: It refused, and why.
        """
        try:
            link = Link.connect(address)
            self._followers.append(link)
            link.send(hello)
            answer, fds = link.receive_fds(timeout_s, 2)
        except (OSError, EOFError) as error:
            raise ServerLostError(-1, f"connecting the leader to {address}") from error
        for fd in fds:  # the follower's memory is no business of the leader's
            os.close(fd)
        if answer.kind != Kind.WELCOME:
            raise_refusal(answer)
        return link

    def serve(self, server: Server) -> None:
        """Start to answer, on a thread of its own, until `close`."""
        self._server = server
        self._poller.register(self._listener, select.EPOLLIN)
        self._poller.register(self._wakeup, select.EPOLLIN)
        for link in self._followers:
            self._links[link.sock.fileno()] = link
            self._poller.register(link.sock, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="shard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving, end every connection and give the memory back. Twice is harmless."""
        if self._is_closing:
            return
        self._is_closing = True
        self._waker.send(b"x")
        if self._thread is not None:
            self._thread.join()
        for link in (*self._links.values(), *self._followers):
            link.close()
        for closable in (self._listener, self._wakeup, self._waker, self._poller, self._snapshots):
            closable.close()
        for slot in self._slots.values():
            slot.close()

    def _slot(self, conn: Hashable) -> Segment:
        if conn not in self._slots:
            self._slots[conn] = Segment.create("paramserver-slot", 1, self._slot_numel, self._dtype)
        return self._slots[conn]

    def _run(self) -> None:
        # The default interval lets another Python thread keep the interpreter 5 ms per switch.
        sys.setswitchinterval(5e-4)
        try:
            while not self._is_closing:
                self._round()
        except BaseException as error:
            self.failure = error
            logger.exception("the shard's thread ended")
            self._listener.close()  # nobody new; those that wait see their connections end
            for link in (*self._links.values(), *self._followers):
                link.close()

    def _round(self) -> None:
        """Wait for something, handle all of it, and look at the clock."""
        assert self._server is not None
        ready = self._spin() or self._poller.poll(_TICK_S)
        if self.now() >= self._next_tick:
            self._next_tick = self.now() + _TICK_S
            with self.lock:
                self._server.on_tick(self.now())
        for fd, _ in ready:
            link = self._links.get(fd)
            if link is not None:
                self._read(fd, link)
            elif fd == self._listener.fileno():
                self._accept()

    def _spin(self) -> list[tuple[int, int]]:
        until = time.perf_counter() + SERVER_SPIN_S
        while time.perf_counter() < until:
            if ready := self._poller.poll(0):
                return ready
            os.sched_yield()
        return []

    def _read(self, fd: int, link: Link) -> None:
        try:
            message = link.poll()
        except EOFError:
            self._end(fd, link)
            return
        except ParamServerError as error:  # not our protocol: there is nothing to answer to
            logger.warning("a connection was ended: %s", error)
            self._end(fd, link)
            return
        if message is not None:
            with self.lock:
                assert self._server is not None
                self._server.on_message(link, message, self.now())

    def _end(self, fd: int, link: Link) -> None:
        self._poller.unregister(fd)
        del self._links[fd]
        link.close()
        with self.lock:
            assert self._server is not None
            self._server.on_gone(link, self.now())
        slot = self._slots.pop(link, None)
        if slot is not None:
            slot.close()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if not is_of_this_user(sock):
            logger.warning("a connection of another user was refused")
            sock.close()
            return
        link = Link(sock)
        self._links[sock.fileno()] = link
        self._poller.register(sock, select.EPOLLIN)


class SharedMemoryConnection:
    """A client's connection to a shard on the same machine."""

    def __init__(
        self,
        address: str,
        shard: int,
        numel: int,
        hello: Message,
        *,
        dtype: torch.dtype = torch.float32,
        slot_rows: int = 1,
        timeout_s: float = 60.0,
    ) -> None:
        """Connect, say ``hello`` and map the shard's memory, slots of ``slot_rows * numel`` too.

        Raises:
            ServerLostError: Nobody listens at ``address``.
            ServerTimeoutError: The shard did not answer.
            ParamServerError: The shard refused, and why.
        """
        self.shard = shard
        self.welcome: Message
        try:
            self._link = Link.connect(address)
        except OSError as error:
            raise ServerLostError(shard, f"connecting to {address} ({error.strerror})") from error
        try:
            self.send(hello)
            with self._named("saying hello", timeout_s):
                self.welcome, fds = self._link.receive_fds(timeout_s, 2)
        except ParamServerError:
            self._link.close()
            raise
        if self.welcome.kind == Kind.WELCOME and len(fds) == 2:
            self._snapshots = Segment.attach(fds[0], numel, dtype, writable=False)
            self._slot = Segment.attach(fds[1], slot_rows * numel, dtype, writable=True)
            self.buffers: Sequence[Tensor] = self._snapshots.rows
            self.slot: Tensor = self._slot.rows[0]
            return
        self._link.close()
        raise_refusal(self.welcome)

    def send(self, message: Message) -> None:
        """Ring the doorbell."""
        try:
            self._link.send(message)
        except OSError as error:
            raise ServerLostError(self.shard, "sending") from error

    def receive(self, timeout_s: float) -> Message:
        """Wait for the shard's next message."""
        with self._named("waiting for an answer", timeout_s):
            return self._link.receive(timeout_s)

    def poll(self) -> Message | None:
        """Return the shard's next message if it is here already."""
        with self._named("looking for a message", 0.0):
            return self._link.poll()

    def fileno(self) -> int:
        """Return the descriptor that can be read when `poll` has a message."""
        return self._link.sock.fileno()

    def close(self) -> None:
        """End the connection; tensors that show the shard's memory stay readable."""
        self._link.close()
        self._snapshots.close()
        self._slot.close()

    @contextlib.contextmanager
    def _named(self, doing: str, timeout_s: float) -> Iterator[None]:
        """Turn what a socket raises into errors that say which shard and doing what."""
        try:
            yield
        except TimeoutError as error:
            raise ServerTimeoutError(self.shard, doing, timeout_s) from error
        except (EOFError, OSError) as error:
            raise ServerLostError(self.shard, doing) from error


def raise_refusal(message: Message) -> None:
    """Raise what a shard answered instead of a welcome."""
    if message.kind == Kind.FAIL:
        raise_failure(message)
    raise ProtocolError(f"expected a welcome, got message {message.kind}")
