"""Whole messages over a Unix socket, with a deadline, and open descriptors with them.

The socket is a SOCK_SEQPACKET one in Linux's abstract namespace: messages keep their borders, and
there is no file to be left.

Waking a blocked process costs 50 to 100 us here, more than everything else in a small push. So both
sides first look for the next message a few times without sleeping (`SPIN_S`, `SERVER_SPIN_S`): a
round trip takes 9 us instead of 69 (two processes on two idle cores), and yields to whoever needs
the core. A client's answer is being made already, so it looks for longer: two workers on two cores
then push 6 % more gradients.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from paramserver.messages import MAX_BYTES, Message, decode, encode

SPIN_S = 2e-3
"""Seconds a client looks for an answer before it sleeps."""

SERVER_SPIN_S = 100e-6
"""Seconds a server looks for a message before it sleeps; its cores are the workers' too."""

_SEND_TIMEOUT_S = 5


class Link:
    """One end of a connection: whole messages over a Unix socket, with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(True)
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0)
        )
        self._buffer = bytearray(MAX_BYTES)
        self._view = memoryview(self._buffer)

    @classmethod
    def connect(cls, address: str) -> Link:
        """Connect to ``address``; OSError if nobody listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(abstract(address))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message, with open descriptors; OSError if the other end is gone or stuck."""
        if fds:
            socket.send_fds(self.sock, [encode(message)], list(fds))
        else:
            self.sock.send(encode(message))

    def poll(self) -> Message | None:
        """Return the next message if it is here; EOFError if the other end is gone."""
        try:
            size = self.sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # told once, of an end that left something unread, and first:
            return self.poll()  # what it said before is still here
        if size == 0:
            raise EOFError
        return decode(self._view[:size])

    def receive(self, timeout_s: float) -> Message:
        """Wait for the next message; TimeoutError, or EOFError if the other end is gone."""
        spin_until = time.perf_counter() + SPIN_S
        while (message := self.poll()) is None:
            if time.perf_counter() > spin_until:
                self._sleep(timeout_s)
            else:
                os.sched_yield()
        return message

    def receive_fds(self, timeout_s: float, count: int) -> tuple[Message, list[int]]:
        """Wait for a message that brings ``count`` descriptors, or none."""
        self._sleep(timeout_s)
        size = array.array("i").itemsize * count
        data, ancillary, _, _ = self.sock.recvmsg(
            MAX_BYTES, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            raise EOFError
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        return decode(data), list(fds)

    def close(self) -> None:
        """End the connection."""
        self.sock.close()

    def _sleep(self, timeout_s: float) -> None:
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            raise TimeoutError


def listening(address: str, backlog: int) -> socket.socket:
    """Return a socket that listens at ``address`` for `Link`s; OSError if it is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(abstract(address))
    except OSError:
        listener.close()
        raise
    listener.listen(backlog)
    return listener


def is_of_this_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket is of the same user as this one."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())


def machine() -> str:
    """Return what two processes have in common whose abstract Unix sockets are the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"


def abstract(address: str) -> str:
    """Return the name of ``address`` in the abstract namespace."""
    return f"\0paramserver/{address}"
