"""An asynchronous run in virtual time: the sequencer, rules and shard of the real one, no waiting.

What a real run leaves to processes and clocks is a heap of events here, ordered by virtual time and
then by the order in which they were made:

    read granted --pull--> compute --push--> arrives --queue--> served: applied, read granted again
              |  network |  delay  | network |    the server   |

A push is decided about when the server has served it, and the read that answers it is granted at
that same moment, as on a real server. With no network and no service time both are free, and what
theory says of staleness holds to the letter.

Nothing is measured and nothing waits, so the same run made again has the same events, and, computed
one by one, the same bits. Delays of compute, network and service come from streams of their own;
which samples a worker reads depends on the seed, its number and its clock alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from async_sgd.jobs import Gradients, Job
from async_sgd.local_server import LocalServer
from async_sgd.streams import Delays
from paramserver.errors import ParamServerError, StragglerTimeoutError
from paramserver.sequencer import Sequencer
from paramserver.shard import Shard

What = Literal["join", "leave", "crash"]


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """A worker comes or goes."""

    at: float
    """Virtual seconds."""
    worker: int
    what: What
    """``join``: it takes part from then on, again or for the first time; one whose first change
    this is does not take part before. ``leave``: its push in flight is its last. ``crash``: it is
    gone at once, and its push is lost."""

    @classmethod
    def parse(cls, text: str) -> Change:
        """Read ``what:worker@seconds``, such as ``crash:2@7.5``.

        Raises:
            ValueError: The text has another form.
        """
        found = re.fullmatch(r"\s*(\w+):(\d+)@(\S+?)\s*", text)
        try:
            what, worker, at = found.groups() if found else ("", "", "")
            seconds = float(at)
        except ValueError:
            raise ValueError(f"a change must be like crash:2@7.5, got {text!r}") from None
        return cls(seconds, int(worker), cast(What, what))

    def __str__(self) -> str:
        return f"{self.what}:{self.worker}@{self.at:g}"

    def __post_init__(self) -> None:
        if not 0 <= self.at < math.inf:
            raise ValueError(f"a change must be at 0 s or later, got {self.at}")
        if self.worker < 0:
            raise ValueError(f"a change needs a worker of number 0 or more, got {self.worker}")
        if self.what not in get_args(What):
            raise ValueError(f"a change must be {' or '.join(get_args(What))}, got {self.what!r}")


def late_joiners(changes: Sequence[Change]) -> set[int]:
    """Return the workers that do not take part from the start: whose first change is a join."""
    first: dict[int, Change] = {}
    for change in sorted(changes):
        first.setdefault(change.worker, change)
    return {worker for worker, change in first.items() if change.what == "join"}


class Buffers(Sequence[Tensor]):
    """Snapshot buffers that take memory from their first use on; freed ones are used first."""

    def __init__(self, count: int, numel: int, dtype: torch.dtype) -> None:
        """Have ``count`` buffers of ``numel`` elements, none of them allocated."""
        self._made: list[Tensor | None] = [None] * count
        self._numel, self._dtype = numel, dtype

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        buffer = self._made[index]
        if buffer is None:
            buffer = self._made[index] = torch.empty(self._numel, dtype=self._dtype)
        return buffer

    @property
    def num_made(self) -> int:
        """Buffers that take memory: the most versions that were alive at once."""
        return sum(buffer is not None for buffer in self._made)


@dataclass(frozen=True, slots=True)
class Times:
    """What takes virtual time."""

    compute: Delays
    """Of a gradient."""
    service: Delays | None = None
    """Of the server for one push, which come one after the other; None is no time."""
    one_way_s: float = 0.0
    """Seconds of all parameters' way from or to the server; the mean of both, if they differ."""
    steps: tuple[int, ...] | None = None
    """Gradients that each worker computes between a read and a push; None is one."""

    def computing(self, worker: int) -> float:
        """Return how many seconds ``worker`` computes from its next read to its push."""
        if self.steps is None:
            return self.compute.draw(worker)
        return sum(self.compute.draw(worker) for _ in range(self.steps[worker]))


