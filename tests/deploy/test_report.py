from __future__ import annotations

import heapq
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.report import write_report
from paramserver.errors import RecordError
from paramserver.ledger import Conservation, Ledger
from paramserver.record import RunFolder, versions


def make_config(**changes: object) -> dict[str, object]:
    plain = {
        "task": "digits",
        "mode": "async",
        "optimizer": {"name": "adam", "lr": 0.001, "betas": (0.9, 0.999)},
        "rule": {"name": "ssp", "bound": 4},
        "workers": 4,
        "shards": 2,
        "batch_size": 32,
        "epochs": 3.0,
        "updates": None,
        "until": None,
        "seed": 0,
    }
    return {**plain, **changes}


def make_async(path: Path, *, workers: int = 4, updates: int = 400, seed: int = 0) -> RunFolder:
    """Write the record of a run in virtual time: exact staleness, made-up losses."""
    folder = RunFolder.create(path, "digits-async")
    config = make_config(workers=workers, seed=seed)
    folder.write_config(config)
    random = np.random.default_rng(seed)
    ledger, law = Ledger(), Conservation()
    read = dict.fromkeys(range(workers), (0, 0.0))
    done = [(random.gamma(4, 0.01), worker) for worker in range(workers)]
    heapq.heapify(done)
    for worker in range(workers):
        law.on_read(worker, 0)
    for version in range(1, updates + 1):
        now, worker = heapq.heappop(done)
        read_version, start = read[worker]
        law.on_arrival(worker, read_version, version - 1)
        law.on_bump(version)
        loss = 2.3 * math.exp(-version / 90) + 0.05 + 0.03 * random.random()
        ledger.append(
            version=version, worker=worker, incarnation=1, seq=version, clock=version,
            read_version=read_version, staleness=version - 1 - read_version, start=start, end=now,
            samples=32, loss=loss, grad_norm=loss,
        )  # fmt: skip
        law.on_read(worker, version)
        read[worker] = (version, now)
        slow = 1 + worker % 3 + 2 * (worker == 0 and now > 3)
        heapq.heappush(done, (now + random.gamma(4, 0.01) * slow, worker))
        at = {"gradients": version, "updates": version, "seconds": now}
        if version % 4 == 0:
            folder.log({"kind": "train", **at, "loss": loss, "updates_per_s": version / now})
        if version % 25 == 0:
            accuracy = 0.97 - 0.87 * math.exp(-version / 70) + 0.01 * random.random()
            test = {"loss": 1.1 * loss, "accuracy": accuracy}
            folder.log({"kind": "test", **at, "version": version, **test})
    ledger.save(folder.updates)
    per_worker = ledger.staleness.per_worker().items()
    folder.write_result(
        {
            "config": config,
            "versions": versions(),
            **{key: config[key] for key in ("mode", "optimizer", "task", "workers", "shards")},
            **at,
            "samples": 32 * updates,
            "updates_per_s": updates / now,
            "gradients_per_s": updates / now,
            "final": test,
            "best": {**test, "version": updates, "seconds": now},
            "staleness": {
                **ledger.staleness.summary(),
                "per_worker": {
                    w: {"pushes": f.pushes, "mean": f.mean, "max": f.max} for w, f in per_worker
                },
            },
            "dropped": {"nonfinite": 2},
            "failures": [{"what": "worker 1", "seconds": 1.2}],
            "invariants": [{"name": "clocks ahead of the slowest", "bound": 4, "worst": 4}],
            "conservation": law.report(),
            "waits": {
                f"worker {w} for worker {(w + 1) % workers}": {"count": 3 + w, "seconds": 0.4 / (w + 1)}
                for w in range(workers)
            },
            "stopped_because": f"{updates} updates",
        }
    )
    return folder


def make_sync(path: Path, *, updates: int = 120) -> RunFolder:
    """Write the record of a synchronous run: no ledger, no staleness, no waits."""
    folder = RunFolder.create(path, "digits-sync")
    config = make_config(mode="sync", workers=2, rule=None, shards=1)
    folder.write_config(config)
    for step in range(1, updates + 1):
        loss = 2.3 * math.exp(-step / 30) + 0.06
        at = {"gradients": 2 * step, "updates": step, "seconds": 0.05 * step}
        if step % 3 == 0:
            folder.log({"kind": "train", **at, "loss": loss})
        if step % 20 == 0:
            test = {"loss": 1.05 * loss, "accuracy": 0.96 - 0.8 * math.exp(-step / 25)}
            folder.log({"kind": "test", **at, **test})
    folder.write_result(
        {
            "config": config,
            "versions": versions(),
            **{key: config[key] for key in ("mode", "optimizer", "task", "workers")},
            **at,
            "updates_per_s": 20.0,
            "gradients_per_s": 40.0,
            "final": test,
            "best": {**test, "version": updates, "seconds": 6.0},
            "failures": [],
            "stopped_because": f"{updates} updates",
        }
    )
    return folder
