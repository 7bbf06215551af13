"""States that are carried from window to window, in the real loop, the simulator and a replay."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from async_sgd.delays import Constant, Exponential
from async_sgd.replay import Replay
from async_sgd.rules import RULES, Asynchronous
from async_sgd.setup import Setup
from async_sgd.simulation import Change
from async_sgd.simulator import Simulator
from paramserver.clipping import ClipNorm
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.optimizers import LBFGS, SGD
from paramserver.progress import Budget
from paramserver.record import Result
from tests.support.clusters import MemoryCluster
from tests.support.recurrences import half_squares, recurrence_task, trained_by_hand
from workers.config import RunConfig
from workers.curriculum import Linear
from workers.local import LOCALS
from workers.loop import train
from workers.recurrent import State
from workers.stopping import Patience
from workers.task import Batch, Task, batches_of, build_data, build_model
from workers.tasks import task as find_task
from workers.windows import Series, Windows

LR = 0.05


class Alone:
    """One worker's real loop over a server in this process, whose losses are looked at."""

    def __init__(self, task: Task, updates: int) -> None:
        self.task = task
        model = build_model(task, 0)
        self.layout = Layout.of(model)
        self.cluster = MemoryCluster(
            self.layout.flatten(model), optimizer=SGD(lr=LR), budget=Budget(updates=updates),
            on_nan="drop",
        )  # fmt: skip

    def run(self, incarnation: int = 1, stop_at: int | None = None) -> None:
        def die(clock: int) -> None:
            if clock == stop_at:
                raise _KilledError

        with self.cluster.join(0, incarnation) as client:
            train(
                self.task, build_model(self.task, 0), self.layout, self.cluster.cuts, client,
                build_data(self.task).train, windows_of(self.task), seed=0, before_push=die,
            )  # fmt: skip

    @property
    def losses(self) -> list[float]:
        return self.cluster.column("loss")


class _KilledError(Exception):
    pass


def windows_of(task: Task) -> Windows:
    found = batches_of(
        task, build_data(task).train, task.batch_size, seed=0, worker=0, num_workers=1
    )
    assert isinstance(found, Windows)
    return found


def plain(task: Task, updates: int, **options: set[int]) -> list[float]:
    return trained_by_hand(task, updates, lr=LR, **options)


@pytest.mark.parametrize("reset", ["never", "pull"])
def test_one_worker_is_plain_truncated_backpropagation(reset: str) -> None:
    task = recurrence_task(4, num_steps=24, reset=reset)
    alone = Alone(task, updates=14)

    alone.run()

    assert alone.losses == pytest.approx(plain(task, 14), rel=1e-9)


def test_a_worker_that_takes_over_begins_with_the_initial_state() -> None:
    task = recurrence_task(4, num_steps=40)
    alone = Alone(task, updates=9)
    with pytest.raises(_KilledError):
        alone.run(stop_at=3)

    alone.run(incarnation=2)

    assert alone.losses == pytest.approx(plain(task, 9, fresh_at={3}), rel=1e-9)
    assert alone.losses != pytest.approx(plain(task, 9), rel=1e-9)


def test_a_gradient_that_is_not_finite_leaves_no_state() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, State]:
        calls.append(len(calls))
        mean, state = half_squares(model, batch, state)
        return (mean * math.nan if len(calls) == 3 else mean), state

    task = recurrence_task(4, num_steps=40)
    assert task.recurrent is not None
    alone = Alone(replace(task, recurrent=replace(task.recurrent, loss=loss)), updates=5)

    alone.run()

    found = alone.losses
    assert math.isnan(found.pop(2))
    assert found == pytest.approx(plain(task, 6, fresh_at={3}, lost={2}), rel=1e-9)


# ---------------------------------------------------------------- the simulator


def simulated(task: Task, out: Path, **options: Any) -> Result:
    names = {k: options.pop(k) for k in RunConfig.__dataclass_fields__ if k in options}
    config = {"workers": 1, "updates": 30, "evaluate_every_s": 0, "out": out, **names}
    delay = options.pop("delay", Constant())
    return Simulator(task, SGD(lr=LR), RunConfig(**config), delay=delay, **options).fit()


def test_a_simulated_worker_is_a_real_one_bit_for_bit(tmp_path: Path) -> None:
    task = recurrence_task(4, 6, num_steps=24)
    alone = Alone(task, updates=30)
    alone.run()

    simulated(task, tmp_path / "run")

    assert Ledger.load(tmp_path / "run" / "updates.npz").columns()["loss"].tolist() == alone.losses


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_a_state_of_workers_in_turn_is_as_stale_as_there_are_workers(
    num_workers: int, tmp_path: Path
) -> None:
    task = recurrence_task(4, num_steps=40 * num_workers)  # 10 windows a pass of each worker

    record = simulated(task, tmp_path / "run", workers=num_workers, updates=20 * num_workers).record

    # None is carried into the two windows that begin a pass of each worker. All read version 0
    # first, and are in turn from their second read on.
    rest = (20 - 2) * num_workers - (num_workers - 1)
    expected = {**dict.fromkeys(range(1, num_workers), 1), num_workers: rest}
    found = record["state_staleness"]["histogram"]
    assert {int(k): v for k, v in found.items()} == expected
    assert record["staleness"]["max"] == num_workers - 1


