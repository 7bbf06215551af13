"""Batches that follow the noise, in runs of real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from async_sgd.replay import Replay
from async_sgd.trainer import AsyncTrainer
from deploy.curves import curves
from paramserver.batch_sizes import CABS
from paramserver.checkpoint import load_checkpoint
from paramserver.optimizers import SGD
from paramserver.record import Result, read_record
from sync.trainer import SyncTrainer
from workers.config import RunConfig
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]

SPEC = CABS(least=4, most=128, decay=0.9)


def config(out: Path, updates: int, **keys: Any) -> RunConfig:
    where = {} if "resume" in keys else {"out": out}
    return RunConfig(updates=updates, adaptive_batch=SPEC, evaluate_every_s=0, **where, **keys)


def run(out: Path, updates: int, workers: int, **keys: Any) -> Result:
    where = config(out, updates, workers=workers, threads=1, **keys)
    return AsyncTrainer(task("digits"), SGD(lr=0.3), where, shards=2).fit()


@pytest.mark.long
def test_asynchronous_workers_draw_what_the_server_says(tmp_path: Path) -> None:
    run(tmp_path / "run", 120, workers=2)

    record = read_record(tmp_path / "run")
    drawn = {label: columns[key] for label, columns, key in curves(record)}["train batch size"]
    assert Replay(tmp_path / "run").run().distance == 0
    assert len(set(drawn.tolist())) > 5


@pytest.mark.long
def test_a_resumed_run_draws_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 60, workers=1)
    run(tmp_path / "parts", 25, workers=1)

    resumed = run(tmp_path / "parts", 60, workers=1, resume=tmp_path / "parts")

    saved = [load_checkpoint(tmp_path / name / "checkpoint") for name in ("parts", "whole")]
    assert torch.equal(saved[0].params, saved[1].params)
    assert resumed.record["samples"] == whole.record["samples"]


@pytest.mark.long
def test_synchronous_ranks_draw_alike(tmp_path: Path) -> None:
    where = config(tmp_path / "run", 120, workers=2)

    result = SyncTrainer(task("digits"), SGD(lr=0.3), where).fit()

    averages = load_checkpoint(tmp_path / "run" / "checkpoint").extra["averages"]
    assert result.metrics["accuracy"] > 0.85
    assert result.record["samples"] != 120 * 2 * 32
    assert averages["weight"] == pytest.approx(1 - 0.9**120)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line).get("batch_size", 4) >= 4 for line in lines)
