"""Real processes: a run trains, survives a kill, resumes, says what broke, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from async_sgd.compensation import COMPENSATIONS, FASGD
from async_sgd.replay import Replay
from async_sgd.rules import BSP, RULES, SSP
from async_sgd.trainer import AsyncTrainer
from paramserver.averaging import AllIterates
from paramserver.checkpoint import load_checkpoint
from paramserver.errors import (
    CheckpointError,
    LayoutError,
    RecordError,
    RunFailedError,
    TaskError,
)
from paramserver.ledger import Ledger
from paramserver.measures import MEASURES
from paramserver.optimizers import OPTIMIZERS, SGD, Adam, Momentum, Optimizer
from paramserver.record import Result
from paramserver.recount import recount
from paramserver.schedules import CosineOnce
from tests.support.gate import Look, once_at, slowed
from tests.support.kept import check_early_stopping
from tests.support.looked import check_that_the_net_was_looked_at, saturated
from tests.support.processes import kill_and_wait, titled
from tests.support.rates import RATED_UPDATES, RATES, at_its_rate
from workers.config import RunConfig
from workers.curriculum import Linear
from workers.local import LOCALS
from workers.stopping import Patience
from workers.task import Data, Task, TensorExamples, build_model, evaluate
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]


def quadratic_run(
    out: Path | None, optimizer: Optimizer, **config: Any
) -> Callable[..., AsyncTrainer]:
    def make(**trainer: Any) -> AsyncTrainer:
        values = {"workers": 2, "updates": 300, "evaluate_every_s": 0, "out": out, **config}
        return AsyncTrainer(
            task("quadratic:noise=0,dim=256"), optimizer, RunConfig(**values), **trainer
        )

    return make


def test_digits_reach_97_percent(tmp_path: Path) -> None:
    trainer = AsyncTrainer(
        task("digits"), Adam(lr=3e-3), RunConfig(workers=2, epochs=25, out=tmp_path / "run")
    )

    result = trainer.fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.best["accuracy"] >= 0.97
    assert record["conservation"]["holds"]
    assert record["gradients"] == sum(int(n) for n in record["staleness"]["histogram"].values())
    assert result.checkpoint is not None


@pytest.mark.long
def test_the_net_is_looked_at(tmp_path: Path) -> None:
    config = RunConfig(workers=2, updates=60, evaluate_every_s=0, out=tmp_path / "run")

    check_that_the_net_was_looked_at(AsyncTrainer(saturated(), Adam(), config, shards=2).fit())


@pytest.mark.long
def test_early_stopping_keeps_the_best_version(tmp_path: Path) -> None:
    config = RunConfig(
        epochs=1e6, early_stopping=Patience(n=3), evaluate_every_s=0.2, out=tmp_path / "run"
    )

    def fit(config: RunConfig) -> Result:
        return AsyncTrainer(task("digits"), Adam(lr=0.01), config, shards=2).fit()

    check_early_stopping(fit, task("digits"), config)


@pytest.mark.parametrize(
    ("rule", "shards"),
    [
        pytest.param(None, 1, id="asp-1", marks=pytest.mark.long),
        pytest.param(None, 3, id="asp-3", marks=pytest.mark.long),
        pytest.param(SSP(bound=1), 1, id="ssp-1", marks=pytest.mark.long),
        pytest.param(SSP(bound=1), 3, id="ssp-3", marks=pytest.mark.long),
        pytest.param(BSP(), 1, id="bsp-1", marks=pytest.mark.long),
        pytest.param(BSP(), 3, id="bsp-3", marks=pytest.mark.long),
    ],
)
def test_a_quadratic_reaches_its_optimum(tmp_path: Path, shards: int, rule: Any) -> None:
    run = quadratic_run(tmp_path / "run", SGD(lr=0.3), updates=1500)

    result = run(shards=shards, rule=rule).fit()

    assert result.metrics["distance"] < 1e-4
    assert result.record["updates"] == 1500


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", sorted(RATES))
def test_every_rule_approaches_the_optimum(tmp_path: Path, name: str, shards: int) -> None:
    optimizer = at_its_rate(name)
    run = quadratic_run(
        tmp_path / "run",
        optimizer,
        updates=RATED_UPDATES,
        schedule=CosineOnce(updates=RATED_UPDATES),
    )

    result = run(shards=shards).fit()

    assert result.metrics["distance"] < 1e-2


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("dc-asgd", 0.3),
        ("dc-asgd-adaptive:strength=0.5", 0.1),
        ("gap-aware", 0.3),
        ("adag", 0.3),
        ("fasgd", 0.002),
    ],
)
def test_a_compensated_quadratic_reaches_its_optimum(tmp_path: Path, name: str, lr: float) -> None:
    compensation = COMPENSATIONS.parse(name)
    run = quadratic_run(tmp_path / "run", SGD(lr=lr), updates=3000)

    result = run(shards=3, compensation=compensation).fit()

    assert result.metrics["distance"] < 1e-2
    assert result.record["config"]["compensation"] == COMPENSATIONS.describe(compensation)


def test_a_killed_worker_is_replaced_and_every_push_is_applied_once(tmp_path: Path) -> None:
    digits, gate = task("digits"), tmp_path / "gate"

    def kill_one() -> None:
        kill_and_wait(titled("ray::Worker.run")[0])

    trainer = AsyncTrainer(
        replace(digits, loss=slowed(digits.loss, gate, calls=100)),
        Momentum(lr=0.01),
        RunConfig(workers=2, updates=3000, out=tmp_path / "run"),
        shards=2,
        progress=once_at(50, gate, kill_one),
    )
    result = trainer.fit()

    ledger = Ledger.load(tmp_path / "run" / "updates.npz")
    columns = ledger.columns()
    assert len(result.record["failures"]) == 1
    assert result.record["updates"] == 3000
    assert result.record["conservation"]["holds"]
    assert recount(columns) == []
    assert set(columns["incarnation"].tolist()) == {1, 2}


def test_a_model_in_bfloat16_is_trained(tmp_path: Path) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = Data(
        TensorExamples(x, x.sum(1, keepdim=True)), TensorExamples(x, x.sum(1, keepdim=True))
    )
    half = Task(
        name="half",
        model=lambda: nn.Linear(8, 1, dtype=torch.bfloat16),
        data=lambda: data,
        loss=lambda model, batch: (model(batch[0]) - batch[1]).float().square().mean(),
        headline="loss",
    )
    config = RunConfig(updates=200, out=tmp_path / "run")

    result = AsyncTrainer(half, Momentum(lr=0.01), config, shards=2).fit()

    assert result.metrics["loss"] < 0.1 < float(x.float().sum(1).square().mean())
    assert load_checkpoint(result.checkpoint).params.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "which", [pytest.param(0, id="first"), pytest.param(-1, id="last", marks=pytest.mark.long)]
)
def test_a_killed_shard_ends_the_run_by_name_and_it_goes_on_from_its_checkpoint(
    tmp_path: Path, which: int
) -> None:
    digits, gate = task("digits"), tmp_path / "gate"

    def kill_one() -> None:
        kill_and_wait(sorted(titled("ray::ShardServer"))[which])

    def trainer(updates: int, progress: Look | None = None, **more: Any) -> AsyncTrainer:
        return AsyncTrainer(
            replace(digits, loss=slowed(digits.loss, gate, calls=100)),
            Momentum(lr=0.01),
            RunConfig(workers=2, updates=updates, checkpoint_every_s=0.1, **more),
            shards=2,
            progress=progress,
        )

    with pytest.raises(RunFailedError, match=r"shard [01] was lost; go on from the last checkp"):
        trainer(10**6, once_at(50, gate, kill_one), out=tmp_path / "run").fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert re.fullmatch("error: shard [01] was lost; .*", record["stopped_because"])
    deadline = time.monotonic() + 10  # Ray does not say when a killed process has ended
    while (left := titled("ray::ShardServer") + titled("ray::Worker.run")) != []:
        assert time.monotonic() < deadline, left
    assert trainer(300, resume=tmp_path / "run").fit().record["updates"] == 300


@pytest.mark.long
def test_a_failing_loss_ends_the_run_and_leaves_its_record(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        raise KeyError("no such column")

    data = Data(TensorExamples(torch.rand(64, 4)), TensorExamples(torch.rand(8, 4)))
    broken = Task(
        name="broken", model=lambda: nn.Linear(4, 1), data=lambda: data, loss=loss, headline="loss"
    )

    with pytest.raises((RunFailedError, TaskError), match="no such column"):
        AsyncTrainer(broken, SGD(lr=0.1), RunConfig(updates=5, out=tmp_path / "run")).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "no such column" in record["stopped_because"]
    assert titled("ray::Worker.run") == []


@pytest.mark.long
def test_data_that_only_workers_fail_to_load_is_named(tmp_path: Path) -> None:
    driver = os.getpid()

    def data() -> Data:
        if os.getpid() != driver:
            raise OSError("the disk is not mounted here")
        return Data(TensorExamples(torch.rand(64, 4)), TensorExamples(torch.rand(8, 4)))

    far = replace(linear_task(exploding), data=data)

    with pytest.raises(TaskError, match="the disk is not mounted here"):
        AsyncTrainer(far, SGD(lr=0.1), RunConfig(updates=5, out=tmp_path / "run")).fit()


@pytest.mark.long
def test_a_lost_evaluator_is_replaced(tmp_path: Path) -> None:
    digits, gate = task("digits"), tmp_path / "gate"

    def kill_it() -> None:
        kill_and_wait(titled("ray::Evaluator")[0])

    result = AsyncTrainer(
        replace(digits, loss=slowed(digits.loss, gate, calls=50)),
        Momentum(lr=0.01),
        RunConfig(workers=2, updates=1000, evaluate_every_s=0.1, out=tmp_path / "run"),
        progress=once_at(50, gate, kill_it),
    ).fit()

    assert [failure["what"] for failure in result.record["failures"]] == ["the evaluator"]
    assert result.metrics["accuracy"] > 0.5


@pytest.mark.long
def test_a_target_that_no_metric_has_ends_the_run_and_leaves_its_record(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="until names 'recall'; task 'digits' has accuracy"):
        AsyncTrainer(
            task("digits"),
            SGD(lr=0.1),
            RunConfig(epochs=1e6, until="recall=0.9", evaluate_every_s=0.1, out=tmp_path / "run"),
        ).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["stopped_because"].startswith("error: until names")
    assert (tmp_path / "run" / "checkpoint" / "manifest.json").exists()


def exploding(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (model(batch[0]) * float("nan")).mean()


def linear_task(loss: Callable[..., torch.Tensor]) -> Task:
    data = Data(TensorExamples(torch.rand(64, 4)), TensorExamples(torch.rand(8, 4)))
    return Task(
        name="linear", model=lambda: nn.Linear(4, 1), data=lambda: data, loss=loss, headline="loss"
    )


@pytest.mark.long
def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path) -> None:
    trainer = AsyncTrainer(
        linear_task(exploding), SGD(lr=0.1), RunConfig(updates=5, out=tmp_path / "run")
    )

    with pytest.raises(RunFailedError, match=r"worker \d at clock 1: the gradient of 'weight'"):
        trainer.fit()

    columns = Ledger.load(tmp_path / "run" / "updates.npz").columns()
    assert np.all(columns["dropped"] > 0)


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    data = Data(TensorExamples(torch.rand(8, 2)), TensorExamples(torch.rand(8, 2)))
    frozen = Task(
        name="frozen",
        model=lambda: nn.Linear(2, 1).requires_grad_(False),
        data=lambda: data,
        loss=exploding,
        headline="loss",
    )

    with pytest.raises(LayoutError, match="no trainable parameter"):
        AsyncTrainer(frozen, SGD(lr=0.1), RunConfig(updates=1, out=tmp_path / "run")).fit()


@pytest.fixture(scope="module")
def finished(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with SGD."""
    out = tmp_path_factory.mktemp("finished") / "run"
    quadratic_run(out, SGD(lr=0.05), updates=5)().fit()
    return out


