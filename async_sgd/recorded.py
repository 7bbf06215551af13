"""The setup of a run, built again from its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS
from async_sgd.rules import RULES
from async_sgd.setup import Setup
from paramserver.averaging import AVERAGES
from paramserver.batch_sizes import ADAPTIVE_BATCHES
from paramserver.clipping import CLIPS
from paramserver.compression import COMPRESSIONS
from paramserver.errors import RecordError
from paramserver.groups import GROUPS
from paramserver.optimizers import OPTIMIZERS
from paramserver.registry import Registry
from paramserver.schedules import SCHEDULES
from workers.config import RunConfig
from workers.curriculum import PACINGS
from workers.difficulty import DIFFICULTIES
from workers.local import LOCALS
from workers.stopping import STOPPINGS
from workers.task import Task
from workers.tasks import recorded_task


def recorded_setup(folder: Path, config: Mapping[str, Any], given: Task | None) -> Setup:
    """Build again what the configuration in the record ``folder`` describes, on one shard.

    Args:
        folder: Of the record.
        config: Its configuration.
        given: What was trained, if the configuration cannot name it; None takes its name.

    Raises:
        RecordError: The configuration lacks something.
        PluginError: It names plug-ins that do not exist here.
    """
    trained = recorded_task(folder, config, given)

    def built(name: str, registry: Registry[Any]) -> Any:
        value = config.get(name)
        return None if value is None else registry.build(value)

    plain = (
        "workers", "batch_size", "epochs", "updates", "validation", "seed", "gradient", "on_nan",
        "threads",
    )  # fmt: skip
    try:
        return Setup(
            trained,
            OPTIMIZERS.build(config["optimizer"]),
            RunConfig(
                **{name: config[name] for name in plain},
                adaptive_batch=built("adaptive_batch", ADAPTIVE_BATCHES),
                curriculum=built("curriculum", PACINGS),
                difficulty=built("difficulty", DIFFICULTIES),
                early_stopping=built("early_stopping", STOPPINGS),
                clip=built("clip", CLIPS),
                schedule=built("schedule", SCHEDULES),
                group=tuple(GROUPS.build(group) for group in config.get("group", ())),
                freeze=tuple(config.get("freeze", ())),
                compress=built("compress", COMPRESSIONS),
                compress_pull=built("compress_pull", COMPRESSIONS),
                average=built("average", AVERAGES),
            ),
            rule=built("rule", RULES),
            damping=built("damping", DAMPINGS),
            compensation=built("compensation", COMPENSATIONS),
            local=built("local", LOCALS),
            measure=config.get("measure", ()),
            shards=1,
        )
    except KeyError as error:
        raise RecordError(
            f"{folder} was written by another version of this library: it has no {error}"
        ) from error
