"""States that ranks carry from window to window, against the closed form on all their streams."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from paramserver.checkpoint import gather_state, scatter_state
from paramserver.layout import Layout
from paramserver.optimizers import LBFGS, SGD
from sync.collective import Collective
from sync.desk import Desk, Part
from sync.trainer import SyncTrainer
from sync.worker import Finished, Plan, Trainee
from tests.support.ranks import group, results
from tests.support.recurrences import recurrence_task, trained_by_hand
from workers.config import RunConfig
from workers.curriculum import Linear
from workers.task import Task, build_data, build_model

LR, WORLD = 0.05, 2


def train(task: Task, updates: int, parts: list[Part] | None = None) -> list[Finished]:
    """Train on two ranks, from the start or from what ``parts`` saved."""
    model = build_model(task, 0)
    layout = Layout.of(model)
    start = layout.flatten(model)
    plan = Plan(
        layout=layout, optimizer=SGD(lr=LR), seed=0, batch_size=task.batch_size, updates=updates
    )
    # Building a model seeds torch's generator, which the ranks' threads share.
    models = [build_model(task, 0) for _ in range(WORLD)]

    def body(collective: Collective) -> Finished:
        one = Trainee(task, models[collective.rank], build_data(task).train, collective, plan)
        if parts is None:
            one.load(start)
        else:
            state = gather_state([(part.cut, part.rule) for part in parts])
            one.load(
                torch.cat([part.params for part in parts]),
                parts[0].position,
                scatter_state(state, collective.cut),
                parts[0].scheduler,
            )
        return one.train(Desk())

    return results(group("shared_memory", layout, WORLD, body))


def by_hand(task: Task, updates: int, **options: Any) -> list[float]:
    return trained_by_hand(task, updates, lr=LR, num_streams=WORLD, **options)


@pytest.mark.parametrize("reset", ["never", "pull"])
def test_two_ranks_are_one_process_on_both_streams(reset: str) -> None:
    task = recurrence_task(4, num_steps=48, reset=reset)

    sums = [train(task, updates)[0].status.loss_sum for updates in range(1, 15)]

    assert sums == pytest.approx(list(accumulate(by_hand(task, 14))), rel=1e-9)


def test_a_state_is_one_version_old() -> None:
    found = train(recurrence_task(4, num_steps=48), 12)

    (states, _) = (one.states for one in found)
    assert states is not None
    assert states.histogram() == {1: 10}  # none is carried into the two that begin a stream


def test_states_that_are_initial_at_each_pull_are_never_stale() -> None:
    (one, _) = train(recurrence_task(4, num_steps=48, reset="pull"), 12)

    assert one.states is not None
    assert one.states.histogram() == {}


def test_a_resumed_run_begins_with_the_initial_state() -> None:
    task = recurrence_task(4, num_steps=80)
    parts = [one.part for one in train(task, 3)]

    resumed = train(task, 9, parts)

    expected = by_hand(task, 9, fresh_at={3})[3:]
    assert resumed[0].status.loss_sum == pytest.approx(sum(expected), rel=1e-9)
    assert sum(by_hand(task, 9)[3:]) != pytest.approx(sum(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": RunConfig(gradient="random")}, "task recurrence goes back through time"),
        ({"config": RunConfig(curriculum=Linear())}, "task recurrence reads windows that follow"),
        ({"optimizer": LBFGS()}, "lbfgs is a round program, answered on windows of task recurrenc"),
    ],
)
def test_what_a_state_cannot_be_carried_through_is_refused(
    options: dict[str, Any], message: str
) -> None:
    optimizer, config = options.get("optimizer", SGD()), options.get("config", RunConfig())

    with pytest.raises(ValueError, match=f"^{message}"):
        SyncTrainer(recurrence_task(4), optimizer, config)
