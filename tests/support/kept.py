"""What early stopping must leave, in whichever mode a run was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from paramserver.checkpoint import load_checkpoint
from paramserver.record import Result
from workers.config import RunConfig
from workers.task import Task, build_data, build_model, evaluate

Fit = Callable[[RunConfig], Result]
"""Makes a run of a configuration."""


def check_early_stopping(fit: Fit, task: Task, config: RunConfig) -> None:
    """Stop early, end again at once when resumed, and go on without, to keep the last version."""
    stopped = fit(config)
    check_that_the_best_is_kept(stopped, task, config)
    updates = stopped.record["updates"]

    again = fit(replace(config, out=None, resume=stopped.path))

    assert again.stopped_because == stopped.stopped_because
    assert again.record["updates"] == updates
    assert (again.best, again.checkpoint) == (stopped.best, stopped.checkpoint)
    budget = {"epochs": None, "updates": updates + 5, "early_stopping": None}

    on = fit(replace(config, out=None, resume=stopped.path, **budget))

    assert (on.record["updates"], on.record["kept"]) == (updates + 5, "last")
    assert on.checkpoint == on.path / "checkpoint"
    assert on.metrics == on.record["final"]
    assert load_checkpoint(on.path / f"best-{stopped.best['version']}").version < updates


def check_that_the_best_is_kept(result: Result, task: Task, config: RunConfig) -> None:
    """Evaluate what was kept anew, and see that no logged evaluation was better."""
    assert result.checkpoint == result.path / "best"
    assert "no better for" in result.stopped_because
    kept = load_checkpoint(result.checkpoint)
    assert kept.version == result.best["version"] < result.record["updates"]
    task = config.with_validation(task)
    data, model = build_data(task), build_model(task, config.seed)
    kept.layout.load(model, kept.params)
    assert data.validation is not None
    loss = evaluate(task, model, data.validation)["loss"]
    assert result.metrics["validation_loss"] == pytest.approx(loss, rel=1e-5)
    lines = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    seen = [line["validation_loss"] for line in lines if line["kind"] == "test"]
    assert min(seen) == result.metrics["validation_loss"]
    assert len(seen) > 3
