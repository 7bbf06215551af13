"""What any transport does when a rule cancels what a worker computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from async_sgd.rules import Ringmaster
from paramserver.client import Client, Ended, Reading
from paramserver.errors import ServerLostError
from paramserver.ledger import Move
from paramserver.recount import recount
from tests.support.clusters import (
    CLUSTERS,
    Cluster,
    GrpcCluster,
    MemoryCluster,
    SharedMemoryCluster,
)

NUMEL = 320
Start = Callable[..., Cluster]


@pytest.fixture(params=CLUSTERS)
def start(request: pytest.FixtureRequest) -> Start:
    kind, shards = CLUSTERS[request.param]

    def make(limit: int, **settings: Any) -> Cluster:
        rule = Ringmaster(limit=limit, cancel=True).build(2)
        return kind(torch.zeros(NUMEL), shards=shards, rule=rule, **settings)

    return make


def push(client: Client, value: float) -> Reading:
    grad = torch.full((NUMEL,), value)
    for slot, part in zip(client.slots, grad.split([len(s) for s in client.slots]), strict=True):
        slot.copy_(part)
    reading = client.push(norm=float(grad.norm()), loss=value)
    assert isinstance(reading, Reading)
    return reading


def newer_read(client: Client, version: int) -> Reading:
    """Return what ``client`` has read once ``version`` is there; a network takes a moment."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        reading = client.newer_read()
        if reading is not None and reading.version == version:
            return reading
    raise TimeoutError(f"version {version} did not come")


def whole(reading: Reading | Ended | None) -> Tensor:
    assert isinstance(reading, Reading)
    return torch.cat(reading.params)


def test_a_worker_sees_that_it_was_cancelled_and_reads_the_latest_version(start: Start) -> None:
    with start(limit=2) as cluster:
        slow, fast = cluster.join(0), cluster.join(1)
        slow.first_read(), fast.first_read()
        push(fast, 1.0)
        assert slow.newer_read() is None  # one update late is allowed

        push(fast, 2.0)
        newer = newer_read(slow, version=2)

        assert torch.equal(whole(newer), torch.full((NUMEL,), -3.0))
        assert slow.newer_read() is None
        assert push(slow, 4.0).version == 3
        assert cluster.column("staleness") == [0, 0, 0]
        assert cluster.sequencer.conservation.holds


def test_several_cancellations_are_seen_as_one(start: Start) -> None:
    with start(limit=1) as cluster:
        slow, fast = cluster.join(0), cluster.join(1)
        slow.first_read(), fast.first_read()
        for _ in range(5):
            push(fast, 1.0)

        newer = newer_read(slow, version=5)

        assert torch.equal(whole(newer), torch.full((NUMEL,), -5.0))
        assert cluster.sequencer.num_cancelled == 5
        assert cluster.sequencer.conservation.report()["abandoned"] == 5


def test_a_push_of_a_cancelled_read_is_dropped_and_answered_by_one_more(start: Start) -> None:
    with start(limit=1) as cluster:
        slow, fast = cluster.join(0), cluster.join(1)
        slow.first_read(), fast.first_read()
        push(fast, 1.0)
        push(fast, 1.0)

        reading = push(slow, float("nan"))  # of what was being overwritten: no error

        assert reading.version == 2
        assert torch.equal(whole(reading), torch.full((NUMEL,), -2.0))
        assert cluster.sequencer.ledger.drop_reasons() == {"cancelled": 1}
        assert cluster.column("read_version")[-1] == 0
        assert cluster.column("staleness")[-1] == 2
        assert cluster.sequencer.conservation.holds
        assert recount(cluster.sequencer.ledger.columns()) == []
        assert push(slow, 1.0).version == 3


def test_the_ledger_tells_who_was_cancelled_and_when(start: Start) -> None:
    with start(limit=1) as cluster:
        slow, fast = cluster.join(3), cluster.join(1)
        slow.first_read(), fast.first_read()
        push(fast, 1.0)

        moves = cluster.sequencer.ledger.moves()

        (cancelled,) = moves[moves["kind"] == Move.CANCEL]
        assert (cancelled["row"], cancelled["worker"], cancelled["incarnation"]) == (1, 3, 1)


@pytest.mark.parametrize("kind", [MemoryCluster, SharedMemoryCluster, GrpcCluster])
def test_a_lost_shard_is_noticed_when_looking(kind: type[Cluster]) -> None:
    with kind(torch.zeros(NUMEL), rule=Ringmaster(limit=1, cancel=True).build(1)) as cluster:
        client = cluster.join(0)
        client.first_read()

        cluster.kill(0)

        with pytest.raises(ServerLostError, match=r"shard 0 while looking for a message"):
            newer_read(client, version=1)
