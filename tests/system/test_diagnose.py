from __future__ import annotations

from pathlib import Path

import pytest

from async_sgd.trainer import AsyncTrainer
from deploy.diagnose import DiagnoseConfig, diagnose
from paramserver.optimizers import Momentum
from workers.config import RunConfig
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]


@pytest.mark.long
def test_several_workers_find_the_curvature_that_one_does(tmp_path: Path) -> None:
    config = RunConfig(workers=2, updates=300, evaluate_every_s=0, out=tmp_path / "run")
    AsyncTrainer(task("digits:hidden=8"), Momentum(lr=0.01), config).fit()

    alone, together = (
        diagnose(tmp_path / "run", DiagnoseConfig(steps=8), jobs=jobs).curvature for jobs in (1, 2)
    )

    assert together.spectrum.ritz.tolist() == alone.spectrum.ritz.tolist()
    assert (together.loss, together.gradient) == (alone.loss, alone.gradient)
    assert together.num_samples == 1438
