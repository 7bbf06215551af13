"""Real shards, server and clients inside the test's process, over the transport of one's choice."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor

from async_sgd.rules import Asynchronous
from paramserver.client import Client
from paramserver.clipping import Clip
from paramserver.compensation import Compensation
from paramserver.messages import Kind, Message
from paramserver.optimizers import SGD, Optimizer
from paramserver.round_server import RoundFollower, RoundLeader
from paramserver.round_shard import RoundShard
from paramserver.rounds import RoundOptimizer
from paramserver.rules import Rule
from paramserver.schedules import Schedule
from paramserver.sequencer import Sequencer
from paramserver.server import Follower, Leader
from paramserver.shard import Shard
from paramserver.transports import Connection, memory, shared_memory
from paramserver.transports.gateway import Gateway
from paramserver.transports.gateway_config import GatewayConfig
from paramserver.transports.grpc_connection import GrpcConnection
from paramserver.transports.link import Link
from paramserver.transports.remote import Remote
from paramserver.transports.shared_memory import raise_refusal
from paramserver.transports.tunnel import Far

TOKEN, FINGERPRINT = "a token", "0123456789abcdef"
_names = itertools.count()


def split(numel: int, num_shards: int) -> tuple[range, ...]:
    """Cut ``numel`` elements, a multiple of 64, into shards as `Layout.cuts` does."""
    blocks = numel // 64
    edges = [blocks * i // num_shards * 64 for i in range(num_shards + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(edges))


class Cluster:
    """Shards that clients can join; the transports differ in the methods at the end."""

    leader: Leader

    def __init__(
        self,
        params: Tensor,
        *,
        shards: int = 1,
        optimizer: Optimizer | RoundOptimizer | None = None,
        rule: Rule | None = None,
        readers: int = 5,
        schedule: Schedule | None = None,
        clip: Clip | None = None,
        compensation: Compensation | None = None,
        num_examples: int = 0,
        rounds: int | None = None,
        slot_rows: int = 1,
        **sequencer: Any,
    ) -> None:
        """Start shards; those of a round program if ``num_examples`` are given."""
        self.cuts = split(params.numel(), shards)
        self.num_examples, self.rounds, self.dtype = num_examples, rounds, params.dtype
        self.slot_rows, self._readers = slot_rows, readers
        machine = rule or Asynchronous().build(readers)
        self.sequencer, self._tabulates = Sequencer(machine, **sequencer), machine.tabulates
        self._optimizer, self._compensation = optimizer or SGD(lr=1.0), compensation
        self._capacity = 2 * readers + 2 if num_examples else readers + 1
        self._clients: list[Client] = []
        self._prepare()
        self.shards: list[Any] = [
            self._make_shard(params[cut.start : cut.stop], cut, self._buffers(i), schedule, clip)
            for i, cut in enumerate(self.cuts)
        ]
        self._start()

    def _make_shard(
        self,
        params: Tensor,
        cut: range,
        buffers: Sequence[Tensor],
        schedule: Schedule | None,
        clip: Clip | None,
    ) -> Shard | RoundShard:
        if not self.num_examples:
            optimizer = cast(Optimizer, self._optimizer)
            return Shard(
                params,
                optimizer,
                buffers,
                schedule=schedule,
                clip=clip,
                compensation=self._compensation,
                tabulates=self._tabulates,
            )
        return RoundShard(
            params,
            cast(RoundOptimizer, self._optimizer),
            buffers,
            cut=cut,
            num_rows=self.slot_rows,
            schedule=schedule,
        )

    def join(self, worker: int, incarnation: int = 1, **client: Any) -> Client:
        """Join as the worker actor does: followers first, then the leader."""
        connections: list[Connection] = []
        try:
            for shard in reversed(range(len(self.shards))):
                connection, welcome = self.connect(shard, worker, incarnation)
                connections.insert(0, connection)
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        client.setdefault("wait_s", 5.0)
        joined = Client(
            connections, worker=worker, incarnation=incarnation, clock=welcome.clock, **client
        )
        self._clients.append(joined)
        return joined

    def params(self) -> Tensor:
        """Return the parameters now."""
        self.settle()
        if self.num_examples:
            return torch.cat([shard.runner.x for shard in self.shards])
        return torch.cat([shard.snapshots.params for shard in self.shards])

    def column(self, name: str) -> list[Any]:
        """Return one of the ledger's columns."""
        values: list[Any] = self.sequencer.ledger.columns()[name].tolist()
        return values

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self.close()

    def _serve(self, hosts: Sequence[Any], links: Sequence[Any]) -> list[Follower]:
        """Make the servers; ``links`` lead to the followers."""
        common = {"token": TOKEN, "fingerprint": FINGERPRINT}
        parts = (self.shards[0], hosts[0], hosts[0].send, self.sequencer)
        if self.num_examples:
            self.leader = RoundLeader(
                *parts,
                followers=links,
                num_examples=self.num_examples,
                num_workers=self._readers,
                rounds=self.rounds,
                **common,
            )
        else:
            self.leader = Leader(*parts, followers=links, **common)
        kind = RoundFollower if self.num_examples else Follower
        return [
            kind(shard, host, host.send, **common)
            for shard, host in zip(self.shards[1:], hosts[1:], strict=True)
        ]

    def _begin(self) -> None:
        """Make a round program's first request."""
        if isinstance(self.leader, RoundLeader):
            self.leader.begin(0.0)

    def connect(
        self,
        shard: int,
        worker: int,
        incarnation: int,
        text: str = f"{TOKEN} {FINGERPRINT}",
    ) -> tuple[Connection, Message]:
        """Say hello to one shard; raise what it refuses with."""
        raise NotImplementedError

    def settle(self) -> None:
        """Let everything that was sent be handled."""
        raise NotImplementedError

    def mute(self) -> contextlib.AbstractContextManager[None]:
        """Make the leader answer nothing for a while."""
        raise NotImplementedError

    def tick(self) -> None:
        """Let a lot of time pass."""
        raise NotImplementedError

    def kill(self, shard: int) -> None:
        """End a shard's process."""
        raise NotImplementedError

    def close(self) -> None:
        """End every shard."""
        raise NotImplementedError

    def _prepare(self) -> None:
        raise NotImplementedError

    def _buffers(self, shard: int) -> Sequence[Tensor]:
        raise NotImplementedError

    def _start(self) -> None:
        raise NotImplementedError


