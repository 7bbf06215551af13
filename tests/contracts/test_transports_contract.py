"""What any transport does, with one shard and with several; a new one is a line in `CLUSTERS`."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from async_sgd.rules import BSP, SSP
from paramserver.client import Client, Ended, Reading
from paramserver.errors import (
    NonFiniteGradientError,
    ProtocolError,
    ResourceError,
    ServerLostError,
    ServerTimeoutError,
    StragglerTimeoutError,
)
from paramserver.messages import Kind, Message, raise_failure
from paramserver.optimizers import OPTIMIZERS, Optimizer
from paramserver.progress import Budget
from paramserver.recount import recount
from tests.support.clusters import (
    CLUSTERS,
    FINGERPRINT,
    TOKEN,
    Cluster,
    GrpcCluster,
    MemoryCluster,
    SharedMemoryCluster,
)

RULES = (
    *("sgd", "momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw", "rmsprop"),
    *("local-momentum", "dana-slim", "delayed-nesterov:every=2"),
)
NUMEL = 320  # five blocks: shards of unequal size
Start = Callable[..., Cluster]


@pytest.fixture(params=CLUSTERS)
def start(request: pytest.FixtureRequest) -> Start:
    kind, shards = CLUSTERS[request.param]
    return partial(kind, shards=shards)


def vector(seed: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


def write(client: Client, grad: Tensor) -> float:
    """Write ``grad`` where ``client`` pushes from; return its norm."""
    for slot, part in zip(client.slots, grad.split([len(s) for s in client.slots]), strict=True):
        slot.copy_(part)
    return float(grad.norm())


def push(client: Client, grad: Tensor, **of: Any) -> Reading:
    norm = write(client, grad)
    reading = client.push(**{"norm": norm, **of})
    assert isinstance(reading, Reading)
    return reading


def whole(reading: Reading | Ended) -> Tensor:
    assert isinstance(reading, Reading)
    return torch.cat(reading.params)


class Plain:
    """The same optimizer on one vector in one process."""

    def __init__(self, params: Tensor, optimizer: Optimizer) -> None:
        self.param = nn.Parameter(params.clone(), requires_grad=False)
        self._rule = optimizer.build([self.param])

    def step(self, grad: Tensor) -> Tensor:
        self._rule.apply([grad])
        return self.param.data


def test_the_first_read_is_what_the_shards_started_with(start: Start) -> None:
    with start(vector(0)) as cluster:
        reading = cluster.join(0).first_read()

        assert isinstance(reading, Reading)
        assert reading.version == 0
        assert torch.equal(whole(reading), vector(0))


@pytest.mark.parametrize("name", RULES)
def test_pushes_do_what_the_optimizer_does_alone(start: Start, name: str) -> None:
    optimizer = OPTIMIZERS.parse(name)
    plain = Plain(vector(0), optimizer)
    with start(vector(0), optimizer=optimizer) as cluster:
        client = cluster.join(0)
        client.first_read()
        for step in range(1, 6):
            reading = push(client, vector(step))

            assert reading.version == step
            assert torch.equal(whole(reading), plain.step(vector(step)))


def test_a_push_that_is_sent_again_is_applied_once_and_answered_alike(start: Start) -> None:
    with start(vector(0)) as cluster:
        client = cluster.join(0)
        client.first_read()
        first = push(client, vector(1))

        again = client.retry()

        assert isinstance(again, Reading)
        assert again.version == first.version == cluster.sequencer.version == 1
        assert torch.equal(whole(again), vector(0) - vector(1))
        assert (client.clock, cluster.column("seq")) == (1, [1])
        assert push(client, vector(2)).version == 2


def test_a_push_without_an_answer_times_out_and_a_retry_applies_it_once(start: Start) -> None:
    with start(vector(0)) as cluster:
        client = cluster.join(0, wait_s=0.1)
        client.first_read()
        norm = write(client, vector(1))
        asked_at = time.monotonic()
        with (
            cluster.mute(),
            pytest.raises(ServerTimeoutError, match=r"did not answer within 0\.1 s"),
        ):
            client.push(norm=norm)
        waited_s = time.monotonic() - asked_at

        reading = client.retry()

        assert waited_s < 1.0
        assert torch.equal(whole(reading), vector(0) - vector(1))
        assert (client.clock, cluster.column("seq")) == (1, [1])
        assert torch.equal(whole(push(client, vector(2))), vector(0) - vector(1) - vector(2))


def test_staleness_is_exact(start: Start) -> None:
    with start(vector(0)) as cluster:
        a, b = cluster.join(0), cluster.join(1)
        a.first_read(), b.first_read()
        for client, seed in ((a, 1), (a, 2), (b, 3), (a, 4), (b, 5)):
            push(client, vector(seed))

        assert cluster.column("worker") == [0, 0, 1, 0, 1]
        assert cluster.column("read_version") == [0, 1, 0, 2, 3]
        assert cluster.column("staleness") == [0, 0, 2, 1, 1]
        assert cluster.sequencer.conservation.holds
        assert recount(cluster.sequencer.ledger.columns()) == []


def test_what_a_worker_has_read_stays_as_it_is_while_others_push(start: Start) -> None:
    with start(vector(0)) as cluster:
        slow, fast = cluster.join(0), cluster.join(1)
        reading = slow.first_read()
        fast.first_read()
        for seed in range(1, 8):
            push(fast, vector(seed))

            assert torch.equal(whole(reading), vector(0))


def test_a_reader_gets_one_consistent_cut_that_stays(start: Start) -> None:
    plain = Plain(vector(0), OPTIMIZERS.parse("adam"))
    with start(vector(0), optimizer=OPTIMIZERS.parse("adam")) as cluster:
        worker, reader = cluster.join(0), cluster.join(-1)
        worker.first_read()
        for version in range(1, 4):
            push(worker, vector(version))
            expected = plain.step(vector(version)).clone()
            reading = reader.read()
            push_ahead = push(worker, vector(50 + version))
            plain.step(vector(50 + version))

            assert reading.version == push_ahead.version - 1
            assert torch.equal(whole(reading), expected)
        reader.release()
        cluster.settle()
        assert [shard.snapshots.num_leases for shard in cluster.shards] == [1] * len(cluster.shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"another {FINGERPRINT}", "the token is not"),
        ("", "the token is not"),
        (f"{TOKEN} another", "laid out in another way"),
        ("tökén \N{SNOWMAN}", "the token is not"),
    ],
)
def test_who_does_not_belong_here_is_refused(start: Start, text: str, message: str) -> None:
    with start(vector(0)) as cluster:
        for shard in range(len(cluster.shards)):
            with pytest.raises(ProtocolError, match=message):
                cluster.connect(shard, 0, 1, text)

        assert cluster.sequencer.live() == []
        assert isinstance(cluster.join(0).first_read(), Reading)


def test_an_old_incarnation_is_refused_and_the_new_one_goes_on(start: Start) -> None:
    with start(vector(0)) as cluster:
        client = cluster.join(0, incarnation=2)
        client.first_read()
        for incarnation in (1, 2):
            with pytest.raises(ProtocolError, match="it has been replaced"):
                cluster.join(0, incarnation=incarnation)

        assert push(client, vector(1)).version == 1


def test_a_replaced_worker_cannot_push_and_its_end_harms_nobody(start: Start) -> None:
    with start(vector(0)) as cluster:
        old = cluster.join(0, incarnation=1)
        old.first_read()
        new = cluster.join(0, incarnation=2)
        reading = new.first_read()
        with pytest.raises(ProtocolError, match=r"does not take part|another's connection"):
            push(old, vector(1))
        old.close()
        cluster.settle()

        assert push(new, vector(2)).version == 1
        assert torch.equal(cluster.params(), vector(0) - vector(2))
        assert isinstance(reading, Reading)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq": 3}, "sent push 3; 1 was expected"),
        ({"read_version": 7}, "says it read version 7; it was granted 0"),
        ({"incarnation": 2}, "came over another's connection"),
        ({"worker": 1}, "came over another's connection"),
        ({"norm": -1.0}, "norm -1.0"),
        ({"kind": Kind.ORDER}, "a leader does not take message 11"),
        ({"kind": Kind.READ}, "a worker reads by pushing"),
    ],
)
@pytest.mark.parametrize("kind", [MemoryCluster, SharedMemoryCluster, GrpcCluster])
def test_a_push_that_breaks_the_contract_changes_nothing(
    kind: type[Cluster], change: dict[str, Any], message: str
) -> None:
    with kind(vector(0)) as cluster:
        connection, _ = cluster.connect(0, worker=0, incarnation=1)
        assert connection.receive(1.0).kind == Kind.GRANT
        good = Message(Kind.PUSH, worker=0, incarnation=1, seq=1, clock=1)

        connection.send(good._replace(**change))

        with pytest.raises(ProtocolError, match=message):
            raise_failure(connection.receive(1.0))
        assert cluster.sequencer.version == 0
        assert torch.equal(cluster.params(), vector(0))
        connection.send(good)
        assert connection.receive(1.0).version == 1
        connection.close()


def test_there_is_room_for_so_many_and_no_more(start: Start) -> None:
    with start(vector(0), readers=2) as cluster:
        cluster.join(0), cluster.join(-1)

        with pytest.raises(ResourceError, match="made for 2 workers and readers"):
            cluster.join(1)


def test_the_run_ends_after_its_budget(start: Start) -> None:
    with start(vector(0), budget=Budget(updates=2)) as cluster:
        a, b = cluster.join(0), cluster.join(1)
        a.first_read(), b.first_read()
        push(a, vector(1))
        write(a, vector(2))
        assert a.push(norm=1.0) == Ended("2 updates")
        write(b, vector(3))

        assert b.push(norm=1.0) == Ended("2 updates")
        assert b.retry() == Ended("2 updates")
        assert cluster.join(2).first_read() == Ended("2 updates")
        assert torch.equal(cluster.params(), vector(0) - vector(1) - vector(2))
        assert cluster.sequencer.ledger.drop_reasons() == {"ended": 1}


def test_a_gradient_that_is_not_finite_stops_the_run_by_name(start: Start) -> None:
    with start(vector(0)) as cluster:
        client, other = cluster.join(0), cluster.join(1)
        client.first_read(), other.first_read()
        with pytest.raises(NonFiniteGradientError, match=r"worker 0 at clock 1.*'fc\.weight'"):
            client.push(norm=float("nan"), layer="fc.weight")
        with pytest.raises(NonFiniteGradientError, match="worker 0 at clock 1"):
            other.push(norm=1.0)

        assert torch.equal(cluster.params(), vector(0))


def test_a_fast_worker_waits_until_the_slow_one_has_pushed(start: Start) -> None:
    with start(vector(0), rule=SSP(bound=0).build(2)) as cluster:
        slow = cluster.join(0)
        released: list[Reading] = []

        def push_after() -> None:
            cluster.settle()  # over a network the later push could arrive first
            released.append(push(slow, vector(2)))

        fast = cluster.join(1, while_waiting=push_after)
        slow.first_read(), fast.first_read()

        reading = push(fast, vector(1))

        assert torch.equal(whole(reading), vector(0) - vector(1) - vector(2))
        assert reading.version == released[0].version == 2
        assert cluster.sequencer.waits["worker 1 for worker 0"].count == 1


def test_a_round_is_the_mean_of_its_gradients_and_releases_all(start: Start) -> None:
    with start(vector(0), rule=BSP().build(2)) as cluster:
        a = cluster.join(0)
        b = cluster.join(1, while_waiting=lambda: rounds.append(push(a, vector(2), samples=3)))
        a.first_read(), b.first_read()
        rounds: list[Reading] = []

        reading = push(b, vector(1), samples=1)

        expected = vector(0) - (vector(1) + 3 * vector(2)) / 4
        torch.testing.assert_close(whole(reading), expected)
        assert reading.version == rounds[0].version == 1


def test_who_waits_too_long_is_told_for_whom(start: Start) -> None:
    with start(vector(0), rule=SSP(bound=0).build(2), wait_timeout_s=0.02) as cluster:
        slow, fast = cluster.join(0), cluster.join(1, while_waiting=cluster.tick)
        slow.first_read(), fast.first_read()

        with pytest.raises(StragglerTimeoutError, match=r"for worker 0 \(clock 0\)"):
            push(fast, vector(1))

        with pytest.raises(StragglerTimeoutError, match="worker 1 at clock 1"):
            push(slow, vector(2))


def test_a_worker_that_leaves_holds_nobody_back(start: Start) -> None:
    with start(vector(0), rule=BSP().build(2)) as cluster:
        gone = cluster.join(0)
        client = cluster.join(1, while_waiting=gone.close)
        gone.first_read(), client.first_read()

        assert push(client, vector(1)).version == 1


@pytest.mark.parametrize("lost", ["first", "last"])
def test_a_lost_shard_is_named(start: Start, lost: str) -> None:
    with start(vector(0)) as cluster:
        client = cluster.join(0)
        client.first_read()
        shard = 0 if lost == "first" else len(cluster.shards) - 1
        cluster.kill(shard)

        with pytest.raises(ServerLostError, match=f"lost the connection to shard {shard} while"):
            push(client, vector(1))


def test_nobody_there_is_said_at_once() -> None:
    cluster = SharedMemoryCluster(vector(0))
    cluster.close()

    with pytest.raises(ServerLostError, match=r"connecting to .* refused"):
        cluster.connect(0, 0, 1)


@pytest.mark.parametrize("shards", [1, 3])
def test_closing_leaves_nothing_behind(shards: int) -> None:
    def live_and_end() -> tuple[int, int]:
        with SharedMemoryCluster(vector(0), shards=shards) as cluster:
            clients = [cluster.join(worker) for worker in range(3)]
            for client in clients:
                client.first_read()
                push(client, vector(1))
            clients[0].close()
            with pytest.raises(ProtocolError):
                cluster.connect(0, 9, 1, "not a token")
        del cluster, clients, client
        gc.collect()  # a mapping goes with the last tensor that shows it
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:paramserver")

    before = live_and_end()

    after = live_and_end()

    assert after == before
