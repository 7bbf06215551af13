"""Workers, a network and shards whose every step is drawn from a seed, and checked.

Each worker is the real client on a thread of its own, but only one thread runs at a time: the plan
hands the turn to a worker until it waits for a message, or has read, and takes it back. Between two
turns one message is delivered. So a seed is a run, however the threads are scheduled.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any, Literal, cast

import torch
from torch import Tensor

from paramserver.client import Client, Ended, Reading
from paramserver.errors import ServerTimeoutError
from paramserver.messages import Kind, Message
from paramserver.recount import recount
from paramserver.rules import RuleSpec
from paramserver.transports import memory
from tests.support.clusters import MemoryCluster

NUMEL = 192
_HAND_OVER_S = 20.0

Turn = Literal["go on", "time out", "die"]


def gradient(worker: int, incarnation: int, seq: int) -> Tensor:
    """Return the push's gradient: multiples of 12, so sums and means of up to 4 are exact."""
    generator = torch.Generator().manual_seed((worker * 1009 + incarnation) * 1009 + seq)
    return torch.randint(-3, 4, (NUMEL,), generator=generator).float() * 12


class Killed(BaseException):
    """Ends a worker's thread where it stands."""


class AnyOrder(memory.Network):
    """Delivers in any order in which each connection's own messages keep theirs."""

    rng: random.Random

    def step(self) -> bool:
        first: dict[object, int] = {}
        for i, (_, conn, _) in enumerate(self._under_way):
            first.setdefault(conn, i)
        if first:
            chosen = self.rng.choice(list(first.values()))
            message = self._under_way[chosen]
            del self._under_way[chosen]
            self._under_way.appendleft(message)
        return super().step()


class Lossy(memory.MemoryConnection):
    """Gives the turn away while it waits, and loses some of the answers to pushes."""

    plan: Plan

    def deliver(self, message: Message, sender: memory.Host) -> None:
        if not (message.seq and self.plan.loses()):
            super().deliver(message, sender)

    def receive(self, timeout_s: float) -> Message:
        while not self._inbox:
            if self.plan.running.pause() == "time out":
                raise ServerTimeoutError(self.shard, "waiting for an answer", timeout_s)
        return self._inbox.popleft()


class Life:
    """One incarnation of a worker, from its joining to its end."""

    def __init__(self, plan: Plan, worker: int, incarnation: int) -> None:
        self.worker, self.incarnation = worker, incarnation
        self.pushes = False
        """Whether it waits for the answer to a push, and may lose patience."""
        self.ended: Ended | None = None
        self.error: BaseException | None = None
        self._plan = plan
        self._turn: Turn = "go on"
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"worker {worker}", daemon=True)

    def take(self, turn: Turn) -> bool:
        """Let it run until it gives the turn back; return whether it lives on."""
        self._turn = turn
        self._plan.running = self
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        assert self._back.acquire(timeout=_HAND_OVER_S), f"worker {self.worker} hangs"
        if self._thread.is_alive() and not self._is_over:
            return True
        self._thread.join()
        if self.error is not None:
            raise self.error
        return False

    _is_over = False

    def pause(self) -> Turn:
        """Give the turn back until the plan wants something of this worker."""
        self._back.release()
        self._go.acquire()
        if self._turn == "die":
            raise Killed
        return self._turn

    def _run(self) -> None:
        self._go.acquire()
        try:
            if self._turn != "die":
                self._work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self._is_over = True
        self._back.release()

    def _work(self) -> None:
        with self._plan.cluster.join(self.worker, self.incarnation) as client:
            reading, seq = client.first_read(), 1
            while True:
                if isinstance(reading, Ended):
                    self.ended = reading
                    return
                self._check(reading)
                self.pause()
                newer = self._newer_read(client)
                if newer is not None:
                    reading = newer
                    continue
                self._check(reading)
                grad = gradient(self.worker, self.incarnation, seq)
                parts = grad.split([len(slot) for slot in client.slots])
                for slot, part in zip(client.slots, parts, strict=True):
                    slot.copy_(part)
                self.pushes = True
                send = lambda: client.push(norm=float(grad.norm()))  # noqa: B023, E731
                while True:
                    try:
                        reading = send()
                        break
                    except ServerTimeoutError:
                        send = client.retry
                self.pushes = False
                seq += 1

    def _check(self, reading: Reading) -> None:
        """Check what is read, unless it was cancelled: then the server may write there."""
        if self._plan.is_granted(self.worker, self.incarnation, reading):
            self._plan.check_reading(reading)

    def _newer_read(self, client: Client) -> Reading | None:
        """Look for a read in the place of one that was cancelled; a lost answer is none."""
        self.pushes = True
        try:
            return client.newer_read()
        except ServerTimeoutError:
            return None
        finally:
            self.pushes = False


