"""The experiments that come with the package, tiny, and the theory they are held to."""

from __future__ import annotations

import csv
import importlib
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from async_sgd.delays import DELAYS
from deploy.experiment import implicit_momentum, stragglers, theory
from deploy.experiment.findings import Claim, Findings, Table, tell
from deploy.experiment.named import NAMED, Bench, Experiment
from deploy.experiment.ways import ALL_REDUCE, WAYS, Part, chart
from deploy.main import USAGE, main


@pytest.mark.parametrize("name", NAMED)
def test_a_named_experiment_tells_what_holds(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(os.environ.get("PARAMSERVER_DATA", "none"), "tinyshakespeare", "input.txt")
    if name == "truncation" and not text.exists():
        pytest.skip("tinyshakespeare is not in $PARAMSERVER_DATA")

    code = main(
        ["experiment", name, "--quick", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path)]
    )

    shown = capsys.readouterr()
    assert code == 0
    with (tmp_path / "claims.csv").open(encoding="utf-8") as file:
        claims = list(csv.DictReader(file))
    assert len(claims) >= 6
    held = sum(claim["holds"] == "yes" for claim in claims)
    assert f"{held} of {len(claims)} claims hold" in shown.out
    assert "failed" not in shown.out
    assert list(tmp_path.glob("*.png"))
    page = (tmp_path / "report.html").read_text()
    assert claims[0]["claim"].split(",")[0] in page
    assert "staleness" in page
    assert again(name, tmp_path) == [claim["claim"] for claim in claims]


