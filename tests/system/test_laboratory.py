"""A real run of four workers, made again: bit for bit, and by delays fitted to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from async_sgd import AsyncTrainer
from async_sgd.replay import Replay
from deploy.main import main
from paramserver.optimizers import Adam
from workers.config import RunConfig
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(180), pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def real(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "real"
    config = RunConfig(workers=4, epochs=200, evaluate_every_s=0, out=folder)
    AsyncTrainer(task("digits"), Adam(lr=3e-3), config).fit()
    return folder


@pytest.mark.long
def test_a_real_run_of_four_workers_replays_bit_for_bit(real: Path) -> None:
    replayed = Replay(real).run()

    recorded = json.loads((real / "result.json").read_text())
    assert replayed.distance == 0
    assert replayed.version == recorded["updates"]
    assert replayed.metrics == recorded["final"]


@pytest.mark.long
def test_delays_fitted_to_a_real_run_predict_its_staleness(real: Path, tmp_path: Path) -> None:
    assert main(["simulate", "--like", str(real), "--out", str(tmp_path / "like")]) == 0

    like = json.loads((tmp_path / "like" / "result.json").read_text())["like"]
    assert like["distance"] < 0.1
    assert sum(like["staleness"]["histogram"].values()) > 2000
