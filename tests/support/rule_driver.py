"""Drives a consistency rule through virtual time: compute, push, wait, crash, join.

No shard and no gradient: only versions, clocks and decisions, recorded in a real ledger. Every
event is followed by the checks that hold for any rule, so a test that only runs it tests something.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator

from paramserver.conservation import Conservation
from paramserver.ledger import Ledger
from paramserver.rules import Accept, Drop, Push, Rule

Seconds = Callable[[Generator], float]

DELAYS: dict[str, Seconds] = {
    "constant": lambda rng: 1.0,
    "exponential": lambda rng: rng.exponential(),
    "gamma": lambda rng: rng.gamma(4.0),
    "pareto": lambda rng: 1.0 + rng.pareto(1.5),
    "pareto without a mean": lambda rng: rng.pareto(0.5),
}
"""Seconds of one gradient. Heavy tails make stragglers that are passed a thousand times."""


class RuleDriver:
    """Runs workers under a rule; a worker reads the moment it may, and pushes when it is done."""

    def __init__(
        self,
        rule: Rule,
        *,
        workers: int,
        seconds: Seconds = DELAYS["exponential"],
        seed: int = 0,
        crash_rate: float = 0.0,
    ) -> None:
        """Let workers 0, 1, … join and start.

        Args:
            rule: A fresh state machine.
            workers: How many workers there are at the start.
            seconds: Draws the time of one gradient from the worker's own random stream.
            seed: Seeds the workers' streams, crashes and joins.
            crash_rate: Chance that a worker crashes after an event. Later it is replaced, under
                its own number or by a new worker, or not at all; as often a new one just joins.
        """
        self.rule = rule
        self.ledger = Ledger()
        self.conservation = Conservation()
        self.version = 0
        self.now = 0.0
        self.worst: dict[str, float] = {}
        """Largest value of each bound so far."""
        self.limits: dict[str, float] = {}
        """Limit of each bound, the latest."""
        self.ended: list[tuple[int, int, float]] = []
        """(worker, clock, time) of each push."""
        self._seconds = seconds
        self._seed = seed
        self._crash_rate = crash_rate
        self._chance = np.random.default_rng([seed, 1])
        self._streams: dict[int, Generator] = {}
        self._clocks: dict[int, int] = {}  # live workers
        self._last_clocks: dict[int, int] = {}  # all workers ever
        self._lives: dict[int, int] = {}  # incarnation of all workers ever
        self._numbers = itertools.count(workers)  # for new workers
        self._waiting: dict[int, None] = {}  # in the order they began to wait
        self._reads: dict[int, tuple[int, float]] = {}  # worker -> (version, time)
        self._numbers_of_reads: dict[int, int] = {}
        self.num_cancelled = 0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        for worker in range(workers):
            self._join(worker)
        self._release()

    def run(self, pushes: int) -> dict[str, np.ndarray[Any, Any]]:
        """Go on until ``pushes`` pushes are in the ledger; return its columns."""
        while len(self.ledger) < pushes:
            assert self._heap, f"seed {self._seed}: nothing is left to happen"
            self.now, _, event = heapq.heappop(self._heap)
            event()
            if self._crash_rate:
                self._maybe_crash()
            self._release()
        return self.ledger.columns()

    def _release(self) -> None:
        for worker in list(self._waiting):
            waits_for = self.rule.waits_for(worker)
            assert worker not in waits_for, f"worker {worker} waits for itself"
            assert waits_for <= self._clocks.keys(), f"worker {worker} waits for the dead"
            if not waits_for:
                del self._waiting[worker]
                self._read(worker)
        assert self._reads or not self._clocks, (
            f"seed {self._seed}, version {self.version}: deadlock, all of {self._waiting} wait"
        )

    def _read(self, worker: int) -> None:
        self._reads[worker] = (self.version, self.now)
        self.conservation.on_read(worker, self.version)
        stream = self._streams.setdefault(worker, np.random.default_rng([self._seed, 2, worker]))
        number = self._numbers_of_reads[worker] = self._numbers_of_reads.get(worker, 0) + 1
        push = partial(self._push, worker, self._lives[worker], number)
        self._after(self._seconds(stream), push)

    def _push(self, worker: int, life: int, number: int) -> None:
        if worker not in self._clocks or self._lives[worker] != life:
            return  # it crashed before it was done
        if number != self._numbers_of_reads[worker]:
            return  # it was cancelled
        read_version, start = self._reads.pop(worker)
        self._clocks[worker] += 1
        clock = self._last_clocks[worker] = self._clocks[worker]
        push = Push(worker, clock, read_version, self.version)
        self.conservation.on_arrival(worker, read_version, self.version)
        verdict = self.rule.on_push(push)
        accepted = isinstance(verdict, Accept)
        self.ledger.append(
            version=self.version + accepted,
            worker=worker,
            incarnation=life,
            seq=clock,
            clock=clock,
            read_version=read_version,
            staleness=push.staleness,
            start=start,
            end=self.now,
            samples=1,
            loss=0.0,
            grad_norm=0.0,
            scale=verdict.scale if isinstance(verdict, Accept) else 0.0,
            dropped=verdict.reason if isinstance(verdict, Drop) else None,
        )
        self.ended.append((worker, clock, self.now))
        if isinstance(verdict, Accept):
            assert self.rule.gathers or verdict.step, "an update was begun and not applied"
            assert self.rule.cancel_age is None or push.staleness < self.rule.cancel_age
            if verdict.step:
                self._bump()
            for bound in self.rule.bounds(push):
                assert bound.value <= bound.limit, f"seed {self._seed}: {bound}"
                self.worst[bound.name] = max(self.worst.get(bound.name, 0.0), bound.value)
                self.limits[bound.name] = bound.limit
        self._waiting[worker] = None

    def _bump(self) -> None:
        self.version += 1
        self.conservation.on_bump(self.version)
        if self.rule.cancel_age is None:
            return
        for worker, read_version in self.conservation.read_by(self.version - self.rule.cancel_age):
            assert self.version - read_version == self.rule.cancel_age
            self.num_cancelled += 1
            self._reads.pop(worker)
            self.conservation.on_abandon(worker, self.version)
            self._waiting[worker] = None

    def _join(self, worker: int) -> None:
        clock = self._last_clocks.get(worker, min(self._clocks.values(), default=0))
        self._clocks[worker] = self._last_clocks[worker] = clock
        self._lives[worker] = self._lives.get(worker, -1) + 1
        self.rule.on_join(worker, clock)
        self._waiting[worker] = None

    def _maybe_crash(self) -> None:
        if self._chance.random() < self._crash_rate / 4:
            self._join(next(self._numbers))
        if not self._clocks or self._chance.random() >= self._crash_rate:
            return
        worker = int(self._chance.choice(list(self._clocks)))
        del self._clocks[worker]
        self._waiting.pop(worker, None)
        self._reads.pop(worker, None)
        self.conservation.on_abandon(worker, self.version)
        if self.rule.on_leave(worker):
            self._bump()
        fate = self._chance.random()
        if fate < 0.75 or not self._clocks:
            heir = worker if fate < 0.5 else next(self._numbers)
            self._after(self._chance.exponential(), partial(self._join, heir))

    def _after(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), event))
