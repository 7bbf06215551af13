"""Surfaces around small runs: a bowl that is known, what is written, and what cannot be."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from async_sgd.delays import Exponential
from async_sgd.simulator import Simulator
from deploy.main import FAILED, USAGE, main
from deploy.surface import Surface, SurfaceConfig, look
from paramserver.errors import RecordError, TaskError
from paramserver.optimizers import SGD
from workers.config import RunConfig
from workers.examples import Batch, Data, TensorExamples
from workers.task import Task, build_data, build_model, evaluate
from workers.tasks import task as find_task

DOUBLE = torch.float64


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def linear() -> Task:
    """Return a linear model with squared loss: its error surface is a quadratic bowl."""
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=noise, dtype=DOUBLE)
    targets = torch.randn(60, 2, generator=noise, dtype=DOUBLE)
    train, test = (
        TensorExamples(inputs[:50], targets[:50]),
        TensorExamples(inputs[50:], targets[50:]),
    )
    return Task(
        name="linear",
        model=lambda: nn.Linear(5, 2, dtype=DOUBLE),
        data=lambda: Data(train, test),
        loss=squares,
        headline="loss",
        batch_size=8,
    )


def trained(out: Path, task: Task | None = None, **options: Any) -> Path:
    """Simulate a run that keeps its path, and return its folder."""
    config = {"workers": 2, "updates": 120, "evaluate_every_s": 4.0, "trajectory": 20, **options}
    run = RunConfig(**config, out=out)
    Simulator(task or linear(), SGD(lr=0.05), run, delay=Exponential()).fit()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "linear")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    return trained(out, find_task("digits:hidden=8"), updates=60)


def seen(folder: Path, **options: Any) -> Surface:
    return look(folder, SurfaceConfig(**options), task=linear(), jobs=1)


KINDS = [
    {"along": along, "dims": dims, "points": 9}
    for along in ("random", "between", "principal")
    for dims in (1, 2)
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_linear_model_has_an_exact_quadratic_bowl(folder: Path, options: dict[str, Any]) -> None:
    surface = seen(folder, **options)

    where = np.stack([part.ravel() for part in np.meshgrid(*surface.axes)])
    ones = np.ones(where.shape[1])
    powers = [ones, *where, *(where[i] * w for i in range(len(where)) for w in where[i:])]
    table, losses = np.stack(powers, axis=1), surface.losses.ravel()
    fitted, *_ = np.linalg.lstsq(table, losses, rcond=None)
    assert np.abs(table @ fitted - losses).max() <= 1e-12 * np.abs(losses).max()
    curvatures = fitted[-3:] if len(where) > 1 else fitted[-1:]
    assert (curvatures[[0, -1]] > 0).all()
    if len(where) > 1:
        assert 4 * curvatures[0] * curvatures[2] > curvatures[1] ** 2


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_each_height_is_the_loss_at_its_point(folder: Path, options: dict[str, Any]) -> None:
    surface = seen(folder, **options)

    task = linear()
    inputs, targets = build_data(task).train.batch(torch.arange(50))
    for index, loss in np.ndenumerate(surface.losses):
        at = [axis[i] for axis, i in zip(surface.axes, reversed(index), strict=True)]
        flat = surface.slice.origin + torch.tensor(at) @ surface.slice.directions
        weight, bias = flat[:10].view(2, 5), flat[64:66]
        off = inputs @ weight.T + bias - targets
        assert loss == pytest.approx(float(off.square().mean()), rel=1e-12)


@pytest.mark.parametrize("along", ["between", "principal", "random"])
def test_the_path_has_its_own_losses_and_those_below_it(folder: Path, along: str) -> None:
    surface = seen(folder, along=along, points=3)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    versions = {line["version"] for line in lines if line["kind"] == "test"}
    assert surface.versions[0] == 0
    assert set(surface.versions[1:]) <= versions
    assert surface.versions[-1] == 120
    assert len(surface.versions) <= 20
    assert surface.path_losses[0] > surface.path_losses[-1]
    start = evaluate(linear(), build_model(linear(), 0), build_data(linear()).train)["loss"]
    assert surface.path_losses[0] == pytest.approx(start, rel=1e-12)
    # Where the slice has a point of the path, both are the same.
    through = {"between": [0, -1], "principal": [-1], "random": [-1]}[along]
    np.testing.assert_allclose(
        surface.shadow_losses[through], surface.path_losses[through], rtol=1e-9
    )
    assert surface.inside is not None
    assert 0 < surface.inside <= 1 + 1e-12


def test_a_line_between_leads_from_the_start_at_0_to_the_end_at_1(folder: Path) -> None:
    surface = seen(folder, along="between", dims=1)

    assert surface.marks == {"start": pytest.approx((0.0,)), "end": pytest.approx((1.0,))}
    assert surface.axes[0][0] <= -0.25
    assert surface.axes[0][-1] >= 1.25
    assert len(surface.axes[0]) == 101


def test_a_line_to_another_run_has_that_runs_loss_at_1(folder: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", seed=4)
    result = json.loads((other / "result.json").read_text())

    surface = seen(folder, along="between", dims=1, other=other, data="test", points=7, reach=0.25)

    at_1 = surface.axes[0].tolist().index(1.0)
    assert surface.losses[at_1] == pytest.approx(result["final"]["loss"], rel=1e-9)


def test_a_plane_through_two_runs_holds_both_and_the_beginning(
    folder: Path, tmp_path: Path
) -> None:
    other = trained(tmp_path / "other", seed=4)

    surface = seen(folder, along="between", other=other, points=3)

    assert surface.marks["end"] == (0.0, 0.0)
    assert surface.marks["other run"] == (1.0, 0.0)
    np.testing.assert_allclose(surface.path[0], surface.marks["start"], atol=1e-9)


def test_random_directions_need_no_path(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", trajectory=None)

    surface = seen(out, along="random", points=5, reach=0.5)

    assert surface.versions == ()
    assert surface.inside is None
    assert [axis[[0, -1]].tolist() for axis in surface.axes] == [[-0.5, 0.5]] * 2
    result = json.loads((out / "result.json").read_text())
    middle = seen(out, along="random", points=5, data="test").losses[2, 2]
    assert middle == pytest.approx(result["final"]["loss"], rel=1e-9)


def test_held_out_samples_are_those_the_run_held_out(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", validation=0.2)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if line["kind"] == "test")

    surface = seen(out, along="between", dims=1, data="validation", points=3)

    assert surface.path_losses[-1] == pytest.approx(last["validation_loss"], rel=1e-9)


def test_parts_that_are_frozen_stay_where_they_are(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", freeze=("bias",))
    result = json.loads((out / "result.json").read_text())

    surface = seen(out, along="between", dims=1, points=3, data="test")

    assert surface.slice.origin.shape == (64,)  # the weight alone
    assert surface.path_losses[-1] == pytest.approx(result["final"]["loss"], rel=1e-9)


def test_samples_are_drawn_by_the_seed(folder: Path) -> None:
    few, again, others = (
        seen(folder, dims=1, points=3, samples=7, seed=seed).losses for seed in (0, 0, 1)
    )

    assert few.tolist() == again.tolist() != others.tolist()


def test_progress_is_told_up_to_the_end(folder: Path) -> None:
    told: list[tuple[int, int]] = []

    surface = look(
        folder, SurfaceConfig(points=5), task=linear(), jobs=1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip

    total = 25 + 2 * len(surface.versions)
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert len(told) > 4


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("flags", "drawn"),
    [
        ("", ["contour", "landscape"]),
        ("--along random", ["contour", "landscape"]),
        ("--along between --dims 1", ["curve"]),
    ],
)
def test_the_command_writes_tables_pictures_and_a_page(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, drawn: list[str]
) -> None:
    out = tmp_path / "surface"
    command = f"surface {digits} {flags} --points 5 --samples 50 --jobs 1 --out {out}"

    assert main(command.split()) == 0

    names = {path.name for path in out.iterdir()}
    pictures = {f"{name}.png" for name in drawn}
    assert names == {"surface.csv", "surface.npz", "path.csv", "report.html", *pictures}
    with (out / "surface.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    packed = np.load(out / "surface.npz")
    assert [float(row["loss"]) for row in rows] == packed["losses"].ravel().tolist()
    assert [float(row["x"]) for row in rows[:5]] == packed["axis_0"].tolist()
    with (out / "path.csv").open(encoding="utf-8") as file:
        assert next(int(row["version"]) for row in csv.DictReader(file)) == 0
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == len(drawn)
    assert "Error surface of digits" in page
    shown = capsys.readouterr().out
    assert "path in the slice" in shown
    assert str(out / "report.html") in shown


def test_a_surface_stands_in_the_runs_own_folder(digits: Path) -> None:
    assert main(f"surface {digits} --dims 1 --points 3 --samples 9 --jobs 1".split()) == 0

    assert (digits / "surface" / "principal-1d" / "report.html").exists()


def test_losses_that_are_not_finite_leave_holes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far out the losses of floats overflow."""
    out = trained(tmp_path / "run", find_task("quadratic:dim=4"), updates=30)
    command = f"surface {out} --along between --reach 1e30 --points 5 --jobs 1"

    assert main(command.split()) == 0

    assert "not finite" in capsys.readouterr().out


