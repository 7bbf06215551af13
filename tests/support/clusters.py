"""Real shards, server and clients inside the test's process, over the transport of one's choice."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from async_sgd.rules import Asynchronous
from paramserver.client import Client
from paramserver.clipping import Clip
from paramserver.messages import Kind, Message
from paramserver.optimizers import SGD, Optimizer
from paramserver.rules import Rule
from paramserver.schedules import Schedule
from paramserver.sequencer import Sequencer
from paramserver.server import Follower, Leader
from paramserver.shard import Shard
from paramserver.transports import Connection, memory, shared_memory
from paramserver.transports.shared_memory import raise_refusal

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
        optimizer: Optimizer | None = None,
        rule: Rule | None = None,
        readers: int = 5,
        schedule: Schedule | None = None,
        clip: Clip | None = None,
        **sequencer: Any,
    ) -> None:
        self.cuts = split(params.numel(), shards)
        self.sequencer = Sequencer(rule or Asynchronous().build(readers), **sequencer)
        self._optimizer = optimizer or SGD(lr=1.0)
        self._capacity = readers + 1
        self._clients: list[Client] = []
        self._prepare()
        self.shards = [
            Shard(
                params[cut.start : cut.stop],
                self._optimizer,
                self._buffers(i),
                schedule=schedule,
                clip=clip,
            )
            for i, cut in enumerate(self.cuts)
        ]
        self._start()

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
        self.leader = Leader(
            self.shards[0], hosts[0], hosts[0].send, self.sequencer, followers=links, **common
        )
        return [
            Follower(shard, host, host.send, **common)
            for shard, host in zip(self.shards[1:], hosts[1:], strict=True)
        ]

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
        self.hosts = [memory.Host(self.network, len(cut), self._capacity) for cut in self.cuts]

    def _buffers(self, shard: int) -> Sequence[Tensor]:
        return self.hosts[shard].buffers

    def _start(self) -> None:
        links = [memory.Link(self.network, host) for host in self.hosts[1:]]
        followers = self._serve(self.hosts, links)
        self.hosts[0].server = self.leader
        for follower, host, link in zip(followers, self.hosts[1:], links, strict=True):
            host.server = follower
            follower.on_message(link, Message(Kind.LEAD, text=f"{TOKEN} {FINGERPRINT}"), 0.0)

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
            shared_memory.Host(address, len(cut), self._capacity)
            for address, cut in zip(self.addresses, self.cuts, strict=True)
        ]

    def _buffers(self, shard: int) -> Sequence[Tensor]:
        return self.hosts[shard].buffers

    def _start(self) -> None:
        links: list[shared_memory.Link] = []
        for follower, host in zip(self._serve(self.hosts, links), self.hosts[1:], strict=True):
            host.serve(follower)
        hello = Message(Kind.LEAD, text=f"{TOKEN} {FINGERPRINT}")
        links += [self.hosts[0].lead(address, hello, 5.0) for address in self.addresses[1:]]
        self._serve(self.hosts, links)
        self.hosts[0].serve(self.leader)

    def connect(
        self, shard: int, worker: int, incarnation: int, text: str = f"{TOKEN} {FINGERPRINT}"
    ) -> tuple[Connection, Message]:
        hello = Message(Kind.HELLO, worker=worker, incarnation=incarnation, text=text)
        connection = shared_memory.SharedMemoryConnection(
            self.addresses[shard], shard, len(self.cuts[shard]), hello, timeout_s=5.0
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