def test_a_folder_of_another_run_is_refused(finished: Path) -> None:
    with pytest.raises(RecordError, match="another run"):
        quadratic_run(finished, SGD(lr=0.05), updates=5)().fit()


def test_a_checkpoint_of_another_optimizer_is_refused(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="was trained with"):
        quadratic_run(None, Adam(), resume=finished)().fit()  # type: ignore[arg-type]


def test_more_workers_than_samples_are_refused(tmp_path: Path) -> None:
    few = linear_task(lambda model, batch: model(batch[0]).mean())

    with pytest.raises(ValueError, match="cannot share 64 samples"):
        AsyncTrainer(few, SGD(lr=0.1), RunConfig(workers=65, updates=1)).fit()


@pytest.mark.long
def test_one_worker_resumes_bit_for_bit_with_its_average_and_compensation(tmp_path: Path) -> None:
    average = AllIterates(start=150)

    def run(name: str, updates: int, **config: Any) -> Result:
        keys = {"workers": 1, "updates": updates, "evaluate_every_s": 0, "average": average}
        keys |= {} if "resume" in config else {"out": tmp_path / name}
        return AsyncTrainer(
            task("digits"),
            Adam(lr=1e-3),
            RunConfig(**keys, **config),
            compensation=FASGD(),
            shards=2,
        ).fit()

    whole = run("whole", 200)
    run("parts", 90)
    resumed = run("parts", 200, resume=tmp_path / "parts")

    saved = load_checkpoint(tmp_path / "parts" / "checkpoint")
    assert torch.equal(saved.params, load_checkpoint(tmp_path / "whole" / "checkpoint").params)
    assert resumed.metrics == whole.metrics
    model = build_model(task("digits"), 0)
    saved.layout.load(model, saved.params)
    last = evaluate(task("digits"), model, task("digits").data().test)
    assert resumed.metrics["loss"] != pytest.approx(last["loss"], rel=1e-3)  # it is the average's


