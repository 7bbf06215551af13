"""Who is let in at a gateway, how many, and how often."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

import grpc

from paramserver.errors import ParamServerError, ProtocolError, ResourceError
from paramserver.transports.remote import PROTOCOL

_REFUSALS: Final = (
    (ResourceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ProtocolError, grpc.StatusCode.FAILED_PRECONDITION),
)


class Rate:
    """At most so many a second, on average; after a quiet time, two seconds' worth at once."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._clock = per_s, clock
        self._left, self._at = 2 * per_s, clock()
        self._lock = threading.Lock()

    def wait_s(self) -> float:
        """Take one; return for how many seconds that is too early, 0 if it is not."""
        with self._lock:
            now = self._clock()
            self._left = min(2 * self._per_s, self._left + (now - self._at) * self._per_s)
            self._at = now
            self._left -= 1
            return max(0.0, -self._left / self._per_s)

    def try_one(self) -> bool:
        """Take one if that is not too early."""
        if self.wait_s() == 0:
            return True
        with self._lock:
            self._left += 1
        return False


class Places:
    """The numbers that guests of a run have: its workers from outside, or its readers."""

    def __init__(self, numbers: range, is_used: Callable[[int], bool], reserved_s: float) -> None:
        """Give out ``numbers``; one that is not used ``reserved_s`` seconds later is free again."""
        self._numbers, self._is_used, self._reserved_s = numbers, is_used, reserved_s
        self._given: dict[Hashable, float] = {}

    def take(self) -> int:
        """Return a number that nobody has.

        Raises:
            ResourceError: There is none.
        """
        now = time.monotonic()
        for number in self._numbers:
            is_reserved = now - self._given.get(number, -self._reserved_s) < self._reserved_s
            if not is_reserved and not self._is_used(number):
                self._given[number] = now
                return number
        raise ResourceError(
            f"this run has places for {len(self._numbers)} clients from outside, and all are "
            "taken: start it with more guests"
        )


def check(metadata: dict[str, str | bytes], token: bytes) -> None:
    """Raise PermissionError without the run's token, ProtocolError for another protocol."""
    given = metadata.get("paramserver-token-bin", b"")
    if not isinstance(given, bytes) or not hmac.compare_digest(given, token):
        raise PermissionError("the token is not this run's")
    protocol = metadata.get("paramserver-protocol", "none")
    if protocol != PROTOCOL:
        raise ProtocolError(
            f"the client speaks version {str(protocol)[:20]!r} of the protocol and the server "
            f"version {PROTOCOL!r}: install the same version of paramserver on both"
        )


def refuse(context: grpc.ServicerContext, error: Exception) -> None:
    """End a call with what ``error`` says."""
    if isinstance(error, PermissionError):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
    for kind, code in _REFUSALS:
        if isinstance(error, kind):
            context.abort(code, str(error)[:1000])
    assert isinstance(error, ParamServerError)
    context.abort(grpc.StatusCode.UNAVAILABLE, str(error)[:1000])
