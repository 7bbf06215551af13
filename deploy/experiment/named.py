"""Experiments by name: each knows its sizes, what is claimed, and how to see whether it holds."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from deploy.experiment.findings import Findings, tell
from deploy.flags import Flags, Parser, spell
from workers.config import Target
from workers.tasks import TASKS, TaskSpec


@dataclass(frozen=True, slots=True)
class Named:
    """Where an experiment is, and what of its own it can be told."""

    module: str
    what: str
    takes: tuple[str, ...] = ()
    """Of the flags that not every experiment has."""


_DATA = ("task", "data_dir")
_OWN = (*_DATA, "until")
"""Flags that not every experiment has."""

NAMED: Mapping[str, Named] = {
    "compare": Named(
        "deploy.experiment.when_asynchrony_pays",
        "waiting, not waiting and local steps on one task, with equal budgets; which pays when",
        takes=_OWN,
    ),
    "implicit-momentum": Named(
        "deploy.experiment.implicit_momentum",
        "asynchrony is momentum 1 - 1/M, measured on a quadratic (Mitliagkas et al.)",
    ),
    "stragglers": Named(
        "deploy.experiment.stragglers",
        "time of an update against order statistics; the best K of N (Chen, Dutta et al.)",
    ),
    "depth-and-optimizer": Named(
        "deploy.experiment.depth_and_optimizer",
        "staleness harms deep nets more, and optimizers differ (Dai et al.)",
    ),
    "softsync": Named(
        "deploy.experiment.softsync",
        "n-softsync: staleness, and the learning rate divided by it (Zhang et al.)",
        takes=_DATA,
    ),
    "fasgd": Named(
        "deploy.experiment.fasgd",
        "stale gradients divided by their usual magnitude, and what a better rate does (Odena)",
        takes=_DATA,
    ),
    "momentum-placement": Named(
        "deploy.experiment.momentum_placement",
        "why momentum on the server fails, and DANA does not (Hakimi et al.)",
    ),
    "truncation": Named(
        "deploy.experiment.truncation",
        "a recurrent net clipped, not clipped, and by windows too long (Pascanu et al.)",
    ),
    "batch-size": Named(
        "deploy.experiment.batch_size",
        "noise, speed, generalisation gap and sharpness by batch size (Keskar et al.)",
    ),
}
"""The experiments, by name."""


@dataclass(frozen=True, kw_only=True)
class NamedFlags:
    """What a named experiment can be told."""

    seeds: int | None = None
    """Seeds of each setting, the experiment's own number unless given; of implicit-momentum the
    replicas, in thousands."""

    quick: bool = False
    """Tiny sizes, to see that it works: what is claimed need not hold at them."""

    out: Path | None = None
    """Folder of the tables, plots and page; ``runs/`` and the experiment's name unless given. What
    is finished there is not made again."""

    jobs: int | None = None
    """Pieces made at a time; as many as there are cores unless given."""

    task: TaskSpec | None = None
    """What is trained, one of `paramserver list tasks`; digits unless given."""

    data_dir: Path | None = None
    """Folder that holds the task's data; without a task mnist is trained."""

    until: str | None = None
    """Value of a metric whose time is told, such as ``loss<=0.2``; it ends no run. Another task
    than digits needs one."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.until is not None:
            Target.parse(self.until)

    @property
    def trained(self) -> Mapping[str, str]:
        """What is trained, as flags of a run; nothing unless that was said."""
        if self.task is None and self.data_dir is None:
            return {}
        named = "mnist" if self.task is None else spell(TASKS, self.task)
        folder = {} if self.data_dir is None else {"data_dir": str(self.data_dir.resolve())}
        return {"task": named, **folder}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how an experiment is made."""

    out: Path
    jobs: int
    quick: bool
    seeds: int | None
    """None: as many as the experiment suggests."""
    console: Console
    trained: Mapping[str, Any] = field(default_factory=dict)
    """What is trained, as flags of a run; nothing: what the experiment suggests."""
    until: str | None = None
    """The target; None: what the experiment suggests."""


class Experiment(Protocol):
    """The module of an experiment."""

    def find(self, bench: Bench) -> Findings:
        """Make what is missing, and return what all of it says.

        Raises:
            UsageError: Flags that do not go together.
        """


def run_named(name: str, argv: Sequence[str]) -> int:
    """Run the experiment ``name``, and return 1 if something of it failed."""
    named = NAMED[name]
    parser = Parser(f"paramserver experiment {name}", f"{named.what[0].upper()}{named.what[1:]}.")
    without = [flag for flag in _OWN if flag not in named.takes]
    flags = Flags(NamedFlags, {TaskSpec: TASKS}, without=without).parse(argv, parser)
    experiment: Experiment = importlib.import_module(named.module)
    bench = Bench(
        out=flags.out or Path("runs") / (f"{name}-quick" if flags.quick else name),
        jobs=flags.jobs or os.cpu_count() or 1,
        quick=flags.quick,
        seeds=flags.seeds,
        console=Console(stderr=True, highlight=False),
        trained=flags.trained,
        until=flags.until,
    )
    findings = experiment.find(bench)
    tell(findings, bench.out)
    return 1 if findings.failed else 0
