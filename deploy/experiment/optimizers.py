"""`paramserver experiment optimizers`: every optimizer on one task: a table, a CSV file, a plot.

Each run keeps its own record in the experiment's folder. An experiment that was interrupted goes on
where it was: runs that have finished are not made again.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deploy.flags import Flags, Parser, UsageError
from paramserver.averaging import AVERAGES
from paramserver.errors import ParamServerError, RecordError
from paramserver.optimizers import OPTIMIZERS
from paramserver.record import read_record
from paramserver.rounds import build_program
from workers.config import RunConfig
from workers.session import ray_session
from workers.task import Task
from workers.tasks import TASKS, TaskSpec, task
from workers.tasks.digits import Digits

Mode = Literal["async", "sync"]


@dataclass(frozen=True, slots=True)
class Contender:
    """One optimizer of a comparison."""

    optimizer: str
    """As ``--optimizer`` takes it."""
    updates: int
    """Updates, or rounds, in synchronous mode; an asynchronous push is one worker's, so there are
    as many more as there are workers."""
    average: str | None = None
    """As ``--average`` takes it."""
    rule: str | None = None
    """As ``--rule`` takes it: a round program's push form, in asynchronous mode alone."""

    @property
    def name(self) -> str:
        """What tables and folders call it."""
        options = {"average": self.average, "rule": self.rule}
        return " ".join(
            [self.optimizer, *(f"{key}={value}" for key, value in options.items() if value)]
        )

    @property
    def is_program(self) -> bool:
        """Whether it runs in rounds."""
        return self.rule is None and build_program(OPTIMIZERS.parse(self.optimizer)) is not None


PUSHED = 600
OPTIMIZERS_COMPARED = (
    Contender("sgd:lr=0.1", PUSHED),
    Contender("momentum:lr=0.02", PUSHED),
    Contender("nesterov:lr=0.02", PUSHED),
    Contender("local-momentum:lr=0.02", PUSHED),
    Contender("dana:lr=0.02", PUSHED),
    Contender("dana-slim:lr=0.02", PUSHED),
    Contender("delayed-nesterov:lr=0.05", PUSHED),
    Contender("adagrad:lr=0.05", PUSHED),
    Contender("adadelta", PUSHED),
    Contender("rmsprop:lr=0.003", PUSHED),
    Contender("adam:lr=0.01", PUSHED),
    Contender("adamw:lr=0.01", PUSHED),
    Contender("sgd:lr=0.1", PUSHED, average="all:start=200"),
    Contender("sgd:lr=0.1", PUSHED, average="last:n=200"),
    Contender("subgradient:lr=0.5", PUSHED),
    Contender("coordinate:block=64", 1),
    Contender("cg", 60),
    Contender("bfgs", 60),
    Contender("lbfgs", 60),
    Contender("newton", 10),
    Contender("saddle-free:damping=0.01", 10),
    Contender("newton-cg", 12),
    Contender("ksd", 8),
    Contender("natural:kl=0.003,damping=0.01,cg_iterations=20", 30),
    Contender("natural:metric=diagonal,kl=0.001,damping=0.001", 60),
    Contender("natural:metric=dense,kl=0.03", 12),
    Contender("coordinate:block=64", 60, rule="asp"),
    Contender("bfgs:lr=0.1,batch=256", 150, rule="asp"),
    Contender("lbfgs:lr=0.3,batch=256", 150, rule="asp"),
    Contender("newton:lr=0.3,damping=1", 20, rule="asp"),
    Contender("saddle-free:lr=0.3,damping=0.1", 20, rule="asp"),
    Contender("natural:metric=diagonal,kl=0.001,damping=0.001,batch=128", 200, rule="asp"),
    Contender("natural:metric=dense,kl=0.01,batch=256", 20, rule="asp"),
)
"""Settings that suit the default task; budgets of some seconds each."""


_DEFAULT_TASK = Digits(hidden=24)


