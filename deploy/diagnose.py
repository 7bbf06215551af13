"""`paramserver diagnose DIR`: what kind of point a run ended at, and what its net looks like."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.bar import Bar
from deploy.curvature import Curvature, Ground, curvature
from deploy.flags import Flags, Parser, UsageError
from deploy.report import write_report
from deploy.trained import Trained, trained
from paramserver.checkpoint import Checkpoint
from paramserver.record import AXES, RunFolder, read_record
from workers.diagnostics import Diagnosis, Diagnostics
from workers.task import Task, build_data, trained_model
from workers.tasks import task as find_task

At = Literal["end", "best"]
Part = Literal["train", "test", "validation"]

_ENDS = 3
"""Eigenvalues of either end that are told."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Where to look, and how closely."""

    at: At | None = None
    """Version to look at, the ``end`` or the ``best``; unless given, the best if it was kept."""

    data: Part = "train"
    """Samples the loss is of."""

    samples: int = 2000
    """At most so many of them."""

    steps: int = 40
    """Products with the Hessian, at most: the more, the closer are the ends of its spectrum."""

    seed: int = 0
    """Draws the samples and the vector that Lanczos' method begins with."""

    def __post_init__(self) -> None:
        if self.at is not None and self.at not in get_args(At):
            raise ValueError(f"at must be {' or '.join(get_args(At))}, got {self.at!r}")
        if self.data not in get_args(Part):
            raise ValueError(f"data must be {', '.join(get_args(Part))}, got {self.data!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class DiagnoseFlags(DiagnoseConfig):
    """What `paramserver diagnose` can be told."""

    task: str | None = None
    """What was trained, if the record cannot say."""

    jobs: int | None = None
    """Worker processes; as many as there are cores unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be 1 or more, got {self.jobs}")


@dataclass(frozen=True, slots=True)
class Found:
    """What a version of a run looks like."""

    diagnosis: Diagnosis
    """The net from inside, at `Diagnosis.version`."""
    curvature: Curvature


def diagnose(
    folder: Path,
    config: DiagnoseConfig | None = None,
    *,
    task: Task | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Look at the net that the run recorded in ``folder`` ended with, and log it in the record.

    Args:
        folder: Of the record.
        config: Where to look.
        task: What was trained, if the record cannot name it: a task made in Python.
        jobs: Worker processes; as many as there are cores unless given.
        progress: Told how many products with the Hessian are done, of how many.

    Raises:
        RecordError: The record lacks something, or is of another model; says what.
        PluginError: It names a task that does not exist here.
        TaskError: The task cannot be built, or its loss failed or is not twice differentiable.
        ValueError: The run has no such samples.
        ResourceError: A worker was lost, or Ray cannot be started.
    """
    config = config or DiagnoseConfig()
    run = trained(folder, task)
    run.check_part(config.data)
    checkpoint = run.checkpoint(best=None if config.at is None else config.at == "best")
    diagnosis = _inside(run, checkpoint)
    ground = Ground(
        run.task, run.layout, checkpoint.params, config.data, config.samples, config.seed
    )
    jobs = jobs or os.cpu_count() or 1
    found = Found(diagnosis, curvature(ground, steps=config.steps, jobs=jobs, progress=progress))
    RunFolder(folder).log({**_axes(folder, checkpoint.version), **_line(found, config.data)})
    return found


def run(argv: Sequence[str]) -> int:
    """Look at the run that ``argv`` names, and print what is there."""
    parser = Parser(
        "paramserver diagnose DIR",
        "What kind of point a run ended at: a minimum or a saddle, by both ends of the Hessian's\n"
        "spectrum, whose products worker processes compute; and its net from inside, by layer.",
        "For example:\n"
        "  paramserver diagnose runs/today\n"
        "  paramserver diagnose runs/today --at end --data test --steps 100",
    )
    wants_help = bool({"-h", "--help"} & set(argv))
    if not wants_help and (not argv or argv[0].startswith("-")):
        raise UsageError("name the folder of a run's record first, then flags (see --help)")
    flags = Flags(DiagnoseFlags, {}).parse(argv if wants_help else argv[1:], parser)
    folder = Path(argv[0])
    given = None if flags.task is None else find_task(flags.task)
    try:
        with Bar("Hessian") as bar:
            found = diagnose(folder, flags, task=given, jobs=flags.jobs, progress=bar)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(_pairs(facts(found, flags.data)))
    console.print(layers(found))
    for warning in found.diagnosis.warnings.values():
        console.print(Text(f"warning: {warning}"))
    console.print(Text(f"report: {write_report([folder])}"))
    return 0


def facts(found: Found, part: str) -> dict[str, str]:
    """Return what there is to say of the whole net, by name."""
    curved, spectrum = found.curvature, found.curvature.spectrum
    ritz, off = spectrum.ritz.tolist(), spectrum.residuals.tolist()
    low, high = slice(0, _ENDS), slice(max(_ENDS, len(ritz) - _ENDS), None)
    largest = max(curved.lowest, key=lambda name: curved.lowest[name])
    noise = found.diagnosis.noise_scale
    return {
        "version": f"{found.diagnosis.version:,}",
        "loss": f"{curved.loss:.4g}, of {curved.num_samples:,} {part} samples",
        "gradient": f"norm {curved.gradient:.3g}, relative {curved.relative_gradient:.3g}",
        "smallest eigenvalues": _eigenvalues(ritz[low], off[low]),
        "largest eigenvalues": _eigenvalues(ritz[high], off[high]) if ritz[high] else "the same",
        "negative eigenvalues": ("" if spectrum.is_whole else "at least ")
        + f"{spectrum.num_negative:,} of {curved.dimensions:,}",
        "lowest direction": f"{100 * curved.lowest[largest]:.0f} % of it in {largest}",
        "stable rate": f"plain gradient descent is stable below lr={curved.largest_rate:.3g}",
        "noise scale": "hidden by noise" if math.isnan(noise) else f"{noise:,.0f} samples",
        "this is": curved.verdict,
    }


def layers(found: Found) -> Table:
    """Return the table of what each parameter and activation looks like."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("parameter", "norm", "gradient", "of the lowest direction"):
        table.add_column(name, justify="left" if name == "parameter" else "right")
    for name, layer in found.diagnosis.layers.items():
        share = f"{100 * found.curvature.lowest[name]:.1f} %"
        table.add_row(name, f"{layer.weight:.3g}", f"{layer.gradient:.3g}", share)
    for name, units in found.diagnosis.units.items():
        table.add_row(name, f"{100 * units.share:.1f} % {units.kind}")
    return table


def _inside(run: Trained, checkpoint: Checkpoint) -> Diagnosis:
    data = build_data(run.task)
    model = trained_model(run.task, checkpoint, seed=run.seed, data=data)
    look = Diagnostics(run.task, model, run.layout, data.train, seed=run.seed)
    return look.look(checkpoint.version)


def _axes(folder: Path, version: int) -> dict[str, Any]:
    """Return where ``version`` lies on the axes of the record's plots."""
    before = [line for line in read_record(folder).metrics if line["updates"] <= version]
    last: Mapping[str, Any] = before[-1] if before else {}
    return {**{axis: last.get(axis, 0) for axis in AXES}, "updates": version}


def _line(found: Found, part: str) -> dict[str, Any]:
    """Return it as a line of metrics.jsonl."""
    curved, spectrum = found.curvature, found.curvature.spectrum
    return {
        "kind": "curvature",
        "version": found.diagnosis.version,
        "data": part,
        "samples": curved.num_samples,
        "loss": curved.loss,
        "gradient": curved.gradient,
        "relative_gradient": curved.relative_gradient,
        "ritz": spectrum.ritz.tolist(),
        "residuals": spectrum.residuals.tolist(),
        "negative": spectrum.num_negative,
        "whole": spectrum.is_whole,
        "verdict": curved.verdict,
    }


def _eigenvalues(values: Sequence[float], off: Sequence[float]) -> str:
    return ", ".join(
        f"{value:.4g}" + (f" ± {error:.1g}" if error > 1e-3 * abs(value) else "")
        for value, error in zip(values, off, strict=True)
    )


def _pairs(values: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, Text(value))
    return table
