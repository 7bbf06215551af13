"""A barrier that carries a few numbers: every rank talks to rank 0 over a Unix socket.

    rank 1 --- values --->  rank 0: waits for all  --- everybody's values ---> rank 1, rank 2
    rank 2 --- values --->

Waking a process that sleeps in the kernel costs 70 to 120 us a round trip here, looking for the
message without sleeping 8 to 20. So every wait first looks for `SPIN_S`, and yields the core
between two looks.

Rank 0 notices whoever is gone (its socket ends) or silent (the deadline passes), tells the others
and raises; they raise the same. The others wait twice as long, since rank 0 may itself come late
and has then its own deadline before it: so rank 0 is always the first to say who is missing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn

from paramserver.errors import PeerLostError, ProtocolError
from sync.collective import Table

SPIN_S = 100e-6
"""Seconds a rank looks for a message before it sleeps."""

_HEAD = struct.Struct("<4sqq")  # what it is, the number of the exchange, the step
_VALUES, _LOST = b"vals", b"lost"
_MAX_BYTES = 1 << 16


class Star:
    """One rank's end of the barrier."""

    def __init__(
        self, rank: int, world: int, links: Mapping[int, socket.socket], timeout_s: float
    ) -> None:
        """Use ``links``, which are closed with this: rank 0's to each other rank, theirs to rank 0.

        Args:
            rank: This rank.
            world: Ranks in the group.
            links: Connected SOCK_SEQPACKET sockets, by the rank at the other end.
            timeout_s: Seconds rank 0 waits for the others.
        """
        self.rank, self.world = rank, world
        self._links = dict(links)
        self._timeout_s = timeout_s if rank == 0 else 2 * timeout_s
        self.waits: tuple[tuple[int, ...], float] = ((), 0.0)
        """The ranks this one waits for, once it sleeps, and since when; for other threads."""
        self._number = 0
        self._step = 0
        self._buffer = bytearray(_MAX_BYTES)
        for link in self._links.values():
            link.setblocking(False)

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell all ranks ``values``, and return what each told; see `Collective.exchange`."""
        self._step = step
        self._number += 1
        if self.world == 1:
            return [tuple(values)]
        width = len(values)
        mine = struct.pack(f"<{width}d", *values)
        if self.rank == 0:
            told = {0: mine, **self._gather(self._links)}
            if any(len(theirs) != len(mine) for theirs in told.values()):
                self._refuse(f"{width} values", {r: len(theirs) // 8 for r, theirs in told.items()})
            everything = b"".join(told[rank] for rank in range(self.world))
            self._tell_all(_VALUES, everything)
        else:
            with contextlib.suppress(OSError):  # rank 0 is gone; what it said last is read below
                self._links[0].send(_HEAD.pack(_VALUES, self._number, step) + mine)
            everything = self._gather(self._links)[0]
            if len(everything) != self.world * len(mine):
                self._refuse(f"{self.world * width} values", {0: len(everything) // 8})
        if width == 0:
            return [()] * self.world
        return list(struct.iter_unpack(f"<{width}d", everything))

    def close(self) -> None:
        """End every link; whoever waits for this rank is told so by the system."""
        for link in self._links.values():
            link.close()

    def _gather(self, ranks: Collection[int]) -> dict[int, bytes]:
        """Wait for this exchange's message of each of ``ranks``, and return what they carry."""
        told: dict[int, bytes] = {}
        start = time.monotonic()
        missing = list(ranks)
        while missing:
            for rank in missing:
                payload = self._poll(rank, start)
                if payload is not None:
                    told[rank] = payload
            missing = [rank for rank in missing if rank not in told]
            if missing:
                self._wait(missing, start)
        self.waits = ((), 0.0)
        return told

    def _wait(self, missing: Sequence[int], start: float) -> None:
        """Let some time pass: yield the core at first, then sleep until there is a message."""
        waited_s = time.monotonic() - start
        if waited_s < SPIN_S:
            os.sched_yield()
            return
        self.waits = (tuple(missing), start)
        poller = select.poll()
        for rank in missing:
            poller.register(self._links[rank], select.POLLIN)
        if not poller.poll(max(0.0, self._timeout_s - waited_s) * 1000):
            self._lose(missing, start)

    def _poll(self, rank: int, start: float) -> bytes | None:
        """Return what ``rank`` told in this exchange, None if it is not here yet."""
        size = 0  # also what a link that has ended gives
        for _ in range(2):  # a reset hides the last messages once; they are there after it
            try:
                size = self._links[rank].recv_into(self._buffer)
            except BlockingIOError:
                return None
            except ConnectionError:
                continue
            break
        if size == 0:
            self._lose([rank], start)
        if size < _HEAD.size:
            raise ProtocolError(f"rank {rank} sent {size} bytes, which are no message")
        kind, number, step = _HEAD.unpack_from(self._buffer)
        payload = bytes(memoryview(self._buffer)[_HEAD.size : size])
        if kind == _LOST:
            lost = [int(peer) for (peer,) in struct.iter_unpack("<d", payload)]
            self._lose(lost, start)
        if kind != _VALUES or (number, step) != (self._number, self._step):
            self._refuse(f"step {self._step}, exchange {self._number}", {rank: (step, number)})
        return payload

    def _lose(self, peers: Sequence[int], start: float) -> NoReturn:
        """Tell the others who is lost, end the group, and raise."""
        if self.rank == 0:
            self._tell_all(_LOST, struct.pack(f"<{len(peers)}d", *peers))
        self.close()
        raise PeerLostError(self.rank, peers, self._step, time.monotonic() - start)

    def _refuse(self, expected: str, got: Mapping[int, object]) -> NoReturn:
        self.close()
        listed = ", ".join(f"rank {rank} {what}" for rank, what in sorted(got.items()))
        raise ProtocolError(f"rank {self.rank} is at {expected}, and got of {listed}")

    def _tell_all(self, kind: bytes, payload: bytes) -> None:
        message = _HEAD.pack(kind, self._number, self._step) + payload
        for link in self._links.values():
            with contextlib.suppress(OSError):  # gone: the next exchange says so
                link.send(message)