@dataclass(frozen=True, kw_only=True)
class ExperimentFlags:
    """What `paramserver experiment optimizers` can be told."""

    task: TaskSpec = _DEFAULT_TASK
    """What is trained; small enough for methods that hold a matrix of its parameters."""

    workers: int = 2
    """Worker processes of each run."""

    mode: Literal["async", "sync", "both"] = "both"
    """Which modes."""

    only: str | None = None
    """Optimizers to run, by the beginnings of their names, separated by ``/``; all unless given."""

    seed: int = 0
    """Of every run."""

    out: Path = Path("runs/optimizers")
    """Folder of the runs, the table (``table.csv``) and the plot (``optimizers.png``)."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be 1 or more, got {self.workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of a comparison."""

    optimizer: str
    mode: str
    form: str
    """How gradients reach the update: pushes, rounds, or all-reduce."""
    metric: float
    loss: float
    gradients: int
    passes: float
    """Passes through the training data that the gradients took; products are not counted."""
    seconds: float
    ended: str


def run(argv: Sequence[str]) -> int:
    """Run the comparison as ``argv`` says."""
    parser = Parser(
        "paramserver experiment optimizers",
        "Train one task with every optimizer, in both modes, and compare them.",
    )
    flags = Flags(ExperimentFlags, {TaskSpec: TASKS}).parse(argv, parser)
    return _optimizers(flags)


def _optimizers(flags: ExperimentFlags) -> int:
    wanted = [c for c in OPTIMIZERS_COMPARED if _is_wanted(c, flags.only)]
    if not wanted:
        names = ", ".join(c.name for c in OPTIMIZERS_COMPARED)
        raise UsageError(f"only={flags.only} names none of: {names}")
    modes: tuple[Mode, ...] = ("async", "sync") if flags.mode == "both" else (flags.mode,)
    what, console = task(flags.task), Console(stderr=True, highlight=False)
    runs = [
        (contender, mode, flags.out / f"{mode}-{_slug(contender.name)}")
        for contender in wanted
        for mode in modes
        if mode == "async" or contender.rule is None
    ]
    is_complete = all(_finished(folder).exists() for *_, folder in runs)
    rows, folders, failed = [], {}, 0
    with contextlib.nullcontext() if is_complete else ray_session(None, flags.workers + 2):
        for number, (contender, mode, folder) in enumerate(runs):
            console.print(f"{number + 1}/{len(runs)}  {contender.name}, {mode}", markup=False)
            try:
                record = _record(what, contender, mode, folder, flags)
            except ParamServerError as error:
                failed += 1
                console.print(f"  failed: {error}", markup=False)
                continue
            rows.append(_row(contender, mode, record, what))
            folders[f"{contender.name}, {mode}"] = folder
    if rows:
        width = None if sys.stdout.isatty() else 130
        _write(flags.out, rows, folders, what, Console(highlight=False, width=width))
    return 1 if failed else 0


def _is_wanted(contender: Contender, only: str | None) -> bool:
    return only is None or any(contender.name.startswith(start) for start in only.split("/"))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def _finished(folder: Path) -> Path:
    return folder / "result.json"


