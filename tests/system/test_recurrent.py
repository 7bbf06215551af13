"""A language model of characters, for real: two asynchronous workers, and two ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from async_sgd.trainer import AsyncTrainer
from deploy.main import main
from paramserver.ledger import Ledger
from paramserver.optimizers import SGD
from sync.trainer import SyncTrainer
from tests.support.recurrences import recurrence_task
from workers.config import RunConfig

pytestmark = [pytest.mark.system, pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]


@pytest.fixture
def text() -> None:
    folder = Path(os.environ.get("PARAMSERVER_DATA", "none"), "tinyshakespeare")
    if not folder.is_dir():
        pytest.skip("tinyshakespeare is not in $PARAMSERVER_DATA")


@pytest.mark.long
@pytest.mark.data
@pytest.mark.usefixtures("text")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_two_asynchronous_workers_are_under_1_9_nats_a_character(cell: str, tmp_path: Path) -> None:
    command = (
        f"train --task tinyshakespeare:cell={cell} --workers 2 --optimizer adam:lr=0.004 "
        f"--clip norm:max_norm=1 --epochs 1.5 --evaluate-every-s 5 --out {tmp_path / 'run'}"
    )

    assert main(command.split()) == 0

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["final"]["loss"] < 1.9
    assert record["state_staleness"]["mean"] == pytest.approx(2, abs=0.1)


@pytest.mark.long
def test_a_resumed_run_carries_no_state_over(tmp_path: Path) -> None:
    task = recurrence_task(4, num_steps=4 * 2 * 100)  # one pass takes 100 clocks
    config = {"workers": 2, "evaluate_every_s": 0}
    first = RunConfig(**config, updates=20, out=tmp_path / "run")
    AsyncTrainer(task, SGD(lr=0.01), first).fit()

    second = RunConfig(**config, updates=60, resume=tmp_path / "run")
    result = AsyncTrainer(task, SGD(lr=0.01), second).fit()

    columns = Ledger.load(tmp_path / "run" / "updates.npz").columns()
    lives = set(zip(columns["worker"].tolist(), columns["incarnation"].tolist(), strict=True))
    assert len(lives) == 4
    counted = sum(result.record["state_staleness"]["histogram"].values())
    assert counted == len(columns["worker"]) - len(lives)


@pytest.mark.long
def test_ranks_carry_states_that_are_one_version_old(tmp_path: Path) -> None:
    config = RunConfig(workers=2, updates=30, evaluate_every_s=0, out=tmp_path / "run")

    result = SyncTrainer(recurrence_task(4, num_steps=800), SGD(lr=0.01), config).fit()

    assert result.record["state_staleness"]["histogram"] == {1: 29}
