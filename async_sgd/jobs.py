"""Gradients of a simulated run: one job a read, computed one by one or many at once.

A job is known in full when its worker reads: parameters, samples and seed are fixed, and only the
time of its arrival is still to come. So its gradient may be computed at any time in between:

    one by one   when it arrives, by the code a worker's process runs: the same bits
    batched      with all others that are in flight then, by `torch.func.vmap` over the jobs

Batching pays where torch's overhead is larger than the arithmetic, as it is for small models. Its
sums are made in another order, so its bits are not those of one by one; the same run made again has
the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from paramserver.clipping import Clip
from paramserver.errors import TaskError
from paramserver.layout import Layout
from workers.batches import Batches, seed_step, step_seed
from workers.estimate import Estimated, Estimator, GradientMode
from workers.examples import Batch, Examples
from workers.functional import Params, PureLoss
from workers.gradients import BoundModel
from workers.task import Task

_BATCH_BYTES = 128 * 2**20
"""Parameters that the jobs of one batch may have in all, at most."""


@dataclass(slots=True, eq=False)
class Job:
    """One gradient of a simulated worker, from its read to its push."""

    worker: int
    incarnation: int
    seq: int
    clock: int
    """Iterations the worker has ended before this one."""
    read_version: int
    params: Tensor
    """What was read, shape ``(n,)``; it stays as it is until the push was decided about."""
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


class Samples:
    """The samples of every worker of a simulated run, by clock: those its process would read."""

    def __init__(self, examples: Examples, batch_size: int, num_workers: int, *, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._examples, self._num_workers = examples, num_workers
        self._batches: dict[int, Batches] = {}

    def batch(self, jobs: Sequence[Job]) -> Batch:
        """Return the samples of all ``jobs``, one job's after the other's."""
        return self._examples.batch(torch.cat([self._indices(job) for job in jobs]))

    def _indices(self, job: Job) -> Tensor:
        batches = self._batches.get(job.worker)
        if batches is None:
            batches = self._batches[job.worker] = Batches(
                len(self._examples),
                self.batch_size,
                seed=self.seed,
                worker=job.worker,
                num_workers=self._num_workers,
            )
        return batches.indices(job.clock)


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
        num_shards: int = 1,
    ) -> None:
        """Compute on ``model``, which ``layout`` describes, in ``mode``.

        The norm of a gradient is summed as by a worker of ``num_shards`` shards.
        """
        cuts = layout.cuts(num_shards)
        self._samples, self._sizes = samples, [len(cut) for cut in cuts]
        self._bound = BoundModel(model, layout, cuts)
        self._slot = torch.zeros(layout.numel, dtype=layout.dtype)
        slots = self._slot.split(self._sizes)
        self._compute = Estimator(
            mode, task, self._bound, cuts, slots, seed=samples.seed, clip=clip
        )
        model.train()

    def begin(self, job: Job) -> None:
        """Do nothing: the gradient is computed when it arrives."""

    def abandon(self, job: Job) -> None:
        """Do nothing."""

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Compute the gradient of ``job``, in the one slot there is."""
        seed_step(self._samples.seed, job.worker, job.clock)
        batch = self._samples.batch([job])
        self._bound.read(job.params.split(self._sizes))
        return self._slot, self._compute(batch, job.worker, job.clock)


class Batched:
    """Computes a job that arrives together with all that are in flight; a `Gradients`.

    The loss must be made of functions that `torch.func.vmap` knows. Random numbers, of dropout for
    example, differ from job to job and are not those of one by one; buffers stay as they are.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: Layout,
        samples: Samples,
        *,
        clip: Clip | None = None,
    ) -> None:
        """Compute on ``model``, which ``layout`` describes, by reverse mode."""
        self._task, self._layout, self._samples, self._clip = task, layout, samples, clip
        self._pure = PureLoss(task, model, layout)
        self._in_flight: dict[Job, None] = {}  # those not computed, the oldest first
        self._max_jobs = max(1, _BATCH_BYTES // (layout.numel * layout.dtype.itemsize))
        model.train()

    def begin(self, job: Job) -> None:
        """Remember ``job`` for the next batch."""
        self._in_flight[job] = None

    def abandon(self, job: Job) -> None:
        """Forget ``job``."""
        self._in_flight.pop(job, None)

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return the gradient of ``job``; compute it now, with others, if it is not there yet."""
        if job.grad is None:
            self._compute(job)
        assert job.grad is not None
        assert job.done is not None
        if self._clip is not None and not job.done.layer:
            self._clip.apply_(job.grad, job.done.norm)
        return job.grad, job.done

    def _compute(self, first: Job) -> None:
        """Compute the jobs in flight, ``first`` and then the oldest, as many as there is room."""
        del self._in_flight[first]
        jobs = [first, *list(self._in_flight)[: self._max_jobs - 1]]
        for job in jobs[1:]:
            del self._in_flight[job]
        batch = tuple(t.unflatten(0, (len(jobs), -1)) for t in self._samples.batch(jobs))
        params = self._pure.split(torch.stack([job.params for job in jobs]))
        seed = step_seed(self._samples.seed, first.worker, first.clock)

        def loss_of(params: Params, batch: Batch) -> Tensor:
            return self._pure.loss(params, batch, seed)

        try:
            slopes, losses = vmap(grad_and_value(loss_of), randomness="different")(params, batch)
        except Exception as error:  # the task's own code may raise anything
            raise TaskError(
                f"the loss of task {self._task.name!r} failed over many jobs at once: {error}; "
                "compute them one by one"
            ) from error
        grads = self._pure.join(slopes, slopes[0].new_zeros(len(jobs), self._layout.numel))
        norms = torch.linalg.vector_norm(grads, dim=1)
        rows = zip(jobs, grads.unbind(), losses.tolist(), norms.tolist(), strict=True)
        for job, grad, loss, norm in rows:
            job.grad, job.done = grad, self._judged(grad, loss, norm)

    def _judged(self, grad: Tensor, loss: float, norm: float) -> Estimated:
        if math.isinf(norm):  # perhaps it is finite, and its square is not
            norm = float(torch.linalg.vector_norm(grad.double()))
        if math.isfinite(loss) and math.isfinite(norm):
            return Estimated(loss, norm)
        for slot in self._layout.slots:
            if not bool(torch.isfinite(grad[slot.offset : slot.end]).all()):
                return Estimated(loss, math.nan, slot.name)
        return Estimated(loss, math.nan, "loss")