def again(name: str, out: Path) -> list[str]:
    """Return what is claimed by the same experiment once more, of which every piece is there."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("piece.json")}
    experiment: Experiment = importlib.import_module(NAMED[name].module)
    bench = Bench(out=out, jobs=1, quick=True, seeds=2, console=Console(stderr=True))

    found = experiment.find(bench)

    assert {path: path.stat().st_mtime_ns for path in out.rglob("piece.json")} == before
    return [claim.text for claim in found.claims]


def test_nothing_holds_of_runs_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARAMSERVER_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    code = main(
        ["experiment", "truncation", "--quick", "--jobs", "1", "--out", str(tmp_path / "out")]
    )

    shown = capsys.readouterr().out
    assert code == 1
    assert shown.count("there is no input.txt") == 3
    with (tmp_path / "out" / "claims.csv").open(encoding="utf-8") as file:
        claims = [claim for claim in csv.DictReader(file) if "characters" in claim["claim"]]
    assert len(claims) == 2
    assert {claim["holds"] for claim in claims} == {"no"}


def test_nothing_holds_of_a_target_that_nobody_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quick", "--jobs", "1", "--until", "loss<=1e-9", "--out", str(tmp_path)]

    assert main(["experiment", "compare", *flags]) == 0

    assert "no less than" in capsys.readouterr().out
    with (tmp_path / "claims.csv").open(encoding="utf-8") as file:
        claims = [claim for claim in csv.DictReader(file) if "to the target" in claim["claim"]]
    assert len(claims) == 5
    assert {claim["holds"] for claim in claims} == {"no"}
    assert {claim["measured"] for claim in claims} == {"never against never"}


def test_a_way_has_one_colour_wherever_it_is_drawn() -> None:
    """All-reduce is drawn on one cluster only."""
    ends = np.array([0.5, 1.0])
    run = {"loss": dict.fromkeys(("loss", "gradients", "updates", "seconds"), ends)}
    made: Any = SimpleNamespace(paths=lambda: [run])
    parts = [
        Part(cluster, way, 0.1, made, [])
        for cluster in ("equal workers", "busy server")
        for way in WAYS
        if way != ALL_REDUCE or cluster == "busy server"
    ]

    drawn = chart(parts)

    assert sorted(label for label, _ in drawn.legend) == sorted(WAYS)
    assert len({colour for _, colour in drawn.legend}) == len(WAYS)


def test_experiments_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment"]) == 0

    shown = capsys.readouterr().out
    for name in ("optimizers", *NAMED):
        assert f"  {name} " in shown
    assert "[grid]" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("straglers", "there is no experiment 'straglers'; did you mean stragglers?"),
        ("--quick", "name an experiment (optimizers, compare, "),
        ("stragglers --seeds 0", "seeds must be 1 or more, got 0"),
        ("stragglers --quickly", "there is no flag --quickly; did you mean --quick?"),
        ("stragglers --quick 7", "--quick: expected true or false, got '7'"),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", *flags.split()]) == USAGE

    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_claim_that_does_not_hold_is_said_with_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = Findings(
        title="<Two>",
        about="claims",
        facts={"seeds": "1"},
        claims=[Claim("a is 1", True, "1.0"), Claim("b is 1", False, "1.5, 0.5 off")],
        tables=[Table("Empty", []), Table("One", [{"x": None, "y": 2.0}], "one")],
    )

    tell(findings, tmp_path)

    shown = capsys.readouterr().out
    assert "does not hold b is 1: 1.5, 0.5 off" in shown
    assert "1 of 2 claims hold" in shown
    assert "Empty" not in shown
    assert (tmp_path / "one.csv").read_text() == "x,y\n,2.0\n"
    assert "&lt;Two&gt;" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------- theory


def test_order_statistics_are_those_known() -> None:
    exponential, pareto = DELAYS.parse("exponential"), DELAYS.parse("pareto:alpha=2.5,scale=1")

    assert theory.order_statistic(exponential, 16, 16) == pytest.approx(3.38073, abs=5e-6)
    assert theory.order_statistic(exponential, 96, 100) == pytest.approx(3.10404, abs=5e-6)
    assert theory.order_statistic(pareto, 16, 16) == pytest.approx(4.5483, abs=5e-5)
    assert theory.order_statistic(pareto, 12, 16) == pytest.approx(1.7029, abs=5e-5)
    assert theory.mean_delay(pareto) == pytest.approx(2.5 / 1.5)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 5), (12, 16), (16, 16)])
def test_a_gamma_of_cv_1_is_exponential(k: int, n: int) -> None:
    gamma, exponential = DELAYS.parse("gamma:mean=2,cv=1"), DELAYS.parse("exponential:mean=2")

    expected = theory.order_statistic(exponential, k, n)

    assert theory.order_statistic(gamma, k, n) == pytest.approx(expected, rel=1e-3)


def test_the_mean_of_a_narrow_gamma_is_right() -> None:
    assert theory.mean_delay(DELAYS.parse("gamma:mean=3,cv=0.1")) == pytest.approx(3, rel=1e-4)


def test_there_is_no_formula_for_every_law() -> None:
    with pytest.raises(ValueError, match=r"^there is no formula for the order statistics of "):
        theory.mean_delay(DELAYS.parse("lognormal"))


def test_backups_that_are_late_cost_time() -> None:
    assert theory.time_with_backups(8, 8) == pytest.approx(theory.harmonic(8))
    assert theory.time_with_backups(1, 2) == pytest.approx(3 / 4)
    stopped = theory.harmonic(8) - theory.harmonic(2)
    assert theory.time_with_backups(6, 8) > 1.1 * stopped


@pytest.mark.parametrize(
    ("placement", "workers", "limit"),
    [
        ("momentum", 1, 3.8),
        ("momentum", 2, 0.1),
        ("local-momentum", 2, 0.19),
        ("dana", 1, 3.8 / 2.8),
        ("dana-slim", 1, 3.8 / 2.8),
        ("momentum", 8, 0.016),
        ("local-momentum", 8, 0.028),
        ("dana", 8, 0.097),
    ],
)
def test_placements_of_momentum_have_the_limits_known(
    placement: str, workers: int, limit: float
) -> None:
    assert theory.stability_limit(placement, workers, 0.9) == pytest.approx(limit, rel=0.03)


def test_one_worker_is_sequential_whatever_the_delays() -> None:
    c, noise, t = 0.1, 0.01, np.arange(21)

    np.testing.assert_allclose(theory.mean_path(1, c, 20), (1 - c) ** t)
    floor = noise / (c * (2 - c))
    squares = floor + (1 - floor) * (1 - c) ** (2 * t)
    np.testing.assert_allclose(theory.mean_squares(1, c, noise, 20), squares)


@pytest.mark.parametrize("workers", [2, 8])
def test_the_mean_path_is_fitted_by_its_own_momentum(workers: int) -> None:
    momentum, step = theory.fit_heavy_ball(theory.mean_path(workers, 0.05, 60))

    assert momentum == pytest.approx(1 - 1 / workers)
    assert step == pytest.approx(0.05 / workers)


def test_an_ensemble_follows_its_mean_path(tmp_path: Path) -> None:
    settings = {"workers": 3, "delay": "exponential", "replicas": 150, "part": 0, "steps": 12,
                "c": 0.3}  # fmt: skip

    made = implicit_momentum.make_ensemble(settings, tmp_path)

    error = np.sqrt(np.array(made["variance"]) / 150)
    off = np.abs(np.array(made["mean"]) - theory.mean_path(3, 0.3, 12))
    assert (off <= 4 * error + 1e-12).all()
    assert error[5] > 0


def test_times_of_an_update_are_those_of_theory(tmp_path: Path) -> None:
    settings = {"law": "exponential", "rule": "k-of-n:k=4,mode=batch-async", "workers": 4,
                "runs": 5, "window": 60}  # fmt: skip

    times = np.array(stragglers.make_times(settings, tmp_path)["times"])

    error = times.std(ddof=1) / math.sqrt(5)
    assert abs(times.mean() - 1) < 4 * error < 0.4