def test_states_are_counted_as_stale_as_their_reads_are_apart(tmp_path: Path) -> None:
    task, changes = (
        recurrence_task(4, num_steps=80),
        [Change(9.0, 1, "crash"), Change(15.0, 1, "join")],
    )

    record = simulated(
        task, tmp_path / "run", workers=3, updates=60, delay=Exponential(), changes=changes
    ).record

    counted: Counter[int] = Counter()
    last: dict[int, Any] = {}
    for row in Ledger.load(tmp_path / "run" / "updates.npz").rows(0):
        before = last.get(row["worker"])
        begins_stream = (row["clock"] - 1) % -(-(80 // 3) // 4) == 0
        if before is not None and before["incarnation"] == row["incarnation"] and not begins_stream:
            counted[int(row["read_version"] - before["read_version"])] += 1
        last[row["worker"]] = row
    found = record["state_staleness"]["histogram"]
    assert {int(k): v for k, v in found.items()} == dict(counted)
    assert len(counted) > 2


def test_states_that_are_initial_at_each_pull_are_never_stale(tmp_path: Path) -> None:
    task = recurrence_task(4, num_steps=80, reset="pull")

    record = simulated(task, tmp_path / "run", workers=3, delay=Exponential()).record

    assert record["state_staleness"]["max"] == 0


def test_a_task_without_states_has_no_figure_of_them(tmp_path: Path) -> None:
    assert "state_staleness" not in simulated(find_task("quadratic"), tmp_path / "run").record


def test_local_steps_carry_the_state_from_one_to_the_next(tmp_path: Path) -> None:
    """With lr=1 on the server, one worker's local SGD is SGD whose every third step is pushed."""
    never, pull = (recurrence_task(4, num_steps=48, reset=reset) for reset in ("never", "pull"))
    local = LOCALS.parse(f"sgd:steps=3,lr={LR}")

    def mean_losses(task: Task, out: Path) -> list[float]:
        config = RunConfig(workers=1, updates=8, evaluate_every_s=0, out=out)
        Simulator(task, SGD(lr=1.0), config, delay=Constant(), local=local).fit()
        return Ledger.load(out / "updates.npz").columns()["loss"].tolist()

    carried, anew = mean_losses(never, tmp_path / "never"), mean_losses(pull, tmp_path / "pull")

    def means(losses: list[float]) -> list[float]:
        return [sum(losses[i : i + 3]) / 3 for i in range(0, len(losses), 3)]

    assert carried == pytest.approx(means(plain(never, 24)), rel=1e-9)
    fresh = set(range(0, 24, 3))
    assert anew == pytest.approx(means(plain(never, 24, fresh_at=fresh)), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"clip": ClipNorm(max_norm=0.3)},
        {"rule": RULES.parse("bounded:limit=1")},
        {"local": LOCALS.parse("sgd:steps=3,lr=0.05")},
        {"changes": [Change(9.0, 1, "crash"), Change(15.0, 1, "join")]},
    ],
    ids=str,
)
def test_a_recurrent_run_replays_to_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    task = recurrence_task(4, 6, num_steps=120)
    simulated(task, tmp_path / "run", workers=3, delay=Exponential(), **options)

    replayed = Replay(tmp_path / "run", task=task).run()

    assert replayed.distance == 0


def test_early_stopping_holds_out_the_end_of_the_series(tmp_path: Path) -> None:
    task = recurrence_task(4, num_steps=84, a=0.3)

    result = simulated(
        task, tmp_path / "run", updates=400, evaluate_every_s=5, early_stopping=Patience(n=2)
    )

    data = build_data(RunConfig(early_stopping=Patience()).with_validation(task))
    assert data.validation is not None
    assert isinstance(data.train, Series)
    whole = build_data(task).train
    assert (len(data.train), len(data.validation)) == (19, 2)
    last = data.validation.batch(torch.tensor([1]))[0]
    assert torch.equal(last, whole.batch(torch.tensor([20]))[0])
    assert "validation_loss" in result.record["final"]


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": RULES.parse("ringmaster:limit=2,cancel=true")},
            "task recurrence carries a state from window to window, and a rule with cancel=true",
        ),
        ({"config": RunConfig(gradient="random")}, "task recurrence goes back through time"),
        ({"config": RunConfig(curriculum=Linear())}, "task recurrence reads windows that follow"),
        (
            {"optimizer": LBFGS(), "rule": RULES.parse("pieces")},
            "lbfgs is a round program, answered on windows of task recurrence in any order",
        ),
    ],
)
def test_what_a_state_cannot_be_carried_through_is_refused(
    options: dict[str, Any], message: str
) -> None:
    optimizer, config = options.pop("optimizer", SGD()), options.pop("config", RunConfig())
    options = {"rule": Asynchronous(), **options}

    with pytest.raises(ValueError, match=f"^{message}"):
        Setup(
            recurrence_task(4), optimizer, config, damping=None, compensation=None, local=None,
            shards=1, **options,
        )  # fmt: skip


def test_windows_given_up_half_way_need_states_that_are_initial_at_each_pull(
    tmp_path: Path,
) -> None:
    task = recurrence_task(4, num_steps=120, reset="pull")
    rule = RULES.parse("ringmaster:limit=1,cancel=true")

    simulated(task, tmp_path / "run", workers=3, delay=Exponential(), rule=rule)

    assert Replay(tmp_path / "run", task=task).run().distance == 0


def test_a_simulation_of_a_recurrent_task_is_not_batched() -> None:
    with pytest.raises(
        ValueError, match=r"^batched computes by torch\.func\.vmap, which cannot foll"
    ):
        Simulator(recurrence_task(4), SGD(), RunConfig(), batched=True)


def test_too_many_streams_for_the_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^3 workers with 3 streams each would have 2 of 24 steps"
    ):
        simulated(recurrence_task(4, num_steps=24), tmp_path / "run", workers=3, batch_size=3)
