"""Gradients of a simulated run: one job a read, computed one by one or many at once.

A job is known in full when its worker reads: parameters, samples and seed are fixed, and only the
time of its arrival is still to come. So its gradient may be computed at any time in between, and so
may the steps of its own that a worker takes instead of one gradient:

    one by one   when it arrives, by the code a worker's process runs: the same bits
    batched      with all others that are in flight then, by `torch.func.vmap` over the jobs

Batching pays where torch's overhead is larger than the arithmetic, as it is for small models. Its
sums are made in another order, so its bits are not those of one by one; the same run made again has
the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from async_sgd.samples import Samples, Step
from paramserver.clipping import Clip
from paramserver.compression import Compression, Traffic, Wire
from paramserver.layout import Layout
from workers.batches import seed_step, step_seed
from workers.estimate import Estimated, Estimator, Given, GradientMode
from workers.examples import Batch
from workers.functional import Params, PureLoss
from workers.gradients import BoundModel
from workers.local import Local, steps_of
from workers.own import Kept, Own, Work
from workers.task import Task, user_code

_BATCH_BYTES = 128 * 2**20
"""Parameters that the jobs of one batch may have in all, at most."""


@dataclass(slots=True, eq=False)
class Job:
    """What a simulated worker does from its read to its push: a gradient, or local steps."""

    worker: int
    incarnation: int
    seq: int
    clock: int
    """Iterations the worker has ended before this one."""
    read_version: int
    params: Tensor
    """What was read, shape ``(n,)``; it stays as it is until the push was decided about. A worker
    that keeps an earlier read does not look at it."""
    samples: int = 0
    """Samples of its gradient; 0 if the run does not change their number."""
    grad: Tensor | None = field(default=None, repr=False)
    """Shape ``(n,)``, once it is computed."""
    done: Estimated | None = None


class Gradients(Protocol):
    """Computes the gradients of jobs."""

    def begin(self, job: Job) -> None:
        """Hear that ``job`` is in flight."""

    def abandon(self, job: Job) -> None:
        """Hear that ``job`` will not arrive."""

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return the gradient of ``job``, clipped and free to be changed until the next call.

        Raises:
            TaskError: The task's loss failed.
        """


WireOf = Callable[[int], Wire | None]
"""Makes the end of the wire that a worker has, by its number; None if nothing is compressed."""


def wire_of(
    layout: Layout,
    cuts: Sequence[range],
    push: Compression | None,
    pull: Compression | None,
    seed: int,
) -> WireOf:
    """Return what makes the wires that workers of a run have; see `Wire`."""
    if push is None and pull is None:
        return lambda worker: None
    return lambda worker: Wire(layout, cuts, push, pull, seed=seed, worker=worker)


class Keeping:
    """What workers keep for themselves between their jobs."""

    def __init__(self, task: Task, local: Local | None, wire: WireOf) -> None:
        self._task, self._local, self._wire = task, local, wire
        self._keeps_nothing = task.recurrent is None and local is None and wire(0) is None
        self._kept: dict[int, tuple[int, Kept]] = {}  # of each worker: its incarnation, and what
        self._traffic = Traffic()  # of those that are gone

    def of(self, job: Job) -> Kept:
        """Return that of the worker of ``job``; another incarnation begins without any."""
        if self._keeps_nothing:
            return Kept()
        incarnation, kept = self._kept.get(job.worker, (None, None))
        if kept is None or incarnation != job.incarnation:
            self.abandon(job)
            own = None if self._local is None else self._local.build
            kept = Kept.at_first(self._task, own, self._wire(job.worker))
            self._kept[job.worker] = (job.incarnation, kept)
        return kept

    @property
    def traffic(self) -> Traffic:
        """What all workers have pushed and read; nothing where nothing is compressed."""
        total = Traffic()
        total.add(self._traffic)
        for _, kept in self._kept.values():
            if kept.wire is not None:
                total.add(kept.wire.traffic)
        return total

    def steps_of(self, job: Job) -> range:
        """Return the numbers of the steps that make ``job``."""
        return steps_of(self._local, job.worker, job.clock)

    def abandon(self, job: Job) -> None:
        """Forget what the worker of ``job`` has kept: it is gone."""
        _, kept = self._kept.pop(job.worker, (0, None))
        if kept is not None and kept.wire is not None:
            self._traffic.add(kept.wire.traffic)


