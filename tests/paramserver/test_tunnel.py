"""Shards on several nodes: the leader's orders go over gRPC, and a way that breaks ends the run."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import grpc
import pytest
import torch

from paramserver.client import Client, Ended, Reading
from paramserver.errors import ParamServerError, ProtocolError, ServerLostError
from paramserver.messages import MAX_TEXT_BYTES, Action, Kind, Message
from paramserver.transports import calls, schema
from paramserver.transports.frames import read_frame, read_message, write_message
from paramserver.transports.gateway import Gateway
from paramserver.transports.link import Link
from paramserver.transports.remote import Remote
from paramserver.transports.tunnel import Far, Tunnel
from tests.support.clusters import FINGERPRINT, TOKEN, GrpcCluster, SpreadCluster
from tests.support.wire import Wire

NUMEL, SHARDS = 640, 3


@pytest.fixture
def cluster() -> Iterator[SpreadCluster]:
    with SpreadCluster(torch.zeros(NUMEL), shards=SHARDS) as cluster:
        yield cluster


def push(client: Client, value: float = 1.0) -> Reading | Ended:
    for slot in client.slots:
        slot.fill_(value)
    return client.push(norm=1.0)


def ended_with(cluster: SpreadCluster) -> ParamServerError | None:
    """Wait until the run has ended; return why."""
    deadline = time.monotonic() + 10
    while cluster.sequencer.ended is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return cluster.sequencer.error


def at(gateway: Gateway) -> Remote:
    return Remote(address=gateway.address, token=TOKEN)


def lead(gateway: Gateway, said: Sequence[bytes], **metadata: str | bytes) -> list[Message]:
    """Call a gateway as its shards' leader does; return what they answer."""
    with closing(at(gateway).channel()) as channel:
        named = [(f"paramserver-{key.replace('_', '-')}", each) for key, each in metadata.items()]
        answered = threading.Event()

        def frames() -> Iterator[bytes]:
            yield from said
            answered.wait(5)  # who says no more has left

        call = channel.stream_stream(schema.method("Lead"))(
            frames(), metadata=at(gateway).metadata(*named), timeout=5
        )
        told = []
        try:
            for each in call:
                told.append(read_message(read_frame(each)))
                answered.set()
        finally:
            answered.set()
        return told


def leading(text: str = f"{TOKEN} {FINGERPRINT}") -> list[bytes]:
    return list(write_message(Message(Kind.LEAD, text=text), 1))


@pytest.mark.parametrize("lost", [1, 2])
def test_a_node_that_is_lost_ends_the_run_at_once_and_is_named(
    cluster: SpreadCluster, lost: int
) -> None:
    """Its shard has missed orders: nothing that comes back later could go on."""
    client = cluster.join(0, wait_s=30.0)
    client.first_read()
    push(client)

    cluster.gateways[lost].close()

    with pytest.raises(ServerLostError, match=f"lost the connection to shard {lost} "):
        push(client)
    assert f"lost the connection to shard {lost} while leading" in str(ended_with(cluster))
    assert cluster.sequencer.version == 1


def test_a_follower_that_ends_takes_its_way_with_it(cluster: SpreadCluster) -> None:
    client = cluster.join(0)
    client.first_read()

    cluster.kill(2)

    with pytest.raises(ServerLostError, match="shard 2"):
        push(client)


class WiredCluster(SpreadCluster):
    """With a wire from the leader's gateway to the others, which can be cut."""

    settings: Mapping[str, Any] = {"listen": "127.0.0.1:0"}

    def _way_to(self, gateway: Gateway) -> str:
        self.wire = Wire(int(gateway.address.rpartition(":")[2]))
        return self.wire.address

    def close(self) -> None:
        super().close()
        self.wire.__exit__()


def test_a_network_cut_for_a_moment_costs_a_moment() -> None:
    """Orders wait in the network and come in order; nothing is told twice."""
    with WiredCluster(torch.zeros(NUMEL), shards=2) as cluster:
        client = cluster.join(0, wait_s=10.0)
        client.first_read()
        cluster.wire.cut()
        threading.Timer(1.0, cluster.wire.mend).start()
        began = time.monotonic()

        reading = push(client)

        assert isinstance(reading, Reading)
        assert time.monotonic() - began > 0.9
        assert [shard.version for shard in cluster.shards] == [1, 1]
        assert torch.equal(cluster.params(), torch.full((NUMEL,), -1.0))


