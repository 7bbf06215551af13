"""Our own contenders in training, through the actors and trainers that runs use."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_sgd.rules import Asynchronous
from deploy.bench.processes import STARTUP_S, Processes, ask
from deploy.bench.work import OPTIMIZER, SEED
from paramserver.actor import ShardActor
from paramserver.layout import Layout
from paramserver.packing import pack
from paramserver.sequencer import Sequencer
from paramserver.shard_config import ShardConfig
from workers.actor import Servers, WorkerActor
from workers.config import RunConfig
from workers.task import Task, build_model


def start_shard(processes: Processes, task: Task, num_workers: int) -> tuple[Any, Servers]:
    """Start one asynchronous shard with ``task``'s parameters; return it and how to reach it."""
    model = build_model(task, SEED)
    layout = Layout.of(model)
    address, token = f"bench-{secrets.token_hex(6)}", secrets.token_hex(8)
    config = ShardConfig(
        index=0,
        address=address,
        capacity=num_workers + 1,
        token=token,
        fingerprint=layout.fingerprint,
        optimizer=OPTIMIZER,
    )
    shard = processes.adopt(
        ShardActor.options(num_cpus=0).remote(config, pack(layout.flatten(model)), layout.dtype)
    )
    ask([shard.lead.remote(Sequencer(Asynchronous().build(num_workers)), [], 30.0)])
    servers = Servers(
        addresses=(address,),
        cuts=layout.cuts(1),
        layout=layout,
        token=token,
        timeout_s=30.0,
        wait_s=30.0,
    )
    return shard, servers


def async_rate(task: Task, num_workers: int, *, warm_s: float, measure_s: float) -> float:
    """Return gradients a second, by the leader's count and clock at two looks at a run."""
    with Processes() as processes:
        shard, servers = start_shard(processes, task, num_workers)
        workers = [
            processes.adopt(WorkerActor.options(num_cpus=0).remote(task, SEED, 1))
            for _ in range(num_workers)
        ]
        ask([w.ready.remote() for w in workers])
        runs = [
            worker.run.remote(servers, number, 1, num_workers, task.batch_size, None)
            for number, worker in enumerate(workers)
        ]
        _wait_for_gradients(shard, num_workers)
        time.sleep(warm_s)
        before = ask([shard.status.remote()])[0]
        time.sleep(measure_s)
        after = ask([shard.status.remote()])[0]
        if after["error"] is not None:
            raise after["error"]
        ask([shard.stop.remote("measured")])
        ask(runs)
        ask([shard.close.remote()])
        gradients = after["gradients"] - before["gradients"]
        return float(gradients / (after["seconds"] - before["seconds"]))


def _wait_for_gradients(shard: Any, number: int) -> None:
    """Wait until the workers have begun, so that the warm-up does."""
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        status: dict[str, Any] = ask([shard.status.remote()])[0]
        if status["gradients"] >= number or status["error"] is not None:
            return
        time.sleep(0.05)
    raise TimeoutError(f"no {number} gradients in {STARTUP_S:g} s")


def sync_rate(task: Task, num_workers: int, *, warm_s: float, measure_s: float) -> float:
    """Return gradients a second of a synchronous run: what its progress says after the warm-up."""
    from sync.trainer import SyncTrainer  # noqa: PLC0415  imports torch.distributed

    seen: list[tuple[float, int]] = []  # seconds and updates
    began = 0.0

    def look(status: Mapping[str, Any]) -> None:
        nonlocal began
        now = time.perf_counter()
        if status["updates"] > 0:
            began = began or now
            seen.append((now, int(status["updates"])))
            if now - began > warm_s + measure_s:
                raise KeyboardInterrupt  # ends a run in order, as Ctrl-C does

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            workers=num_workers,
            updates=10**9,
            threads=1,
            seed=SEED,
            evaluate_every_s=0,
            checkpoint_every_s=0,
            out=Path(folder) / "run",
        )
        SyncTrainer(task, OPTIMIZER, config, progress=look).fit()
    steady = [(now, updates) for now, updates in seen if now - seen[0][0] >= warm_s]
    if len(steady) < 2:
        raise TimeoutError("the synchronous run told too seldom where it stands; measure longer")
    (start, first), (end, last) = steady[0], steady[-1]
    return num_workers * (last - first) / (end - start)
