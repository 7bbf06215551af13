"""Groups of parameters and frozen parts in step: each rank has a slice of every group it meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.averaging import AllIterates
from paramserver.checkpoint import gather_state, scatter_state
from paramserver.clipping import ClipNorm
from paramserver.layout import Layout
from paramserver.optimizers import DANA, LBFGS, Adam, Optimizer
from sync.collective import Collective
from sync.desk import Desk, Part
from sync.rounds import RoundTrainee
from sync.trainer import SyncTrainer
from sync.worker import Finished, Plan, Trainee
from tests.support import two_modules
from tests.support.ranks import group, results
from tests.support.two_modules import (
    BATCH,
    FROZEN,
    GROUPS,
    SEED,
    TASK,
    UPDATES,
    by_torch,
    grouped_task,
    named,
)
from workers.config import RunConfig
from workers.oracles import Oracle
from workers.task import Task, build_data, build_model, evaluate


def trained(
    task: Task,
    optimizer: Optimizer,
    world: int,
    *,
    updates: int = UPDATES,
    parts: list[Part] | None = None,
    **fields: Any,
) -> list[Part]:
    """Train on ``world`` ranks, from the start or from ``parts``; return what each rank has."""
    layout = Layout.of(build_model(task, SEED), task.groups)
    start = layout.flatten(build_model(task, SEED))
    plan = Plan(
        layout=layout,
        optimizer=optimizer,
        groups=task.groups,
        seed=SEED,
        batch_size=BATCH,
        updates=updates,
        **fields,
    )
    models = [build_model(task, SEED) for _ in range(world)]  # threads share torch's generator

    def body(collective: Collective) -> Finished:
        model = models[collective.rank]
        one = Trainee(task, model, build_data(task).train, collective, plan)
        if parts is None:
            one.load(start)
        else:
            state = gather_state([(part.cut, part.rule) for part in parts])
            whole = torch.cat([part.params for part in parts])
            rule = scatter_state(state, collective.cut)
            one.load(whole, parts[0].position, rule, parts[0].scheduler)
        return one.train(Desk())

    return [one.part for one in results(group("shared_memory", layout, world, body))]


def by_name(task: Task, parts: list[Part]) -> dict[str, Tensor]:
    model = build_model(task, SEED)
    Layout.of(model, task.groups).load(model, torch.cat([part.params for part in parts]))
    return named(model)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", two_modules.OPTIMIZERS)
def test_one_rank_has_the_bits_of_torch_with_parameter_groups(name: str, is_frozen: bool) -> None:
    torchs = two_modules.OPTIMIZERS[name]
    task = grouped_task(*GROUPS, *([FROZEN] if is_frozen else []))

    ours = by_name(task, trained(task, torchs.ours, 1))

    theirs = named(by_torch(torchs, is_frozen=is_frozen))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("optimizer", [Adam(lr=0.01), DANA(lr=0.01)], ids=str)
def test_what_three_ranks_saved_goes_on_as_if_never_stopped(optimizer: Optimizer) -> None:
    task = grouped_task(*GROUPS, FROZEN)
    options: dict[str, Any] = {
        "average": AllIterates(),
        "clip_reduced": ClipNorm(max_norm=0.5),
    }
    straight = trained(task, optimizer, 3, **options)

    saved = trained(task, optimizer, 3, updates=11, **options)
    went_on = trained(task, optimizer, 3, parts=saved, **options)

    for one, other in zip(straight, went_on, strict=True):
        assert torch.equal(one.params, other.params)
    assert gather_state([(p.cut, p.rule) for p in straight]).groups == (
        gather_state([(p.cut, p.rule) for p in went_on]).groups
    )


def test_what_three_ranks_saved_can_be_cut_for_five() -> None:
    task = grouped_task(*GROUPS)
    saved = trained(task, Adam(lr=0.01), 3, updates=11)

    nothing_more = trained(task, Adam(lr=0.01), 5, updates=11, parts=saved)

    before, after = (gather_state([(p.cut, p.rule) for p in ps]) for ps in (saved, nothing_more))
    assert after.groups == before.groups
    assert after.scalars == before.scalars
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)


def test_a_round_program_takes_frozen_parts() -> None:
    task = grouped_task(FROZEN)
    layout = Layout.of(build_model(task, SEED), task.groups)
    start = layout.flatten(build_model(task, SEED))
    plan = Plan(layout=layout, optimizer=LBFGS(), seed=SEED, batch_size=BATCH, updates=5)
    models = [build_model(task, SEED) for _ in range(2)]
    examples = build_data(task).train

    def body(collective: Collective) -> Finished:
        oracle = Oracle(task, models[collective.rank], layout, examples, SEED)
        one = RoundTrainee(oracle, len(examples), collective, plan)
        one.load(start)
        return one.train(Desk())

    parts = [one.part for one in results(group("shared_memory", layout, 2, body))]

    model = build_model(task, SEED)
    before = evaluate(task, model, examples)["loss"]
    layout.load(model, torch.cat([part.params for part in parts]))
    assert evaluate(task, model, examples)["loss"] < before / 2
    assert "middle.weight" not in [slot.name for slot in layout.slots]


def test_a_round_program_refuses_rates_of_groups() -> None:
    with pytest.raises(ValueError, match=r"^lbfgs takes one step along all .* encoder has its own"):
        SyncTrainer(TASK, LBFGS(), RunConfig(group=GROUPS))