class Simulation:
    """The events of one run; see the module. The caller evaluates, records and stops it."""

    def __init__(
        self,
        sequencer: Sequencer,
        shard: Shard,
        buffers: Sequence[Tensor],
        gradients: Gradients,
        batch_size: int,
        times: Times,
        *,
        num_workers: int,
        changes: Sequence[Change] = (),
    ) -> None:
        """Let the workers join that take part from the start.

        Args:
            sequencer: Orders the run; it expects those workers.
            shard: Holds all parameters.
            buffers: The shard's.
            gradients: Computes them.
            batch_size: Samples in a gradient, unless the sequencer sizes them.
            times: What takes time.
            num_workers: Workers that there can be, by number from 0.
            changes: Workers that come or go.
        """
        self.now = 0.0
        """Virtual seconds."""
        self.sequencer, self.shard = sequencer, shard
        self.server = LocalServer(sequencer, shard, buffers, gradients, batch_size)
        self._times = times
        self._events: list[tuple[float, int, Job | Change]] = []
        self._numbers = itertools.count()
        self._in_service: set[Job] = set()
        self._served_until = 0.0
        self._incarnations = [0] * num_workers
        self._leaving: set[int] = set()
        for change in sorted(changes):
            self._schedule(change.at, change)
        for worker in sorted(set(range(num_workers)) - late_joiners(changes)):
            self._join(worker)

    def run(self, until: float = math.inf, num_events: float = math.inf) -> bool:
        """Go on to virtual second ``until``, or to the end of the run; return whether it goes on.

        It may also return after ``num_events``, for the caller to look after other things.

        Raises:
            ParamServerError: What broke the run.
        """
        sequencer, events = self.sequencer, self._events
        handled = 0
        while sequencer.ended is None:
            if handled >= num_events:
                return True
            handled += 1
            if not events:
                sequencer.fail(self._stuck())
                break
            if events[0][0] > until:
                self.now = until
                return True
            self.now, _, event = heapq.heappop(events)
            if isinstance(event, Change):
                self._change(event)
            else:
                self._arrive(event)
        if sequencer.error is not None:
            raise sequencer.error
        return False

    def _schedule(self, at: float, event: Job | Change) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), event))

    def _change(self, change: Change) -> None:
        worker = change.worker
        live = self.sequencer.is_live(worker, self._incarnations[worker])
        if change.what == "join" and live:
            self._leaving.discard(worker)  # it has thought better of it
        elif change.what == "join":
            self._join(worker)
        elif change.what == "leave" and live and worker in self.server.jobs:
            self._leaving.add(worker)
        elif live:
            self._leave(worker)

    def _join(self, worker: int) -> None:
        self._incarnations[worker] += 1
        self._begin(self.server.join(worker, self._incarnations[worker], self.now))

    def _leave(self, worker: int) -> None:
        self._leaving.discard(worker)
        self._begin(self.server.leave(worker, self.now))

    def _arrive(self, job: Job) -> None:
        """Let ``job`` wait for its turn at the server, or serve it."""
        worker = job.worker
        if self.server.jobs.get(worker) is not job:  # its worker has crashed
            self._in_service.discard(job)
            return
        if self._times.service is not None and job not in self._in_service:
            begins = max(self.now, self._served_until)
            self._served_until = begins + self._times.service.draw(worker)
            self._in_service.add(job)
            self._schedule(self._served_until, job)
            return
        self._in_service.discard(job)
        begun = self.server.push(worker, self.now)
        if worker in self._leaving:
            self._begin([other for other in begun if other.worker != worker])
            self._leave(worker)
        else:
            self._begin(begun)

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Schedule the arrivals of jobs that begin now."""
        times = self._times
        for job in jobs:
            at = self.now + 2 * times.one_way_s + times.computing(job.worker)
            self._schedule(at, job)

    def _stuck(self) -> ParamServerError:
        """Return why nothing will ever happen any more."""
        for worker, (others, waited_s) in self.sequencer.waiting(self.now).items():
            clocks = {w: self.sequencer.clock(w) for w in others}
            return StragglerTimeoutError(worker, self.sequencer.clock(worker), clocks, waited_s)
        return ParamServerError(f"no worker is left after {self.now:g} virtual seconds")
