"""Real clients and shards under lost, repeated and reordered messages, and dying workers.

A failing case names its seed; `Plan(seed, …).run(…)` is that run again.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_sgd.rules import (
    BSP,
    SSP,
    Asynchronous,
    BoundedStaleness,
    KofN,
    NSoftsync,
    Rennala,
    Ringmaster,
)
from paramserver.errors import ResourceError
from paramserver.messages import Kind, Message
from paramserver.rules import RuleSpec
from tests.support.chaos import Plan, gradient
from tests.support.clusters import MemoryCluster

RULES = [
    Asynchronous(),
    SSP(bound=0),
    SSP(bound=2),
    BSP(),
    BoundedStaleness(limit=2),
    KofN(k=2, mode="sync"),
    KofN(k=2, mode="async"),
    KofN(k=2, mode="batch-async"),
    NSoftsync(n=2),
    Ringmaster(limit=2, cancel=True),
    KofN(k=2, mode="sync", cancel=True),
    Rennala(batch=2, cancel=True),
]


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_push_is_lost_halved_or_applied_twice(rule: RuleSpec, shards: int) -> None:
    for seed in range(3):
        print(f"seed {seed}")
        plan = Plan(seed, rule, workers=2 + seed, shards=shards)

        plan.run(num_events=400)

        assert plan.cluster.sequencer.version > 0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rule=st.sampled_from(RULES),
    workers=st.integers(2, 4),
    shards=st.integers(1, 3),
    loss_rate=st.floats(0, 0.4),
    kill_rate=st.floats(0, 0.1),
)
def test_any_mixture_of_faults_is_survived(
    seed: int, rule: RuleSpec, workers: int, shards: int, loss_rate: float, kill_rate: float
) -> None:
    plan = Plan(
        seed, rule, workers=workers, shards=shards, loss_rate=loss_rate, kill_rate=kill_rate
    )

    plan.run(num_events=200)


def test_the_plan_does_what_it_says() -> None:
    plan = Plan(0, SSP(bound=1), workers=3, shards=2)

    plan.run(num_events=3000)

    assert plan.num_killed > 5
    assert plan.num_timeouts > 5
    assert plan.cluster.sequencer.version > 50


@pytest.mark.parametrize("num_sent", range(4))
def test_a_worker_killed_between_slices_and_commit_leaves_all_or_nothing(num_sent: int) -> None:
    start = torch.zeros(192)
    with MemoryCluster(start, shards=3) as cluster:
        dying = [cluster.connect(shard, worker=0, incarnation=1)[0] for shard in (2, 1, 0)]
        other = cluster.join(1)
        other.first_read()
        lost = gradient(0, 1, 1)
        for connection, cut in zip(dying, reversed(cluster.cuts), strict=True):
            connection.slot.copy_(lost[cut.start : cut.stop])
        push = Message(Kind.PUSH, worker=0, incarnation=1, seq=1, clock=1)

        for connection in dying[:num_sent]:
            connection.send(push)
        for connection in dying:
            connection.close()

        expected = start - lost if num_sent == 3 else start
        assert torch.equal(cluster.params(), expected)
        assert [shard.version for shard in cluster.shards] == [num_sent == 3] * 3
        for slot, cut in zip(other.slots, cluster.cuts, strict=True):
            slot.copy_(gradient(1, 1, 1)[cut.start : cut.stop])
        other.push(norm=1.0)
        assert torch.equal(cluster.params(), expected - gradient(1, 1, 1))


def test_a_slice_of_the_dead_that_comes_late_does_not_replace_its_successors() -> None:
    with MemoryCluster(torch.zeros(128), shards=2) as cluster:
        dead, _ = cluster.connect(shard=1, worker=0, incarnation=1)
        follower, _ = cluster.connect(shard=1, worker=0, incarnation=2)
        leader, _ = cluster.connect(shard=0, worker=0, incarnation=2)
        push = Message(Kind.PUSH, worker=0, incarnation=2, seq=1, clock=1)
        follower.send(push)

        dead.send(push._replace(incarnation=1))

        leader.send(push)
        cluster.settle()
        assert [shard.version for shard in cluster.shards] == [1, 1]


@pytest.mark.parametrize("shard", [0, 1])
def test_an_order_that_cannot_be_executed_stops_every_worker_with_its_cause(
    shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ResourceError("all buffers are read")

    with MemoryCluster(torch.zeros(192), shards=3) as cluster:
        a, b, late = cluster.join(0), cluster.join(1), cluster.join(2)
        for client in (a, b, late):
            client.first_read()
        monkeypatch.setattr(cluster.shards[shard].snapshots, "writable", fail)

        for client in (a, b):
            with pytest.raises(ResourceError, match="all buffers are read"):
                client.push(norm=1.0)
        monkeypatch.undo()
        with pytest.raises(ResourceError, match="all buffers are read"):
            late.push(norm=1.0)
