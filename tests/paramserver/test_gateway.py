"""The gRPC gateway: who is let in, what a broken network does, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import paramserver
from paramserver.client import Client, Reading
from paramserver.errors import (
    ProtocolError,
    ResourceError,
    ServerLostError,
    ServerTimeoutError,
)
from paramserver.layout import Layout, Slot
from paramserver.transports import calls, remote
from paramserver.transports.admission import Rate
from paramserver.transports.remote import Identity, Remote, is_local
from tests.support import clusters
from tests.support.certificates import Authority
from tests.support.clusters import TOKEN, GrpcCluster, SpreadCluster
from tests.support.wire import Wire

NUMEL = 640
LAYOUT = Layout((Slot("weight", 0, (16, 30)), Slot("bias", 512, (100,))), torch.float32)
LOOPBACK = {"listen": "127.0.0.1:0"}


@pytest.fixture(params=[GrpcCluster, SpreadCluster])
def laid_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[GrpcCluster]:
    """Return a cluster that tells guests how its parameters are laid out."""
    monkeypatch.setattr(clusters, "FINGERPRINT", LAYOUT.fingerprint)
    settings = {"first_guest": 4, "guests": 2, "layout": json.dumps(LAYOUT.to_json())}
    return type("LaidOut", (request.param,), {"settings": {**LOOPBACK, **settings}})


def start(**settings: Any) -> GrpcCluster:
    kind = type("Started", (GrpcCluster,), {"settings": {**LOOPBACK, **settings}})
    cluster: GrpcCluster = kind(torch.zeros(NUMEL), shards=2)
    return cluster


def write(client: Client, value: float) -> None:
    for slot in client.slots:
        slot.fill_(value)


def push(client: Client, value: float = 1.0) -> Tensor:
    write(client, value)
    reading = client.push(norm=1.0)
    assert isinstance(reading, Reading)
    return torch.cat(reading.params)


def at(cluster: GrpcCluster, **changes: Any) -> Remote:
    return Remote(**{"address": cluster.gateway.address, "token": TOKEN, **changes})


# Clients without Ray


def test_a_guest_joins_as_a_worker_and_another_reads(laid_out: type[GrpcCluster]) -> None:
    with laid_out(torch.zeros(NUMEL), shards=2) as cluster:
        address = cluster.gateway.address
        with (
            paramserver.Client.connect(address, TOKEN) as worker,
            paramserver.Client.connect(address, TOKEN, reads=True) as reader,
        ):
            worker.first_read()
            push(worker, 2.0)
            reading = reader.read()

            assert (worker.worker, reader.worker) == (4, -2)
            assert worker.layout == LAYOUT
            assert reading.version == 1
            assert torch.equal(torch.cat(reading.params), torch.full((NUMEL,), -2.0))


def test_a_snapshot_is_one_version_of_all_shards(laid_out: type[GrpcCluster]) -> None:
    with laid_out(torch.zeros(NUMEL), shards=2) as cluster:
        with Client.connect(cluster.gateway.address, TOKEN) as client:
            client.first_read()
            for _ in range(3):
                push(client)

        version, params = calls.snapshot(at(cluster), cluster.cuts, torch.float32, timeout_s=5.0)

        assert version == 3
        assert torch.equal(params, torch.full((NUMEL,), -3.0))


def test_guests_beyond_the_places_are_told_so(laid_out: type[GrpcCluster]) -> None:
    with laid_out(torch.zeros(NUMEL), shards=2) as cluster:
        address = cluster.gateway.address
        first, second = (Client.connect(address, TOKEN) for _ in range(2))

        with pytest.raises(ResourceError, match="places for 2 clients from outside"):
            Client.connect(address, TOKEN)

        first.close(), second.close()


def test_stats_and_health_are_told() -> None:
    with start() as cluster:
        client = cluster.join(0)
        client.first_read()
        push(client)

        stats = calls.stats(at(cluster), timeout_s=5.0)

        assert (stats.clients, stats.num_clients, stats.messages) == (2, 64, 2)
        assert stats.received_bytes > NUMEL * 4
        assert calls.serves(at(cluster), timeout_s=5.0)
        cluster.kill(1)
        assert not calls.serves(at(cluster), timeout_s=5.0)


def test_who_pushed_is_told_and_readers_are_not() -> None:
    with start(first_guest=2, guests=1) as cluster:
        for worker in (0, 1, 2, -1):
            cluster.join(worker).close()

        assert cluster.gateway.came() == {0, 1, 2}


# Who is let in


def test_nothing_is_read_or_written_without_the_token() -> None:
    with start() as cluster:
        stranger = at(cluster, token="not it")
        for ask in (
            lambda: calls.register(stranger, reads=True, timeout_s=5.0),
            lambda: calls.snapshot(stranger, cluster.cuts, torch.float32, timeout_s=5.0),
            lambda: calls.stats(stranger, timeout_s=5.0),
            lambda: calls.serves(stranger, timeout_s=5.0),
            lambda: cluster.dial(0, 0, 1, "not it", clusters.FINGERPRINT),
        ):
            with pytest.raises(ProtocolError, match="the token is not this run's"):
                ask()

        assert cluster.sequencer.live() == []
        assert cluster.gateway.counted()["refused"] == 5
        assert cluster.gateway.counted()["sent_bytes"] == 0


def test_another_version_of_the_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as cluster:
        monkeypatch.setattr(remote, "PROTOCOL", "2")

        with pytest.raises(ProtocolError, match=r"client speaks version '2' .* server version '1'"):
            calls.stats(at(cluster), timeout_s=5.0)


def test_nobody_at_an_address_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    with pytest.raises(ServerLostError, match=rf"connecting at 127.0.0.1:{port} \(.*refused"):
        Client.connect(f"127.0.0.1:{port}", TOKEN)


@pytest.mark.parametrize("address", ["nowhere", "host:", ":7000", "host:70000"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="an address is host:port or unix:path, got"):
        Client.connect(address, TOKEN)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(ResourceError, match=rf"cannot listen at {address}: it is taken"):
            start(listen=address)


def test_two_runs_do_not_share_a_port() -> None:
    with (
        start() as cluster,
        pytest.raises(ResourceError, match="cannot listen at"),
    ):
        start(listen=cluster.gateway.address)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:socket", True),
        ("unix-abstract:x", True),
        ("10.0.0.7:1", False),
        ("0.0.0.0:1", False),
        ("127.0.0.1.example.org:1", False),
    ],
)
def test_loopback_and_unix_sockets_are_local(address: str, local: bool) -> None:
    assert is_local(address) is local


def test_clear_text_does_not_leave_the_machine_unless_told_to() -> None:
    with pytest.raises(ResourceError, match=r"could read the token .* clear_text=true"):
        start(listen="0.0.0.0:0")
    with pytest.raises(ResourceError, match="could read the token"):
        Client.connect("10.0.0.7:7000", TOKEN)

    assert Remote(address="10.0.0.7:7000", token=TOKEN, clear_text=True)


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"), "foreign")


def test_pushes_go_over_tls(authority: Authority) -> None:
    with start(identity=authority.identity("server")) as cluster:
        connection = cluster.dial(
            0, 0, 1, TOKEN, clusters.FINGERPRINT, identity=Identity(ca=authority.ca)
        )

        assert connection.welcome.worker == 0
        connection.close()


def test_mutual_tls_lets_in_who_has_a_certificate(authority: Authority, foreign: Authority) -> None:
    with start(identity=authority.identity("server", ca=authority.ca)) as cluster:
        known = authority.identity("client", ca=authority.ca)
        assert calls.serves(at(cluster, identity=known), timeout_s=5.0)
        for stranger in (
            Identity(ca=authority.ca),
            foreign.identity("client", ca=authority.ca),
        ):
            with pytest.raises(ServerLostError, match=r"TLS failed: .*(certificate|ca)"):
                calls.serves(at(cluster, identity=stranger), timeout_s=5.0)


def test_certificates_that_cannot_be_trusted_are_refused(
    authority: Authority, foreign: Authority
) -> None:
    expired = authority.identity("expired", days=-1)
    trusting = Identity(ca=authority.ca)
    with (
        start(identity=expired) as cluster,
        pytest.raises(ServerLostError, match="certificate is refused: certificate has expired"),
    ):
        calls.serves(at(cluster, identity=trusting), timeout_s=5.0)
    with start(identity=foreign.identity("server")) as cluster:
        with pytest.raises(ServerLostError, match="certificate is refused: unable to get local"):
            calls.serves(at(cluster, identity=trusting), timeout_s=5.0)
        with pytest.raises(ServerLostError, match="it wants TLS: give the ca"):
            calls.serves(at(cluster), timeout_s=5.0)


def test_a_certificate_without_its_key_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs its key"):
        Identity(certificate=tmp_path / "a.pem")
    with pytest.raises(ResourceError, match=r"cannot read .*absent\.pem: No such file"):
        Client.connect("127.0.0.1:1", TOKEN, tmp_path / "absent.pem")
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(ResourceError, match=r"empty\.pem is not a PEM file"):
        Client.connect("127.0.0.1:1", TOKEN, tmp_path / "empty.pem")


# Limits


def test_conversations_beyond_the_limit_are_refused() -> None:
    with start(num_clients=2) as cluster:
        cluster.join(0)

        with pytest.raises(ResourceError, match="2 conversations are open, as many as there may"):
            cluster.join(1)


def test_calls_beyond_the_rate_are_refused() -> None:
    with (
        start(calls_per_s=1.0) as cluster,
        pytest.raises(ResourceError, match="more than 1 calls a second"),
    ):
        [calls.serves(at(cluster), timeout_s=5.0) for _ in range(5)]


def test_strangers_do_not_use_up_the_calls_of_others() -> None:
    with start(calls_per_s=1.0) as cluster:
        stranger = at(cluster, token="not it")
        for _ in range(5):
            with pytest.raises(ProtocolError, match="the token is not this run's"):
                calls.serves(stranger, timeout_s=5.0)

        assert calls.serves(at(cluster), timeout_s=5.0)


def test_a_rate_is_kept_over_time_and_allows_two_seconds_worth_at_once() -> None:
    now = [0.0]
    rate = Rate(10.0, clock=lambda: now[0])

    assert [rate.try_one() for _ in range(21)] == [True] * 20 + [False]
    now[0] = 0.1
    assert [rate.try_one() for _ in range(2)] == [True, False]


# The network breaks


@pytest.fixture
def wired() -> Iterator[tuple[GrpcCluster, Wire]]:
    with (
        start(linger_s=1.0) as cluster,
        Wire(int(cluster.gateway.address.rpartition(":")[2])) as wire,
    ):
        cluster.gateway.address = wire.address
        yield cluster, wire


def test_a_network_that_is_back_before_the_deadline_is_not_noticed(
    wired: tuple[GrpcCluster, Wire],
) -> None:
    cluster, wire = wired
    client = cluster.join(0)
    client.first_read()
    wire.cut()
    threading.Timer(0.3, wire.mend).start()

    params = push(client)

    assert torch.equal(params, torch.full((NUMEL,), -1.0))
    assert cluster.column("seq") == [1]
    client.close()


def test_a_push_into_a_cut_times_out_by_name_and_its_retry_is_applied_once(
    wired: tuple[GrpcCluster, Wire],
) -> None:
    cluster, wire = wired
    client = cluster.join(0, wait_s=0.3)
    client.first_read()
    push(client)
    wire.cut()
    write(client, 1.0)
    with pytest.raises(ServerTimeoutError, match=r"shard 1 did not answer within 0\.3 s"):
        client.push(norm=1.0)
    wire.mend()

    reading = client.retry()

    assert isinstance(reading, Reading)
    assert (reading.version, cluster.column("seq")) == (2, [1, 2])
    assert torch.equal(push(client), torch.full((NUMEL,), -3.0))
    client.close()


def test_streams_that_break_are_taken_up_again_and_each_push_is_applied_once(
    wired: tuple[GrpcCluster, Wire],
) -> None:
    cluster, wire = wired
    client = cluster.join(0, wait_s=10.0, while_waiting=wire.reset)
    client.first_read()
    for version in range(1, 6):
        params = push(client)

        assert torch.equal(params, torch.full((NUMEL,), -float(version)))
    assert cluster.column("seq") == [1, 2, 3, 4, 5]
    client.close()


def test_a_client_that_stays_away_loses_its_place_and_holds_nobody_back(
    wired: tuple[GrpcCluster, Wire],
) -> None:
    cluster, wire = wired
    client = cluster.join(0, wait_s=0.2)
    client.first_read()
    wire.cut()
    wire.reset()
    deadline = time.monotonic() + 10
    while cluster.sequencer.live() and time.monotonic() < deadline:
        time.sleep(0.01)

    assert cluster.sequencer.live() == []
    assert cluster.gateway.counted()["clients"] == 0
    with pytest.raises((ServerTimeoutError, ServerLostError), match="shard 1"):
        push(client)
    wire.mend()
    with pytest.raises(ProtocolError, match="has been replaced"):
        retry_until_there_is_a_network(client)
    assert torch.equal(cluster.params(), torch.zeros(NUMEL))
    client.close()


def retry_until_there_is_a_network(client: Client) -> None:
    for _ in range(50):
        with contextlib.suppress(ServerTimeoutError):
            client.retry()


@pytest.mark.long
def test_a_worker_that_computes_for_a_minute_keeps_its_stream() -> None:
    """Its keep-alive pings are not taken for too many."""
    with start() as cluster:
        client = cluster.join(0)
        client.first_read()
        streams = [connection._stream for connection in client._connections]  # type: ignore[attr-defined]

        time.sleep(60)

        assert [connection._stream for connection in client._connections] == streams  # type: ignore[attr-defined]
        assert not any(stream.is_over for stream in streams)
        assert torch.equal(push(client), torch.full((NUMEL,), -1.0))


@pytest.mark.long
def test_a_network_cut_for_five_seconds_costs_five_seconds_and_no_push(
    wired: tuple[GrpcCluster, Wire],
) -> None:
    cluster, wire = wired
    client = cluster.join(0, wait_s=30.0)
    client.first_read()
    push(client)
    wire.cut()
    threading.Timer(5.0, wire.mend).start()
    since = time.monotonic()

    push(client)

    assert 5.0 <= time.monotonic() - since < 10.0
    assert torch.equal(push(client), torch.full((NUMEL,), -3.0))
    assert cluster.column("seq") == [1, 2, 3]
    assert cluster.sequencer.conservation.holds
    client.close()


@pytest.mark.long
def test_a_network_cut_for_ever_ends_by_name_and_what_was_pushed_stays_applied_once(
    wired: tuple[GrpcCluster, Wire],
) -> None:
    cluster, wire = wired
    client = cluster.join(0, wait_s=6.0)
    client.first_read()
    push(client)
    wire.cut()
    write(client, 1.0)

    with pytest.raises(ServerTimeoutError, match=r"shard 1 did not answer within 6\.0 s"):
        client.push(norm=1.0)

    with pytest.raises(ServerTimeoutError, match="shard 1"):
        client.retry()
    assert cluster.column("seq") == [1]
    assert cluster.sequencer.conservation.holds
    assert torch.equal(cluster.params(), torch.full((NUMEL,), -1.0))
    client.close()


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", f"unix-abstract:deserted-{os.getpid()}"], ids=["tcp", "unix"]
)
def test_a_gateway_that_has_ended_is_named_at_once(listen: str) -> None:
    with start(listen=listen) as cluster:
        client = cluster.join(0, wait_s=60.0)
        client.first_read()
        push(client)
        cluster.gateway.close()
        since = time.monotonic()

        with pytest.raises(ServerLostError, match=r"shard \d .*its gateway has ended"):
            push(client)

        assert time.monotonic() - since < 5.0
        assert cluster.column("seq") == [1]
