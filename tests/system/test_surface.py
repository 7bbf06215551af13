"""Real runs keep their path, and worker processes compute the surface around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_sgd.trainer import AsyncTrainer
from deploy.surface import SurfaceConfig, look
from paramserver.optimizers import Momentum
from sync.trainer import SyncTrainer
from workers.config import RunConfig
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]


@pytest.mark.long
@pytest.mark.parametrize("mode", [AsyncTrainer, SyncTrainer])
def test_several_workers_compute_the_surface_that_one_does(
    mode: type[AsyncTrainer | SyncTrainer], tmp_path: Path
) -> None:
    config = RunConfig(
        workers=2, updates=1500, evaluate_every_s=0.1, trajectory=5, out=tmp_path / "run"
    )
    mode(task("digits:hidden=8"), Momentum(lr=0.01), config).fit()
    where = SurfaceConfig(along="between", dims=1, points=9, samples=200)

    alone, together = (look(tmp_path / "run", where, jobs=jobs) for jobs in (1, 2))

    assert together.losses.tolist() == alone.losses.tolist()
    assert together.path_losses.tolist() == alone.path_losses.tolist()
    assert together.versions[0] == 0
    assert together.versions[-1] == 1500
    assert together.path_losses[-1] < together.path_losses[0]
