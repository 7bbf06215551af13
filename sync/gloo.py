"""Ranks on any machines: each has its own copy of the parameters, and gloo carries the slices.

    reduce    rank i sends slice j of its gradient to rank j, which sums what it got (all-to-all)
    publish   rank j sends slice j of the parameters to every rank                    (all-gather)

That moves as many bytes as a ring all-reduce. Gloo's own all-reduce took about as long (2 ranks,
64 MiB: 60 ms), its reduce-scatter is an all-reduce underneath (113 ms). The sum is made by its
owner in a fixed order, as in `sync.shared`, and replicas are equal by their bits also where the
machines' processors round differently.
"""

from __future__ import annotations

import contextlib
import functools
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
from paramserver.layout import BLOCK, Layout
from sync.collective import Table, weighted_sum_

_ROLL_CALL_S = 3.0
"""Seconds in which ranks that noticed a loss sign in, to find out who did not."""


class Gloo:
    """A `sync.collective.Collective` of ranks on any machines; made by `Host.form` and `join`."""

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
        self.rank, self.world = rank, world
        size = -(-layout.numel // (world * BLOCK)) * BLOCK  # equal slices; the last may be short
        mine = range(rank * size, (rank + 1) * size)
        numel = layout.numel
        self.cut = range(min(mine.start, numel), min(mine.stop, numel))
        self._params, self._grad, self._received = (
            torch.zeros(world * size, dtype=layout.dtype) for _ in range(3)
        )
        self.params: Tensor = self._params[:numel]
        self.grad: Tensor = self._grad[:numel]
        self._mine = mine
        self._terms = self._received.view(world, size)
        self._store, self._step, self._timeout_s = store, 0, timeout_s
        self._others = tuple(other for other in range(world) if other != rank)
        self.waits: tuple[tuple[int, ...], float] = ((), 0.0)
        with self._named():
            self._group = _connect(store, rank, layout, world, ip, timeout_s)

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell every rank ``values`` and return what each told."""
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

    def reduce(self, weights: Sequence[float]) -> Tensor:
        """Return the weighted sum of the gradients for the own slice, its own term first."""
        with self._named():
            self._group.alltoall_base(self._received, self._grad, [], []).wait()
        terms = list(zip(self._terms, weights, strict=True))
        own, weight = terms.pop(self.rank)
        return weighted_sum_(own, weight, terms)[: len(self.cut)]

    def publish(self, *, vector: bool = False) -> None:
        """Bring every rank's slice to all ranks."""
        with self._named():
            for whole in (self._params, self._vector) if vector else (self._params,):
                mine = whole[self._mine.start : self._mine.stop]
                self._group._allgather_base(whole, mine).wait()

    def close(self) -> None:
        """Leave the group; ranks that still wait for this one see their connections end."""
        if hasattr(self, "_group"):
            del self._group  # ends the connections
        del self._store

    @functools.cached_property
    def _vector(self) -> Tensor:
        return torch.zeros_like(self._params)

    @property
    def vector(self) -> Tensor:
        """The second vector, this rank's copy of it."""
        return self._vector[: len(self.params)]

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
        until = time.monotonic() + min(_ROLL_CALL_S, self._timeout_s)
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

    def form(self, layout: Layout, world: int, token: str, timeout_s: float) -> Gloo:
        """Wait for the other ranks, and be rank 0."""
        return Gloo(PrefixStore(token, self._store), 0, layout, world, self._ip, timeout_s)

    def close(self) -> None:
        """Stop listening, once no group uses the store any more."""
        del self._store


def join(
    address: str, rank: int, layout: Layout, world: int, token: str, ip: str, timeout_s: float
) -> Gloo:
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
    return Gloo(PrefixStore(token, store), rank, layout, world, ip, timeout_s)


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
