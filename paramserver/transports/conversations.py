"""The conversations that a gateway has: which are open, who may take one up, when one has ended."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from paramserver.compression import Agreed
from paramserver.errors import ProtocolError, ResourceError
from paramserver.messages import Kind, Message
from paramserver.transports.pulls import Place, Pulls
from paramserver.transports.sessions import Session
from paramserver.transports.shared_memory import SharedMemoryConnection

logger = logging.getLogger(__name__)

Connect = Callable[[int, Message, str], SharedMemoryConnection]
"""Says a client's hello, which brings the fingerprint of its layout, to a shard."""

_MAX_MACHINE: Final = 128


class TakenUp(NamedTuple):
    """What a stream goes on with."""

    session: Session
    received: int
    """Number of the last message that the client has whole."""
    anew: int
    """Of the one whose tensors no neighbour has given it; 0 if there is none."""


class Conversations:
    """Sessions by their names; a thread of its own ends those whose clients stay away."""

    def __init__(
        self,
        connect: Connect,
        *,
        num_shards: int,
        limit: int,
        linger_s: float,
        agreed: Agreed | None = None,
    ) -> None:
        """Have ``limit`` at most; one without a stream ends after ``linger_s``.

        ``agreed`` is for clients that compress.
        """
        self._connect, self._num_shards = connect, num_shards
        self._limit, self._linger_s, self._agreed = limit, linger_s, agreed
        self._sessions: dict[bytes, Session] = {}
        self._opening: set[bytes] = set()
        self._pulls = Pulls()
        self._lock = threading.Lock()  # of the two above
        self._closing = threading.Event()

    def start(self) -> None:
        """Look after them until `close`."""
        threading.Thread(target=self._clear_up, name="gateway-clearing", daemon=True).start()

    def __len__(self) -> int:
        return len(self._sessions)

    def has(self, worker: int) -> bool:
        """Whether one of them is ``worker``'s."""
        return any(session.hello.worker == worker for session in list(self._sessions.values()))

    def take_up(self, metadata: dict[str, str | bytes]) -> TakenUp:
        """Return the session a stream is for, and from where it goes on.

        Raises:
            ProtocolError: The stream does not say what for, or not what it said before.
            ResourceError: There are too many.
            ParamServerError: The shard refuses the client.
        """
        name = metadata.get("paramserver-session-bin", b"")
        worker, incarnation, received = (
            _number(metadata, key) for key in ("worker", "incarnation", "received")
        )
        shard = shard_of(metadata, self._num_shards)
        anew = _number(metadata, "anew", default="0")
        place = _place(metadata)
        if not isinstance(name, bytes) or len(name) != 16:
            raise ProtocolError("a session's name has 16 bytes")
        compresses = metadata.get("paramserver-payloads") == "1"
        if compresses and self._agreed is None:
            raise ProtocolError("this client compresses, and this run does not")
        hello = Message(Kind.HELLO, worker=worker, incarnation=incarnation)
        with self._lock:
            session = self._sessions.get(name)
            if session is not None:
                if session.hello[:4] != hello[:4] or session.shard != shard:
                    raise ProtocolError("this session is another client's")
                return TakenUp(session, received, anew)
            if name in self._opening:
                raise ResourceError("this session is being opened already")
            if len(self._sessions) + len(self._opening) >= self._limit:
                raise ResourceError(
                    f"{self._limit} conversations are open, as many as there may be: "
                    "start the run with more clients"
                )
            self._opening.add(name)
        try:
            model = metadata.get("paramserver-model-bin", b"")
            fingerprint = model[:64].decode(errors="replace") if isinstance(model, bytes) else ""
            end = self._agreed.shard_end(shard, worker) if compresses and self._agreed else None
            connection = self._connect(shard, hello, fingerprint)
            session = Session(connection, hello, end, place=place, pulls=self._pulls)
            with self._lock:
                self._sessions[name] = session
        finally:
            with self._lock:
                self._opening.discard(name)
        return TakenUp(session, 0, 0)

    def end(self, session: Session) -> None:
        """Give a client's place back; who sees that it left sees it counted no more."""
        with self._lock:
            self._sessions = {n: s for n, s in self._sessions.items() if s is not session}
        session.close()

    def close(self) -> None:
        """End all of them. Twice is harmless."""
        self._closing.set()
        for session in list(self._sessions.values()):
            session.close()

    def _clear_up(self) -> None:
        """Now and then end sessions whose clients have been away for too long."""
        while not self._closing.wait(min(1.0, self._linger_s / 4)):
            for session in list(self._sessions.values()):
                away = session.detached_at
                if session.is_over and away is not None:
                    self.end(session)
                elif away is not None and time.monotonic() - away > self._linger_s:
                    logger.warning("worker %d did not come back", session.hello.worker)
                    self.end(session)


def _place(metadata: dict[str, str | bytes]) -> Place | None:
    """Return where a client is found by its neighbours; None if it does not say so."""
    machine, shelf = (str(metadata.get(f"paramserver-{key}", "")) for key in ("machine", "shelf"))
    if not machine and not shelf:
        return None
    if not 0 < len(machine) <= _MAX_MACHINE or not re.fullmatch("[0-9a-f]{32}", shelf):
        raise ProtocolError(
            f"a client that has neighbours says its machine, in {_MAX_MACHINE} characters at most, "
            "and its shelf, in 32 hex digits"
        )
    return Place(machine, shelf)


def shard_of(metadata: dict[str, str | bytes], num_shards: int) -> int:
    """Return which of ``num_shards`` a call is for; ProtocolError if it is none of them."""
    shard = _number(metadata, "shard")
    if not 0 <= shard < num_shards:
        raise ProtocolError(f"there are {num_shards} shards, and none is {shard}")
    return shard


def _number(metadata: dict[str, str | bytes], key: str, default: str = "") -> int:
    text = metadata.get(f"paramserver-{key}", default)
    try:
        number = int(str(text)[:24])
    except ValueError:
        raise ProtocolError(f"paramserver-{key} must be a whole number") from None
    if not -(2**31) <= number < 2**31:
        raise ProtocolError(f"paramserver-{key} is out of range")
    return number