# ---------------------------------------------------------------- what cannot be


def test_a_run_without_a_path_is_told_how_to_keep_one(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", trajectory=None)

    with pytest.raises(
        RecordError, match=r"run kept no trajectory, which looking along=principal needs: train wit"
    ):
        seen(out)


def test_a_task_made_in_python_must_be_given(folder: Path) -> None:
    with pytest.raises(
        RecordError, match=r"linear does not say how its task 'linear' is made: give it"
    ):
        look(folder, jobs=1)


def test_a_task_that_makes_another_model_now_is_refused(folder: Path) -> None:
    other = replace(linear(), model=lambda: nn.Linear(5, 3, dtype=DOUBLE))

    with pytest.raises(
        RecordError, match=r"are of another model than its task makes now \(.*weigh"
    ):
        look(folder, task=other, jobs=1)


def test_a_run_of_another_version_is_refused(tmp_path: Path) -> None:
    out = trained(tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    del config["early_stopping"]
    (out / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        RecordError, match=r"another version of this library: it has no 'early_stop"
    ):
        seen(out)


def test_a_run_without_a_checkpoint_has_nothing_to_look_around(tmp_path: Path) -> None:
    out = trained(tmp_path / "run", trajectory=None)
    (out / "checkpoint").rename(tmp_path / "away")

    with pytest.raises(RecordError, match=r"run has no checkpoint: there are no parameters"):
        seen(out, along="random")


def test_a_run_without_validation_data_has_no_surface_of_them(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^task linear of this run has no validation data: look a"
    ):
        seen(folder, data="validation")


def test_a_loss_that_fails_says_so(folder: Path) -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        raise ZeroDivisionError("three by nothing")

    with pytest.raises(TaskError, match="ZeroDivisionError: three by nothing"):
        look(folder, SurfaceConfig(points=3), task=replace(linear(), loss=broken), jobs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"along": "sideways"}, "along must be random, between, principal, got 'sideways'"),
        ({"dims": 3}, "dims must be 1 or 2, got 3"),
        ({"data": "all"}, "data must be train, test, validation, got 'all'"),
        ({"points": 2}, "points must be 3 or more, got 2"),
        ({"reach": 0.0}, "reach must be above 0, got 0.0"),
        ({"reach": math.nan}, "reach must be above 0, got nan"),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"other": Path("x")}, "other is a run to look towards: use along=between, not principal"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SurfaceConfig(**change)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("surface", USAGE, "name the folder of a run's record first, then flags"),
        ("surface --dims 1", USAGE, "name the folder of a run's record first, then flags"),
        ("surface nowhere", FAILED, "nowhere"),
        ("surface nowhere --along up", USAGE, "expected random or between or principal, got 'up'"),
        ("surface nowhere --jobs 0", USAGE, "jobs must be 1 or more, got 0"),
        ("surface nowhere --task nothing", USAGE, "nothing"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(
    command: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == code

    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