def _record(
    what: Task, contender: Contender, mode: Mode, folder: Path, flags: ExperimentFlags
) -> Mapping[str, Any]:
    """Return the result of a run, which is made if it is not there."""
    finished = _finished(folder)
    if finished.exists():
        record: Mapping[str, Any] = json.loads(finished.read_text())
        then, now = record["config"]["seed"], flags.seed
        if then != now or record["workers"] != flags.workers or record["task"] != what.name:
            raise RecordError(f"{folder} holds a run of other settings: choose another out")
        if record["stopped_because"].startswith("error: "):
            raise RecordError(f"{folder} holds a run that failed: delete it to make it again")
        return record
    from async_sgd.rules import RULES  # noqa: PLC0415
    from async_sgd.trainer import AsyncTrainer  # noqa: PLC0415  # imports Ray
    from sync.trainer import SyncTrainer  # noqa: PLC0415  # imports torch.distributed

    pushes = mode == "async" and not contender.is_program
    config = RunConfig(
        workers=flags.workers,
        updates=contender.updates * (flags.workers if pushes else 1),
        average=None if contender.average is None else AVERAGES.parse(contender.average),
        seed=flags.seed,
        evaluate_every_s=0.2,
        checkpoint_every_s=0,
        out=folder,
    )
    optimizer = OPTIMIZERS.parse(contender.optimizer)
    if mode == "sync":
        return SyncTrainer(what, optimizer, config).fit().record
    rule = None if contender.rule is None else RULES.parse(contender.rule)
    return AsyncTrainer(what, optimizer, config, rule=rule).fit().record


def _row(contender: Contender, mode: Mode, record: Mapping[str, Any], what: Task) -> Row:
    num_train = len(what.data().train)
    forms = {"async": "rounds" if contender.is_program else "pushes", "sync": "all-reduce"}
    return Row(
        optimizer=contender.name,
        mode=mode,
        form=forms[mode],
        metric=record["final"][what.headline],
        loss=record["final"]["loss"],
        gradients=record["gradients"],
        passes=record["samples"] / num_train,
        seconds=record["seconds"],
        ended=record["stopped_because"],
    )


def _write(
    out: Path, rows: Sequence[Row], folders: Mapping[str, Path], what: Task, console: Console
) -> None:
    fields = list(Row.__dataclass_fields__)
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows([getattr(row, name) for name in fields] for row in rows)
    table = Table(title=f"{what.name}: every optimizer", title_justify="left")
    heads = ("optimizer", "mode", "form", what.headline, "loss", "gradients", "passes", "seconds")
    for head in heads:
        table.add_column(head, justify="left" if head in heads[:3] else "right")
    for row in rows:
        table.add_row(
            row.optimizer, row.mode, row.form, f"{row.metric:.4f}", f"{row.loss:.4f}",
            f"{row.gradients:,}", f"{row.passes:.1f}", f"{row.seconds:.1f}",
        )  # fmt: skip
    console.print(table)
    plot(out / "optimizers.png", folders)
    print(f"table: {out / 'table.csv'}\nplot:  {out / 'optimizers.png'}")


def plot(path: Path, folders: Mapping[str, Path]) -> None:
    """Draw the test loss of each run against gradients and against seconds, a row for each mode."""
    modes = sorted({name.rpartition(", ")[2] for name in folders})
    figure = Figure(figsize=(13, 5.2 * len(modes)), layout="constrained")
    panels = np.atleast_2d(figure.subplots(len(modes), 2, squeeze=False))
    for mode, pair in zip(modes, panels, strict=True):
        names = [name for name in folders if name.endswith(f", {mode}")]
        colours = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, max(len(names), 2)))
        for panel, axis in zip(pair, ("gradients", "seconds"), strict=True):
            for number, name in enumerate(names):
                x, y = _curve(folders[name], axis)
                style = ("-", "--", ":")[number % 3]
                label = name.rpartition(", ")[0]
                panel.plot(x, y, style, color=colours[number], label=label, linewidth=1.4)
            _dress(panel, f"{mode}: test loss", axis)
        pair[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _curve(folder: Path, axis: str) -> tuple[list[float], list[float]]:
    points = [
        (line[axis], line["loss"])
        for line in _lines(folder)
        if line.get("kind") == "test" and line.get("loss") is not None and line[axis] > 0
    ]
    return [x for x, _ in points], [y for _, y in points]


def _lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    yield from read_record(folder).metrics


def _dress(panel: Axes, title: str, axis: str) -> None:
    panel.set_title(title, loc="left")
    panel.set_xlabel("gradients" if axis == "gradients" else "seconds")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(visible=True, alpha=0.3)
