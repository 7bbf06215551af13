from __future__ import annotations

from pathlib import Path

import pytest

from async_sgd.trainer import AsyncTrainer
from paramserver.checkpoint import load_checkpoint
from paramserver.groups import Group
from paramserver.optimizers import Adam
from sync.trainer import SyncTrainer
from workers.config import RunConfig
from workers.task import build_model
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]


@pytest.mark.long
@pytest.mark.parametrize("trainer", [AsyncTrainer, SyncTrainer])
def test_several_losses_are_trained_with_a_part_frozen_and_another_slowed(
    tmp_path: Path, trainer: type[AsyncTrainer] | type[SyncTrainer]
) -> None:
    """Adam moves each element by its rate at most, as long as its first moment is no larger."""
    what = task("digits-autoencoder:hidden=32")
    config = RunConfig(
        workers=2,
        updates=40,
        group=(Group(name="encoder", lr_factor=1e-3),),
        freeze=("decoder",),
        evaluate_every_s=0,
        out=tmp_path / "run",
    )
    start = dict(build_model(what, config.seed).named_parameters())

    result = trainer(what, Adam(lr=0.01), config).fit()

    kept = load_checkpoint(tmp_path / "run" / "checkpoint")
    names = [slot.name for slot in kept.layout.slots]
    moved = {
        slot.name: float(
            (kept.params[slot.offset : slot.end] - start[slot.name].detach().flatten()).abs().max()
        )
        for slot in kept.layout.slots
    }
    assert names == [name for name in start if not name.startswith("decoder")]
    assert all(0 < moved[name] < 40 * 2e-5 for name in names if name.startswith("encoder"))
    assert moved["classifier.weight"] > 0.05
    assert {"classification_loss", "reconstruction_loss"} < set(result.metrics)
