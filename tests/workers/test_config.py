from __future__ import annotations

from pathlib import Path

import pytest

from workers.config import RunConfig


def test_a_folder_may_be_named_by_a_string() -> None:
    assert RunConfig(out="runs/first").out == Path("runs/first")  # type: ignore[arg-type]
    assert RunConfig(resume="runs/first").resume == Path("runs/first")  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1, 2, -5])
def test_a_trajectory_of_too_few_snapshots_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=r"^trajectory must be 3 or more, got "):
        RunConfig(trajectory=number)


def test_a_trajectory_without_evaluations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a trajectory is of what evaluations read"):
        RunConfig(trajectory=9, evaluate_every_s=0)
