"""What the run in a record trained, built again: for looking at its net after it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paramserver.checkpoint import Checkpoint, load_checkpoint
from paramserver.errors import RecordError
from paramserver.groups import GROUPS
from paramserver.layout import Layout
from paramserver.record import RunFolder, read_record
from workers.config import RunConfig
from workers.stopping import STOPPINGS
from workers.task import Task, build_data, build_model
from workers.tasks import recorded_task


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's task and where its parameters lie."""

    folder: Path
    task: Task
    """With the samples held out, and the parts frozen, that the run held out and froze."""
    seed: int
    """Of the run."""
    layout: Layout

    def checkpoint(self, *, best: bool | None = None) -> Checkpoint:
        """Return the last checkpoint, or the best version if one is kept; None takes that if so.

        Raises:
            RecordError: There is none, or it is of another model.
        """
        files = RunFolder(self.folder)
        if best is None:
            best = files.best.exists()
        path = files.best if best else files.checkpoint
        if not path.exists():
            what = "best version" if best else "checkpoint"
            raise RecordError(f"{self.folder} has no {what}: there are no parameters to look at")
        checkpoint = load_checkpoint(path)
        self.check(self.folder, checkpoint.layout)
        return checkpoint

    def check(self, folder: Path, theirs: Layout) -> None:
        """Raise RecordError if the parameters in ``folder`` are of another model."""
        difference = self.layout.difference(theirs)
        if difference is not None:
            raise RecordError(
                f"the parameters in {folder} are of another model than its task makes now "
                f"({difference}): give the task that was trained"
            )

    def check_part(self, part: str) -> None:
        """Raise ValueError if the task has no ``part``: ``train``, ``test`` or ``validation``."""
        if part == "validation" and build_data(self.task).validation is None:
            raise ValueError(
                f"task {self.task.name} of this run has no validation data: look at train or test"
            )


def trained(folder: Path, given: Task | None) -> Trained:
    """Return what the run recorded in ``folder`` trained.

    Args:
        folder: Of the record.
        given: What was trained, if the record cannot name it; None takes its name.

    Raises:
        RecordError: The record lacks something.
        PluginError: It names a task that does not exist here.
        TaskError: The task cannot be built.
    """
    config = read_record(folder).config
    task = recorded_task(folder, config, given)
    try:
        stopping = config["early_stopping"]
        run = RunConfig(
            seed=config["seed"],
            validation=config["validation"],
            early_stopping=None if stopping is None else STOPPINGS.build(stopping),
            group=tuple(GROUPS.build(group) for group in config.get("group", ())),
            freeze=tuple(config.get("freeze", ())),
        )
    except KeyError as error:
        raise RecordError(
            f"{folder} was written by another version of this library: it has no {error}"
        ) from error
    task = run.applied_to(task)
    return Trained(folder, task, run.seed, Layout.of(build_model(task, run.seed), task.groups))
