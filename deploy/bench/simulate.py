"""The simulator: updates a second with many workers, what batching gains, and memory.

Each figure is of whole runs, from the task to the written record. The yardstick is a loop that does
what every script of this kind does and nothing else: a heap of arrivals, a gradient from torch, a
step, a copy for the worker. It keeps no record, knows no rule, and checks nothing.
"""

from __future__ import annotations

import heapq
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from async_sgd.delays import Exponential
from async_sgd.simulator import Simulator
from deploy.bench import figures
from deploy.bench.figures import OURS
from paramserver.layout import Layout
from paramserver.optimizers import SGD
from workers.batches import Batches
from workers.config import RunConfig
from workers.gradients import BoundModel
from workers.task import Data, Task, TensorExamples, build_data, build_model
from workers.tasks import task

BATCHED, ONE_BY_ONE, LOOP = f"{OURS}, batched", f"{OURS}, one by one", "a bare loop"

_ROUNDS = 3

Contender = Callable[[Task, int, int, int], None]
"""Makes a run of a task with so many workers, updates, and samples a batch."""


def run(report: figures.Report, *, quick: bool) -> None:
    """Measure every case and print a table each."""
    scale = 100 if quick else 1
    torch.set_num_threads(1)
    quadratic = task("quadratic:dim=10,num_points=32000")
    _compare(report, "10-parameter quadratic", quadratic, 1000, 50_000 // scale, 1)
    digits = task("digits:hidden=32")
    _compare(report, "digits 64-32-10, batch 16", digits, 256, 10_000 // scale, 16)
    large = task("quadratic:dim=1700,num_points=6000")
    _compare(report, "1,700-parameter quadratic", large, 6000, 100_000 // scale, 1, (BATCHED,))
    _memory(report, quick=quick)


def _compare(
    report: figures.Report,
    what: str,
    task: Task,
    num_workers: int,
    updates: int,
    batch_size: int,
    names: tuple[str, ...] = (BATCHED, ONE_BY_ONE, LOOP),
) -> None:
    contenders: dict[str, Contender] = {
        BATCHED: lambda *run: _ours(*run, batched=True),
        ONE_BY_ONE: lambda *run: _ours(*run, batched=False),
        LOOP: _loop,
    }
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_ROUNDS if len(names) > 1 else 1):
        for name in names:
            start = time.perf_counter()
            contenders[name](task, num_workers, updates, batch_size)
            rounds[name].append(updates / (time.perf_counter() - start))
    report.show(f"{what}, {num_workers:,} workers", "updates/s", rounds, [LOOP, ONE_BY_ONE])


def _ours(task: Task, num_workers: int, updates: int, batch_size: int, *, batched: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            workers=num_workers,
            updates=updates,
            batch_size=batch_size,
            evaluate_every_s=0,
            out=Path(folder) / "run",
        )
        optimizer = SGD(lr=0.1 / num_workers)
        Simulator(task, optimizer, config, delay=Exponential(), batched=batched).fit()


def _loop(task: Task, num_workers: int, updates: int, batch_size: int) -> None:
    model = build_model(task, 0)
    layout = Layout.of(model)
    bound = BoundModel(model, layout, (range(layout.numel),))
    grad = torch.zeros(layout.numel)
    bound.write_gradients_to([grad])
    params, examples = layout.flatten(model), build_data(task).train
    clocks = [0] * num_workers
    batches = [
        Batches(len(examples), batch_size, seed=0, worker=w, num_workers=num_workers)
        for w in range(num_workers)
    ]
    copies = [params.clone() for _ in range(num_workers)]
    random = np.random.default_rng(0)
    arrivals = [(random.exponential(), worker) for worker in range(num_workers)]
    heapq.heapify(arrivals)
    for _ in range(updates):
        now, worker = arrivals[0]
        bound.read([copies[worker]])
        bound.backward(task.loss(model, examples.batch(batches[worker].indices(clocks[worker]))))
        params.add_(grad, alpha=-0.1 / num_workers)
        copies[worker].copy_(params)
        clocks[worker] += 1
        heapq.heapreplace(arrivals, (now + random.exponential(), worker))


def _memory(report: figures.Report, *, quick: bool) -> None:
    """Say how much memory thousands of workers take that all read another version."""
    num_workers, updates = (100, 100) if quick else (10_000, 20_000)
    net = replace(task("digits:hidden=2130"), data=partial(_noise, 2 * num_workers))
    numel = Layout.of(build_model(net, 0)).numel
    before = _resident_bytes()
    start = time.perf_counter()
    _ours(net, num_workers, updates, 16, batched=False)
    seconds, grown = time.perf_counter() - start, _peak_bytes() - before
    live = min(num_workers, updates) * numel * 4
    report.show(
        f"{numel:,} parameters, {num_workers:,} workers",
        "updates/s",
        {ONE_BY_ONE: [updates / seconds]},
    )
    report.note(
        f"memory grew by {grown / 2**30:.2f} GiB; {min(num_workers, updates):,} versions alive at "
        f"once are {live / 2**30:.2f} GiB"
    )


def _noise(num_samples: int) -> Data:
    """Return as many samples of the digits' shape; what is in them does not matter."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(num_samples, 64, generator=generator)
    samples = TensorExamples(pixels, torch.randint(10, (num_samples,), generator=generator))
    return Data(train=samples, test=samples)


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
