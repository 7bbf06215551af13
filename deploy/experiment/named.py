"""Experiments by name: each knows its sizes, what is claimed, and how to see whether it holds."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from deploy.experiment.findings import Findings, tell
from deploy.flags import Flags, Parser

NAMED: Mapping[str, tuple[str, str]] = {
    "implicit-momentum": (
        "deploy.experiment.implicit_momentum",
        "asynchrony is momentum 1 - 1/M, measured on a quadratic (Mitliagkas et al.)",
    ),
    "stragglers": (
        "deploy.experiment.stragglers",
        "time of an update against order statistics; the best K of N (Chen, Dutta et al.)",
    ),
    "momentum-placement": (
        "deploy.experiment.momentum_placement",
        "why momentum on the server fails, and DANA does not (Hakimi et al.)",
    ),
    "truncation": (
        "deploy.experiment.truncation",
        "a recurrent net clipped, not clipped, and by windows too long (Pascanu et al.)",
    ),
    "batch-size": (
        "deploy.experiment.batch_size",
        "noise, speed, generalisation gap and sharpness by batch size (Keskar et al.)",
    ),
}
"""Module and a line, by name."""


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

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how an experiment is made."""

    out: Path
    jobs: int
    quick: bool
    seeds: int | None
    """None: as many as the experiment suggests."""
    console: Console


class Experiment(Protocol):
    """The module of an experiment."""

    def find(self, bench: Bench) -> Findings:
        """Make what is missing, and return what all of it says."""


def run_named(name: str, argv: Sequence[str]) -> int:
    """Run the experiment ``name``, and return 1 if something of it failed."""
    module, what = NAMED[name]
    parser = Parser(f"paramserver experiment {name}", f"{what[0].upper()}{what[1:]}.")
    flags = Flags(NamedFlags, {}).parse(argv, parser)
    experiment: Experiment = importlib.import_module(module)
    bench = Bench(
        out=flags.out or Path("runs") / (f"{name}-quick" if flags.quick else name),
        jobs=flags.jobs or os.cpu_count() or 1,
        quick=flags.quick,
        seeds=flags.seeds,
        console=Console(stderr=True, highlight=False),
    )
    findings = experiment.find(bench)
    tell(findings, bench.out)
    return 1 if findings.failed else 0
