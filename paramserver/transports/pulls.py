"""Which client of a machine was sent which parameters last, so that others there copy them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """Where a client can be found by others of its machine."""

    machine: str
    """What it has in common with them: see `paramserver.transports.link.machine`."""
    shelf: str
    """The name of its `paramserver.transports.neighbours.Shelf`, of one shard."""


class Holder(NamedTuple):
    """Who has a pull."""

    shelf: str
    number: int
    """Of the message that has brought it there."""


@dataclass(frozen=True, slots=True)
class _Sent:
    what: Hashable
    to: Holder
    has_it: Callable[[], bool]


class Pulls:
    """What was sent last to each machine from each shard. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: dict[tuple[str, int], _Sent] = {}

    def claim(
        self,
        what: Hashable,
        place: Place,
        shard: int,
        number: int,
        has_it: Callable[[], bool],
        *,
        anew: bool = False,
    ) -> Holder | None:
        """Return who has ``what`` already; None if the client at ``place`` is to be sent it.

        Then others are told that this client has it from message ``number``, while ``has_it()``.

        Args:
            what: Equal to another one only if the parameters are the same.
            place: Of the client that waits for it.
            shard: Whose they are.
            number: Of the message to that client.
            has_it: Whether what it was sent is still the same as what is claimed.
            anew: Whether it is to be sent in any case.
        """
        with self._lock:
            sent = self._sent.get((place.machine, shard))
            is_other = sent is not None and sent.to.shelf != place.shelf
            if sent is not None and is_other and not anew and sent.what == what and sent.has_it():
                return sent.to
            self._sent[place.machine, shard] = _Sent(what, Holder(place.shelf, number), has_it)
            return None

    def forget(self, place: Place, shard: int) -> None:
        """Send nobody to the client at ``place`` any more."""
        with self._lock:
            sent = self._sent.get((place.machine, shard))
            if sent is not None and sent.to.shelf == place.shelf:
                del self._sent[place.machine, shard]