class MemoryCluster(Cluster):
    """Over the memory transport."""

    network: memory.Network
    make_network: Callable[[], memory.Network] = memory.Network
    make_connection: type[memory.MemoryConnection] = memory.MemoryConnection

    def _prepare(self) -> None:
        self.network = type(self).make_network()
        self.hosts = [
            memory.Host(
                self.network, len(cut), self._capacity, self.dtype, slot_rows=self.slot_rows
            )
            for cut in self.cuts
        ]

    def _buffers(self, shard: int) -> Sequence[Tensor]:
        return self.hosts[shard].buffers

    def _start(self) -> None:
        links = [memory.Link(self.network, self.hosts[0], host) for host in self.hosts[1:]]
        followers = self._serve(self.hosts, links)
        self.hosts[0].server = self.leader
        for follower, host, link in zip(followers, self.hosts[1:], links, strict=True):
            host.server = follower
            follower.on_message(link, Message(Kind.LEAD, text=f"{TOKEN} {FINGERPRINT}"), 0.0)
        self._begin()

    def connect(
        self, shard: int, worker: int, incarnation: int, text: str = f"{TOKEN} {FINGERPRINT}"
    ) -> tuple[Connection, Message]:
        connection = self.make_connection(self.network, self.hosts[shard], shard)
        connection.send(Message(Kind.HELLO, worker=worker, incarnation=incarnation, text=text))
        welcome = connection.receive(1.0)
        if welcome.kind != Kind.WELCOME:
            connection.close()
            raise_refusal(welcome)
        return connection, welcome

    def settle(self) -> None:
        self.network.run()

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        self.network.lose = lambda message: message.kind == Kind.PUSH
        yield
        self.network.lose = lambda message: False

    def tick(self) -> None:
        self.settle()
        self.leader.on_tick(1e9)

    def kill(self, shard: int) -> None:
        self.hosts[shard].server = None

    def close(self) -> None:
        pass