def test_a_program_too_large_for_its_matrix_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    trainer = AsyncTrainer(
        task("digits"), OPTIMIZERS.parse("newton"), RunConfig(updates=1, out=tmp_path / "run")
    )

    with pytest.raises(LayoutError, match=r"^newton holds a .* and its limit is 2,000: use newton"):
        trainer.fit()

    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_curriculum_replays_bit_for_bit(tmp_path: Path) -> None:
    config = RunConfig(
        updates=150, curriculum=Linear(start=0.1, over=100), threads=1, out=tmp_path / "run"
    )

    AsyncTrainer(task("digits"), Adam(lr=0.01), config).fit()

    assert Replay(tmp_path / "run").run().distance == 0


@pytest.mark.long
def test_local_steps_of_real_workers_replay_and_resume_bit_for_bit(tmp_path: Path) -> None:
    def run(name: str, local: str, updates: int, workers: int, **config: Any) -> Result:
        keys = {} if "resume" in config else {"out": tmp_path / name}
        return AsyncTrainer(
            task("digits"),
            OPTIMIZERS.parse("nesterov:lr=0.7,momentum=0.5"),
            RunConfig(workers=workers, updates=updates, evaluate_every_s=0, **keys, **config),
            local=LOCALS.parse(local),
            measure=MEASURES,
            shards=2,
        ).fit()

    run("both", "adamw:steps=4,speeds=1/0.5", 60, workers=2)
    whole = run("whole", "sgd:steps=3,lr=0.1", 50, workers=1)
    run("parts", "sgd:steps=3,lr=0.1", 20, workers=1)

    resumed = run("parts", "sgd:steps=3,lr=0.1", 50, workers=1, resume=tmp_path / "parts")

    assert Replay(tmp_path / "both").run().distance == 0.0
    assert resumed.metrics == whole.metrics
    assert set(whole.record["measures"]) == set(MEASURES)
    ledger = Ledger.load(tmp_path / "both" / "updates.npz").columns()
    steps = {w: set(ledger["samples"][ledger["worker"] == w] // 32) for w in range(2)}
    assert steps == {0: {4}, 1: {2}}


@pytest.mark.long
@pytest.mark.parametrize(
    ("rule", "local"),
    [
        ("ringmaster:limit=1,cancel=true", None),
        ("k-of-n:k=2,cancel=true", None),
        ("ringleader", None),
        ("asp", "downpour:push=2,fetch=6,lr=0.05"),
    ],
)
def test_what_real_workers_do_is_replayed_bit_for_bit(
    tmp_path: Path, rule: str, local: str | None
) -> None:
    result = AsyncTrainer(
        task("digits"),
        OPTIMIZERS.parse("momentum:lr=0.02"),
        RunConfig(workers=3, updates=150, evaluate_every_s=0, out=tmp_path / "run"),
        rule=RULES.parse(rule),
        local=None if local is None else LOCALS.parse(local),
        measure=("cosine", "step"),
        shards=2,
    ).fit()

    assert Replay(tmp_path / "run").run().distance == 0.0
    assert result.record["conservation"]["holds"]
    assert ("cancelled" in result.record) == ("cancel" in rule)
    assert result.record.get("cancelled", 1) > 0
