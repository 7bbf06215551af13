"""Ranks on one machine: one copy of the parameters, in memory that all of them share.

    memfd   | parameters | gradient of rank 0 | gradient of rank 1 | ... | second vector
    rank 0    reads all    writes;  slice 0 <-+  reads slice 0
              writes slice 0
    rank 1    reads all    reads slice 1      +-> writes;  slice 1
              writes slice 1

Nobody reads parameters between `exchange` and `publish`, so each rank updates its slice where it
is, and no second copy is needed. The model's own parameters are views of the vector: an update is
seen without a copy. The second vector is there once a rank has used it: whoever comes to it makes
the memory longer, always to the same length.

The memory is a memfd. Rank 0 makes it and hands its descriptor over the Unix socket on which the
ranks then meet (`sync.star`): both are nameless, so a killed rank leaves nothing behind. Only
processes of the same user are let in, and only with the group's token.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import logging
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Sequence

from torch import Tensor

from paramserver.errors import PeerLostError, ProtocolError, ResourceError
from paramserver.layout import Layout
from paramserver.transports.segment import Segment, check_memory
from sync.collective import Sent, Table, fair_cuts, weighted_sum_
from sync.star import Star

logger = logging.getLogger(__name__)

_HELLO = struct.Struct("<4si32s")  # mark, rank, group
_MARK = b"sync"
_WELCOME = b"welcome"


class SharedMemory:
    """A `sync.collective.Collective` of ranks on one machine; made by `Host.form` and `join`."""

    def __init__(self, star: Star, segment: Segment, layout: Layout) -> None:
        """Use ``segment``, whose first row holds parameters and the others gradients, by rank."""
        self.rank, self.world = star.rank, star.world
        self.cuts = fair_cuts(layout, star.world)
        self.cut = self.cuts[star.rank]
        self._star, self._segment, self._layout = star, segment, layout
        self._step = 0
        self.slots = segment.rows[1 : 1 + star.world]
        """The gradients of all ranks; each writes its own."""
        self.params: Tensor = segment.rows[0]
        self.grad: Tensor = self.slots[self.rank]
        self._slices = [slot[self.cut.start : self.cut.stop] for slot in self.slots]

    @functools.cached_property
    def vector(self) -> Tensor:
        """The second vector, in the row after the gradients."""
        check_memory(self._layout.num_bytes)
        num_rows = 2 + self.world
        stride = (self.grad.data_ptr() - self.params.data_ptr()) // (1 + self.rank)
        os.ftruncate(self._segment.fd, num_rows * stride)
        longer = Segment(
            self._segment.fd, num_rows, self._layout.numel, self._layout.dtype, writable=True
        )
        return longer.rows[-1]

    @property
    def waits(self) -> tuple[tuple[int, ...], float]:
        """The ranks a call waits for now, and since when."""
        return self._star.waits

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell every rank ``values`` and return what each told."""
        self._step = step
        return self._star.exchange(step, values)

    def reduce(self, weights: Sequence[float], sent: Sent | None = None) -> Tensor:
        """Return the weighted sum of the gradients for the own slice, its own term first."""
        terms = list(zip(self._slices, weights, strict=True))
        own, weight = terms.pop(self.rank)
        return weighted_sum_(own, weight, terms)

    def publish(self, *, vector: bool = False) -> None:
        """Wait until every rank has updated its slice; that of the second vector as well."""
        self._star.exchange(self._step, ())

    def close(self) -> None:
        """Leave the group; the memory goes with the last tensor that shows it."""
        self._star.close()
        self._segment.close()


