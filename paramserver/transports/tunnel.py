"""The leader's way to a shard on another node: its orders one way, what the shard says the other.

    leader --- Unix socket ---> `Tunnel` --- gRPC ---> `led`, in the gateway of the shard's node
                                                          --- Unix socket ---> follower

Both shards speak as if they were on one node. Only messages pass here: no tensors are the leader's
business. Where the way breaks, it ends at both sides, and so does the run: a follower that has
missed an order is behind for good.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import grpc

from paramserver.errors import ParamServerError, ProtocolError, ServerLostError
from paramserver.messages import failure
from paramserver.transports import schema
from paramserver.transports.frames import read_frame, read_message, write_message
from paramserver.transports.link import Link, is_of_this_user, listening
from paramserver.transports.remote import Remote

logger = logging.getLogger(__name__)

_LOOK_MS: Final = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Far:
    """A shard on another node than the leader's."""

    address: str
    """Where the leader finds the way to it, on its own node."""
    remote: Remote
    """The gateway of the shard's node."""


class Tunnel:
    """The leader's end, from the time it is made until `close`. One leader is let in."""

    def __init__(self, far: Far, shard: int, secret: str) -> None:
        """Listen for the leader; ``secret`` is what those who may lead know."""
        self._far, self._shard, self._secret = far, shard, secret
        self._listener = listening(far.address, 1)
        self._link: Link | None = None
        self._is_closing = False
        self._channel = far.remote.channel()
        self._thread = threading.Thread(target=self._run, name=f"tunnel-{shard}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it. Twice is harmless."""
        self._is_closing = True
        for sock in (self._listener, None if self._link is None else self._link.sock):
            if sock is not None:
                with contextlib.suppress(OSError):  # it has ended
                    sock.shutdown(socket.SHUT_RDWR)
        self._channel.close()
        self._thread.join()

    def _run(self) -> None:
        with self._listener:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed before anybody came
                return
        self._link = link = Link(sock)
        try:
            if is_of_this_user(sock):
                self._carry(link)
        except (OSError, ValueError):  # the leader is gone, or the channel is closed
            return
        finally:
            link.close()

    def _carry(self, link: Link) -> None:
        remote = self._far.remote
        metadata = remote.metadata(
            ("paramserver-shard", str(self._shard)),
            ("paramserver-lead-bin", self._secret.encode()),
        )
        call = self._channel.stream_stream(schema.method("Lead"))(said(link), metadata=metadata)
        try:
            hear(call, link)
        except grpc.RpcError as error:
            if self._is_closing:
                return
            try:
                remote.raise_named(error, self._shard, "leading", 0.0)
            except ParamServerError as named:
                link.send(failure(named))
        finally:
            call.cancel()


def led(address: str, shard: int, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
    """Be the follower's end of a tunnel, in a call of its gateway: yield what it says.

    Raises:
        ServerLostError: Nobody listens at ``address``.
    """
    try:
        link = Link.connect(address)
    except OSError as error:
        raise ServerLostError(shard, f"connecting to {address} ({error.strerror})") from error

    def end() -> None:
        with contextlib.suppress(OSError):  # the follower has ended it
            link.sock.shutdown(socket.SHUT_RDWR)

    def listen() -> None:
        try:
            hear(frames, link)
        except ParamServerError as error:
            logger.warning("a leader's way to shard %d was ended: %s", shard, error)
        except (grpc.RpcError, OSError):  # one of the two is gone, and the other told so
            return
        finally:
            end()

    context.add_callback(end)
    threading.Thread(target=listen, name="gateway-led", daemon=True).start()
    try:
        yield from said(link)
    finally:
        link.close()


def check_lead(metadata: dict[str, str | bytes], secret: str) -> None:
    """Raise ProtocolError unless who calls may lead."""
    given = metadata.get("paramserver-lead-bin", b"")
    if not secret or not isinstance(given, bytes):
        raise ProtocolError("nobody leads here from another node")
    if not hmac.compare_digest(given, secret.encode()):
        raise ProtocolError("only the run's own leader leads")


def said(link: Link) -> Iterator[bytes]:
    """Yield the frames of what comes over ``link`` until it ends."""
    poller = select.poll()
    poller.register(link.sock, select.POLLIN)
    number = 0
    try:
        while True:
            message = link.poll()
            if message is None:
                poller.poll(_LOOK_MS)
                continue
            number += 1
            yield from write_message(message, number)
    except (EOFError, OSError):
        return


def hear(frames: Iterator[bytes], link: Link) -> None:
    """Pass on over ``link`` what ``frames`` say.

    Raises:
        ProtocolError: One of them is no message, or brings tensors.
        OSError: The other end is gone.
        grpc.RpcError: The stream broke.
    """
    for encoded in frames:
        frame = read_frame(encoded)
        if frame.length or frame.data:
            raise ProtocolError("tensors came where only messages pass")
        link.send(read_message(frame))
