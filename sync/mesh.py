"""Every rank connected with every other over TCP by gloo, on any machines, and who is lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    DistStoreError,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from paramserver.errors import PeerLostError, ProtocolError
from paramserver.layout import Layout
from sync.collective import Table

_ROLL_CALL_S = 3.0
"""Seconds in which ranks that noticed a loss sign in, to find out who did not."""


class Mesh:
    """The connections of one rank; made by `Host.form` and `join`, used by one thread.

    Every rank makes the same calls in the same order. A call waits for the others, but not for
    longer than the deadline, and raises PeerLostError if one is gone or silent.
    """

    def __init__(
        self, store: Store, rank: int, layout: Layout, world: int, ip: str, timeout_s: float
    ) -> None:
        """Meet the other ranks.

        Args:
            store: Where the ranks find each other; kept by rank 0.
            rank: This rank.
            layout: Of the model, the same on all ranks.
            world: Ranks in the group.
            ip: Address of this machine that the others reach.
            timeout_s: Seconds to wait here, and in each call later.

        Raises:
            PeerLostError: A rank did not come, or has another model.
        """
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._store, self._step = store, 0
        self._others = tuple(other for other in range(world) if other != rank)
        self.waits: tuple[tuple[int, ...], float] = ((), 0.0)
        """The ranks a call waits for now, and since when; for other threads."""
        with self._named():
            self._group = _connect(store, rank, layout, world, ip, timeout_s)

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell every rank ``values`` and return what each told, as `sync.collective` says."""
        self._step = step
        told = torch.empty(self.world, 1 + len(values), dtype=torch.float64)
        mine = torch.tensor([step, *values], dtype=torch.float64)
        with self._named():
            self._group.allgather([list(told)], [mine]).wait()
        table: Table = [tuple(row) for row in told.tolist()]
        steps = {rank: int(row[0]) for rank, row in enumerate(table)}
        if set(steps.values()) != {step}:
            raise ProtocolError(f"rank {self.rank} is at step {step}, all are at {steps}")
        return [row[1:] for row in table]

    def scatter(
        self, received: Tensor, sent: Tensor, from_each: Sequence[int], to_each: Sequence[int]
    ) -> None:
        """Send every rank a piece of ``sent`` and fill ``received`` with a piece from each.

        Args:
            received: Shape ``(sum(from_each),)``. Overwritten.
            sent: Shape ``(sum(to_each),)``, the pieces in the order of the ranks.
            from_each: Elements that come from each rank.
            to_each: Elements that each rank gets; empty for all alike, as ``from_each`` then is.
        """
        with self._named():
            self._group.alltoall_base(received, sent, list(from_each), list(to_each)).wait()

    def gather(self, whole: Tensor, mine: Tensor) -> None:
        """Fill ``whole`` with the ``mine`` of every rank, all of the same shape."""
        with self._named():
            self._group._allgather_base(whole, mine).wait()

    def tell(self, key: str, value: str) -> None:
        """Let every rank that asks for ``key`` know ``value``."""
        with self._named():
            self._store.set(key, value)

    def ask(self, key: str) -> str:
        """Return what a rank told of ``key``; wait until one does."""
        with self._named():
            value: bytes = self._store.get(key)
        return value.decode()

    def close(self) -> None:
        """Leave; ranks that still wait for this one see their connections end."""
        if hasattr(self, "_group"):
            del self._group  # ends the connections
        del self._store

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn gloo's errors into one that says who is lost."""
        start = time.monotonic()
        self.waits = (self._others, start)  # gloo does not say which of them
        try:
            yield
        except RuntimeError as error:  # gloo has no class for it
            self._lose(error, start)
        self.waits = ((), 0.0)

    def _lose(self, error: RuntimeError, start: float) -> NoReturn:
        waited_s = time.monotonic() - start
        raise PeerLostError(self.rank, self._missing(), self._step, waited_s) from error

    def _missing(self) -> list[int]:
        """Call the roll: every rank that is there has noticed the loss, and signs in."""
        until = time.monotonic() + min(_ROLL_CALL_S, self.timeout_s)
        missing = []
        try:
            self._store.set(f"here/{self.rank}", "")
            for rank in self._others:
                left = timedelta(seconds=max(until - time.monotonic(), 1e-3))
                try:
                    self._store.wait([f"here/{rank}"], left)
                except DistStoreError:  # in time nobody signed
                    missing.append(rank)
        except RuntimeError:  # the store is rank 0's: it is gone, or has finished its own roll call
            return missing or [0]
        return missing or list(self._others)


class Host:
    """Rank 0's store, where the others find the group.

    torch's store looks up the name of every address it connects: where the name server does not
    answer, each new group waits for the resolver's timeout (5 s by default, ``RES_OPTIONS``).
    """

    def __init__(self, ip: str, timeout_s: float) -> None:
        """Listen at a free port of ``ip``."""
        self._ip, self._timeout_s = ip, timeout_s
        self._store = TCPStore(
            ip, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self.address = f"{ip}:{self._store.port}"

    def form(self, layout: Layout, world: int, token: str, timeout_s: float) -> Mesh:
        """Wait for the other ranks, and be rank 0; see `Mesh`."""
        return Mesh(PrefixStore(token, self._store), 0, layout, world, self._ip, timeout_s)

    def close(self) -> None:
        """Stop listening, once no group uses the store any more."""
        del self._store


def join(
    address: str, rank: int, layout: Layout, world: int, token: str, ip: str, timeout_s: float
) -> Mesh:
    """Join the group whose rank 0 listens at ``address``; ``ip`` is this machine's.

    Raises:
        PeerLostError: Rank 0, or another rank, is not there.
    """
    host, _, port = address.rpartition(":")
    start = time.monotonic()
    try:
        store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerLostError(rank, [0], 0, time.monotonic() - start) from error
    return Mesh(PrefixStore(token, store), rank, layout, world, ip, timeout_s)


def _connect(
    store: Store, rank: int, layout: Layout, world: int, ip: str, timeout_s: float
) -> Any:  # torch's stubs leave out most of what its groups can do
    """Make a group of its own; torch's global one stays free for what the task does with it."""
    # Without a device gloo takes the address the host's name resolves to, often 127.0.1.1.
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=ip)]
    options._timeout = timedelta(seconds=timeout_s)
    store = PrefixStore(layout.fingerprint, store)  # another model's ranks do not meet ours
    return ProcessGroupGloo(store, rank, world, options)
