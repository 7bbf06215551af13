"""Synchronous peers on gloo: `DistributedDataParallel`, and all-reduce followed by the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deploy.bench.processes import STARTUP_S, Processes, ask, free_port, timed
from deploy.bench.work import Trainee, momentum_sgd, synthetic_gradient
from workers.task import Task


class Rank:
    """One process of a gloo group."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        torch.set_num_threads(1)
        self._rank, self._world, self._port = rank, world, port

    def join(self) -> None:
        """Join the group; returns when all have."""
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{self._port}",
            rank=self._rank,
            world_size=self._world,
            timeout=timedelta(seconds=STARTUP_S),
        )

    def begin(self, numel: int) -> None:
        """Make the vectors for `measure`."""
        self._gradient = synthetic_gradient((numel,))
        self._params = nn.Parameter(torch.zeros(numel))
        self._params.grad = self._gradient.clone()
        self._optimizer = momentum_sgd([self._params])

    def measure(self, repeats: int) -> list[float]:
        """Return the milliseconds of each all-reduce, mean and step of the gradient."""
        gradient = self._params.grad
        assert gradient is not None

        def step() -> None:
            # The mean over equal gradients is the gradient, so it may be reduced again and again.
            dist.all_reduce(gradient)
            gradient.div_(self._world)
            self._optimizer.step()

        return timed(step, repeats)

    def train(self, task: Task, warm_s: float, measure_s: float) -> float:
        """Train with DDP and return steps a second, after a warm-up."""
        trainee = Trainee(task, self._rank, self._world)
        model = DistributedDataParallel(trainee.model)
        optimizer = momentum_sgd(list(model.parameters()))

        def step() -> None:
            optimizer.zero_grad()
            trainee.backward(model)
            optimizer.step()

        first = self._time(step, 3)
        warm = self._time(step, self._agreed(max(3, int(warm_s / first))))
        num_steps = self._agreed(max(3, int(measure_s / warm)))
        return 1 / self._time(step, num_steps)

    def _time(self, step: Callable[[], None], repeats: int) -> float:
        """Return the mean seconds of a step."""
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats

    def _agreed(self, number: int) -> int:
        """Return rank 0's number at every rank."""
        tensor = torch.tensor(number)
        dist.broadcast(tensor, 0)
        return int(tensor)


def start(processes: Processes, world: int) -> list[Any]:
    """Start and join ``world`` processes."""
    port = free_port()
    ranks = [processes.start(Rank, rank, world, port) for rank in range(world)]
    ask([r.join.remote() for r in ranks])
    return ranks


def train_rate(task: Task, num_workers: int, *, warm_s: float, measure_s: float) -> float:
    """Return gradients a second of `DistributedDataParallel`: steps times workers."""
    with Processes() as processes:
        ranks = start(processes, num_workers)
        rates = ask(
            [r.train.remote(task, warm_s, measure_s) for r in ranks],
            STARTUP_S + 5 * (warm_s + measure_s),
        )
        return float(rates[0]) * num_workers
