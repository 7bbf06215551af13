"""Clients of one machine share a pull: what they read is the same, and it comes once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from async_sgd.rules.gathering import BSP
from async_sgd.rules.ringmaster import Ringmaster
from paramserver.client import Client, Reading
from paramserver.errors import ProtocolError
from paramserver.messages import Kind, Message
from paramserver.transports import grpc_connection, neighbours
from paramserver.transports.grpc_connection import GrpcConnection
from paramserver.transports.link import Link
from paramserver.transports.neighbours import Neighbours, Shelf
from paramserver.transports.pulls import Holder, Place, Pulls
from tests.support.clusters import TOKEN, GrpcCluster, MemoryCluster
from tests.support.wire import Wire

NUMEL, WORKERS, STEPS = 320_000, 3, 4
PULL_BYTES = 4 * NUMEL


def vector(seed: int, numel: int = NUMEL) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def lock_step() -> dict[str, Any]:
    """Return what makes all workers read one version, over two shards."""
    return {"shards": 2, "readers": WORKERS, "rule": BSP().build(WORKERS)}


def step(clients: Sequence[Client], seed: int) -> list[Tensor]:
    """Push once from each client; return what they read then."""
    for worker, client in enumerate(clients):
        grad = vector(seed + worker)
        parts = grad.split([len(slot) for slot in client.slots])
        torch._foreach_copy_(list(client.slots), list(parts))
        client.begin_push(norm=float(grad.norm()))
    return [read(client.end_push()) for client in clients]


def read(reading: object) -> Tensor:
    assert isinstance(reading, Reading)
    return torch.cat(list(reading.params))


def trained(cluster: Any) -> list[list[Tensor]]:
    """Return what each client reads in `STEPS` steps in lock-step."""
    clients = [cluster.join(worker) for worker in range(WORKERS)]
    seen = [[read(client.first_read()) for client in clients]]
    return seen + [step(clients, 10 * number) for number in range(STEPS)]


@pytest.fixture
def cluster() -> Iterator[GrpcCluster]:
    with GrpcCluster(vector(0), **lock_step()) as cluster:
        yield cluster


def sent(cluster: GrpcCluster) -> float:
    """Return how many pulls' bytes have been sent so far."""
    return cluster.gateway.counted()["sent_bytes"] / PULL_BYTES


