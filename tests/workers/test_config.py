from __future__ import annotations

from pathlib import Path

from workers.config import RunConfig


def test_a_folder_may_be_named_by_a_string() -> None:
    assert RunConfig(out="runs/first").out == Path("runs/first")  # type: ignore[arg-type]
    assert RunConfig(resume="runs/first").resume == Path("runs/first")  # type: ignore[arg-type]
