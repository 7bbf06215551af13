"""Where a worker's time goes in asynchronous training, while all workers run."""

from __future__ import annotations

import copy
import statistics
import time

from torch import nn

from deploy.bench.ours import start_shard
from deploy.bench.processes import STARTUP_S, Processes, ask
from deploy.bench.pushpull_peers import MemoryLimit
from deploy.bench.work import Trainee
from paramserver.client import Client, Ended, Reading
from paramserver.freed_memory import keep_freed_memory
from workers.actor import Servers
from workers.gradients import BoundModel
from workers.task import Task

FORWARD_BACKWARD = "forward and backward"
TO_SLOT = "copy to the slot and norm"
ANSWER = "push, wait for the answer"
BATCH = "batch"
SERVER = "server: fused step and a copy, alone"


class PartsWorker:
    """A worker's loop with a stopwatch; every step also runs without the slot, to compare."""

    def __init__(self, task: Task, worker: int, num_workers: int) -> None:
        keep_freed_memory()
        self._trainee = Trainee(task, worker, num_workers)
        self._worker = worker

    def train(self, servers: Servers, measure_s: float) -> dict[str, float]:
        """Return the median milliseconds of each part of a step."""
        model, plain = self._trainee.model, copy.deepcopy(self._trainee.model)
        bound = BoundModel(model, servers.layout, servers.cuts)
        parts: dict[str, list[float]] = {}
        with servers.connect(self._worker, 1) as client:
            bound.write_gradients_to(client.slots)
            reading: Reading | Ended = client.first_read()
            until = time.perf_counter() + measure_s
            while time.perf_counter() < until and isinstance(reading, Reading):
                reading = self._step(bound, plain, client, reading, parts)
        medians = {
            name: statistics.median(times[len(times) // 4 :]) for name, times in parts.items()
        }
        medians[TO_SLOT] -= medians[FORWARD_BACKWARD]
        return medians

    def _step(
        self,
        bound: BoundModel,
        plain: nn.Module,
        client: Client,
        reading: Reading,
        parts: dict[str, list[float]],
    ) -> Reading | Ended:
        since = time.perf_counter()

        def clock(part: str) -> None:
            nonlocal since
            now = time.perf_counter()
            parts.setdefault(part, []).append((now - since) * 1e3)
            since = now

        task = self._trainee.task
        bound.read(reading.params)
        batch = self._trainee.batch()
        clock(BATCH)
        task.loss(plain, batch).backward()
        plain.zero_grad()
        clock(FORWARD_BACKWARD)
        loss = task.loss(bound.model, batch)
        norm = bound.backward(loss)
        clock(TO_SLOT)  # forward and backward are taken off at the end
        answer = client.push(loss=loss.item(), norm=norm, samples=len(batch[0]))
        clock(ANSWER)
        return answer


def measure(task: Task, num_workers: int, *, measure_s: float) -> dict[str, float]:
    """Return the milliseconds of each part of a worker's step, the mean over the workers."""
    with Processes() as processes:
        shard, servers = start_shard(processes, task, num_workers)
        workers = [processes.start(PartsWorker, task, w, num_workers) for w in range(num_workers)]
        answers = ask([w.train.remote(servers, measure_s) for w in workers], STARTUP_S + measure_s)
        ask([shard.close.remote()])
        limit = processes.start(MemoryLimit, servers.layout.numel)
        server = ask([limit.measure.remote(10)])[0]
    parts = {name: statistics.mean(a[name] for a in answers) for name in answers[0]}
    return {**parts, SERVER: statistics.median(server)}