def test_a_network_that_breaks_ends_the_run() -> None:
    with WiredCluster(torch.zeros(NUMEL), shards=2) as cluster:
        client = cluster.join(0, wait_s=10.0)
        client.first_read()
        push(client)

        cluster.wire.reset()

        with pytest.raises(ServerLostError, match=r"(1 while leading|0 while being led by) it"):
            push(client)
        assert "shard 1 while leading" in str(ended_with(cluster))
        assert cluster.sequencer.version < 3


def test_only_the_runs_own_leader_leads(cluster: SpreadCluster) -> None:
    """A guest knows the token, and is not to give orders."""
    gateway = cluster.gateways[1]
    for secret in ({}, {"lead_bin": b"guess"}, {"lead_bin": b""}):
        with pytest.raises(grpc.RpcError, match="only the run's own leader leads"):
            lead(gateway, leading(), shard="1", **secret)
    for shard, message in (("0", "behind another gateway"), ("9", "there are 3 shards")):
        with pytest.raises(grpc.RpcError, match=message):
            lead(gateway, leading(), shard=shard, lead_bin=b"the gateways'")

    (refused,) = lead(gateway, leading(), shard="1", lead_bin=b"the gateways'")

    assert refused.kind == Kind.FAIL
    assert "has a leader already" in refused.text
    client = cluster.join(0)
    client.first_read()
    assert isinstance(push(client), Reading)


def test_nobody_leads_where_all_shards_are_on_one_node() -> None:
    with (
        GrpcCluster(torch.zeros(NUMEL)) as cluster,
        pytest.raises(grpc.RpcError, match="nobody leads here from another node"),
    ):
        lead(cluster.gateway, leading(), shard="0", lead_bin=b"")


def test_tensors_and_nonsense_end_the_way(cluster: SpreadCluster) -> None:
    message = Message(Kind.ORDER, Action.SAVE)
    for said in ([b"nonsense"], list(write_message(message, 1, [torch.ones(4)]))):
        told = lead(cluster.gateways[1], said, shard="1", lead_bin=b"the gateways'")
        assert told == []
    assert cluster.shards[1].saved is None


def test_the_other_gateways_do_not_give_places(cluster: SpreadCluster) -> None:
    cuts, dtype = cluster.cuts, torch.float32
    with pytest.raises(ProtocolError, match="not the gateway that the run is joined at"):
        calls.register(at(cluster.gateways[1]), reads=True, timeout_s=5.0)
    with pytest.raises(ProtocolError, match="not the gateway that the run is joined at"):
        calls.snapshot(at(cluster.gateways[1]), cuts, dtype, timeout_s=5.0)
    with pytest.raises(ProtocolError, match="shard 0 is behind another gateway"):
        cluster.dial(0, 0, 1, TOKEN, FINGERPRINT, address=cluster.gateways[1].address)


def test_the_run_is_well_as_long_as_all_nodes_are(cluster: SpreadCluster) -> None:
    assert calls.serves(at(cluster.gateway), timeout_s=5.0)
    cluster.gateways[2].close()
    assert not calls.serves(at(cluster.gateway), timeout_s=5.0)


def test_a_long_text_passes_both_ways() -> None:
    """A round program's sums may fill a message."""
    with SpreadCluster(torch.zeros(NUMEL), shards=2) as cluster:
        text = "é" * (MAX_TEXT_BYTES // 2)
        (refused,) = lead(cluster.gateways[1], leading(text), shard="1", lead_bin=b"the gateways'")
        assert "token or layout" in refused.text


def test_a_gateway_that_is_not_there_is_named_to_the_leader() -> None:
    far = Far(address=f"far-{os.getpid()}", remote=Remote(address="127.0.0.1:9", token=TOKEN))
    tunnel = Tunnel(far, 1, "secret")
    with closing(Link.connect(far.address)) as link:
        link.send(Message(Kind.LEAD))
        told = link.receive(10.0)

        assert told.kind == Kind.FAIL
        assert "leading at 127.0.0.1:9" in told.text
    tunnel.close()
    tunnel.close()


def test_a_closed_way_leaves_nothing() -> None:
    def live_and_end() -> None:
        with SpreadCluster(torch.zeros(NUMEL), shards=SHARDS) as cluster:
            client = cluster.join(0)
            client.first_read()
            push(client)

    live_and_end()  # gRPC opens some for good
    before = opened()

    live_and_end()

    deadline = time.monotonic() + 5  # gRPC closes its own by and by
    while (after := opened()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert after <= before
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if name.startswith(("tunnel", "gateway-led", "shelf"))}


def opened() -> int:
    """Return how many sockets and segments this process has open."""
    gc.collect()  # a mapping goes with the last tensor that shows it
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was that of the listing
            kinds.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(kind.startswith(("socket:", "/memfd:")) for kind in kinds)
