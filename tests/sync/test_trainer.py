"""What a synchronous run is refused for, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paramserver.clipping import ClipNorm
from paramserver.errors import LayoutError
from paramserver.optimizers import BFGS, LBFGS
from sync.trainer import SyncTrainer
from workers.config import RunConfig
from workers.tasks.quadratic import Quadratic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"config": RunConfig(clip=ClipNorm(max_norm=1.0))},
            "^lbfgs needs more than grad",
        ),
        ({"reduce": "sum"}, "^lbfgs is a round program, which compares means"),
    ],
    ids=["clip", "sum"],
)
def test_what_would_break_a_line_search_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyncTrainer(Quadratic().build(), LBFGS(), **options)


def test_a_model_too_large_for_a_matrix_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    large = Quadratic(dim=100_000, num_points=2).build()
    trainer = SyncTrainer(large, BFGS(), RunConfig(updates=1, out=tmp_path / "run"))

    with pytest.raises(LayoutError, match="100,032"):
        trainer.fit()

    assert not (tmp_path / "run").exists()


def test_a_sample_larger_than_the_data_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    trainer = SyncTrainer(
        Quadratic(num_points=50).build(), LBFGS(batch=51), RunConfig(out=tmp_path / "run")
    )

    with pytest.raises(ValueError, match=r"^lbfgs: batch=51 is more than the 50 training samples"):
        trainer.fit()

    assert not (tmp_path / "run").exists()