class OneByOne:
    """Computes each job when it arrives, as a worker's process does; a `Gradients`."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: Layout,
        samples: Samples,
        *,
        mode: GradientMode = "reverse",
        clip: Clip | None = None,
        num_chunks: int = 1,
        local: Local | None = None,
        compress: Compression | None = None,
        compress_pull: Compression | None = None,
        num_shards: int = 1,
    ) -> None:
        """Compute on ``model``, which ``layout`` describes, in ``mode``; ``local`` steps, if any.

        Pushes and reads are compressed if that is given. Norms are summed, and slices compressed,
        as by a worker of ``num_shards`` shards; noise is measured in ``num_chunks``.
        """
        cuts = layout.cuts(num_shards)
        self._samples, self._sizes = samples, [len(cut) for cut in cuts]
        bound = BoundModel(model, layout, cuts)
        self._slot = torch.zeros(layout.numel, dtype=layout.dtype)
        slots = self._slot.split(self._sizes)
        compute = Estimator(
            mode, task, bound, cuts, slots, seed=samples.seed, clip=clip, num_chunks=num_chunks
        )
        self._work = Work(compute, bound, slots)
        wire = wire_of(layout, cuts, compress, compress_pull, samples.seed)
        self._keeping = Keeping(task, local, wire)
        model.train()

    def begin(self, job: Job) -> None:
        """Do nothing: the gradient is computed when it arrives."""

    def abandon(self, job: Job) -> None:
        """Forget what its worker has kept."""
        self._keeping.abandon(job)

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Compute the gradient of ``job``, in the one slot there is."""

        def prepare(step: int) -> Given:
            seed_step(self._samples.seed, job.worker, step)
            return self._samples.read(Step(job.worker, step, job.read_version, job.samples))

        kept, steps = self._keeping.of(job), self._keeping.steps_of(job)
        read, batch = job.params.split(self._sizes), prepare(steps.start)
        done = self._work(kept, read, job.read_version, job.worker, steps, batch, prepare)
        return self._slot, self._work.send(kept, steps, done)

    @property
    def traffic(self) -> Traffic:
        """What workers have pushed and read."""
        return self._keeping.traffic