class SharedMemoryCluster(Cluster):
    """Over shared memory; each shard on a thread of this process."""

    def _prepare(self) -> None:
        name = f"test-{os.getpid()}-{next(_names)}"
        self.addresses = [f"{name}/{i}" for i in range(len(self.cuts))]
        self.hosts = [
            shared_memory.Host(
                address, len(cut), self._capacity, self.dtype, slot_rows=self.slot_rows
            )
            for address, cut in zip(self.addresses, self.cuts, strict=True)
        ]

    def _buffers(self, shard: int) -> Sequence[Tensor]:
        return self.hosts[shard].buffers

    def _start(self) -> None:
        links: list[Link] = []
        for follower, host in zip(self._serve(self.hosts, links), self.hosts[1:], strict=True):
            host.serve(follower)
        try:
            self._open()
        except BaseException:
            SharedMemoryCluster.close(self)
            raise
        hello = Message(Kind.LEAD, text=f"{TOKEN} {FINGERPRINT}")
        links += [self.hosts[0].lead(address, hello, 5.0) for address in self._ways()]
        self._serve(self.hosts, links)
        self._begin()
        self.hosts[0].serve(self.leader)

    def _open(self) -> None:
        """Start what others come in by."""

    def _ways(self) -> list[str]:
        """Return where the leader finds the followers."""
        return self.addresses[1:]

    def connect(
        self, shard: int, worker: int, incarnation: int, text: str = f"{TOKEN} {FINGERPRINT}"
    ) -> tuple[Connection, Message]:
        hello = Message(Kind.HELLO, worker=worker, incarnation=incarnation, text=text)
        connection = shared_memory.SharedMemoryConnection(
            self.addresses[shard],
            shard,
            len(self.cuts[shard]),
            hello,
            dtype=self.dtype,
            slot_rows=self.slot_rows,
            timeout_s=5.0,
        )
        return connection, connection.welcome

    def settle(self) -> None:
        """Ask each shard something: whoever answers has handled what came before."""
        for shard in range(len(self.shards)):
            with contextlib.suppress(Exception):
                self.connect(shard, -99, 0, text="not a token")

    def mute(self) -> contextlib.AbstractContextManager[None]:
        @contextlib.contextmanager
        def locked() -> Iterator[None]:
            with self.hosts[0].lock:
                yield

        return locked()

    def tick(self) -> None:
        """Time passes by itself; the host looks at the clock four times a second."""

    def kill(self, shard: int) -> None:
        self.hosts[shard].close()

    def close(self) -> None:
        for host in self.hosts:
            host.close()


