"""A shard's process: the data plane on a thread, and the control plane as actor methods.

Workers never call these methods; their pushes go through the transport. The driver does, a few
times a second at most: create, lead, look, save, stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from paramserver.averaging import Average
from paramserver.clipping import Clip
from paramserver.errors import ServerTimeoutError
from paramserver.ledger import Ledger
from paramserver.messages import Kind, Message
from paramserver.optimizers import AnyOptimizer, Optimizer
from paramserver.round_server import RoundFollower, RoundLeader
from paramserver.round_shard import RoundShard
from paramserver.rounds import RoundOptimizer
from paramserver.schedules import Schedule
from paramserver.sequencer import Progress, Sequencer
from paramserver.server import Follower, Leader
from paramserver.shard import Saved, Shard
from paramserver.transports.shared_memory import Host


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """What a shard needs beside the rest to run a round program."""

    cut: range
    """The shard's range of the parameters."""

    num_examples: int
    """Training samples there are."""

    num_workers: int
    """Workers that are expected."""

    finished: int = 0
    """Rounds finished before."""

    last: int | None = None
    """Round after which the run ends; None if rounds do not end it."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What one shard is made of."""

    index: int
    """Number of the shard; 0 leads."""

    address: str
    """Where it listens."""

    capacity: int
    """Snapshot buffers: one a worker and reader, plus one."""

    token: str
    """The run's secret."""

    fingerprint: str
    """The layout's."""

    optimizer: AnyOptimizer
    schedule: Schedule | None = None
    clip: Clip | None = None
    average: Average | None = None
    version: int = 0

    rule_state: dict[str, Any] | None = None
    """The optimizer's saved ``state_dict``; None starts afresh."""

    schedule_state: dict[str, Any] | None = None

    slot_rows: int = 1
    """Rows of a slot; more than one for pushes of several and programs that ask for matrices."""

    threads: int = 1
    """torch threads of the process."""

    rounds: RoundsConfig | None = None
    """Given if the optimizer is a round program."""


class ShardServer:
    """One shard behind its transport. Leads if it is shard 0."""

    def __init__(self, config: ShardConfig, params: NDArray[Any]) -> None:
        """Keep what `follow` and `lead` need: Ray hides what a constructor raises."""
        torch.set_num_threads(config.threads)
        self._config = config
        self._params = torch.from_numpy(np.array(params))  # Ray's arrays are read-only views
        self._leader: Leader | None = None
        self._seen_rows = 0

    @cached_property
    def _host(self) -> Host:
        c, params = self._config, self._params
        return Host(c.address, params.numel(), c.capacity, params.dtype, slot_rows=c.slot_rows)

    @cached_property
    def _shard(self) -> Shard | RoundShard:
        c = self._config
        shard = self._make_shard(self._params)
        if c.rule_state is not None:
            shard.restore(c.rule_state, c.schedule_state)
        del self._params
        return shard

    def _make_shard(self, params: Tensor) -> Shard | RoundShard:
        c = self._config
        if c.rounds is None:
            return Shard(
                params,
                cast(Optimizer, c.optimizer),
                self._host.buffers,
                schedule=c.schedule,
                clip=c.clip,
                average=c.average,
                version=c.version,
                num_rows=c.slot_rows,
            )
        return RoundShard(
            params,
            cast(RoundOptimizer, c.optimizer),
            self._host.buffers,
            cut=c.rounds.cut,
            num_rows=c.slot_rows,
            schedule=c.schedule,
            average=c.average,
            version=c.version,
            rounds=c.rounds.finished,
        )

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
        leader = self._leading()
        with self._host.lock:
            s = leader.sequencer
            new = s.ledger.rows(self._seen_rows)
            self._seen_rows = len(s.ledger)
            applied = new[new["dropped"] == 0]
            recent: dict[str, Any] = {}
            if len(applied):
                recent["staleness_mean"] = float(np.mean(applied["staleness"]))
                recent["staleness_max"] = int(np.max(applied["staleness"]))
            losses = applied["loss"][~np.isnan(applied["loss"])]  # a product has none
            if len(losses):
                recent["loss"] = float(np.mean(losses))
            return {
                "updates": self._updates(),
                "gradients": s.gradients,
                "samples": s.samples,
                "seconds": self._host.now(),
                "live": s.live(),
                "waiting": {w: (sorted(o), t) for w, (o, t) in s.waiting(self._host.now()).items()},
                "dropped": s.ledger.drop_reasons(),
                "ended": s.ended,
                "error": s.error,
                **recent,
            }

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
        with self._host.lock:
            s = self._leading().sequencer
            staleness: dict[str, Any] = s.ledger.staleness.summary()
            staleness["per_worker"] = {
                w: {"pushes": f.pushes, "mean": f.mean, "max": f.max}
                for w, f in s.ledger.staleness.per_worker().items()
            }
            return {
                "staleness": staleness,
                "dropped": s.ledger.drop_reasons(),
                "conservation": s.conservation.report(),
                "invariants": [
                    {"name": n, "bound": limit, "worst": value}
                    for n, (value, limit) in s.worst.items()
                ],
                "waits": {
                    k: {"count": w.count, "seconds": w.seconds} for k, w in sorted(s.waits.items())
                },
            }

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


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


ShardActor = ray.remote(max_restarts=0, max_task_retries=0)(ShardServer)