class Batched:
    """Computes a job that arrives together with all that are in flight; a `Gradients`.

    The loss must be made of functions that `torch.func.vmap` knows. Random numbers, of dropout for
    example, differ from job to job and are not those of one by one; buffers stay as they are. A
    recurrent task is refused before: `torch.func.vmap` cannot follow torch's recurrent layers.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: Layout,
        samples: Samples,
        *,
        clip: Clip | None = None,
        local: Local | None = None,
        compress: Compression | None = None,
        compress_pull: Compression | None = None,
    ) -> None:
        """Compute on ``model``, by reverse mode; ``local`` steps, if there are any.

        Pushes and reads are compressed if that is given.

        Of local steps the gradients are computed together, and each worker's step is taken alone.
        """
        self._task, self._layout, self._samples, self._clip = task, layout, samples, clip
        self._pure = PureLoss(task, model, layout)
        wire = wire_of(layout, layout.cuts(1), compress, compress_pull, samples.seed)
        self._keeping = Keeping(task, local, wire)
        self._in_flight: dict[Job, None] = {}  # those not computed, the oldest first
        self._max_jobs = max(1, _BATCH_BYTES // (layout.numel * layout.dtype.itemsize))
        model.train()

    def begin(self, job: Job) -> None:
        """Remember ``job`` for the next batch."""
        self._in_flight[job] = None

    def abandon(self, job: Job) -> None:
        """Forget ``job``, and what its worker has kept."""
        self._in_flight.pop(job, None)
        self._keeping.abandon(job)

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return the gradient of ``job``; compute it now, with others, if it is not there yet."""
        if job.grad is None:
            self._compute(job)
        assert job.grad is not None
        assert job.done is not None
        step = self._keeping.steps_of(job).start
        if self._keeping.of(job).sends_([job.grad], step, job.done):
            norm = float(torch.linalg.vector_norm(job.grad))
            judged = self._judged(job.grad, job.done.loss, norm)
            job.done = replace(job.done, norm=judged.norm, layer=judged.layer)
        return job.grad, job.done

    @property
    def traffic(self) -> Traffic:
        """What workers have pushed and read."""
        return self._keeping.traffic

    def _compute(self, first: Job) -> None:
        """Compute the jobs in flight, ``first`` and then the oldest, as many as there is room."""
        del self._in_flight[first]
        jobs = [first, *list(self._in_flight)[: self._max_jobs - 1]]
        for job in jobs[1:]:
            del self._in_flight[job]
        reads = [self._seen(job) for job in jobs]
        points = torch.stack(reads)
        owns = [own for job in jobs if (own := self._keeping.of(job).own) is not None]
        if owns:
            self._take_steps(jobs, reads, owns, points)
            return
        found = self._gradients(
            points, [Step(job.worker, job.clock, job.read_version) for job in jobs]
        )
        for job, (grad, done) in zip(jobs, found, strict=True):
            job.grad, job.done = grad.clone(), done  # a row would keep all the others alive

    def _seen(self, job: Job) -> Tensor:
        (seen,) = self._keeping.of(job).seen([job.params], job.read_version)
        return seen

    def _take_steps(
        self, jobs: Sequence[Job], reads: Sequence[Tensor], owns: Sequence[Own], points: Tensor
    ) -> None:
        """Take the steps of all ``jobs``, each at its row of ``points``, side by side."""
        for own, read, x in zip(owns, reads, points.unbind(), strict=True):
            own.begin([read], [x])
        steps, losses = [self._keeping.steps_of(job) for job in jobs], [0.0] * len(jobs)
        for ahead in range(max(map(len, steps))):
            under_way = [
                row for row, job in enumerate(jobs) if job.done is None and ahead < len(steps[row])
            ]
            if not under_way:  # each has met a gradient that is not finite
                break
            now = [
                Step(jobs[row].worker, steps[row][ahead], jobs[row].read_version)
                for row in under_way
            ]
            found = self._gradients(points[under_way], now)
            for row, (grad, done) in zip(under_way, found, strict=True):
                if done.layer:
                    jobs[row].grad = grad.clone()  # a row would keep all the others alive
                    jobs[row].done = replace(done, steps=ahead + 1)
                else:
                    owns[row].step([grad])
                    losses[row] += done.loss
        for own, job, numbers, loss in zip(owns, jobs, steps, losses, strict=True):
            if job.done is None:
                job.grad = torch.empty_like(job.params)
                own.end([job.grad])
                norm = float(torch.linalg.vector_norm(job.grad))
                done = self._judged(job.grad, loss / len(numbers), norm)
                job.done = replace(done, steps=len(numbers), keeps=own.keeps)

    def _gradients(self, points: Tensor, steps: Sequence[Step]) -> list[tuple[Tensor, Estimated]]:
        """Return the gradient of each step, at its row of ``points``, clipped."""
        batch = tuple(t.unflatten(0, (len(steps), -1)) for t in self._samples.batch(steps))
        params = self._pure.split(points)
        seed = step_seed(self._samples.seed, steps[0].worker, steps[0].number)

        def loss_of(params: Params, batch: Batch) -> Tensor:
            return self._pure.loss(params, batch, seed)

        what = f"the loss of task {self._task.name!r} over many jobs at once (leave batched out)"
        with user_code(what):
            slopes, losses = vmap(grad_and_value(loss_of), randomness="different")(params, batch)
        grads = self._pure.join(slopes, torch.zeros_like(points))
        norms = torch.linalg.vector_norm(grads, dim=1)
        found = []
        for grad, loss, norm in zip(grads.unbind(), losses.tolist(), norms.tolist(), strict=True):
            done = self._judged(grad, loss, norm)
            if self._clip is not None and not done.layer:
                self._clip.apply_(grad, done.norm)
            found.append((grad, done))
        return found

    def _judged(self, grad: Tensor, loss: float, norm: float) -> Estimated:
        if math.isinf(norm):  # perhaps it is finite, and its square is not
            norm = float(torch.linalg.vector_norm(grad.double()))
        if math.isfinite(loss) and math.isfinite(norm):
            return Estimated(loss, norm)
        for slot in self._layout.slots:
            if not bool(torch.isfinite(grad[slot.offset : slot.end]).all()):
                return Estimated(loss, math.nan, slot.name)
        return Estimated(loss, math.nan, "loss")
