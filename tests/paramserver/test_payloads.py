"""Payloads over gRPC: what comes of them is what a wire within one process makes of the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.client import Client, Reading
from paramserver.compression import COMPRESSIONS, Agreed, Payload, Wire
from paramserver.errors import ProtocolError
from paramserver.layout import Layout
from paramserver.transports.sessions import Session
from tests.support.clusters import FINGERPRINT, TOKEN, Cluster, GrpcCluster, MemoryCluster
from tests.support.wire import Wire as Cable

LAYOUT = Layout.of(nn.Linear(40, 16))
SHARDS, SEED, STEPS = 2, 3, 6
PAIRS = [
    *(("bf16", "fp16"), ("int8", "int8"), ("top-k:share=0.1", None), (None, "qsgd:levels=7")),
    *(("random-k:share=0.1", "sign"), ("powersgd", "powersgd"), ("sign", "top-k:share=0.1")),
    ("int8:feedback=false", "int8:feedback=false"),
]


def agreed(push: str | None, pull: str | None) -> Agreed:
    return Agreed(
        layout=LAYOUT,
        cuts=LAYOUT.cuts(SHARDS),
        push=push and COMPRESSIONS.parse(push),
        pull=pull and COMPRESSIONS.parse(pull),
        seed=SEED,
    )


def vector(seed: int) -> Tensor:
    drawn = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
    drawn[LAYOUT.slots[-1].end :] = 0  # padding
    return drawn


def over_grpc(on: Agreed, **settings: Any) -> GrpcCluster:
    kind = type("Compressing", (GrpcCluster,), {"settings": {"agreed": on, **settings}})
    cluster: GrpcCluster = kind(vector(0), shards=SHARDS)
    return cluster


class Pushes:
    """A worker that pushes a random walk through its wire, and keeps what it has seen."""

    def __init__(self, cluster: Cluster, on: Agreed, **client: Any) -> None:
        self.client: Client = cluster.join(0, **client)
        self.wire = Wire(
            LAYOUT, on.cuts, on.push, on.pull, seed=SEED, worker=0,
            carrier=self.client if self.client.carries else None,
        )  # fmt: skip
        self.seen: list[Tensor] = []
        self.see(self.client.first_read())

    def see(self, reading: object) -> None:
        assert isinstance(reading, Reading)
        self.seen.append(torch.cat(list(self.wire.read(reading.params, reading.version))))

    def write(self, step: int) -> float:
        grad = vector(step + 1)
        parts = grad.split([len(slot) for slot in self.client.slots])
        torch._foreach_copy_(list(self.client.slots), list(parts))
        self.wire.push_(self.client.slots, step)
        return float(torch.cat(self.client.slots).norm())

    def push(self, step: int) -> None:
        self.see(self.client.push(norm=self.write(step)))


def alone(on: Agreed) -> tuple[Pushes, Tensor]:
    """Return what the same comes to where nothing travels."""
    with MemoryCluster(vector(0), shards=SHARDS) as cluster:
        worker = Pushes(cluster, on)
        for step in range(STEPS):
            worker.push(step)
        return worker, cluster.params().clone()


def all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(("push", "pull"), PAIRS)
def test_what_travels_comes_to_what_one_process_makes_of_it(
    push: str | None, pull: str | None
) -> None:
    on = agreed(push, pull)
    expected, params = alone(on)
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        for step in range(STEPS):
            worker.push(step)

        assert worker.client.carries
        assert all_equal(worker.seen, expected.seen)
        assert torch.equal(cluster.params(), params)
        assert worker.wire.traffic == expected.wire.traffic


def test_fewer_bytes_travel() -> None:
    with over_grpc(agreed("int8", "int8")) as small, over_grpc(agreed("bf16", None)) as large:
        counted = []
        for cluster in (small, large):
            worker = Pushes(cluster, cluster.gateway.config.agreed)  # type: ignore[arg-type]
            before = cluster.gateway.counted()
            for step in range(STEPS):
                worker.push(step)
            after = cluster.gateway.counted()
            ways = ("received_bytes", "sent_bytes")
            counted.append(
                [(after[way] - before[way]) / (4 * STEPS * LAYOUT.numel) for way in ways]
            )

    (push, pull), (half, plain) = counted
    assert push < 0.45  # a small model: headers and scales are a good part
    assert pull < 0.45
    assert 0.5 < half < 0.7
    assert plain > 1.0


@pytest.fixture
def cable(request: pytest.FixtureRequest) -> Iterator[tuple[GrpcCluster, Cable, Agreed]]:
    on = agreed("int8", "int8")
    with (
        over_grpc(on, listen="127.0.0.1:0", linger_s=5.0) as cluster,
        Cable(int(cluster.gateway.address.rpartition(":")[2])) as wire,
    ):
        cluster.gateway.address = wire.address
        yield cluster, wire, on


def test_differences_are_taken_once_whenever_streams_break(
    cable: tuple[GrpcCluster, Cable, Agreed],
) -> None:
    """A worker sees the sum of all differences: one too many or too few would stay in it."""
    cluster, wire, on = cable
    expected, params = alone(on)
    worker = Pushes(cluster, on, wait_s=10.0, while_waiting=wire.reset)

    for step in range(STEPS):
        worker.push(step)

    assert all_equal(worker.seen, expected.seen)
    assert torch.equal(cluster.params(), params)
    assert cluster.column("seq") == list(range(1, STEPS + 1))
    worker.client.close()


def test_an_answer_that_was_lost_on_its_way_is_taken_once(
    cable: tuple[GrpcCluster, Cable, Agreed],
) -> None:
    """The push is applied and answered into a cut; what it was answered is sent again."""
    cluster, wire, on = cable
    expected, params = alone(on)
    worker = Pushes(cluster, on, wait_s=10.0)
    for step in range(STEPS):
        norm = worker.write(step)
        if step == 2:
            cut_when_sent = threading.Thread(target=cut_answer, args=(cluster, wire, step + 1))
            cut_when_sent.start()
            worker.see(worker.client.push(norm=norm))
            cut_when_sent.join()
        else:
            worker.see(worker.client.push(norm=norm))

    assert all_equal(worker.seen, expected.seen)
    assert torch.equal(cluster.params(), params)
    worker.client.close()


def cut_answer(cluster: GrpcCluster, wire: Cable, version: int) -> None:
    """Break the streams once ``version`` is there, whose answer is on its way or lost."""
    while cluster.sequencer.version < version:
        pass
    wire.reset()


def test_a_stream_that_breaks_while_a_difference_is_made_loses_none(
    cable: tuple[GrpcCluster, Cable, Agreed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The push comes once more meanwhile, and is answered once more; both answers count as one."""
    cluster, wire, on = cable
    expected, params = alone(on)
    worker = Pushes(cluster, on, wait_s=10.0)
    (session,) = [s for s in sessions_of(cluster) if s.shard == 0]
    shows, began = session._end.shows, threading.Event()  # type: ignore[union-attr]

    def slowly(vector: Tensor, version: int) -> Payload:
        stream = session._stream
        if version == 3 and not began.is_set():
            began.set()
            wire.reset()
            deadline = time.monotonic() + 5
            while session._stream == stream and time.monotonic() < deadline:
                time.sleep(0.001)
            assert session._stream > stream  # the next one is here, and wants to be told
        return shows(vector, version)

    monkeypatch.setattr(session._end, "shows", slowly)
    for step in range(STEPS):
        worker.push(step)

    assert began.is_set()
    assert all_equal(worker.seen, expected.seen)
    assert torch.equal(cluster.params(), params)
    worker.client.close()


