"""`paramserver experiment FILE.toml`: what is made, what is kept, what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.experiment import grid, pool
from deploy.experiment.comparison import Compared
from deploy.experiment.grid import Grid, make_run
from deploy.experiment.pieces import Settings
from deploy.experiment.results import over_seeds, spread
from deploy.main import FAILED, INTERRUPTED, USAGE, main
from workers.session import ray_session

RUN = {"task": "digits:hidden=4", "updates": 12, "batch_size": 8, "evaluate_every_s": 3}
FILE = """
[grid]
optimizer = ["momentum:lr=0.02", {name = "dana", lr = 0.02}]
workers = [1, 3]
seeds = [0, 1]
[run]
task = "digits:hidden=4"
updates = 12
batch_size = 8
evaluate_every_s = 3
"""


def small(**axes: list[Any]) -> Grid:
    return Grid(axes=axes, seeds=[0], run=RUN)


def experiment(tmp_path: Path, text: str = FILE, *flags: str) -> int:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return main(["experiment", str(file), "--out", str(tmp_path / "out"), "--jobs", "1", *flags])


def table(tmp_path: Path, name: str) -> list[dict[str, str]]:
    with (tmp_path / "out" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def written(tmp_path: Path) -> dict[Path, int]:
    """Return when each finished run was written."""
    results = (tmp_path / "out").glob("runs/*/*/run/result.json")
    return {path: path.stat().st_mtime_ns for path in results}


# ---------------------------------------------------------------- cells


def test_every_combination_is_made_with_every_seed() -> None:
    made = Grid(
        axes={"optimizer": ["sgd", "dana:lr=0.1"], "workers": [1, 4]}, seeds=[3, 5], run=RUN
    ).cells

    assert [(cell.varied["optimizer"], cell.varied["workers"], cell.seed) for cell in made] == [
        ("sgd", "1", 3), ("sgd", "1", 5), ("sgd", "4", 3), ("sgd", "4", 5),
        ("dana:lr=0.1", "1", 3), ("dana:lr=0.1", "1", 5),
        ("dana:lr=0.1", "4", 3), ("dana:lr=0.1", "4", 5),
    ]  # fmt: skip
    assert len({cell.folder for cell in made}) == 8


def test_a_cell_is_called_by_what_varies_alone() -> None:
    (cell, *_) = small(delay=["gamma:cv=0.3"], workers=[2, 8], damping=["none", "dynsgd"]).cells

    assert cell.group == "workers 2, damping none"
    assert cell.piece.name == "workers 2, damping none, seed 0"
    assert cell.folder == "runs/workers=2,damping=none/seed-0"


def test_names_that_differ_in_signs_alone_have_folders_of_their_own() -> None:
    made = small(until=["loss<=0.1", "loss>=0.1"]).cells

    assert len({cell.folder for cell in made}) == 2


def test_a_cell_is_known_by_all_its_flags_however_they_are_written() -> None:
    def fingerprint(**run: Any) -> str:
        return Grid(axes={}, seeds=[0], run={**RUN, **run}).cells[0].piece.fingerprint

    same = fingerprint(optimizer="adam:lr=0.1,betas=0.8/0.99")
    assert fingerprint(optimizer={"name": "adam", "lr": 0.1, "betas": [0.8, 0.99]}) == same
    assert fingerprint(optimizer="adam:lr=0.1,betas=0.8/0.99", batched=False) == same
    others = [{"optimizer": "adam:lr=0.1"}, {"workers": 3}, {"latency": 0.1}, {"batched": True}]
    assert len({same, *(fingerprint(**other) for other in others)}) == 5


def test_the_settings_of_a_cell_build_its_flags_again() -> None:
    run = {**RUN, "clip": "norm:max_norm=1", "delay": "gamma:factors=1/2", "rule": "ssp:bound=1",
           "changes": "crash:1@4", "bandwidth": 1e6, "batched": True}  # fmt: skip
    piece = Grid(axes={}, seeds=[2], run=run).cells[0].piece
    settings = json.loads(json.dumps(piece.settings))

    given = {k: v for k, v in settings.items() if k not in ("mode", "seed") and v is not None}
    again = Grid(axes={}, seeds=[2], run=given).cells[0].piece

    assert again.fingerprint == piece.fingerprint


# ---------------------------------------------------------------- from a file to tables


def test_a_grid_leaves_tables_plots_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment(tmp_path) == 0

    cells, summary = table(tmp_path, "cells"), table(tmp_path, "summary")
    assert len(cells) == 8
    assert list(cells[0])[:3] == ["optimizer", "workers", "seed"]
    assert cells[0].keys() >= {
        "updates", "gradients", "seconds", "final_accuracy", "best_loss", "staleness_mean",
        "staleness_p95", "staleness_max", "gradients_per_s", "dropped", "stopped_because", "folder",
    }  # fmt: skip
    assert {row["updates"] for row in cells} == {"12"}
    assert all((tmp_path / "out" / row["folder"] / "result.json").exists() for row in cells)
    assert [(row["optimizer"], row["workers"], row["seeds"]) for row in summary] == [
        ("momentum:lr=0.02", "1", "2"), ("momentum:lr=0.02", "3", "2"),
        ("dana:lr=0.02", "1", "2"), ("dana:lr=0.02", "3", "2"),
    ]  # fmt: skip
    losses = sorted(float(row["final_loss"]) for row in cells[:2])
    assert [float(summary[0][f"final_loss_{end}"]) for end in ("min", "max")] == losses
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("dana:lr=0.02", "virtual seconds", "gradients", "updates", "staleness", "<svg"):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "out" / "metrics.png").stat().st_size > 10_000
    assert "8/8" in capsys.readouterr().err


def test_only_what_is_missing_is_made_again(tmp_path: Path) -> None:
    experiment(tmp_path)
    before, rows = written(tmp_path), table(tmp_path, "cells")
    pieces = sorted((tmp_path / "out").glob("runs/*/*/piece.json"))
    piece = json.loads(pieces[0].read_text())
    pieces[0].write_text(json.dumps({**piece, "result": None}))  # it was killed on the way
    pieces[3].unlink()
    for file in sorted(pieces[3].parent.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()

    assert experiment(tmp_path) == 0

    after = written(tmp_path)
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {pieces[i].parent / "run" / "result.json" for i in (0, 3)}
    assert table(tmp_path, "cells") == rows


def test_runs_of_other_settings_are_never_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment(tmp_path)
    before = written(tmp_path)
    capsys.readouterr()

    code = experiment(tmp_path, FILE.replace("updates = 12", "updates = 13"))

    assert code == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "was made with other settings (updates 12, now 13): choose another folder" in line
    assert written(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "out" / "runs" / "optimizer=dana_lr=0.02,workers=3" / "seed-0"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").touch()

    assert experiment(tmp_path) == FAILED

    assert "holds something else than a piece" in capsys.readouterr().err
    assert list(theirs.iterdir()) == [theirs / "thesis.tex"]
    assert not written(tmp_path)


def test_a_run_that_fails_is_told_of_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FILE.replace("workers = [1, 3]", 'rule = ["asp", "softsync:n=1"]')

    assert experiment(tmp_path, text) == FAILED

    rows = table(tmp_path, "cells")
    assert [row["updates"] for row in rows] == ["12"] * 6 + ["", ""]
    assert rows[-1]["stopped_because"].startswith("error: dana keeps a velocity for each worker")
    assert [row["failed"] for row in table(tmp_path, "summary")] == ["0", "0", "0", "2"]
    shown = capsys.readouterr()
    assert "failed: optimizer dana:lr=0.02, rule softsync, seed 1: dana keeps" in shown.err
    assert "failed: optimizer dana:lr=0.02, rule softsync, seed 1: dana keeps" in " ".join(
        shown.out.split()
    )


def test_what_a_target_took_is_in_the_table(tmp_path: Path) -> None:
    text = FILE.replace("updates = 12", 'updates = 40\nuntil = "accuracy=0.2"')

    assert experiment(tmp_path, text.replace("seeds = [0, 1]", "seeds = [0]")) == 0

    rows = table(tmp_path, "cells")
    reached = [row for row in rows if row["seconds_to_target"]]
    assert reached
    for row in reached:
        assert float(row["seconds_to_target"]) == float(row["seconds"])
        assert row["gradients_to_target"] == row["gradients"]
    assert all("reached" not in row["stopped_because"] for row in rows if row not in reached)


def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_begun = 0

    def interrupted(settings: Settings, folder: Path) -> Settings:
        nonlocal num_begun
        num_begun += 1
        if num_begun == 4:
            raise KeyboardInterrupt
        return make_run(settings, folder)

    interrupted.__module__, interrupted.__qualname__ = make_run.__module__, make_run.__qualname__
    monkeypatch.setattr(grid, "make_run", interrupted)
    codes = [experiment(tmp_path)]
    before = written(tmp_path)
    codes.append(experiment(tmp_path))

    assert codes == [INTERRUPTED, 0]
    assert len(before) == 3
    assert before.items() <= written(tmp_path).items()
    err = capsys.readouterr().err
    assert "3 of 8 are finished and kept: the same command goes on from here" in err
    assert "3 of 8 are there already" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("optimizer =", "optimiser ="), "no key 'optimiser'; did you mean optimizer?"),
        (("momentum:lr", "momentun:lr"), "optimizer: there is no optimizer 'momentun'"),
        (("lr=0.02", "lr=-1"), "optimizer: optimizer 'momentum': lr must be above 0"),
        (("[1, 3]", "[]"), "[grid] workers must be a list of one value or more, got []"),
        (("[1, 3]", "3"), "[grid] workers must be a list of one value or more, got 3"),
        (("[1, 3]", "[1, 0]"), "workers must be 1 or more, got 0"),
        (("[1, 3]", "[1, 1]"), "optimizer=momentum:lr=0.02,workers=1 stands there twice"),
        (("seeds = [0, 1]", ""), "[grid] needs seeds, such as seeds = [0, 1, 2]"),
        (("[0, 1]", "[]"), "seeds must be different whole numbers, got []"),
        (("[0, 1]", "[1, 1]"), "seeds must be different whole numbers, got [1, 1]"),
        (("[0, 1]", "3"), "seeds must be different whole numbers, got 3"),
        (("updates = 12", "workers = 2"), "workers stands in [grid] and in [run]: give it once"),
        (("updates = 12", "seed = 2"), "seed is no flag of single runs here: [grid] has seeds"),
        (("updates = 12", 'out = "x"'), "there is no key 'out'"),
        (("updates = 12", "batched = 3"), "batched: expected true or false, got 3"),
        (("[run]", "[runs]"), "there is no key 'runs' (there are grid, mode, run)"),
        (("[grid]", 'mode = "real"\n[grid]'), "mode must be simulate or async or sync, got 'real'"),
        (("[grid]", "[grid"), "is not TOML"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
) -> None:
    assert experiment(tmp_path, FILE.replace(*change)) == USAGE

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"paramserver: {tmp_path / 'grid.toml'}")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "nowhere.toml"]) == USAGE

    assert "nowhere.toml cannot be read: No such file" in capsys.readouterr().err


# ---------------------------------------------------------------- figures over seeds


def test_a_summary_leaves_out_what_failed_and_what_is_not_finite() -> None:
    rows = [
        {"rule": "asp", "seed": 0, "updates": 3, "loss": 1.0, "seconds_to_target": None},
        {"rule": "asp", "seed": 1, "updates": 5, "loss": None, "seconds_to_target": 2.0},
        {"rule": "asp", "seed": 2, "stopped_because": "error: no"},
    ]

    (row,) = over_seeds(rows, ["rule"])

    assert (row["seeds"], row["failed"]) == (3, 1)
    assert [row[f"updates_{part}"] for part in ("median", "min", "max")] == [4, 3, 5]
    assert [row[f"loss_{part}"] for part in ("median", "min", "max")] == [1.0, 1.0, 1.0]
    assert (row["seconds_to_target_reached"], row["seconds_to_target_median"]) == (1, 2.0)


def test_lines_are_compared_where_all_of_them_are() -> None:
    x, middle, low, high = (
        spread([([0, 2, 4], [0, 2, 4]), ([1, 5], [3, 7]), ([0, 4], [1, 5])]) or ()
    )

    assert (x[0], x[-1]) == (1, 4)
    assert [part[0] for part in (middle, low, high)] == [2, 1, 3]
    assert spread([([0, 1], [0, 1]), ([2, 3], [0, 1])]) is None
    assert spread([([], [])]) is None


@pytest.mark.parametrize(
    ("axes", "num_charts"),
    [
        ({"workers": [1, 2, 3]}, 1),
        ({"damping": ["none", "dynsgd"], "workers": [1, 2, 3, 4]}, 1),
        ({"damping": ["none", "dynsgd"], "workers": [1, 2, 3, 4, 5]}, 2),
        ({"workers": list(range(1, 12))}, 1),
    ],
)
def test_keys_that_come_first_have_plots_of_their_own_where_lines_are_many(
    axes: dict[str, list[Any]], num_charts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(**axes)
    monkeypatch.setattr("deploy.experiment.comparison.paths", lambda folder: {})
    outcomes = [pool.Outcome(cell.piece, {"updates": 1}) for cell in made.cells]

    charts = Compared(made, Path(), outcomes).charts()

    assert len(charts) == len({chart.name for chart in charts}) == num_charts


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def in_ray() -> Iterator[None]:
    with ray_session(None, 4):
        yield


@pytest.mark.long
@pytest.mark.system
def test_runs_made_in_parallel_are_those_made_one_by_one(tmp_path: Path, in_ray: None) -> None:
    experiment(tmp_path)
    alone = table(tmp_path, "cells")
    (tmp_path / "out").rename(tmp_path / "alone")

    code = experiment(tmp_path, FILE, "--jobs", "2")

    assert code == 0
    assert table(tmp_path, "cells") == alone


@pytest.mark.long
@pytest.mark.system
def test_real_runs_are_made_one_at_a_time(tmp_path: Path, in_ray: None) -> None:
    text = FILE.replace("[grid]", 'mode = "async"\n[grid]').replace("[1, 3]", "[1]")

    code = experiment(tmp_path, text.replace("seeds = [0, 1]", "seeds = [0]"), "--jobs", "2")

    assert code == 0
    assert [row["updates"] for row in table(tmp_path, "cells")] == ["12", "12"]