class Host:
    """Rank 0's door: the others knock at `address` until the group is complete."""

    def __init__(self) -> None:
        """Listen.

        Raises:
            ResourceError: This is not Linux.
        """
        if not sys.platform.startswith("linux"):
            raise ResourceError("collective='shared_memory' needs Linux (memfd): use 'gloo'")
        self.address = secrets.token_hex(16)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_abstract(self.address))
        self._listener.listen(128)

    def form(self, layout: Layout, world: int, token: str, timeout_s: float) -> SharedMemory:
        """Wait for the other ranks, hand them the memory, and be rank 0.

        Args:
            layout: Of the model, the same on all ranks.
            world: Ranks in the group.
            token: What a rank must know to be let in.
            timeout_s: Seconds to wait here, and in each exchange later.

        Raises:
            ResourceError: There is too little memory.
            PeerLostError: A rank did not come.
        """
        check_memory((1 + world) * layout.num_bytes)
        segment = Segment.create("paramserver-sync", 1 + world, layout.numel, layout.dtype)
        links: dict[int, socket.socket] = {}
        try:
            self._admit(links, _group(token, layout, world), world, timeout_s)
            for rank, link in links.items():
                _welcome(rank, link, segment.fd)
            return SharedMemory(Star(0, world, links, timeout_s), segment, layout)
        except BaseException:
            for link in links.values():
                link.close()
            segment.close()
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()

    def _admit(
        self, links: dict[int, socket.socket], group: bytes, world: int, timeout_s: float
    ) -> None:
        """Fill ``links`` with the sockets of the ranks 1 to ``world - 1`` that know ``group``."""
        start = time.monotonic()
        while len(links) < world - 1:
            left_s = start + timeout_s - time.monotonic()
            try:
                self._listener.settimeout(max(left_s, 1e-3))
                link, _ = self._listener.accept()
            except TimeoutError:
                missing = [rank for rank in range(1, world) if rank not in links]
                raise PeerLostError(0, missing, 0, time.monotonic() - start) from None
            try:
                rank = _read_hello(link, group, left_s)
                if not 1 <= rank < world or rank in links:
                    raise ProtocolError(f"there is no place for rank {rank}")
            except (OSError, ProtocolError) as error:
                logger.warning("a connection to the group was refused: %s", error)
                link.close()
                continue
            links[rank] = link


def join(
    address: str, rank: int, layout: Layout, world: int, token: str, timeout_s: float
) -> SharedMemory:
    """Join the group of the rank 0 that listens at ``address``; see `Host.form`.

    Raises:
        PeerLostError: Rank 0 is not there, is silent or refused.
    """
    start = time.monotonic()
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.settimeout(2 * timeout_s)  # rank 0 first says who else is missing
        link.connect(_abstract(address))
        link.send(_HELLO.pack(_MARK, rank, _group(token, layout, world)))
        data, fds, _, _ = socket.recv_fds(link, len(_WELCOME), 1, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        data, fds = b"", []
    if data != _WELCOME or len(fds) != 1:
        link.close()
        raise PeerLostError(rank, [0], 0, time.monotonic() - start)
    try:
        segment = Segment.attach(fds[0], layout.numel, layout.dtype, writable=True)
    except BaseException:
        link.close()
        os.close(fds[0])
        raise
    return SharedMemory(Star(rank, world, {0: link}, timeout_s), segment, layout)


def _group(token: str, layout: Layout, world: int) -> bytes:
    """Return what only ranks of one group have in common, 32 bytes."""
    return hashlib.sha256(f"{token} {layout.fingerprint} {world}".encode()).digest()


def _read_hello(link: socket.socket, group: bytes, timeout_s: float) -> int:
    """Return the rank that knocks; ProtocolError if it does not belong to the group."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        raise ProtocolError(f"it belongs to user {uid}")
    link.settimeout(max(timeout_s, 1e-3))
    data = link.recv(_HELLO.size)
    if len(data) != _HELLO.size:
        raise ProtocolError(f"it said {len(data)} bytes instead of a hello")
    mark, rank, theirs = _HELLO.unpack(data)
    if mark != _MARK or not hmac.compare_digest(theirs, group):
        raise ProtocolError("it has another token, model or number of ranks")
    return int(rank)


def _welcome(rank: int, link: socket.socket, fd: int) -> None:
    try:
        socket.send_fds(link, [_WELCOME], [fd])
    except OSError as error:
        raise PeerLostError(0, [rank], 0, 0.0) from error


def _abstract(address: str) -> str:
    return f"\0paramserver/sync/{address}"
