"""Clients of one machine share a pull: it comes over the network once, and the others copy it.

    gateway --- the parameters -----> client A, into its `Shelf`
            --- "A has them" -------> client B --- Unix socket ---> A's shelf
                                      copies them from A's memory, and asks whether they were
                                      still there when it had finished

Nothing is held for a neighbour, so none can hold another one up: what is overwritten meanwhile, or
does not come, is asked of the gateway after all, which keeps the book of who has what
(`paramserver.transports.pulls`).
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import threading
import time
from collections.abc import Sequence
from typing import Final, Self

import torch
from torch import Tensor

from paramserver.errors import ParamServerError, ProtocolError
from paramserver.messages import Kind, Message
from paramserver.transports.link import Link, is_of_this_user, listening
from paramserver.transports.pulls import Holder
from paramserver.transports.segment import Segment

_PATIENCE_S: Final = 5.0
"""Seconds without news of a pull after which a client has it sent to itself."""

_NEWS_S: Final = 1.0


class Shelf:
    """The buffers a client's pulls come into, and the thread that says what is in them.

    A pull is called by the number of the message that brings it.
    """

    def __init__(self, token: str, rows: int, numel: int, dtype: torch.dtype) -> None:
        """Make ``rows`` buffers of ``numel`` elements, open to those who know ``token``."""
        self.name = secrets.token_hex(16)
        self._token = token
        self._segment = Segment.create("paramserver-pulls", rows, numel, dtype)
        self.buffers = self._segment.rows
        self._lock = threading.Lock()  # of the three below
        self._pulls: dict[int, tuple[int, ...]] = {}  # those that are whole, and their buffers
        self._last = 0
        self._moved_at = 0.0
        self._listener = listening(self.name, 64)
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC)
        self._links: dict[int, Link] = {}
        self._known: set[Link] = set()  # those that have said the token
        self._waiting: dict[Link, int] = {}  # the pull that each one waits for
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="shelf", daemon=True)
        self._thread.start()

    def take_away(self, buffers: Sequence[int]) -> None:
        """Say that ``buffers`` are written from now on."""
        with self._lock:
            kept = {n: at for n, at in self._pulls.items() if not set(at) & set(buffers)}
            self._pulls = kept

    def moves(self) -> None:
        """Say that a part of a pull has come."""
        self._moved_at = time.monotonic()

    def put(self, number: int, buffers: tuple[int, ...] = ()) -> None:
        """Say that message ``number`` is whole, and that what it has brought is in ``buffers``."""
        with self._lock:
            self._last = number
            if buffers:
                self._pulls[number] = buffers
        if self._waiting:
            os.eventfd_write(self._wakeup, 1)

    def close(self) -> None:
        """Show neighbours out; the buffers stay as they are. Twice is harmless."""
        if self._is_closing:
            return
        self._is_closing = True
        os.eventfd_write(self._wakeup, 1)
        self._thread.join()
        os.close(self._wakeup)
        self._segment.close()

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # whatever ends it: neighbours are to see that, and not to wait
            for link in self._links.values():
                link.close()
            self._listener.close()

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wakeup, select.POLLIN)
        told_at = time.monotonic()
        while not self._is_closing:
            for fd, _ in poller.poll(_NEWS_S * 1000 if self._waiting else None):
                if fd == self._listener.fileno():
                    self._accept(poller)
                elif fd == self._wakeup:
                    os.eventfd_read(fd)
                elif not self._hear(self._links[fd]):
                    self._end(poller, fd)
            for link, number in list(self._waiting.items()):
                self._answer(link, number)
            if time.monotonic() - told_at >= _NEWS_S:
                if self._moved_at > told_at:
                    for link, number in self._waiting.items():
                        _say(link, Message(Kind.PARTIAL, seq=number))
                told_at = time.monotonic()

    def _accept(self, poller: select.poll) -> None:
        sock, _ = self._listener.accept()
        if not is_of_this_user(sock):
            sock.close()
            return
        self._links[sock.fileno()] = Link(sock)
        poller.register(sock, select.POLLIN)

    def _hear(self, link: Link) -> bool:
        """Take what ``link`` says; False if that is the end of it."""
        try:
            message = link.poll()
        except (EOFError, ParamServerError):
            return False
        if message is None:
            return True
        if message.kind == Kind.HELLO:
            if not hmac.compare_digest(message.text.encode(), self._token.encode()):
                return False
            self._known.add(link)
            return _say(link, Message(Kind.WELCOME), [self._segment.fd])
        if message.kind != Kind.READ or link not in self._known:
            return False
        self._waiting[link] = message.seq
        return True

    def _answer(self, link: Link, number: int) -> None:
        """Tell where pull ``number`` is, or that it is no more; nothing if it may still come."""
        with self._lock:
            buffers, last = self._pulls.get(number), self._last
        if buffers is not None:
            buffer, vector = (*buffers, -1)[:2]
            _say(link, Message(Kind.GRANT, seq=number, buffer=buffer, vector=vector))
        elif number <= last:
            _say(link, Message(Kind.END, seq=number))
        else:
            return
        del self._waiting[link]

    def _end(self, poller: select.poll, fd: int) -> None:
        poller.unregister(fd)
        link = self._links.pop(fd)
        self._known.discard(link)
        self._waiting.pop(link, None)
        link.close()


class Neighbours:
    """A client's way to the shelves of others on its machine. Used by one thread."""

    def __init__(self, token: str, buffer: Tensor) -> None:
        """Know nobody yet; shelves have buffers like ``buffer``."""
        self._token, self._numel, self._dtype = token, len(buffer), buffer.dtype
        self._met: dict[str, tuple[Link, Segment]] = {}

    def copy(self, holder: Holder, into: Sequence[Tensor]) -> bool:
        """Copy what ``holder`` has, or is about to have; False if it is not to be had there.

        ``into`` may have been written then.
        """
        try:
            link, segment = self._met.get(holder.shelf) or self._meet(holder.shelf)
            buffers = self._ask(link, holder.number)
            if len(buffers) != len(into):
                return False
            for buffer, out in zip(buffers, into, strict=True):
                out.copy_(segment.rows[buffer])
            return self._ask(link, holder.number) == buffers
        except (OSError, EOFError, IndexError, ParamServerError):  # gone, silent, or no shelf
            self._leave(holder.shelf)
            return False

    def close(self) -> None:
        """Leave all of them."""
        for shelf in list(self._met):
            self._leave(shelf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _meet(self, shelf: str) -> tuple[Link, Segment]:
        link = Link.connect(shelf)
        try:
            if not is_of_this_user(link.sock):
                raise ProtocolError(f"shelf {shelf} is another user's")
            link.send(Message(Kind.HELLO, text=self._token))
            welcome, fds = link.receive_fds(_PATIENCE_S, 1)
            if welcome.kind != Kind.WELCOME or len(fds) != 1:
                raise ProtocolError(f"shelf {shelf} did not welcome its neighbour")
            segment = Segment.attach(fds[0], self._numel, self._dtype, writable=False)
        except BaseException:
            link.close()
            raise
        self._met[shelf] = link, segment
        return link, segment

    def _ask(self, link: Link, number: int) -> tuple[int, ...]:
        """Return the buffers that pull ``number`` is in; none if it is there no more."""
        link.send(Message(Kind.READ, seq=number))
        while (answer := link.receive(_PATIENCE_S)).kind == Kind.PARTIAL:
            pass  # it comes
        if answer.kind != Kind.GRANT:
            return ()
        return tuple(buffer for buffer in (answer.buffer, answer.vector) if buffer >= 0)

    def _leave(self, shelf: str) -> None:
        if shelf in self._met:
            link, segment = self._met.pop(shelf)
            link.close()
            segment.close()


def _say(link: Link, message: Message, fds: Sequence[int] = ()) -> bool:
    """Send ``message``; False if nobody takes it, whose end is then heard of."""
    try:
        link.send(message, fds)
    except OSError:
        return False
    return True
