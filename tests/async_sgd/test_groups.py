"""Groups of parameters and frozen parts in simulated runs, with plain torch as the other side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DynSGD
from async_sgd.replay import Replay
from async_sgd.rules import RULES
from async_sgd.setup import Setup
from async_sgd.simulator import Simulator
from paramserver.averaging import AllIterates
from paramserver.checkpoint import load_checkpoint
from paramserver.clipping import ClipNorm
from paramserver.errors import LayoutError
from paramserver.groups import Group
from paramserver.optimizers import LBFGS, OPTIMIZERS, SGD, Adam, CoordinateDescent, Optimizer
from paramserver.record import read_record
from paramserver.schedules import Step
from tests.support import two_modules
from tests.support.two_modules import (
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
from workers.local import LOCALS
from workers.task import Task, build_model
from workers.tasks import task


def simulated(
    out: Path,
    what: Task,
    optimizer: Optimizer,
    *,
    options: dict[str, Any] | None = None,
    **run: Any,
) -> dict[str, Tensor]:
    """Simulate a run, and return the parameters of its model at the end."""
    config = {"workers": 1, "updates": UPDATES, "evaluate_every_s": 0, "seed": SEED, "out": out}
    result = Simulator(what, optimizer, RunConfig(**{**config, **run}), **(options or {})).fit()
    assert result.checkpoint is not None
    kept = load_checkpoint(result.checkpoint)
    model = build_model(what, SEED)
    kept.layout.load(model, kept.params)
    return named(model)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", two_modules.OPTIMIZERS)
def test_one_worker_has_the_bits_of_torch_with_parameter_groups(
    tmp_path: Path, name: str, is_frozen: bool
) -> None:
    torchs = two_modules.OPTIMIZERS[name]
    what = grouped_task(*GROUPS, *([FROZEN] if is_frozen else []))

    ours = simulated(tmp_path / "run", what, torchs.ours)

    theirs = named(by_torch(torchs, is_frozen=is_frozen))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = named(build_model(TASK, SEED))
    changed = {name for name in start if not torch.equal(start[name], ours[name])}
    unchanged = {"middle.weight", "middle.bias"} if is_frozen else set()
    assert changed == start.keys() - unchanged


def test_a_run_can_say_what_the_task_could(tmp_path: Path) -> None:
    by_task = simulated(tmp_path / "a", grouped_task(*GROUPS, FROZEN), SGD(lr=0.1))

    by_run = simulated(tmp_path / "b", TASK, SGD(lr=0.1), group=GROUPS, freeze=("middle",))

    assert all(torch.equal(by_task[name], by_run[name]) for name in by_task)


def test_gradients_computed_in_batches_are_of_the_same_groups(tmp_path: Path) -> None:
    what = grouped_task(*GROUPS, FROZEN)

    one = simulated(tmp_path / "a", what, SGD(lr=0.1), workers=4)
    many = simulated(tmp_path / "b", what, SGD(lr=0.1), workers=4, options={"batched": True})

    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": DynSGD()},
        {"compensation": COMPENSATIONS.parse("adag")},
        {"rule": RULES.parse("k-of-n:k=2")},
    ],
    ids=str,
)
def test_the_record_of_a_run_with_groups_replays_to_the_same_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = {
        "group": (Group(name="encoder", lr_factor=0.1, schedule=Step(every=7)),),
        "freeze": ("decoder",),
        "average": AllIterates(),
        "clip": ClipNorm(max_norm=1.0),
        "workers": 3,
    }
    simulated(
        tmp_path / "run",
        task("digits-autoencoder:hidden=8,code=4"),
        Adam(lr=0.01),
        options=options,
        **config,
    )

    assert Replay(tmp_path / "run").run().distance == 0


def test_frozen_parameters_are_not_sent(tmp_path: Path) -> None:
    simulated(tmp_path / "run", TASK, SGD(lr=0.1), freeze=("encoder", "middle"))

    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert [slot.name for slot in checkpoint.layout.slots] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("optimizer", [LBFGS(), CoordinateDescent()])
@pytest.mark.parametrize("rule", [None, "asp"])
def test_rounds_and_their_push_forms_take_frozen_parts_and_refuse_rates(
    optimizer: Any, rule: str | None
) -> None:
    def setup(**run: Any) -> Setup:
        return Setup(
            TASK,
            optimizer,
            RunConfig(**run),
            rule=None if rule is None else RULES.parse(rule),
            damping=None,
            compensation=None,
            shards=1,
        )

    assert len(setup(freeze=("head",)).ready(None).plan.layout.slots) == 4
    name = OPTIMIZERS.name_of(optimizer)
    with pytest.raises(
        ValueError, match=rf"^{name} takes one step along all .* group head has its"
    ):
        setup(group=(Group(name="head", lr_factor=0.1),))


def test_local_steps_take_frozen_parts_and_refuse_rates(tmp_path: Path) -> None:
    options = {"local": LOCALS.parse("sgd:steps=2")}

    ours = simulated(tmp_path / "run", TASK, SGD(lr=1.0), options=options, freeze=("head",))

    assert torch.equal(ours["head.weight"], named(build_model(TASK, SEED))["head.weight"])
    with pytest.raises(
        ValueError, match=r"^local sgd takes one step .* use no local steps, or only"
    ):
        simulated(tmp_path, TASK, SGD(lr=1.0), options=options, group=GROUPS)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"freeze": ("tail",)},
            r"^group tail matches no parameter by 'tail'; .* encoder\.0\.weight,",
        ),
        ({"freeze": ("*",)}, r"^nothing is left to train: \* freeze all of encoder"),
        (
            {"group": (Group(name="head"),), "freeze": ("head",)},
            "^group head is given twice: say all that is its own in one place",
        ),
        (
            {"group": (Group(name="*.bias", lr_factor=2.0), Group(name="head", lr_factor=2.0))},
            r"^parameter head\.bias is in groups \*\.bias and head",
        ),
        (
            {"group": (Group(name="head", weight_decay=0.0),), "optimizer": "rmsprop"},
            "^group head has weight_decay 0, and optimizer RMSProp has none",
        ),
        ({"freeze": "head"}, r"^freeze must be a tuple, such as \('head',\)"),
    ],
)
def test_groups_that_cannot_be_are_refused(
    tmp_path: Path, run: dict[str, Any], message: str
) -> None:
    optimizer = OPTIMIZERS.parse(run.pop("optimizer", "sgd"))

    with pytest.raises((ValueError, LayoutError), match=message):
        simulated(tmp_path / "run", TASK, optimizer, **run)


def test_each_loss_is_in_the_log(tmp_path: Path) -> None:
    config = RunConfig(workers=2, updates=20, evaluate_every_s=4.0, out=tmp_path / "run")

    Simulator(task("digits-autoencoder:weight=0.5"), Adam(lr=0.003), config).fit()

    lines = [line for line in read_record(tmp_path / "run").metrics if line["kind"] == "test"]
    assert len(lines) > 2
    for line in lines:
        parts = line["classification_loss"] + 0.5 * line["reconstruction_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