def sessions_of(cluster: GrpcCluster) -> list[Session]:
    return list(cluster.gateway._conversations._sessions.values())


def test_a_push_that_is_sent_again_is_answered_with_what_the_worker_has() -> None:
    on = agreed("int8", "int8")
    expected, params = alone(on)
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        for step in range(STEPS):
            worker.push(step)

            again = worker.client.retry()

            assert isinstance(again, Reading)
            assert torch.equal(torch.cat(again.params), worker.seen[-1])
        assert all_equal(worker.seen, expected.seen)
        assert torch.equal(cluster.params(), params)


def test_nothing_is_sent_to_a_worker_that_takes_nothing_over() -> None:
    on = agreed("int8", "int8")
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        norm = worker.write(0)
        before = cluster.gateway.counted()["sent_bytes"]

        worker.client.begin_push(norm=norm, keeps=True)
        answer = worker.client.end_push()

        assert isinstance(answer, Reading)
        assert answer.version == 0  # still
        cluster.settle()
        assert cluster.gateway.counted()["sent_bytes"] - before < 400
        worker.push(1)
        off = (worker.seen[-1] - cluster.params()).abs().max()
        assert 0 < float(off) < 0.1  # int8 of what both pushes have changed, not of one


def test_a_guest_reads_and_pushes_vectors_in_a_run_that_compresses() -> None:
    with over_grpc(agreed("top-k:share=0.1", "int8")) as cluster:
        connections = [
            cluster.dial(shard, 1, 1, TOKEN, FINGERPRINT, compresses=False)
            for shard in reversed(range(SHARDS))
        ]
        client = Client(connections[::-1], worker=1, incarnation=1)
        first = client.first_read()
        assert isinstance(first, Reading)
        assert torch.equal(torch.cat(first.params), vector(0))
        for slot, part in zip(
            client.slots, vector(1).split([len(s) for s in client.slots]), strict=True
        ):
            slot.copy_(part)

        reading = client.push(norm=1.0)

        assert isinstance(reading, Reading)
        assert torch.equal(torch.cat(reading.params), vector(0) - vector(1))
        assert not client.carries
        client.close()


