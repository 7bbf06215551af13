"""A whole synchronous group inside the test's process: each rank on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

from paramserver.layout import Layout
from sync import mesh, shared
from sync.collective import Collective
from sync.gloo import Gloo
from sync.nodes import meet

T = TypeVar("T")
Kind = Literal["shared_memory", "gloo", "nodes"]

KINDS: tuple[Kind, ...] = ("shared_memory", "gloo", "nodes")
LOCALHOST = "127.0.0.1"
TOKEN = "a token"
NODES = (0, 1, 0, 0, 1)
"""Where ranks are when there are several nodes, in any order and unevenly."""


def group(
    kind: Kind,
    layout: Layout,
    world: int,
    body: Callable[[Collective], T],
    timeout_s: float = 10.0,
) -> list[T | BaseException]:
    """Run ``body`` on every rank of a group; return what each returned or raised, by rank.

    A rank leaves the group as soon as its body has ended, as a process that ends does.
    """
    host: shared.Host | mesh.Host
    host = shared.Host() if kind == "shared_memory" else mesh.Host(LOCALHOST, timeout_s)
    came_out: list[T | BaseException] = [AssertionError("the rank did not end")] * world

    def run(rank: int) -> None:
        try:
            collective = enter(kind, host, rank, layout, world, timeout_s)
            try:
                came_out[rank] = body(collective)
            finally:
                collective.close()
        except BaseException as error:
            came_out[rank] = error

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}") for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * timeout_s)
    host.close()
    return came_out


def enter(
    kind: Kind,
    host: shared.Host | mesh.Host,
    rank: int,
    layout: Layout,
    world: int,
    timeout_s: float,
) -> Collective:
    """Join the group of ``host`` as ``rank``."""
    joined: shared.SharedMemory | mesh.Mesh
    if rank == 0:
        joined = host.form(layout, world, TOKEN, timeout_s)
    elif kind == "shared_memory":
        joined = shared.join(host.address, rank, layout, world, TOKEN, timeout_s)
    else:
        joined = mesh.join(host.address, rank, layout, world, TOKEN, LOCALHOST, timeout_s)
    if isinstance(joined, shared.SharedMemory):
        return joined
    if kind == "gloo":
        return Gloo(joined, layout)
    return meet(joined, layout, NODES[:world], TOKEN)


def results(came_out: list[T | BaseException]) -> list[T]:
    """Return what the ranks returned; raise what the first one raised, if one did."""
    good: list[T] = []
    for one in came_out:
        if isinstance(one, BaseException):
            raise one
        good.append(one)
    return good
