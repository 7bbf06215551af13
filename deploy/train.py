"""`paramserver train`: joins a task, an optimizer and a mode into a run, and shows how it went."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from rich.console import Console

from async_sgd.damping import DAMPINGS
from async_sgd.rules import RULES
from deploy.flags import Flags, Parser, UsageError, spell
from deploy.outcome import outcome
from deploy.progress import Progress
from paramserver.averaging import AVERAGES, Average
from paramserver.clipping import CLIPS, Clip
from paramserver.errors import ParamServerError, RunFailedError
from paramserver.optimizers import OPTIMIZERS, Adam, AnyOptimizer
from paramserver.record import Result
from paramserver.registry import Registry
from paramserver.rules import Damping, RuleSpec
from paramserver.schedules import SCHEDULES, Schedule
from workers.config import RunConfig
from workers.task import Task
from workers.tasks import TASKS, TaskSpec, task
from workers.tasks.digits import Digits

logger = logging.getLogger(__name__)

_DEFAULT_TASK = Digits()
_DEFAULT_OPTIMIZER = Adam(lr=3e-3)
_DEFAULT_EPOCHS = 25.0
"""Enough for the default optimizer to pass 97 % on the default task under any seed tried."""

_PLUGINS: Mapping[object, Registry[Any]] = {
    TaskSpec: TASKS,
    AnyOptimizer: OPTIMIZERS,
    Average: AVERAGES,
    RuleSpec: RULES,
    Damping: DAMPINGS,
    Clip: CLIPS,
    Schedule: SCHEDULES,
}

_ONLY_IN: Mapping[str, Literal["async", "sync"]] = {
    "rule": "async",
    "damping": "async",
    "shards": "async",
    "reduce": "sync",
    "collective": "sync",
}


@dataclass(frozen=True, kw_only=True)
class TrainFlags(RunConfig):
    """What `paramserver train` can be told."""

    mode: Literal["async", "sync"] = "async"
    """Each worker at its own pace on a parameter server, or all in step by all-reduce."""

    task: TaskSpec = _DEFAULT_TASK
    """What is trained: one of `paramserver list tasks`, or your own ``package.module:factory``."""

    data_dir: Path | None = None
    """Folder that holds the task's data; the same as the task's own key ``data_dir``."""

    optimizer: AnyOptimizer = _DEFAULT_OPTIMIZER
    """One of `paramserver list optimizers`."""

    rule: RuleSpec | None = None
    """Who waits for whom, one of `paramserver list rules`; async only, where it is asp unless
    given, or pieces for a round program, which any other rule runs in its push form."""

    damping: Damping | None = None
    """Shortens the steps of stale gradients, one of `paramserver list dampings`; async only, where
    it is none unless given."""

    shards: int | None = None
    """Server processes the parameters are cut over; async only, where it is 1 unless given."""

    reduce: Literal["mean", "sum"] | None = None
    """How the workers' gradients become one; sync only, where it is mean unless given."""

    collective: Literal["auto", "shared_memory", "gloo"] | None = None
    """What carries gradients between workers; sync only, where it is auto unless given."""

    config: Path | None = None
    """TOML file with these flags as keys, such as ``batch_size = 64``; flags win over it."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for name, mode in _ONLY_IN.items():
            if getattr(self, name) is not None and self.mode != mode:
                raise ValueError(f"{name} is for mode {mode} only, and this run's is {self.mode}")
        if self.data_dir is not None and not hasattr(self.task, "data_dir"):
            raise ValueError(f"task {TASKS.name_of(self.task)} has no data folder to name")
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards must be 1 or more, got {self.shards}")

    def task_spec(self) -> TaskSpec:
        """Return the task, reading from ``data_dir`` if that is given."""
        if self.data_dir is None:
            return self.task
        folder = str(self.data_dir.resolve())  # workers may run in another folder
        return cast(TaskSpec, dataclasses.replace(cast(Any, self.task), data_dir=folder))

    def run_config(self) -> RunConfig:
        """Return what both trainers take; a run without an end gets a number of epochs."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)}
        if self.epochs is None and self.updates is None and self.until is None:
            values["epochs"] = _DEFAULT_EPOCHS
        return RunConfig(**values)

    def only_mine(self) -> dict[str, Any]:
        """Return the options of this run's mode that were given."""
        mine = {name: getattr(self, name) for name, mode in _ONLY_IN.items() if mode == self.mode}
        return {name: value for name, value in mine.items() if value is not None}


class Trainer(Protocol):
    """What `train` needs of a trainer."""

    def fit(self) -> Result:
        """Run to the end; Ctrl-C ends the run in order."""


def run(argv: Sequence[str]) -> int:
    """Train as ``argv`` says, print the outcome, and return the exit code."""
    parser = Parser(
        "paramserver train",
        "Train a task with several worker processes, on this machine or on a Ray cluster.\n"
        f"Without epochs, updates or until a run takes {_DEFAULT_EPOCHS:g} epochs.",
        "For example:\n"
        "  paramserver train --rule ssp:bound=4 --workers 4 --until accuracy=0.97\n"
        "  paramserver train --mode sync --optimizer momentum:lr=0.05 --epochs 10\n"
        "  paramserver train --task mymodule:my_task --config run.toml",
    )
    flags = Flags(TrainFlags, _PLUGINS).parse(argv, parser)
    config, what = flags.run_config(), task(flags.task_spec())
    starting = (
        f"{flags.mode} training of {spell(TASKS, flags.task)} with "
        f"{spell(OPTIMIZERS, flags.optimizer)}: starting {config.workers} "
        f"worker{'s' if config.workers > 1 else ''} …"
    )
    try:
        with Progress(Console(stderr=True), starting) as progress:
            result = _trainer(flags, what, config, progress).fit()
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


def _trainer(
    flags: TrainFlags,
    what: Task,
    config: RunConfig,
    progress: Callable[[Mapping[str, Any]], None],
) -> Trainer:
    # A mode imports its own half alone: Ray takes a second, torch.distributed half of one.
    if flags.mode == "sync":
        from sync.trainer import SyncTrainer  # noqa: PLC0415

        return SyncTrainer(what, flags.optimizer, config, progress=progress, **flags.only_mine())
    from async_sgd.trainer import AsyncTrainer  # noqa: PLC0415

    return AsyncTrainer(what, flags.optimizer, config, progress=progress, **flags.only_mine())


def _write_page(folder: Path) -> Path | None:
    """Write a run's page; that it cannot be written does not make a run fail."""
    from deploy.report import write_report  # noqa: PLC0415  # matplotlib takes a second

    try:
        return write_report([folder])
    except ParamServerError as error:
        logger.warning("no report: %s", error)
        return None
