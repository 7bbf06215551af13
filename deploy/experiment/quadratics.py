"""Simulations of a quadratic with no network and no data: the real sequencer, rules and shard.

Coordinates are quadratics of their own that share a run: the same delays, so the same staleness.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_sgd.delays import DelayLaw
from async_sgd.jobs import Job
from async_sgd.simulation import Buffers, Simulation, Times
from async_sgd.streams import Delays, Stream
from paramserver.optimizers import SGD
from paramserver.optimizers.base import Optimizer
from paramserver.progress import Budget
from paramserver.rules import RuleSpec
from paramserver.sequencer import Sequencer
from paramserver.shard import Shard
from workers.estimate import Estimated

Noise = Callable[[], Tensor]


class Still:
    """Gradients of 0, where only time matters; an `async_sgd.jobs.Gradients`."""

    def __init__(self) -> None:
        self._grad = torch.zeros(1, dtype=torch.float64)
        self._done = Estimated(0.0, 0.0)

    def begin(self, job: Job) -> None:
        """Do nothing."""

    def abandon(self, job: Job) -> None:
        """Do nothing."""

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return 0."""
        return self._grad, self._done


class Slopes:
    """Gradients ``curvature * w + noise``; an `async_sgd.jobs.Gradients` that keeps the path."""

    def __init__(self, curvature: Tensor, noise: Noise | None = None) -> None:
        """Take one curvature a coordinate, shape ``(n,)``, and noise of the same shape."""
        self._curvature, self._noise = curvature, noise
        self._done = Estimated(0.0, 0.0)
        self._path: list[Tensor] = []

    def begin(self, job: Job) -> None:
        """Keep what was read, if it is a version that nobody has read before."""
        if job.read_version == len(self._path):
            self._path.append(job.params.clone())

    def abandon(self, job: Job) -> None:
        """Do nothing."""

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        """Return the gradient at what ``job`` read."""
        grad = self._curvature * job.params
        return grad if self._noise is None else grad + self._noise(), self._done

    def path(self) -> NDArray[np.float64]:
        """Return what workers were shown at versions 0, 1, …; shape ``(versions, n)``."""
        return torch.stack(self._path).numpy()


def simulation(
    num_workers: int,
    delay: DelayLaw,
    rule: RuleSpec,
    *,
    seed: int,
    gradients: Still | Slopes,
    updates: int | None = None,
    optimizer: Optimizer | None = None,
    size: int = 1,
    service: DelayLaw | None = None,
) -> Simulation:
    """Describe a run of ``num_workers`` from w = 1 in ``size`` coordinates, float64.

    Args:
        num_workers: All take part from the start to the end.
        delay: Virtual seconds of a gradient.
        rule: Which pushes are applied, and who waits.
        seed: Of the delays.
        gradients: What workers compute.
        updates: After which the run ends; None: it ends when the caller wants.
        optimizer: Applied to every update; None steps by 0.01 times the gradient.
        size: Coordinates.
        service: Virtual seconds of the server for a push; None is none.
    """
    start = torch.ones(size, dtype=torch.float64)
    buffers = Buffers(num_workers + 2, size, start.dtype)
    sequencer = Sequencer(
        rule.build(num_workers), budget=Budget(updates=updates), expected=num_workers
    )
    compute = Delays(delay, num_workers, seed=seed, stream=Stream.COMPUTE)
    serving = (
        None if service is None else Delays(service, num_workers, seed=seed, stream=Stream.SERVICE)
    )
    return Simulation(
        sequencer,
        Shard(start, optimizer or SGD(lr=0.01), buffers),
        buffers,
        gradients,
        1,
        Times(compute=compute, service=serving),
        num_workers=num_workers,
    )
