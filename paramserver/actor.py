"""A shard's process: the data plane on a thread, and the control plane as actor methods.

Workers never call these methods; their pushes go through the transport. The driver does, a few
times a second at most: create, lead, look, save, stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray
import torch

from paramserver.errors import ServerTimeoutError
from paramserver.freed_memory import keep_freed_memory
from paramserver.ledger import Ledger
from paramserver.messages import Kind, Message
from paramserver.packing import Packed, unpack
from paramserver.progress import Progress
from paramserver.round_server import RoundFollower, RoundLeader
from paramserver.round_shard import RoundShard
from paramserver.sequencer import Sequencer
from paramserver.server import Follower, Leader
from paramserver.shard import Saved, Shard
from paramserver.shard_config import ShardConfig
from paramserver.standing import Standing
from paramserver.transports.link import machine
from paramserver.transports.shared_memory import Host

if TYPE_CHECKING:
    from paramserver.transports.gateway import Gateway
    from paramserver.transports.gateway_config import GatewayConfig


OWN_ADDRESS = "own-node:0"
"""Where a gateway listens at a free port of the address that Ray knows its node by."""


class ShardServer:
    """One shard behind its transport. Leads if it is shard 0."""

    def __init__(self, config: ShardConfig, params: Packed, dtype: torch.dtype) -> None:
        """Keep what `follow` and `lead` need: Ray hides what a constructor raises."""
        torch.set_num_threads(config.threads)
        self._config = config
        self._params = unpack(params, dtype)
        self._leader: Leader | None = None

    @cached_property
    def _host(self) -> Host:
        c, params = self._config, self._params
        return Host(c.address, params.numel(), c.capacity, params.dtype, slot_rows=c.slot_rows)

    @cached_property
    def _shard(self) -> Shard | RoundShard:
        shard = self._config.build(self._params, self._host.buffers)
        del self._params
        return shard

    def machine(self) -> str:
        """Return where this is: see `paramserver.transports.link.machine`."""
        return machine()

    def follow(self) -> None:
        """Listen, and serve as a follower.

        Raises:
            ResourceError: Too little memory, or the address is taken.
        """
        c = self._config
        kind = Follower if c.rounds is None else RoundFollower
        server = kind(
            self._shard,
            self._host,
            self._host.send,
            token=c.token,
            fingerprint=c.fingerprint,
        )
        self._host.serve(server)

    def lead(self, sequencer: Sequencer, followers: Sequence[str], timeout_s: float) -> None:
        """Listen, and serve as the leader of the shards at ``followers``, with a new ``sequencer``.

        Raises:
            ResourceError: Too little memory, or the address is taken.
        """
        c = self._config
        hello = Message(Kind.LEAD, text=f"{c.token} {c.fingerprint}")
        links = [self._host.lead(address, hello, timeout_s) for address in followers]
        common: dict[str, Any] = {
            "followers": links,
            "token": c.token,
            "fingerprint": c.fingerprint,
        }
        parts = (self._shard, self._host, self._host.send, sequencer)
        self._standing = Standing(sequencer)
        if c.rounds is None:
            self._leader = Leader(*parts, **common)
        else:
            self._leader = RoundLeader(
                *parts,
                num_examples=c.rounds.num_examples,
                num_workers=c.rounds.num_workers,
                rounds=c.rounds.last,
                **common,
            )
            self._leader.begin(self._host.now())  # before a follower's first share can come in
        self._host.serve(self._leader)

    def status(self) -> dict[str, Any]:
        """Return where the run stands and what happened since the last call."""
        self._leading()
        with self._host.lock:
            return {**self._standing.status(self._host.now()), "updates": self._updates()}

    def _updates(self) -> int:
        """Updates of the parameters: versions of a push rule, rounds of a program."""
        if isinstance(self._shard, RoundShard):
            return self._shard.runner.rounds
        return self._leading().sequencer.version

    def failure(self) -> str | None:
        """Return what ended this shard's serving thread, or None while it serves."""
        error = self._host.failure
        return None if error is None else f"{type(error).__name__}: {error}"

    def save(self) -> tuple[Saved, Progress, Ledger]:
        """Make every shard save itself at one version; return this one's part and the ledger."""
        leader = self._leading()
        with self._host.lock:
            leader.save()
            assert self._shard.saved is not None
            return self._shard.saved, leader.sequencer.progress(), leader.sequencer.ledger

    def saved(self, version: int, timeout_s: float) -> Saved:
        """Wait until this shard has saved itself at ``version``, and return its part."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._host.lock:
                if self._shard.saved is not None and self._shard.saved.version == version:
                    return self._shard.saved
            time.sleep(0.002)  # the leader's order is on its way to this process
        raise ServerTimeoutError(self._config.index, f"saving version {version}", timeout_s)

    def stop(self, reason: str) -> None:
        """End the run; workers are told."""
        leader = self._leading()
        with self._host.lock:
            leader.stop(reason)

    def summary(self) -> dict[str, Any]:
        """Return what a run's record says of the ledger, the rule's bounds and the waits."""
        self._leading()
        with self._host.lock:
            return self._standing.summary()

    def memory(self) -> dict[str, int]:
        """Return the process's resident bytes, of them shared, and the bytes of one model."""
        fields = [int(n) for n in _read("/proc/self/statm").split()]
        page = 4096
        model = self._host.buffers[0].numel() * self._host.buffers[0].element_size()
        return {"resident": fields[1] * page, "shared": fields[2] * page, "model": model}

    def close(self) -> None:
        """Stop serving and give the memory back."""
        if "_host" in self.__dict__:  # it may never have been made
            self._host.close()

    def _leading(self) -> Leader:
        assert self._leader is not None, "only shard 0 leads"
        return self._leader


class GatewayServer:
    """The process that clients on other nodes, and without Ray, speak to."""

    def __init__(self, config: GatewayConfig) -> None:
        """Keep what `start` needs: Ray hides what a constructor raises."""
        torch.set_num_threads(1)
        keep_freed_memory()
        self._config = config
        self._gateway: Gateway | None = None

    def start(self) -> str:
        """Listen; return the address as other nodes reach it.

        Raises:
            ResourceError: The address cannot be listened at, or a certificate not be read.
        """
        # gRPC is imported by those processes alone that speak it
        from paramserver.transports.gateway import Gateway  # noqa: PLC0415

        config, own = self._config, ray.util.get_node_ip_address()
        if config.listen == OWN_ADDRESS:
            config = replace(config, listen=f"{own}:0")
        self._gateway = Gateway(config)
        host, colon, port = self._gateway.start().rpartition(":")
        everywhere = ("0.0.0.0", "[::]")  # noqa: S104  # what a user may have asked for
        return (own if host in everywhere else host) + colon + port

    def summary(self) -> tuple[set[int], dict[str, int]]:
        """Return who pushed through here, and what a run's record says of what came and went."""
        assert self._gateway is not None, "started before"
        counted = self._gateway.counted()
        del counted["clients"]  # of whom none is left
        return self._gateway.came(), counted

    def close(self) -> None:
        """End every conversation."""
        if self._gateway is not None:
            self._gateway.close()


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


ShardActor = ray.remote(max_restarts=0, max_task_retries=0)(ShardServer)
GatewayActor = ray.remote(max_restarts=0, max_task_retries=0)(GatewayServer)