def test_a_pull_comes_once_and_all_read_the_same(cluster: GrpcCluster) -> None:
    with MemoryCluster(vector(0), **lock_step()) as alone:
        expected = trained(alone)

    before = sent(cluster)
    seen = trained(cluster)

    for ours, theirs in zip(seen, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert 1 + STEPS <= sent(cluster) - before < 1.01 * (1 + STEPS)


def test_clients_of_other_machines_are_sent_their_own(
    cluster: GrpcCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = iter("ABCDEF")
    monkeypatch.setattr(grpc_connection, "machine", lambda: next(machines))
    before = sent(cluster)

    seen = trained(cluster)

    assert all(torch.equal(each, all_read[0]) for all_read in seen for each in all_read)
    assert sent(cluster) - before > WORKERS * (1 + STEPS)


def test_another_version_is_not_a_neighbours() -> None:
    """Asynchronous workers read versions of their own, which nobody near has."""
    with GrpcCluster(vector(0), readers=WORKERS) as cluster:
        clients = [cluster.join(worker) for worker in range(WORKERS)]
        for client in clients:
            client.first_read()
        params, before = vector(0), sent(cluster)
        for seed in range(STEPS):
            for worker, client in enumerate(clients):
                (seen,) = step([client], seed)
                params -= vector(seed)
                assert torch.equal(seen, params), (seed, worker)

        assert sent(cluster) - before > WORKERS * STEPS


def test_a_neighbour_that_leaves_is_done_without(cluster: GrpcCluster) -> None:
    """It has what another one is told to copy, and is gone before that one does."""
    clients = [cluster.join(worker) for worker in range(WORKERS)]
    for client in clients:
        client.first_read()
    for client in clients:  # any may be the first to be sent the next version
        shelf_of(client).close()
    before = sent(cluster)

    seen = step(clients, 1)

    assert all(torch.equal(each, seen[0]) for each in seen)
    # The leader's half to each of the three, the other shard's to one. Who asks anew says its push
    # again, too, and may be sent the answer to that.
    assert 2.0 <= sent(cluster) - before < 3.1


def shelf_of(client: Client) -> Shelf:
    """Return where the leader's pulls are."""
    connection = client._leader
    assert isinstance(connection, GrpcConnection)
    assert connection._shelf is not None
    return connection._shelf


def test_who_asks_anew_does_so_at_once_and_not_when_it_next_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that only looks for a newer read while it computes is sent it, too."""
    asked: list[int] = []

    def refuse(near: Neighbours, holder: Holder, into: object) -> bool:
        asked.append(holder.number)
        return False

    monkeypatch.setattr(Neighbours, "copy", refuse)
    rule = Ringmaster(limit=1, cancel=True).build(2)
    with GrpcCluster(vector(0), readers=2, rule=rule) as cluster:
        slow, fast = cluster.join(0), cluster.join(1)
        slow.first_read(), fast.first_read()
        for seed in range(8):
            step([fast], seed)
        newest, deadline = 0, time.monotonic() + 4.0
        while newest < 8:
            assert time.monotonic() < deadline, f"version {newest} is the newest one"
            found = slow.newer_read()
            newest = newest if found is None else found.version
    assert asked


def test_a_neighbour_without_news_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is cut while it is sent what another one is told to copy."""
    monkeypatch.setattr(neighbours, "_PATIENCE_S", 0.5)
    params = vector(0, 8_000_000)
    tcp = type("OverTcp", (GrpcCluster,), {"settings": {"listen": "127.0.0.1:0"}})
    with tcp(params) as cluster, ThreadPoolExecutor() as threads:
        direct = cluster.gateway.address
        with Wire(int(direct.rpartition(":")[2])) as wire:
            cluster.gateway.address = wire.address
            first = cluster.join(-2, wait_s=30.0)
            cluster.gateway.address = direct
            second = cluster.join(-3, wait_s=30.0)
            before = cluster.gateway.counted()["sent_bytes"]
            reading = threads.submit(first.read)
            while cluster.gateway.counted()["sent_bytes"] == before:
                time.sleep(1e-4)
            wire.cut()
            began = time.monotonic()

            assert torch.equal(read(second.read()), params)
            assert time.monotonic() - began > 0.5  # it was told to wait for the other one
            assert not reading.done()

            wire.mend()
            assert torch.equal(read(reading.result()), params)


@pytest.mark.parametrize(
    ("machine", "shelf"),
    [("m" * 129, "0" * 32), ("m", "../" + "0" * 29), ("m", ""), ("", "0" * 32)],
)
def test_a_place_that_is_none_is_refused(
    cluster: GrpcCluster, monkeypatch: pytest.MonkeyPatch, machine: str, shelf: str
) -> None:
    monkeypatch.setattr(grpc_connection, "machine", lambda: machine)
    monkeypatch.setattr(neighbours.secrets, "token_hex", lambda size: shelf)

    with pytest.raises(ProtocolError, match="its shelf, in 32 hex digits"):
        cluster.join(0)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf(TOKEN, 4, 8, torch.float32)
    for number, buffer in enumerate(shelf.buffers):
        buffer.fill_(number)
    yield shelf
    shelf.close()


@pytest.fixture
def near() -> Iterator[Neighbours]:
    with Neighbours(TOKEN, torch.zeros(8)) as near:
        yield near


def room(rows: int) -> list[Tensor]:
    return list(torch.full((rows, 8), -1.0))


def test_parameters_and_a_products_vector_are_copied(shelf: Shelf, near: Neighbours) -> None:
    shelf.put(5, (1, 3))
    into = room(2)

    assert near.copy(Holder(shelf.name, 5), into)
    assert [int(each[0]) for each in into] == [1, 3]
    assert not near.copy(Holder(shelf.name, 5), room(1))  # the gateway's word was of two


def test_what_was_passed_over_is_not_to_be_had(shelf: Shelf, near: Neighbours) -> None:
    shelf.put(5, (0,))
    shelf.put(7, (1,))

    assert near.copy(Holder(shelf.name, 5), room(1))
    assert not near.copy(Holder(shelf.name, 6), room(1))
    shelf.take_away((0, 2))
    assert not near.copy(Holder(shelf.name, 5), room(1))
    assert near.copy(Holder(shelf.name, 7), room(1))


def test_what_is_overwritten_meanwhile_is_not_taken_for_it(shelf: Shelf, near: Neighbours) -> None:
    """The owner goes on at the worst moment: when the neighbour is copying."""
    shelf.put(5, (0,))

    class Slow(Tensor):
        def copy_(self, *args: Any, **kwargs: Any) -> Tensor:
            shelf.take_away((0,))
            return super().copy_(*args, **kwargs)

    assert not near.copy(Holder(shelf.name, 5), [torch.zeros(8).as_subclass(Slow)])


def test_a_pull_that_comes_slowly_is_waited_for(
    shelf: Shelf, near: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(neighbours, "_NEWS_S", 0.05)
    into, began = room(1), time.monotonic()
    with ThreadPoolExecutor() as threads:
        copied = threads.submit(near.copy, Holder(shelf.name, 9), into)
        while time.monotonic() - began < 1.5:
            assert not copied.done()
            shelf.moves()
            time.sleep(0.01)
        shelf.put(9, (2,))

        assert copied.result()
    assert int(into[0][0]) == 2


def test_strangers_are_shown_out(shelf: Shelf, near: Neighbours) -> None:
    shelf.put(5, (0,))
    with Neighbours("another run's token", torch.zeros(8)) as stranger:
        assert not stranger.copy(Holder(shelf.name, 5), room(1))
    for said in (Message(Kind.READ, seq=5), Message(Kind.PUSH)):
        link = Link.connect(shelf.name)
        link.send(said)
        with pytest.raises(EOFError):
            link.receive(5.0)
        link.close()
    link = Link.connect(shelf.name)
    link.sock.send(b"nonsense")
    with pytest.raises(EOFError):
        link.receive(5.0)
    link.close()

    assert near.copy(Holder(shelf.name, 5), room(1))
    assert not near.copy(Holder("0" * 32, 5), room(1))


def test_a_closed_shelf_leaves_nothing(near: Neighbours) -> None:
    shelf = Shelf(TOKEN, 1, 8, torch.float32)
    shelf.put(1, (0,))
    assert near.copy(Holder(shelf.name, 1), room(1))
    before = set(os.listdir("/proc/self/fd"))
    shelf.close()
    shelf.close()

    assert not near.copy(Holder(shelf.name, 1), room(1))
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before) - 5  # and the neighbour's own two
    assert "shelf" not in {thread.name for thread in threading.enumerate()}


def test_the_book_says_who_has_what() -> None:
    """Nobody is sent to itself, to who has let go, to another version, shard or machine."""
    pulls, leased = Pulls(), {"a": True}
    a, b, far = Place("m", "a"), Place("m", "b"), Place("n", "c")

    def claim(what: str, place: Place, shard: int = 0, **how: Any) -> Holder | None:
        return pulls.claim(what, place, shard, 7, lambda: leased.get(place.shelf, True), **how)

    assert claim("v1", a) is None
    assert claim("v1", b) == Holder("a", 7)
    assert claim("v1", a) is None
    assert claim("v1", far) is None
    assert claim("v1", b, shard=1) is None
    assert claim("v2", b) is None
    assert claim("v2", a) == Holder("b", 7)
    assert claim("v2", a, anew=True) is None
    assert claim("v2", b) == Holder("a", 7)
    leased["a"] = False
    assert claim("v2", b) is None
    pulls.forget(a, 0)
    assert claim("v2", a) == Holder("b", 7)
    pulls.forget(b, 0)
    assert claim("v2", a) is None