class GrpcCluster(SharedMemoryCluster):
    """Over gRPC, through a gateway in this process."""

    settings: Mapping[str, Any] = {}
    """What the gateway is told beside where the shards are."""

    def _open(self) -> None:
        self._dialled: list[GrpcConnection] = []
        self.gateway = self._gateway(self.addresses, **self.settings)

    def _gateway(self, shards: Sequence[str | Far | None], number: int = 0, **more: Any) -> Gateway:
        common: dict[str, Any] = {
            "listen": f"unix-abstract:{self.addresses[number]}/gateway",
            "timeout_s": 5.0,
            **more,
        }
        gateway = Gateway(
            GatewayConfig(
                shards=tuple(shards),
                cuts=self.cuts,
                dtype=self.dtype,
                token=TOKEN,
                fingerprint=FINGERPRINT,
                slot_rows=self.slot_rows,
                **common,
            )
        )
        gateway.start()
        return gateway

    @property
    def gateways(self) -> list[Gateway]:
        """Those that the shards are behind, in order."""
        return [self.gateway] * len(self.shards)

    def connect(
        self, shard: int, worker: int, incarnation: int, text: str = f"{TOKEN} {FINGERPRINT}"
    ) -> tuple[Connection, Message]:
        token, _, fingerprint = text.rpartition(" ")
        connection = self.dial(shard, worker, incarnation, token, fingerprint)
        return connection, connection.welcome

    def dial(
        self,
        shard: int,
        worker: int,
        incarnation: int,
        token: str,
        fingerprint: str,
        *,
        compresses: bool = True,
        **of: Any,
    ) -> GrpcConnection:
        """Say hello to one shard over the network; ``of`` changes how it is spoken to.

        The client ``compresses`` if the run does.
        """
        remote = Remote(**{"address": self.gateways[shard].address, "token": token, **of})
        connection = GrpcConnection(
            remote,
            shard,
            len(self.cuts[shard]),
            Message(Kind.HELLO, worker=worker, incarnation=incarnation, text=fingerprint),
            dtype=self.dtype,
            slot_rows=self.slot_rows,
            timeout_s=5.0,
            agreed=self.gateway.config.agreed if compresses else None,
        )
        self._dialled.append(connection)
        return connection

    def settle(self) -> None:
        """Wait until the gateway has told the shards what it was sent, then ask each of them."""
        deadline = time.monotonic() + 1.0  # what was refused is not taken
        while time.monotonic() < deadline:
            taken = sum(gateway.counted()["messages"] for gateway in set(self.gateways))
            if taken >= sum(c.num_sent for c in self._dialled):
                break
            time.sleep(0.001)
        for shard in range(len(self.shards)):
            with contextlib.suppress(Exception):
                SharedMemoryCluster.connect(self, shard, -99, 0, text="not a token")

    def close(self) -> None:
        for gateway in self.gateways:
            gateway.close()
        super().close()


class SpreadCluster(GrpcCluster):
    """Over gRPC, each shard behind a gateway of its own, as on nodes of their own."""

    def _open(self) -> None:
        self._dialled = []
        secret, count = "the gateways'", len(self.addresses)
        self._others: list[Gateway] = []
        shards: list[str | Far | None] = [self.addresses[0]]
        for number in range(1, count):
            own = [address if i == number else None for i, address in enumerate(self.addresses)]
            self._others.append(self._gateway(own, number, secret=secret, **self.settings))
            remote = Remote(address=self._way_to(self._others[-1]), token=TOKEN)
            shards.append(Far(address=f"{self.addresses[number]}/far", remote=remote))
        self.gateway = self._gateway(shards, secret=secret, **self.settings)

    def _way_to(self, gateway: Gateway) -> str:
        """Return where the leader's gateway reaches another one."""
        return gateway.address

    def _ways(self) -> list[str]:
        return [f"{address}/far" for address in self.addresses[1:]]

    @property
    def gateways(self) -> list[Gateway]:
        """Those that the shards are behind, in order."""
        return [self.gateway, *self._others]

    def settle(self) -> None:
        """Wait, too, until the leader's orders have come to all shards."""
        super().settle()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            if len({shard.version for shard in self.shards}) == 1:
                break
            time.sleep(0.001)


CLUSTERS: Mapping[str, tuple[type[Cluster], int]] = {
    "memory, 1 shard": (MemoryCluster, 1),
    "memory, 3 shards": (MemoryCluster, 3),
    "shared memory, 1 shard": (SharedMemoryCluster, 1),
    "shared memory, 3 shards": (SharedMemoryCluster, 3),
    "grpc, 1 shard": (GrpcCluster, 1),
    "grpc, 3 shards": (GrpcCluster, 3),
    "grpc, 3 shards on as many nodes": (SpreadCluster, 3),
}
"""What the contracts are held by: each kind, and how many shards it has."""
