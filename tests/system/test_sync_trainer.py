"""Real ranks: a run trains, survives lost ranks, says what broke, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.averaged_state import averaged
from paramserver.averaging import AllIterates
from paramserver.checkpoint import load_checkpoint
from paramserver.errors import CheckpointError, RunFailedError, TaskError
from paramserver.optimizers import LBFGS, Adam, Momentum
from paramserver.record import Result
from paramserver.schedules import CosineOnce
from sync.trainer import SyncTrainer
from tests.support.gate import interrupt, once_at, slowed
from tests.support.kept import check_early_stopping
from tests.support.looked import check_that_the_net_was_looked_at, saturated
from tests.support.processes import kill_and_wait, titled
from tests.support.rates import RATED_UPDATES, RATES, at_its_rate
from workers.config import RunConfig
from workers.curriculum import Linear
from workers.stopping import Patience
from workers.task import Batch, Data, Task, TensorExamples, build_model, evaluate
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]

UPDATES = 2000

SLOW_FROM = 400
"""Gradients after which a rank is slow until the driver has looked."""


def mean_squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def small_task(loss: Callable[..., Tensor] | None = None) -> Task:
    """Return a task that is ready at once; ``loss`` replaces its own."""
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    examples = TensorExamples(inputs, inputs.sin().sum(1, keepdim=True))
    return Task(
        name="sines",
        model=lambda: nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1)),
        data=lambda: Data(examples, examples),
        loss=loss or mean_squared_error,
        headline="loss",
        batch_size=8,
    )


def run(out: Path, *, loss: Callable[..., Tensor] | None = None, **options: Any) -> Result:
    """Make a small run; ``options`` are the trainer's or the configuration's."""
    if (gate := options.pop("gate", None)) is not None:
        loss = slowed(mean_squared_error, gate, SLOW_FROM)
    trainers = {k: options.pop(k) for k in ("progress", "collective") if k in options}
    folder = {} if "resume" in options else {"out": out}
    values = {"workers": 2, "updates": UPDATES, "evaluate_every_s": 0, **folder, **options}
    return SyncTrainer(small_task(loss), Momentum(lr=0.01), RunConfig(**values), **trainers).fit()


def params(out: Path) -> Tensor:
    return load_checkpoint(out / "checkpoint").params


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(out)
    return out


def kill_a(title: str) -> None:
    kill_and_wait(titled(title)[0])


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: None) -> Iterator[None]:
    """Wait for all ranks and evaluators to end: Ray does not say when a killed process has."""
    yield
    deadline = time.monotonic() + 20
    while left := titled("ray::Rank") + titled("ray::Evaluator"):
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.1)


def run_digits(out: Path, digits: Task | None = None, **options: Any) -> Result:
    """Train digits with L-BFGS; ``options`` are the trainer's or the configuration's."""
    trainers = {k: options.pop(k) for k in ("progress", "collective") if k in options}
    folder = {} if "resume" in options else {"out": out}
    values = {"workers": 2, "updates": 30, "evaluate_every_s": 0, **folder, **options}
    return SyncTrainer(digits or task("digits"), LBFGS(), RunConfig(**values), **trainers).fit()


@pytest.mark.long
@pytest.mark.parametrize("collective", ["shared_memory", "gloo"])
def test_lbfgs_learns_digits_in_rounds(tmp_path: Path, collective: str) -> None:
    result = run_digits(tmp_path / "run", collective=collective, evaluate_every_s=0.2)

    record = result.record
    num_train = len(task("digits").data().train)
    assert result.stopped_because == "30 updates"
    assert result.metrics["accuracy"] >= 0.93
    assert (record["mode"], record["collective"]) == ("sync", collective)
    assert record["samples"] >= 30 * num_train
    assert record["samples"] % num_train == 0
    assert record["failures"] == []


@pytest.mark.long
def test_rounds_go_on_from_the_last_finished_one_whatever_happens(tmp_path: Path) -> None:
    def slowed_digits(gate: Path) -> Task:
        digits = task("digits")
        return replace(digits, loss=slowed(digits.loss, gate, calls=5, seconds=0.1))

    first, second = tmp_path / "first", tmp_path / "second"
    run_digits(tmp_path / "straight", updates=60)
    stopped = run_digits(
        tmp_path / "run", slowed_digits(first), updates=60, progress=once_at(3, None, interrupt)
    )
    went_on = run_digits(
        tmp_path / "run",
        slowed_digits(second),
        updates=60,
        resume=tmp_path / "run",
        progress=once_at(10, second, partial(kill_a, "ray::Rank")),
        checkpoint_every_s=0.2,
        wait_timeout_s=20,
    )

    assert stopped.stopped_because == "interrupted"
    assert len(went_on.record["failures"]) == 1
    assert torch.equal(params(tmp_path / "run"), params(tmp_path / "straight"))


@pytest.mark.long
def test_an_interrupted_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    average, gate = AllIterates(start=UPDATES - 500), tmp_path / "gate"
    run(tmp_path / "straight", average=average)

    interrupted = run(
        tmp_path / "run", gate=gate, progress=once_at(100, gate, interrupt), average=average
    )
    resumed = run(tmp_path / "run", resume=tmp_path / "run", average=average)

    assert interrupted.stopped_because == "interrupted"
    assert interrupted.metrics["loss"] > 0
    assert resumed.stopped_because == f"{UPDATES} updates"
    saved = load_checkpoint(tmp_path / "run" / "checkpoint")
    straight = load_checkpoint(tmp_path / "straight" / "checkpoint")
    assert torch.equal(saved.params, straight.params)
    numel = saved.layout.numel
    means = [averaged(c.params, c.state, average, [range(numel)]) for c in (saved, straight)]
    assert torch.equal(*means)
    model = build_model(small_task(), 0)
    saved.layout.load(model, means[0])
    loss = evaluate(small_task(), model, small_task().data().test)["loss"]
    assert resumed.metrics["loss"] == pytest.approx(loss, rel=1e-5)  # of the average
    with pytest.raises(CheckpointError, match="had an average"):
        run(tmp_path / "run", resume=tmp_path / "run")


def test_digits_reach_97_percent_and_that_ends_the_run(tmp_path: Path) -> None:
    config = RunConfig(
        workers=2,
        epochs=100,
        until="accuracy=0.97",
        evaluate_every_s=0.2,
        out=tmp_path / "run",
    )

    result = SyncTrainer(task("digits"), Adam(lr=3e-3), config).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.stopped_because == "accuracy=0.97 reached"
    assert result.best["accuracy"] >= 0.97
    assert (record["mode"], record["collective"]) == ("sync", "shared_memory")
    assert record["gradients"] == 2 * record["updates"]
    assert record["samples"] == 32 * record["gradients"]
    assert record["failures"] == []


@pytest.mark.long
def test_the_net_is_looked_at(tmp_path: Path) -> None:
    config = RunConfig(workers=2, updates=60, evaluate_every_s=0, out=tmp_path / "run")

    check_that_the_net_was_looked_at(SyncTrainer(saturated(), Momentum(lr=0.01), config).fit())


@pytest.mark.long
def test_early_stopping_keeps_the_best_version(tmp_path: Path) -> None:
    config = RunConfig(
        epochs=1e6, early_stopping=Patience(n=3), evaluate_every_s=0.2, out=tmp_path / "run"
    )

    def fit(config: RunConfig) -> Result:
        return SyncTrainer(task("digits"), Adam(lr=0.01), config).fit()

    check_early_stopping(fit, task("digits"), config)


@pytest.mark.long
def test_ranks_draw_what_the_version_lets_them(tmp_path: Path) -> None:
    paces = {"none": None, "all": Linear(start=1), "late": Linear(start=0.1, over=10**6)}
    for name, pacing in paces.items():
        run(tmp_path / name, updates=20, curriculum=pacing, evaluate_every_s=0)

    assert torch.equal(params(tmp_path / "all"), params(tmp_path / "none"))
    assert not torch.equal(params(tmp_path / "late"), params(tmp_path / "none"))


def test_progress_tells_of_training_and_of_tests(tmp_path: Path) -> None:
    told: set[str] = set()

    def listen(status: Mapping[str, Any]) -> None:
        told.update(status)
        if {"loss", "metrics"} <= told:
            raise KeyboardInterrupt  # else it goes on until the test's own deadline

    config = RunConfig(workers=2, epochs=1e6, evaluate_every_s=0.2, out=tmp_path / "run")

    result = SyncTrainer(task("digits"), Adam(lr=3e-3), config, progress=listen).fit()

    assert result.stopped_because == "interrupted"


@pytest.mark.parametrize(
    "collective", ["shared_memory", pytest.param("gloo", marks=pytest.mark.long)]
)
def test_a_killed_rank_is_replaced_and_changes_nothing(
    tmp_path: Path, collective: str, undisturbed: Path
) -> None:
    gate = tmp_path / "gate"

    result = run(
        tmp_path / "run",
        gate=gate,
        progress=once_at(300, gate, partial(kill_a, "ray::Rank")),
        collective=collective,
        checkpoint_every_s=0.2,
        wait_timeout_s=20,
    )

    (failure,) = result.record["failures"]
    assert failure["what"].startswith("rank ")
    assert result.record["updates"] == UPDATES
    assert result.record["collective"] == collective
    assert torch.allclose(params(tmp_path / "run"), params(undisturbed), rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_silent_rank_is_replaced(tmp_path: Path, undisturbed: Path) -> None:
    gate = tmp_path / "gate"

    def silence_one() -> None:
        os.kill(titled("ray::Rank")[0], signal.SIGSTOP)

    result = run(
        tmp_path / "run", gate=gate, progress=once_at(300, gate, silence_one), wait_timeout_s=2.0
    )

    assert len(result.record["failures"]) == 1
    assert torch.equal(params(tmp_path / "run"), params(undisturbed))


@pytest.mark.long
def test_a_rank_lost_once_too_often_ends_the_run(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    look = once_at(100, gate, partial(kill_a, "ray::Rank"))

    with pytest.raises(RunFailedError, match="raise max_failures"):
        run(tmp_path / "run", gate=gate, progress=look, max_failures=0, checkpoint_every_s=0.2)

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["stopped_because"].startswith("error: ")
    assert record["final"]


@pytest.mark.long
def test_a_lost_evaluator_is_replaced(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    look = once_at(100, gate, partial(kill_a, "ray::Evaluator"))

    result = run(tmp_path / "run", gate=gate, progress=look, evaluate_every_s=0.1)

    assert [failure["what"] for failure in result.record["failures"]] == ["the evaluator"]
    assert result.metrics["loss"] < 1.0


@pytest.mark.long
def test_a_failing_loss_ends_the_run_and_leaves_its_record(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        raise KeyError("no such column")

    with pytest.raises(RunFailedError, match="no such column"):
        run(tmp_path / "run", loss=loss)

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "no such column" in record["stopped_because"]


@pytest.mark.long
def test_data_that_only_ranks_fail_to_load_is_named(tmp_path: Path) -> None:
    driver = os.getpid()

    def data() -> Data:
        if os.getpid() != driver:
            raise OSError("the disk is not mounted here")
        return small_task().data()

    far = replace(small_task(), data=data)

    with pytest.raises(TaskError, match="the disk is not mounted here"):
        SyncTrainer(far, Adam(), RunConfig(updates=5, out=tmp_path / "run")).fit()


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", sorted(RATES))
def test_every_push_rule_approaches_the_optimum(tmp_path: Path, name: str, workers: int) -> None:
    optimizer = at_its_rate(name)
    config = RunConfig(
        workers=workers,
        updates=RATED_UPDATES,
        schedule=CosineOnce(updates=RATED_UPDATES),
        evaluate_every_s=0,
        out=tmp_path / "run",
    )

    result = SyncTrainer(task("quadratic:noise=0,dim=256"), optimizer, config).fit()

    assert result.metrics["distance"] < 1e-2


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_its_state(tmp_path: Path) -> None:
    def exploding(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (model(batch[0]) * (float("nan") if model.training else 1.0)).mean()

    with pytest.raises(RunFailedError, match=r"worker 0 at clock 1: the gradient of '0.weight'"):
        run(tmp_path / "run", loss=exploding)

    assert load_checkpoint(tmp_path / "run" / "checkpoint").version == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["final"]["loss"] != 0


def test_a_checkpoint_of_another_optimizer_is_refused(undisturbed: Path) -> None:
    with pytest.raises(CheckpointError, match="was trained with"):
        SyncTrainer(small_task(), Adam(), RunConfig(resume=undisturbed)).fit()
