"""`paramserver simulate` and `paramserver replay` on the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from deploy.main import FAILED, USAGE, main

SMALL = ["--task", "digits:hidden=8", "--updates", "40", "--evaluate-every-s", "0"]


def simulate(out: Path, *flags: str) -> int:
    return main(["simulate", *SMALL, "--out", str(out), *flags])


def record(out: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((out / "result.json").read_text())
    return loaded


def test_a_simulated_run_shows_its_outcome_and_leaves_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    code = simulate(
        out, "--workers", "5", "--delay", "gamma:cv=0.3", "--rule", "ssp:bound=1",
        "--damping", "dynsgd", "--compensation", "dc-asgd", "--service", "constant:time=0.01",
        "--latency", "0.1", "--bandwidth", "1e6", "--changes", "crash:1@4,join:1@6",
        "--measure", "gap,cosine",
    )  # fmt: skip

    shown = capsys.readouterr().out
    assert code == 0
    for words in ("gamma:cv=0.3", "virtual seconds", "law of staleness", "gap", "40", str(out)):
        assert words in shown
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    config = record(out)["config"]
    assert isinstance(config, dict)
    assert config["changes"] == ["crash:1@4", "join:1@6"]
    assert config["network"] == {"latency": 0.1, "bandwidth": 1e6}


def test_a_file_of_flags_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('workers = 3\ndelay = {name = "constant", time = 2.0}\n')

    assert simulate(tmp_path / "run", "--config", str(file)) == 0

    assert record(tmp_path / "run")["seconds"] == 28.0  # 40 updates, 3 at a time


def test_many_seeds_are_the_runs_of_each_seed_and_are_made_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--workers", "3", "--damping", "dynsgd", "--updates", "30"]
    simulate(tmp_path / "one", *flags, "--seed", "6")
    capsys.readouterr()

    code = simulate(tmp_path / "many", *flags, "--seed", "5", "--seeds", "3")

    assert code == 0
    assert "Medians over seeds" in capsys.readouterr().out
    with (tmp_path / "many" / "cells.csv").open(encoding="utf-8") as file:
        rows = {row["seed"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["5", "6", "7"]
    assert len({row["final_loss"] for row in rows.values()}) == 3
    final = record(tmp_path / "one")["final"]
    assert isinstance(final, dict)
    assert float(rows["6"]["final_loss"]) == final["loss"]
    assert (tmp_path / "many" / "report.html").exists()

    assert simulate(tmp_path / "many", *flags, "--seed", "5", "--seeds", "4") == 0
    assert "3 of 4 are there already" in capsys.readouterr().err


def test_batches_follow_the_noise_and_the_page_shows_them(tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "run.toml"
    file.write_text('adaptive_batch = {name = "cabs", least = 4}\n')

    code = simulate(out, "--optimizer", "sgd:lr=0.5", "--config", str(file))

    config = record(out)["config"]
    assert isinstance(config, dict)
    assert code == 0
    assert config["adaptive_batch"]["least"] == 4
    assert "batch size" in (out / "report.html").read_text()
    assert main(["replay", str(out)]) == 0


def test_a_recorded_run_is_simulated_with_delays_like_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A simulated record stands for a real one: they have the same form, but for their mode."""
    real = tmp_path / "real"
    simulate(real, "--workers", "3", "--updates", "400", "--delay", "gamma:mean=0.02,cv=0.2")
    for name in ("config.json", "result.json"):
        text = (real / name).read_text()
        (real / name).write_text(text.replace('"mode": "simulate"', '"mode": "async"'))
    capsys.readouterr()

    assert main(["simulate", "--like", str(real), "--out", str(tmp_path / "like")]) == 0

    assert "its histogram of staleness is 0.0" in " ".join(capsys.readouterr().out.split())
    like = record(tmp_path / "like")
    assert like["updates"] == 400
    assert "recorded" in (tmp_path / "like" / "report.html").read_text()


def test_local_steps_are_simulated_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    assert simulate(out, "--local", "sgd:steps=3", "--optimizer", "sgd:lr=1") == 0

    assert main(["replay", str(out)]) == 0
    assert "equal to the checkpoint's, bit for bit" in capsys.readouterr().out
    assert "sgd:steps=3" in (out / "report.html").read_text()


def test_seeds_and_a_recorded_run_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    simulate(real, "--updates", "100")
    for name in ("config.json", "result.json"):
        text = (real / name).read_text()
        (real / name).write_text(text.replace('"mode": "simulate"', '"mode": "async"'))

    assert main(["simulate", "--like", str(real), "--seeds", "2"]) == USAGE

    assert "leave out seeds or like" in capsys.readouterr().err


def test_no_delays_are_fitted_to_what_was_cancelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(tmp_path / "run", "--rule", "ringmaster:limit=1,cancel=true")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"simulate"', '"async"'))
    shown = capsys.readouterr().out

    code = simulate(tmp_path / "other", "--like", str(tmp_path / "run"))

    assert code == USAGE
    assert "cancelled" in shown
    assert "those that took long were cancelled: give --delay instead" in capsys.readouterr().err


def test_no_delays_are_fitted_to_local_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    simulate(real, "--local", "sgd:steps=3")
    for name in ("config.json", "result.json"):
        text = (real / name).read_text()
        (real / name).write_text(text.replace('"mode": "simulate"', '"mode": "async"'))

    assert main(["simulate", "--like", str(real), "--out", str(tmp_path / "like")]) == USAGE

    assert "are of several local steps, which take a delay each" in capsys.readouterr().err


def test_a_replay_tells_that_all_bits_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    simulate(out)
    capsys.readouterr()

    assert main(["replay", str(out)]) == 0
    assert "equal to the checkpoint's, bit for bit" in capsys.readouterr().out
    assert main(["replay", str(out), "--damping", "inverse", "--at", "20"]) == 0
    assert "recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--delay gamma:cv=-1", "--delay: delay 'gamma': cv must be"),
        ("--delay trace:path=/nowhere", "/nowhere"),
        ("--service gama", "--service: there is no delay 'gama'; did you mean 'gamma'?"),
        ("--latency -1", "latency must be 0 s or more"),
        ("--bandwidth 0", "bandwidth must be above 0 bytes/s"),
        ("--changes crash:1", "a change must be like crash:2@7.5, got 'crash:1'"),
        ("--changes crash:7@1", "there is no worker 7 to crash: with 2 workers the last one is 1"),
        ("--optimizer lbfgs", "lbfgs is a round program"),
        ("--rule pieces", "rule pieces is for round programs"),
        ("--resume x", "there is no flag --resume"),
        ("--seeds 0", "seeds must be 1 or more, got 0"),
        ("--seeds 2 --optimizer lbfgs", "lbfgs is a round program"),
        ("--workers 2000", "2000 workers cannot share"),
        ("--like nowhere", "nowhere is not the record of a run"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert simulate(tmp_path / "run", *flags.split()) in (USAGE, FAILED)

    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("paramserver: ")
    assert message in errors[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("nowhere", "nowhere is not the record of a run"),
        ("RUN --at 3", "--at says from when on"),
        ("RUN --damping non", "there is no damping 'non'; did you mean 'none'?"),
        ("RUN --at -1 --damping dynsgd", "at must be version 0 or later"),
        ("RUN more", "'more' is one word too many"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    simulate(tmp_path / "run", "--updates", "2")
    capsys.readouterr()

    assert main(["replay", *flags.replace("RUN", str(tmp_path / "run")).split()]) != 0

    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("paramserver: ")
    assert message in errors[-1]
