"""The peers of training: one process alone, Ray's documented pattern, torch RPC, and DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from deploy.bench.processes import STARTUP_S, Processes, ask
from deploy.bench.ray_pattern import (
    DocumentedDriver,
    DocumentedServer,
    DocumentedWorker,
    model_factory,
)
from deploy.bench.work import Meter, Trainee, momentum_sgd
from paramserver.freed_memory import keep_freed_memory
from workers.task import Task

Rate = Callable[[Task, float, float], float]
"""Trains for some seconds of warm-up and of measuring; returns gradients a second."""

NUM_WORKERS = 2
ALONE = "one process"
DDP = "DDP, gloo"


class Alone:
    """The usual loop of one process."""

    def __init__(self, task: Task, keeps_memory: bool) -> None:
        if keeps_memory:
            keep_freed_memory()
        self._trainee = Trainee(task)

    def train(self, warm_s: float, measure_s: float) -> float:
        """Return gradients a second."""
        meter = Meter(warm_s, measure_s)
        optimizer = momentum_sgd(list(self._trainee.model.parameters()))
        going = True
        while going:
            optimizer.zero_grad()
            self._trainee.backward()
            optimizer.step()
            going = meter.count()
        return meter.rate()


def _one_process(task: Task, warm_s: float, measure_s: float, *, keeps_memory: bool) -> float:
    with Processes() as processes:
        alone = processes.start(Alone, task, keeps_memory)
        return float(
            ask([alone.train.remote(warm_s, measure_s)], STARTUP_S + warm_s + measure_s)[0]
        )


def _documented(task: Task, warm_s: float, measure_s: float, *, synchronous: bool) -> float:
    with Processes() as processes:
        server = processes.start(DocumentedServer, model_factory(task))
        workers = [
            processes.start(DocumentedWorker, task, w, NUM_WORKERS) for w in range(NUM_WORKERS)
        ]
        driver = processes.start(DocumentedDriver, server, workers)
        run = driver.run_sync if synchronous else driver.run_async
        rate = run.remote(warm_s, measure_s)
        return float(ask([rate], STARTUP_S + warm_s + measure_s)[0])


def _rpc(task: Task, warm_s: float, measure_s: float, *, synchronous: bool) -> float:
    # Its import fails where torch was built without RPC: then only this contender does not run.
    from deploy.bench import rpc_pattern  # noqa: PLC0415

    return rpc_pattern.train_rate(
        task, NUM_WORKERS, synchronous=synchronous, warm_s=warm_s, measure_s=measure_s
    )


def _ddp(task: Task, warm_s: float, measure_s: float) -> float:
    from deploy.bench import gloo_pattern  # noqa: PLC0415  fails where torch has no gloo

    return gloo_pattern.train_rate(task, NUM_WORKERS, warm_s=warm_s, measure_s=measure_s)


YARDSTICK: dict[str, Rate] = {ALONE: partial(_one_process, keeps_memory=False)}

PEERS: dict[str, Rate] = {
    "one process, memory kept": partial(_one_process, keeps_memory=True),
    DDP: _ddp,
    "Ray's documented pattern, async": partial(_documented, synchronous=False),
    "Ray's documented pattern, sync": partial(_documented, synchronous=True),
    "torch RPC server, async": partial(_rpc, synchronous=False),
    "torch RPC server, sync": partial(_rpc, synchronous=True),
}
