"""What an asynchronous run is refused for, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_sgd.compensation import DCASGD
from async_sgd.damping import DynSGD
from async_sgd.rules import Asynchronous, Pieces, Ringleader, Ringmaster
from async_sgd.trainer import AsyncTrainer
from paramserver.clipping import ClipNorm
from paramserver.optimizers import DANA, SGD, AnyOptimizer, NewtonCG, SaddleFreeNewton, Subgradient
from paramserver.rules import RuleSpec
from workers.config import RunConfig
from workers.local import LOCALS
from workers.tasks.quadratic import Quadratic


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [(NewtonCG(curvature_batch=51), Pieces()), (SaddleFreeNewton(batch=51), Asynchronous())],
    ids=["rounds", "pushes"],
)
def test_a_sample_larger_than_the_data_is_refused_before_a_folder_is_made(
    tmp_path: Path, optimizer: AnyOptimizer, rule: RuleSpec
) -> None:
    trainer = AsyncTrainer(
        Quadratic(num_points=50).build(), optimizer, RunConfig(out=tmp_path / "run"), rule=rule
    )

    with pytest.raises(ValueError, match=r"batch=51 is more than the 50 training samples"):
        trainer.fit()

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "rule", "message"),
    [
        (NewtonCG(), None, r"^newton-cg is a round program: nothing in a round is stale, or comp"),
        (
            SaddleFreeNewton(),
            Asynchronous(),
            r"^saddle-free does not push a gradient alone, and a compensation corrects nothing",
        ),
    ],
    ids=["rounds", "pushes"],
)
def test_only_gradients_are_compensated(
    optimizer: AnyOptimizer, rule: RuleSpec | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncTrainer(Quadratic().build(), optimizer, rule=rule, compensation=DCASGD())


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [(NewtonCG(), None), (SaddleFreeNewton(), Asynchronous())],
    ids=["rounds", "pushes"],
)
def test_only_gradients_are_measured(optimizer: AnyOptimizer, rule: RuleSpec | None) -> None:
    with pytest.raises(ValueError, match=r"does not push a gradient alone, and measure gap,step"):
        AsyncTrainer(Quadratic().build(), optimizer, rule=rule, measure=("gap", "step"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": SaddleFreeNewton()},
            r"^saddle-free keeps points from push to push, and a rule with cancel=true gives up",
        ),
        (
            {"local": LOCALS.parse("adamw")},
            r"^local adamw keeps 2 vectors from push to push, which half of its steps would have",
        ),
        ({"local": LOCALS.parse("elastic")}, r"^local elastic keeps 1 vectors from push to push"),
    ],
)
def test_what_would_be_left_half_done_is_not_cancelled(
    options: dict[str, Any], message: str
) -> None:
    made = {"optimizer": SGD(lr=1.0), "rule": Ringmaster(limit=2, cancel=True), **options}

    with pytest.raises(ValueError, match=message):
        AsyncTrainer(Quadratic().build(), **made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"damping": DynSGD()},
            r"^damping shortens the step of one gradient, and an update of",
        ),
        (
            {"compensation": DCASGD()},
            r"^compensation corrects a gradient for one update, and an",
        ),
        ({"optimizer": DANA()}, r"^dana keeps a velocity for each worker, and rule ringleader"),
    ],
)
def test_a_table_of_gradients_is_no_single_gradient(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncTrainer(Quadratic().build(), **{"optimizer": SGD(), "rule": Ringleader(), **options})


def test_the_norm_of_a_compensated_gradient_is_known_to_one_shard_alone() -> None:
    task, polyak = Quadratic().build(), Subgradient(step="polyak", optimum=0.0)
    clipped = RunConfig(clip=ClipNorm(max_norm=1.0, where="reduced"))

    AsyncTrainer(task, SGD(), clipped, compensation=DCASGD())
    AsyncTrainer(task, polyak, compensation=DCASGD())
    with pytest.raises(ValueError, match=r"^clipping a compensated gradient by its norm needs"):
        AsyncTrainer(task, SGD(), clipped, compensation=DCASGD(), shards=2)
    with pytest.raises(ValueError, match=r"^subgradient needs the norm of a compensated gradient"):
        AsyncTrainer(task, polyak, compensation=DCASGD(), shards=2)
