"""What an asynchronous run is refused for, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_sgd.rules import Asynchronous, Pieces
from async_sgd.trainer import AsyncTrainer
from paramserver.optimizers import AnyOptimizer, NewtonCG, SaddleFreeNewton
from paramserver.rules import RuleSpec
from workers.config import RunConfig
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