class Plan:
    """One run: what happens next is drawn from ``seed``, and every step is checked."""

    def __init__(
        self,
        seed: int,
        rule: RuleSpec,
        *,
        workers: int,
        shards: int,
        loss_rate: float = 0.05,
        kill_rate: float = 0.02,
    ) -> None:
        self.rng = random.Random(seed)
        self._loss_rate, self._kill_rate = loss_rate, kill_rate
        self._is_calm = False
        self.running: Life
        machine = rule.build(workers)
        self._gathers = machine.gathers
        start = torch.zeros(NUMEL)

        class Ours(MemoryCluster):
            make_network = AnyOrder
            make_connection = cast(
                "type[memory.MemoryConnection]", type("L", (Lossy,), {"plan": self})
            )

        self.cluster = Ours(start, shards=shards, rule=machine, readers=workers + 1)
        network = cast(AnyOrder, self.cluster.network)
        network.rng = self.rng
        network.lose = lambda m: m.kind == Kind.PUSH and self.loses()
        network.repeat = lambda m: m.kind == Kind.PUSH and self.loses()
        self._network = network
        self._lives = {w: Life(self, w, 1) for w in range(workers)}
        self.models = [start]
        """The parameters of each version, replayed from the ledger alone."""
        self._seen = 0
        self._updates: dict[int, list[Tensor]] = {}
        self._applied: Counter[tuple[int, int, int]] = Counter()
        self.num_killed = self.num_timeouts = 0

    def loses(self) -> bool:
        """Draw whether a message is lost, or repeated."""
        return not self._is_calm and self.rng.random() < self._loss_rate

    def run(self, num_events: int) -> None:
        """Let ``num_events`` things happen, then end the run in order, and check what is left."""
        for _ in range(num_events):
            self._event()
            self.check()
        self._is_calm = True
        self.cluster.leader.stop("the plan is over")
        for _ in range(20_000):
            if not self._lives and not self._network.step():
                break
            self._event()
            self.check()
        assert not self._lives, f"never told that the run ended: {sorted(self._lives)}"
        self._check_at_the_end()

    def check(self) -> None:
        """Check what must hold after every event."""
        sequencer, shards = self.cluster.sequencer, self.cluster.shards
        assert sequencer.error is None, sequencer.error
        assert sequencer.conservation.holds, sequencer.conservation.report()
        self._replay()
        assert shards[0].version == sequencer.version == len(self.models) - 1
        for shard, cut in zip(shards, self.cluster.cuts, strict=True):
            assert torch.equal(
                shard.snapshots.params, self.models[shard.version][cut.start : cut.stop]
            ), f"a shard's parameters are not those of version {shard.version}"

    def is_granted(self, worker: int, incarnation: int, reading: Reading) -> bool:
        """Whether what a worker reads was not cancelled, and so must not change."""
        sequencer = self.cluster.sequencer
        is_live = sequencer.is_live(worker, incarnation)
        return is_live and sequencer.conservation.read_version(worker) == reading.version

    def check_reading(self, reading: Reading) -> None:
        """Check that what a worker reads is one version, whole and unchanged."""
        assert torch.equal(torch.cat(reading.params), self.models[reading.version])

    def _event(self) -> None:
        if not self._lives or self.rng.random() < 0.6:
            self._network.step()
            return
        worker = self.rng.choice(list(self._lives))
        life, draw = self._lives[worker], 1.0 if self._is_calm else self.rng.random()
        turn: Turn = "go on"
        if draw < self._kill_rate:
            turn, self.num_killed = "die", self.num_killed + 1
        elif life.pushes and (draw < 0.1 or (self._is_calm and self.rng.random() < 0.01)):
            turn, self.num_timeouts = "time out", self.num_timeouts + 1
        if life.take(turn):
            return
        if life.ended is None:
            self._lives[worker] = Life(self, worker, life.incarnation + 1)
        else:
            del self._lives[worker]

    def _replay(self) -> None:
        ledger = self.cluster.sequencer.ledger
        rows: list[Any] = list(ledger.rows(self._seen))
        self._seen = len(ledger)
        for row in rows:
            if row["dropped"]:
                continue
            push = (int(row["worker"]), int(row["incarnation"]), int(row["seq"]))
            self._applied[push] += 1
            assert self._applied[push] == 1, f"{push} was applied twice"
            self._updates.setdefault(int(row["version"]), []).append(gradient(*push))
        while len(self.models) <= self.cluster.sequencer.version:
            grads = self._updates[len(self.models)]
            assert self._gathers or len(grads) == 1
            self.models.append(self.models[-1] - sum(grads, torch.zeros(NUMEL)) / len(grads))

    def _check_at_the_end(self) -> None:
        sequencer, shards = self.cluster.sequencer, self.cluster.shards
        assert [shard.version for shard in shards] == [sequencer.version] * len(shards)
        assert [shard.snapshots.num_leases for shard in shards] == [0] * len(shards)
        assert recount(sequencer.ledger.columns(), gathers=self._gathers) == []
        assert sequencer.live() == []