def test_a_client_that_compresses_is_refused_where_the_run_does_not() -> None:
    on = agreed("int8", None)
    with GrpcCluster(vector(0), shards=SHARDS) as cluster:
        cluster.gateway.config = replace(cluster.gateway.config, agreed=on)  # what the client knows

        with pytest.raises(ProtocolError, match="this client compresses, and this run does not"):
            cluster.join(0)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("top-k:share=0.1", lambda p: p.tensors[0].fill_(10**6), "a place is outside of"),
        ("random-k:share=0.1", lambda p: p.tensors[0].fill_(-1), "a seed must be 0 or more"),
    ],
)
def test_a_payload_that_cannot_be_is_refused_and_changes_nothing(
    name: str, spoil: Any, message: str
) -> None:
    on = agreed(name, None)
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        norm = worker.write(0)
        for connection in worker.client._connections:
            spoil(connection._payload)  # type: ignore[attr-defined]

        with pytest.raises(ProtocolError, match=message):
            worker.client.push(norm=norm)

        assert torch.equal(cluster.params(), vector(0))


def test_a_payload_of_another_length_is_refused() -> None:
    on = agreed("int8", None)
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        norm = worker.write(0)
        short = Payload("int8", 8, torch.float32, (torch.zeros(8, dtype=torch.int8),))
        worker.client.carry(0, short)
        worker.client.carry(1, short)

        with pytest.raises(ProtocolError, match=r"brings 8 bytes of tensors; .* were expected"):
            worker.client.push(norm=norm)

        assert torch.equal(cluster.params(), vector(0))


def test_a_payload_that_was_not_agreed_on_is_refused() -> None:
    on = agreed(None, "int8")
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        for shard in range(SHARDS):
            bits = torch.zeros(8, dtype=torch.int8)
            worker.client.carry(shard, Payload("int8", 8, torch.float32, (bits,)))

        with pytest.raises(ProtocolError, match="a payload came, and none was agreed on"):
            worker.client.push(norm=1.0)


def test_what_a_client_has_is_kept_no_longer() -> None:
    """Of each shard at most the last payload that was shown is in memory."""
    on = agreed("int8", "int8")
    with over_grpc(on) as cluster:
        worker = Pushes(cluster, on)
        for step in range(STEPS):
            worker.push(step)

        sessions = sessions_of(cluster)
        assert len(sessions) == SHARDS
        assert all(sum(k.shown is not None for k in s._kept) <= 1 for s in sessions)
