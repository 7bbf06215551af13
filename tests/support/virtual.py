"""Small simulated runs whose every part a test can choose and look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_sgd.delays import DELAYS, DelayLaw
from async_sgd.jobs import Batched, Gradients, Job, OneByOne
from async_sgd.rules import RULES
from async_sgd.samples import Samples
from async_sgd.simulation import Buffers, Change, Simulation, Times, late_joiners
from async_sgd.streams import Delays, Stream
from paramserver.clipping import Clip
from paramserver.layout import Layout
from paramserver.optimizers import SGD
from paramserver.optimizers.base import Optimizer
from paramserver.progress import Budget
from paramserver.rules import Damping, RuleSpec
from paramserver.sequencer import Sequencer
from paramserver.shard import Shard
from workers.estimate import Estimated
from workers.task import Data, Task, build_data, build_model

DOUBLE = torch.float64


class Still:
    """Gradients of 0, for tests that look at order and time alone; a `Gradients`."""

    def __init__(self) -> None:
        self._grad = torch.zeros(1, dtype=DOUBLE)
        self._done = Estimated(0.0, 0.0)

    def begin(self, job: Job) -> None:
        """Do nothing."""

    def abandon(self, job: Job) -> None:
        """Do nothing."""

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return 0."""
        return self._grad, self._done


@dataclass
class Slope:
    """Gradients ``curvature * w + noise``, computed by no network; a `Gradients`."""

    curvature: float | Tensor = 1.0
    noise: Callable[[Job], Tensor | float] = lambda job: 0.0
    seen: dict[int, Tensor] = field(default_factory=dict)
    """Parameters by version, of those versions that somebody has read."""

    def begin(self, job: Job) -> None:
        """Keep what ``job`` reads."""
        if job.read_version not in self.seen:
            self.seen[job.read_version] = job.params.clone()

    def abandon(self, job: Job) -> None:
        """Do nothing."""

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return the gradient at what ``job`` read."""
        return self.curvature * job.params + self.noise(job), Estimated(0.0, 0.0)

    def path(self) -> NDArray[np.float64]:
        """Return the parameters of all versions from 0 on, shape ``(versions, n)``."""
        return torch.stack([self.seen[version] for version in range(len(self.seen))]).numpy()


class Watch:
    """Computes as another `Gradients` does, and keeps what happened."""

    def __init__(self, inner: Gradients) -> None:
        self.inner = inner
        self.in_flight: dict[int, Job] = {}
        """Jobs by worker."""
        self.points: list[Tensor] = []
        """What pushes were computed at, in the order they arrived."""
        self.num_others: list[int] = []
        """Jobs in flight beside each push, in the same order."""
        self.abandoned: list[Job] = []
        self.most_versions = 0
        """Largest number of different versions that were read at one time."""

    def begin(self, job: Job) -> None:
        assert job.worker not in self.in_flight, f"worker {job.worker} computes twice"
        self.in_flight[job.worker] = job
        versions = {job.read_version for job in self.in_flight.values()}
        self.most_versions = max(self.most_versions, len(versions))
        self.inner.begin(job)

    def abandon(self, job: Job) -> None:
        assert self.in_flight.pop(job.worker) is job
        self.abandoned.append(job)
        self.inner.abandon(job)

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        assert self.in_flight.pop(job.worker) is job
        self.points.append(job.params.clone())
        self.num_others.append(len(self.in_flight))
        return self.inner.finish(job)

    def ages(self, version: int) -> int:
        """Return how many versions old all that is in flight is in sum, at ``version``."""
        return sum(version - job.read_version for job in self.in_flight.values())


def simulation(
    num_workers: int,
    *,
    updates: int,
    delay: str | DelayLaw = "exponential",
    rule: str | RuleSpec = "asp",
    service: str | None = None,
    one_way_s: float = 0.0,
    optimizer: Optimizer | None = None,
    damping: Damping | None = None,
    gradients: Gradients | None = None,
    start: float | Tensor = 1.0,
    buffers: Buffers | None = None,
    batch_size: int = 1,
    seed: int = 0,
    changes: Sequence[Change] = (),
) -> Simulation:
    """Make a simulation of ``num_workers`` on one vector, by default a scalar that stays."""
    params = start if isinstance(start, Tensor) else torch.tensor([start], dtype=DOUBLE)
    spec = RULES.parse(rule) if isinstance(rule, str) else rule
    machine = spec.build(num_workers)
    sequencer = Sequencer(
        machine,
        damping=damping,
        budget=Budget(updates=updates),
        expected=num_workers - len(late_joiners(changes)),
    )
    buffers = buffers or Buffers(num_workers + 2, params.numel(), params.dtype)
    shard = Shard(params, optimizer or SGD(lr=0.01), buffers, tabulates=machine.tabulates)
    times = Times(
        compute=delays(delay, num_workers, seed, Stream.COMPUTE),
        service=None if service is None else delays(service, num_workers, seed, Stream.SERVICE),
        one_way_s=one_way_s,
    )
    return Simulation(
        sequencer, shard, buffers, gradients or Still(), batch_size, times,
        num_workers=num_workers, changes=changes,
    )  # fmt: skip


def delays(law: str | DelayLaw, num_workers: int, seed: int, stream: Stream) -> Delays:
    """Return the delays a simulation has, from their beginning."""
    spec = DELAYS.parse(law) if isinstance(law, str) else law
    return Delays(spec, num_workers, seed=seed, stream=stream)


def columns(run: Simulation) -> dict[str, NDArray[Any]]:
    """Return the columns of the ledger."""
    return run.sequencer.ledger.columns()


def params(run: Simulation) -> Tensor:
    """Return a copy of the parameters now."""
    return run.shard.snapshots.params.clone()


@dataclass
class Learning:
    """Simulated runs of a real task, which differ in what a test is about."""

    task: Task
    num_workers: int = 4
    batch_size: int = 8
    seed: int = 0
    updates: int = 60
    lr: float = 0.05
    data: Data = field(init=False)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.data = build_data(self.task)
        self.layout = Layout.of(build_model(self.task, self.seed))

    def samples(self) -> Samples:
        return Samples(
            self.task, self.data.train, self.batch_size, self.num_workers, seed=self.seed
        )

    def gradients(
        self, batched: bool, clip: Clip | None = None, samples: Samples | None = None
    ) -> Gradients:
        make = Batched if batched else OneByOne
        model = build_model(self.task, self.seed)
        return make(self.task, model, self.layout, samples or self.samples(), clip=clip)

    def start(self) -> Tensor:
        return self.layout.flatten(build_model(self.task, self.seed))

    def simulation(self, gradients: Gradients, **options: Any) -> Simulation:
        """Make a simulation; ``options`` are those of `simulation`."""
        settings = {
            "updates": self.updates,
            "optimizer": SGD(lr=self.lr),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "start": self.start(),
            **options,
        }
        return simulation(self.num_workers, gradients=gradients, **settings)
