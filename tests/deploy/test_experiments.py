from __future__ import annotations

import csv
from pathlib import Path

import pytest

from deploy.experiment import optimizers
from deploy.main import main
from paramserver.optimizers import OPTIMIZERS

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


def test_every_optimizer_of_the_registry_is_compared() -> None:
    compared = {c.optimizer.partition(":")[0] for c in optimizers.OPTIMIZERS_COMPARED}

    assert compared == {entry.name for entry in OPTIMIZERS} - {"torch"}


@pytest.mark.long
def test_a_comparison_leaves_a_table_and_a_plot_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compared"
    command = ["experiment", "optimizers", "--only", "newton-cg/sgd:lr=0.1 average=all",
               "--task", "digits:hidden=2", "--mode", "async", "--out", str(out)]  # fmt: skip

    codes = [main(command)]
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    codes.append(main(command))

    assert codes == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")} == written
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer"], row["form"]) for row in rows] == [
        ("sgd:lr=0.1 average=all:start=200", "pushes"),
        ("newton-cg", "rounds"),
    ]
    assert all(float(row["metric"]) > 0.2 for row in rows)
    assert (out / "optimizers.png").stat().st_size > 10_000
    assert "newton-cg" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_every_optimizer_learns_digits_in_every_form(tmp_path: Path) -> None:
    out = tmp_path / "all"

    code = main(["experiment", "optimizers", "--task", "digits:hidden=8", "--out", str(out)])

    assert code == 0
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(optimizers.OPTIMIZERS_COMPARED) - 7  # forms that are pushed alone
    poor = {row["optimizer"]: row["metric"] for row in rows if float(row["metric"]) < 0.5}
    assert not poor


def test_what_does_not_exist_is_said_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    codes = [main(["experiment", "optimisers"]), main(["experiment", "optimizers", "--only", "x"])]

    assert codes == [2, 2]
    err = capsys.readouterr().err
    assert "there is no experiment 'optimisers'; did you mean optimizers? (there are " in err
    assert "only=x names none of: sgd:lr=0.1, " in err
