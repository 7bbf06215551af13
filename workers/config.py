"""What a run is asked to do, whichever mode it runs in."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from paramserver.averaging import Average
from paramserver.batch_sizes import AdaptiveBatch
from paramserver.clipping import Clip
from paramserver.compression import Compression, check_pull
from paramserver.groups import Group
from paramserver.schedules import Schedule
from paramserver.trajectory import LEAST
from workers.curriculum import Course, Pacing
from workers.difficulty import Difficulty, Loss, places
from workers.estimate import GradientMode
from workers.examiner import Looks
from workers.holdout import held_out
from workers.placement import Placement
from workers.stopping import EarlyStopping
from workers.task import Data, Task, is_minimised, regrouped

_HELD_OUT = 0.1
"""Share of the training samples that early stopping decides by, if nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(Placement):
    """Size, budget, seed and deadlines of a run; both trainers take the same one."""

    workers: int = 2
    """Worker processes."""

    batch_size: int | None = None
    """Samples in one worker's batch; None takes the task's."""

    adaptive_batch: AdaptiveBatch | None = None
    """Lets the number of samples follow the gradients' noise, the learning rate and the loss, from
    batch_size on; None keeps it."""

    epochs: float | None = None
    """Passes through the training data, counted over all workers, after which the run ends."""

    updates: int | None = None
    """Updates of the parameters after which the run ends."""

    until: str | None = None
    """A metric to reach on the test data, such as ``accuracy=0.97`` or ``loss<=0.1``; with a
    name like ``validation_loss`` on the validation data."""

    early_stopping: EarlyStopping | None = None
    """Ends the run when it no longer gets better on the validation data, and keeps the best
    version; None goes on to the end of the budget and keeps the last."""

    trajectory: int | None = None
    """Evaluations whose parameters are kept in the record, for `paramserver surface`, 3 or more;
    beyond so many, those too close together go. None keeps none."""

    validation: float | None = None
    """Share of the training samples held out for validation. None takes the task's own validation
    data; if it has none, 0.1 for early stopping, else 0."""

    seed: int = 0
    """Seeds the model, the order of the data and everything random in the run."""

    curriculum: Pacing | None = None
    """Draws easy samples first, and more and more of the others as the run goes on; None draws from
    all from the start."""

    difficulty: Difficulty | None = None
    """What tells easy samples from hard ones; None is by a loss, if there is a curriculum."""

    clip: Clip | None = None
    """Gradient clipping; None leaves gradients as they are."""

    schedule: Schedule | None = None
    """Learning-rate schedule, stepped by applied updates; None keeps the rate."""

    group: tuple[Group, ...] = ()
    """A part of the model with a learning rate, weight decay or schedule of its own: one of the
    task's groups by its name, or parameters by a pattern, such as ``encoder:lr_factor=0.1`` or
    ``*.bias:weight_decay=0``; may be given several times."""

    freeze: tuple[str, ...] = ()
    """A part of the model that stays as it is: a group of the task, or a pattern, such as
    ``encoder`` or ``*.bias``; may be given several times."""

    compress: Compression | None = None
    """What workers send their gradients through, with what is left out kept for the next one where
    the compression has feedback; None sends them as they are."""

    compress_pull: Compression | None = None
    """What workers read parameters through; with feedback they are sent what has changed. None
    shows them the parameters as they are; so does mode sync, where all are equal to the bit."""

    average: Average | None = None
    """Average of the parameters after each update, evaluated in their place; None has none."""

    gradient: GradientMode = "reverse"
    """How workers compute gradients for a push rule: by ``reverse`` mode, by ``forward`` mode,
    which takes a pass a parameter, or as a ``random`` forward gradient, unbiased, in one pass."""

    on_nan: Literal["drop", "stop"] = "stop"
    """What a gradient with NaN or infinity does: it is dropped and counted, or stops the run."""

    evaluate_every_s: float = 1.0
    """Seconds between evaluations on the test data; 0 evaluates only at the end."""

    diagnostics: bool = True
    """Whether evaluations look at the net as well: gradients by layer, saturated and dead units,
    steps, gradient noise. In the evaluating process, and at most 5 % of the time."""

    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints; 0 writes only the one at the end."""

    out: Path | None = None
    """Folder of the run's record; None makes one under ``runs/``."""

    resume: Path | None = None
    """Record to go on from; the run continues in that folder."""

    threads: int | None = None
    """torch threads in each worker; None takes the CPUs it asks of a cluster, and at home its share
    of the machine's cores."""

    wait_timeout_s: float = 60.0
    """Seconds a worker may wait for others before the run stops and says who waits for whom."""

    call_timeout_s: float = 60.0
    """Seconds an answer of another process may take."""

    max_failures: int = 10
    """Processes that may be lost and replaced before the run gives up."""

    def __post_init__(self) -> None:
        Placement.__post_init__(self)
        for name in ("out", "resume"):
            if isinstance(folder := getattr(self, name), str):  # what people write, if not mypy
                object.__setattr__(self, name, Path(folder))
        for name in ("group", "freeze"):
            if not isinstance(several := getattr(self, name), tuple):
                raise ValueError(f"{name} must be a tuple, such as ({several!r},)")
        for name, least in (
            *(("workers", 1), ("batch_size", 1), ("updates", 1), ("threads", 1)),
            ("trajectory", LEAST),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.max_failures < 0:
            raise ValueError(f"max_failures must be 0 or more, got {self.max_failures}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        if self.difficulty is not None and self.curriculum is None:
            raise ValueError("difficulty orders the samples of a curriculum: give that, too")
        if self.validation is not None and not 0 < self.validation < 1:
            raise ValueError(f"validation must be above 0 and below 1, got {self.validation}")
        if self.early_stopping is not None and self.evaluate_every_s == 0:
            raise ValueError(
                "early stopping decides by evaluations: evaluate_every_s must be above 0 s"
            )
        if self.trajectory is not None and self.evaluate_every_s == 0:
            raise ValueError(
                "a trajectory is of what evaluations read: evaluate_every_s must be above 0 s"
            )
        for name in ("evaluate_every_s", "checkpoint_every_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 s or more, got {getattr(self, name)}")
        for name in ("wait_timeout_s", "call_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 s, got {getattr(self, name)}")
        if self.gradient not in get_args(GradientMode):
            raise ValueError(
                f"gradient must be {' or '.join(get_args(GradientMode))}, got {self.gradient!r}"
            )
        if self.on_nan not in ("drop", "stop"):
            raise ValueError(f"on_nan must be 'drop' or 'stop', got {self.on_nan!r}")
        if self.compress_pull is not None:
            check_pull(self.compress_pull)
        if self.until is not None:
            Target.parse(self.until)
        if self.out is not None and self.resume is not None:
            raise ValueError(
                "a resumed run continues in its own folder: give out or resume, not both"
            )

    def course(self, task: Task, data: Data) -> Course | None:
        """Score the training samples for the curriculum; None if there is none.

        Raises:
            TaskError: They cannot be scored.
        """
        if self.curriculum is None:
            return None
        by = self.difficulty or Loss()
        return Course(self.curriculum, places(by, task, data, self.curriculum.order, self.seed))

    @property
    def worker_threads(self) -> int:
        """How many torch threads each worker has."""
        if self.threads is not None:
            return self.threads
        if self.address is not None:
            return max(1, int(self.worker_cpus))
        return max(1, len(os.sched_getaffinity(0)) // self.workers)

    @property
    def looks(self) -> Looks:
        """What evaluations are to look at, beside the test and validation data."""
        stopping = self.early_stopping
        return Looks(train=stopping is not None and stopping.needs_train, inside=self.diagnostics)

    def applied_to(self, task: Task) -> Task:
        """Return ``task`` as this run trains it: with its groups, and samples held out.

        Raises:
            ValueError: A group is given twice.
        """
        frozen = tuple(Group(name=name, frozen=True) for name in self.freeze)
        return self.with_validation(regrouped(task, (*self.group, *frozen)))

    def with_validation(self, task: Task) -> Task:
        """Return ``task`` with the part of its training samples held out that this run asks for."""
        if self.validation is not None:
            return held_out(task, self.validation, self.seed)
        if self.early_stopping is not None:
            return held_out(task, _HELD_OUT, self.seed, spare_own=True)
        return task


@dataclass(frozen=True, slots=True)
class Target:
    """A value of a metric that ends the run when it is reached."""

    metric: str
    value: float
    at_least: bool
    """Whether larger is better."""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``name=value``, ``name>=value`` or ``name<=value``.

        ``=`` means at most for a metric that is minimised, else at least.

        Raises:
            ValueError: The text has another form.
        """
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|=)\s*(\S+)\s*", text)
        try:
            metric, sign, number = found.groups() if found else ("", "", "")
            value = float(number)
        except ValueError:
            raise ValueError(
                f"until must be like accuracy=0.97 or loss<=0.1, got {text!r}"
            ) from None
        falls = is_minimised(metric)
        return cls(metric, value, sign == ">=" or (sign == "=" and not falls))

    def reached(self, metrics: dict[str, float]) -> bool:
        """Whether ``metrics`` reach the target; a metric that is not there raises KeyError."""
        value = metrics[self.metric]
        return value >= self.value if self.at_least else value <= self.value
