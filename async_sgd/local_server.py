"""A server without a transport: the sequencer and one shard, called in this process.

It does with pushes, joins and departures what a leader's process does with messages about them, by
the same sequencer and the same shard. Who calls it decides what happens when: the simulator by a
heap of events, the replay by a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from async_sgd.jobs import Gradients, Job
from paramserver.errors import ParamServerError
from paramserver.messages import Action, Kind, Message
from paramserver.sequencer import Sequencer
from paramserver.shard import Saved, Shard

_READER = -1
"""Who reads without pushing, as the shard knows it."""


class LocalServer:
    """Orders and applies the pushes of workers that are jobs; see the module.

    Each event returns the jobs that began with it: the workers that were let go on.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        shard: Shard,
        buffers: Sequence[Tensor],
        gradients: Gradients,
        batch_size: int,
    ) -> None:
        """Serve all parameters from one shard.

        Args:
            sequencer: Orders the run.
            shard: Holds all parameters.
            buffers: The shard's.
            gradients: Computes them.
            batch_size: Samples in a gradient, unless the sequencer sizes them.
        """
        self.sequencer, self.shard = sequencer, shard
        self.jobs: dict[int, Job] = {}
        """Each worker's job in flight."""
        self._buffers, self._gradients, self._batch_size = buffers, gradients, batch_size

    def join(self, worker: int, incarnation: int, now: float) -> list[Job]:
        """Let ``worker`` take part; a job of an earlier incarnation is lost."""
        self._abandon(worker)
        return self._carry_out(self.sequencer.on_join(worker, incarnation, now))

    def leave(self, worker: int, now: float) -> list[Job]:
        """Forget ``worker``; its job is lost."""
        self._abandon(worker)
        return self._carry_out(self.sequencer.on_leave(worker, now))

    def push(self, worker: int, now: float) -> list[Job]:
        """Let the job of ``worker`` arrive and be decided about."""
        job = self.jobs.pop(worker)
        grad, done = self._gradients.finish(job)
        message = Message(
            Kind.PUSH, 0, worker, job.incarnation, job.seq, job.clock, 0, job.read_version, 0,
            done.steps * (job.samples or self._batch_size), 0, -1, int(done.keeps), 0.0, done.loss,
            done.norm, done.layer, done.noise,
        )  # fmt: skip
        self.shard.hold(worker, job.incarnation, job.seq, grad)
        return self._carry_out(self.sequencer.on_push(message, now))

    def push_cancelled(self, worker: int, read_version: int, samples: int, now: float) -> list[Job]:
        """Let a push of ``samples`` arrive whose read of ``read_version`` was cancelled before."""
        job = self.jobs[worker]
        self._abandon(worker)
        message = Message(
            Kind.PUSH, 0, worker, job.incarnation, job.seq, job.clock, 0, read_version, 0,
            samples,
        )  # fmt: skip
        return self._carry_out(self.sequencer.on_push(message, now))

    @contextmanager
    def shown(self) -> Iterator[Tensor]:
        """Show the parameters that are evaluated now, their average if the run has one."""
        lease = self.shard.execute(self._of_reader(Action.READ))
        assert lease is not None
        try:
            yield self._buffers[lease.buffer]
        finally:
            self.shard.execute(self._of_reader(Action.RELEASE))

    def save(self) -> Saved:
        """Copy everything a checkpoint needs."""
        self.shard.execute(self._of_reader(Action.SAVE))
        assert self.shard.saved is not None
        return self.shard.saved

    def _abandon(self, worker: int) -> None:
        job = self.jobs.pop(worker, None)
        if job is not None:
            self._gradients.abandon(job)

    def _carry_out(self, orders: Sequence[Message]) -> list[Job]:
        begun = []
        for order in orders:
            try:
                lease = self.shard.execute(order)
            except ParamServerError as error:  # as a leader: the run cannot go on
                self.sequencer.fail(error)
                return []
            if lease is not None:
                begun.append(self._begin(order, self._buffers[lease.buffer]))
        return begun

    def _begin(self, read: Message, params: Tensor) -> Job:
        worker = read.worker
        self._abandon(worker)  # it may have been cancelled
        read_version = self.sequencer.conservation.read_version(worker)
        assert read_version is not None, f"worker {worker} was granted no read"
        job = Job(
            worker,
            self.sequencer.incarnation(worker),
            read.seq + 1,
            self.sequencer.clock(worker),
            read_version,
            params,
            read.samples,
        )
        self.jobs[worker] = job
        self._gradients.begin(job)
        return job

    def _of_reader(self, action: Action) -> Message:
        return Message(Kind.ORDER, action, _READER, version=self.sequencer.version)
