"""What the commands that make a run have in common: their flags, and what they show of it."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS
from async_sgd.delays import DELAYS, DelayLaw
from async_sgd.rules import RULES
from deploy.flags import UsageError, spell
from deploy.outcome import outcome
from deploy.progress import Progress
from paramserver.averaging import AVERAGES, Average
from paramserver.batch_sizes import ADAPTIVE_BATCHES, AdaptiveBatch
from paramserver.clipping import CLIPS, Clip
from paramserver.compensation import Compensation
from paramserver.compression import COMPRESSIONS, Compression
from paramserver.errors import ParamServerError, RunFailedError
from paramserver.groups import GROUPS, Group
from paramserver.optimizers import OPTIMIZERS, Adam, AnyOptimizer
from paramserver.record import Result
from paramserver.registry import Registry
from paramserver.rules import Damping, RuleSpec
from paramserver.schedules import SCHEDULES, Schedule
from workers.config import RunConfig
from workers.curriculum import PACINGS, Pacing
from workers.difficulty import DIFFICULTIES, Difficulty
from workers.local import LOCALS, Local
from workers.stopping import STOPPINGS, EarlyStopping
from workers.task import Task
from workers.tasks import TASKS, TaskSpec, task
from workers.tasks.digits import Digits

logger = logging.getLogger(__name__)

_DEFAULT_TASK = Digits()
_DEFAULT_OPTIMIZER = Adam(lr=3e-3)
DEFAULT_EPOCHS = 25.0
"""Enough for the default optimizer to pass 97 % on the default task under any seed tried."""

PLUGINS: Mapping[object, Registry[Any]] = {
    TaskSpec: TASKS,
    AnyOptimizer: OPTIMIZERS,
    AdaptiveBatch: ADAPTIVE_BATCHES,
    Average: AVERAGES,
    RuleSpec: RULES,
    Damping: DAMPINGS,
    Compensation: COMPENSATIONS,
    Compression: COMPRESSIONS,
    Local: LOCALS,
    Clip: CLIPS,
    Group: GROUPS,
    Schedule: SCHEDULES,
    EarlyStopping: STOPPINGS,
    Pacing: PACINGS,
    Difficulty: DIFFICULTIES,
    DelayLaw: DELAYS,
}

Tell = Callable[[Mapping[str, Any]], None]
"""Shows where a run stands."""


@dataclass(frozen=True, kw_only=True)
class RunFlags(RunConfig):
    """What every run can be told."""

    task: TaskSpec = _DEFAULT_TASK
    """What is trained: one of `paramserver list tasks`, or your own ``package.module:factory``."""

    data_dir: Path | None = None
    """Folder that holds the task's data; the same as the task's own key ``data_dir``."""

    optimizer: AnyOptimizer = _DEFAULT_OPTIMIZER
    """One of `paramserver list optimizers`."""

    config: Path | None = None
    """TOML file with these flags as keys, such as ``batch_size = 64``; flags win over it."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        if self.data_dir is not None and not hasattr(self.task, "data_dir"):
            raise ValueError(f"task {TASKS.name_of(self.task)} has no data folder to name")

    def built_task(self) -> Task:
        """Return the task, reading from ``data_dir`` if that is given."""
        if self.data_dir is None:
            return task(self.task)
        folder = str(self.data_dir.resolve())  # workers may run in another folder
        return task(cast(TaskSpec, dataclasses.replace(cast(Any, self.task), data_dir=folder)))

    def run_config(self) -> RunConfig:
        """Return what every trainer takes; a run without an end gets a number of epochs."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)}
        if self.epochs is None and self.updates is None and self.until is None:
            values["epochs"] = DEFAULT_EPOCHS
        return RunConfig(**values)

    def title(self, mode: str) -> str:
        """Return what is about to be done, such as ``async training of digits with adam``."""
        return (
            f"{mode} training of {spell(TASKS, self.task)} with {spell(OPTIMIZERS, self.optimizer)}"
        )


class Trainer(Protocol):
    """What makes a run."""

    def fit(self) -> Result:
        """Run to the end; Ctrl-C ends the run in order."""


def make_run(starting: str, trainer: Callable[[Tell], Trainer]) -> int:
    """Make the run of what ``trainer`` returns, show how it went, and return the exit code.

    Raises:
        UsageError: A combination that cannot work.
        ParamServerError: The run failed.
        KeyboardInterrupt: It was interrupted; its record is written.
    """
    try:
        with Progress(Console(stderr=True), starting) as progress:
            result = trainer(progress).fit()
    except RunFailedError as error:
        if error.record is not None:
            _write_page(Path(error.record))
        raise
    except ParamServerError:
        raise
    except ValueError as error:  # the trainers' word for a combination that cannot work
        logger.debug("the trainer refused the run", exc_info=True)
        raise UsageError(str(error)) from error
    page = _write_page(result.path)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(outcome(result.record))
    print(f"record: {result.path}")
    if page is not None:
        print(f"report: {page}")
    if result.stopped_because == "interrupted":
        raise KeyboardInterrupt
    return 0


def _write_page(folder: Path) -> Path | None:
    """Write a run's page; that it cannot be written does not make a run fail."""
    from deploy.report import write_report  # noqa: PLC0415  # matplotlib takes a second

    try:
        return write_report([folder])
    except ParamServerError as error:
        logger.warning("no report: %s", error)
        return None
