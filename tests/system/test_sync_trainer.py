"""Real ranks: a run trains, survives lost ranks, says what broke, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.checkpoint import load_checkpoint
from paramserver.errors import CheckpointError, RunFailedError
from paramserver.optimizers import SGD, Adam, Momentum
from sync.trainer import SyncTrainer
from tests.support.processes import kill_and_wait, titled
from workers.config import RunConfig
from workers.task import Data, Task, TensorExamples
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]

Look = Callable[[Mapping[str, Any]], None]


def linear_task(loss: Callable[..., Tensor]) -> Task:
    data = Data(TensorExamples(torch.rand(64, 4)), TensorExamples(torch.rand(8, 4)))
    return Task(
        name="linear", model=lambda: nn.Linear(4, 1), data=lambda: data, loss=loss, headline="loss"
    )


def once_at(updates: int, act: Callable[[list[int]], None]) -> tuple[Look, list[int]]:
    """Return a look that calls ``act`` with the ranks' processes once, and a list it then fills."""
    acted: list[int] = []

    def look(status: Mapping[str, Any]) -> None:
        if not acted and status["updates"] > updates:
            acted.extend(titled("ray::Rank"))
            act(acted)

    return look, acted


def momentum_run(out: Path, **config: Any) -> Callable[..., SyncTrainer]:
    def make(**trainer: Any) -> SyncTrainer:
        values = {"workers": 2, "updates": 1500, "evaluate_every_s": 0, "out": out, **config}
        return SyncTrainer(task("digits"), Momentum(lr=0.01), RunConfig(**values), **trainer)

    return make


def test_digits_reach_97_percent(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []
    config = RunConfig(workers=2, epochs=25, evaluate_every_s=0.2, out=tmp_path / "run")

    result = SyncTrainer(task("digits"), Adam(lr=3e-3), config, progress=seen.append).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.best["accuracy"] >= 0.97
    assert (record["mode"], record["collective"]) == ("sync", "shared_memory")
    assert record["gradients"] == 2 * record["updates"]
    assert record["samples"] >= 25 * 1437
    assert record["failures"] == []
    assert any("test_accuracy" in status for status in seen)
    assert any("loss" in status for status in seen)


def test_a_target_ends_the_run(tmp_path: Path) -> None:
    config = RunConfig(workers=2, until="accuracy=0.9", evaluate_every_s=0.2, out=tmp_path / "run")

    result = SyncTrainer(task("digits"), Adam(lr=3e-3), config).fit()

    assert result.stopped_because == "accuracy=0.9 reached"
    assert result.best["accuracy"] >= 0.9


@pytest.mark.parametrize("collective", ["shared_memory", "gloo"])
def test_a_killed_rank_is_replaced_and_nothing_is_lost_for_good(
    tmp_path: Path, collective: str
) -> None:
    look, killed = once_at(300, lambda ranks: kill_and_wait(ranks[0]))
    run = momentum_run(tmp_path / "broken", checkpoint_every_s=0.2, wait_timeout_s=10)

    result = run(progress=look, collective=collective).fit()

    momentum_run(tmp_path / "whole")(collective=collective).fit()
    broken, whole = (load_checkpoint(tmp_path / n / "checkpoint") for n in ("broken", "whole"))
    (failure,) = result.record["failures"]
    assert killed
    assert failure["what"].startswith("rank ")
    assert result.record["updates"] == 1500
    assert torch.equal(broken.params, whole.params)


def test_a_silent_rank_is_replaced(tmp_path: Path) -> None:
    look, stopped = once_at(300, lambda ranks: os.kill(ranks[0], signal.SIGSTOP))
    run = momentum_run(tmp_path / "run", wait_timeout_s=1.0)

    result = run(progress=look).fit()

    assert len(result.record["failures"]) == 1
    assert result.record["updates"] == 1500
    os.kill(stopped[0], signal.SIGKILL)


def test_a_rank_that_is_lost_once_too_often_ends_the_run(tmp_path: Path) -> None:
    look, _ = once_at(100, lambda ranks: kill_and_wait(ranks[0]))
    run = momentum_run(tmp_path / "run", max_failures=0, checkpoint_every_s=0.2)

    with pytest.raises(RunFailedError, match="raise max_failures"):
        run(progress=look).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["stopped_because"].startswith("error: ")
    assert record["final"]
    assert titled("ray::Rank") == []


def test_a_lost_evaluator_is_replaced(tmp_path: Path) -> None:
    killed: list[int] = []

    def look(status: Mapping[str, Any]) -> None:
        if not killed and status["updates"] > 100:
            killed.extend(titled("ray::Evaluator"))
            kill_and_wait(killed[0])

    run = momentum_run(tmp_path / "run", evaluate_every_s=0.1)

    result = run(progress=look).fit()

    assert [failure["what"] for failure in result.record["failures"]] == ["the evaluator"]
    assert result.metrics["accuracy"] > 0.9


def test_an_interrupted_run_writes_its_record_and_goes_on_later(tmp_path: Path) -> None:
    def interrupt(status: Mapping[str, Any]) -> None:
        if status["updates"] > 100:
            raise KeyboardInterrupt

    result = momentum_run(tmp_path / "run")(progress=interrupt).fit()

    assert result.stopped_because == "interrupted"
    assert result.metrics["accuracy"] > 0
    resumed = momentum_run(None, resume=tmp_path / "run")().fit()  # type: ignore[arg-type]
    assert resumed.stopped_because == "1500 updates"
    momentum_run(tmp_path / "whole")().fit()
    both = [load_checkpoint(tmp_path / n / "checkpoint").params for n in ("run", "whole")]
    assert torch.equal(*both)


def test_a_failing_loss_ends_the_run_and_leaves_its_record(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        raise KeyError("no such column")

    with pytest.raises(RunFailedError, match="no such column"):
        SyncTrainer(
            linear_task(loss), SGD(lr=0.1), RunConfig(updates=5, out=tmp_path / "run")
        ).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "no such column" in record["stopped_because"]
    assert titled("ray::Rank") == []


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path) -> None:
    def exploding(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        factor = float("nan") if model.weight.sum() != 0 and model.training else 1.0
        return (model(batch[0]) * factor).mean()

    with pytest.raises(RunFailedError, match=r"worker \d at clock 1: the gradient of 'weight'"):
        SyncTrainer(
            linear_task(exploding), SGD(lr=0.1), RunConfig(updates=5, out=tmp_path / "run")
        ).fit()

    assert load_checkpoint(tmp_path / "run" / "checkpoint").version == 0


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    momentum_run(tmp_path / "run", updates=5)().fit()

    with pytest.raises(CheckpointError, match="was trained with"):
        SyncTrainer(task("digits"), Adam(), RunConfig(resume=tmp_path / "run")).fit()
