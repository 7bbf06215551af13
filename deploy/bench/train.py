"""Gradients a second with two workers, steady state, beside one process and public peers.

Every contender starts anew in each round, warms up, and is measured for the same time: none of them
can be halted while others are measured. The data lies ready as tensors in every process.
"""

from __future__ import annotations

import statistics

from deploy.bench import ours, parts
from deploy.bench.figures import OURS, Report
from deploy.bench.processes import ray_for_bench
from deploy.bench.train_peers import ALONE, DDP, NUM_WORKERS, PEERS, YARDSTICK, Rate
from deploy.bench.work import has_mnist, tasks
from workers.task import Task

ASYNC, SYNC = f"{OURS}, async", f"{OURS}, sync"

AIMS = {"ConvNet": (1.6, 1.5), "MLP": (1.3, 2.0)}
"""For each net: asynchronous against one process, synchronous against DDP."""

ROUNDS, QUICK_ROUNDS = 5, 1
SECONDS, QUICK_SECONDS = (2.0, 5.0), (0.2, 0.6)
"""Of warming up and of measuring."""


def _async(task: Task, warm_s: float, measure_s: float) -> float:
    return ours.async_rate(task, NUM_WORKERS, warm_s=warm_s, measure_s=measure_s)


def _sync(task: Task, warm_s: float, measure_s: float) -> float:
    return ours.sync_rate(task, NUM_WORKERS, warm_s=warm_s, measure_s=measure_s)


def run(report: Report, *, peers: bool, quick: bool) -> None:
    """Measure both nets, print a table each, and the parts of a step where an aim is missed."""
    contenders: dict[str, Rate] = {ASYNC: _async, SYNC: _sync, **YARDSTICK}
    if peers:
        contenders |= PEERS
    mnist = has_mnist()
    report.note(
        f"training, {NUM_WORKERS} workers, one torch thread a process, momentum SGD, "
        + (
            "MNIST's first images"
            if mnist
            else "random images of MNIST's shape (set PARAMSERVER_DATA to train on MNIST)"
        )
    )
    warm_s, measure_s = QUICK_SECONDS if quick else SECONDS
    with ray_for_bench(quick=quick):
        for size, task in tasks(mnist=mnist, quick=quick).items():
            rounds: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(QUICK_ROUNDS if quick else ROUNDS):
                for name, rate in list(contenders.items()):
                    try:
                        rounds[name].append(rate(task, warm_s, measure_s))
                    except Exception as error:  # one that cannot run must not end the others
                        report.failed(name, error)
                        del contenders[name]
            report.show(size, "gradients/s", rounds, [ALONE, DDP])
            if misses := missed(size, rounds):
                report.note("; ".join(misses))
                show_parts(report, task, measure_s)


def missed(size: str, rounds: dict[str, list[float]]) -> list[str]:
    """Say which aims are missed; none where something did not run."""
    asynchronous, synchronous = AIMS[size.partition(",")[0].partition(" ")[0]]
    aims = ((ASYNC, ALONE, asynchronous), (SYNC, DDP, synchronous))
    found = []
    for mine, yardstick, aim in aims:
        if rounds.get(mine) and rounds.get(yardstick):
            ratio = statistics.median(rounds[mine]) / statistics.median(rounds[yardstick])
            if ratio < aim:
                found.append(f"{mine} is {ratio:.2f} times {yardstick}; the aim is {aim}")
    return found


def show_parts(report: Report, task: Task, measure_s: float) -> None:
    """Print where a step's time goes: what bounds the asynchronous rate."""
    try:
        found = parts.measure(task, NUM_WORKERS, measure_s=measure_s)
    except Exception as error:
        report.failed(f"{OURS}, parts", error)
        return
    report.note("parts of a worker's step, median ms, both workers running:")
    for part, ms in found.items():
        report.note(f"  {part:40} {ms:8.3f}")
