"""What the runs of a grid have found: a row a run, a row over seeds, and the metrics over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.findings import Findings, Table, file_name
from deploy.experiment.grid import Cell, Grid
from deploy.experiment.pool import Outcome, make_all
from deploy.experiment.results import Paths, Row, over_seeds, paths, spread
from deploy.plots import AXES

_MAX_LINES = 8
"""Lines in one plot; with more, the keys that come first have plots of their own."""

_SHOWN = {"updates", "gradients", "seconds", "seconds_to_target", "staleness_mean"}
"""Figures people read, beside final metrics."""

_REACHED = "seconds_to_target_reached"
"""Seeds that reached the target; the median is over those."""

CONVENTION = (
    "Staleness is the number of updates applied between the read a gradient was computed at and "
    "its own; gradients are those applied, without dropped ones. Lines are medians over seeds, "
    "bands from the least to the largest."
)


@dataclass(frozen=True, slots=True)
class Compared:
    """A grid whose runs have been made."""

    grid: Grid
    out: Path
    outcomes: Sequence[Outcome]

    @property
    def rows(self) -> list[Row]:
        """A row a run, in the grid's order; that of a failed one says why."""
        return [
            {
                **cell.varied,
                "seed": cell.seed,
                **(outcome.result or {"stopped_because": f"error: {outcome.error}"}),
                "folder": str(Path(cell.folder) / "run"),
            }
            for cell, outcome in zip(self.grid.cells, self.outcomes, strict=True)
        ]

    @property
    def summary(self) -> list[Row]:
        """A row for each combination: median, least and largest over seeds."""
        return over_seeds(self.rows, self.grid.varied)

    @property
    def failed(self) -> list[str]:
        """Runs that failed, and why."""
        return [f"{o.piece.name}: {o.error}" for o in self.outcomes if o.error]

    def table(self, title: str) -> Table:
        """Return what people read of the summary."""
        return Table(title, _brief(self.summary, self.grid.varied))

    def paths(self) -> list[Paths]:
        """Return the metrics of every run that was made, over time."""
        return [
            paths(self.out / cell.folder / "run")
            for cell, outcome in zip(self.grid.cells, self.outcomes, strict=True)
            if outcome.result is not None
        ]

    def charts(self) -> list[Chart]:
        """Draw every test metric against gradients, updates and seconds."""
        made = [
            cell
            for cell, outcome in zip(self.grid.cells, self.outcomes, strict=True)
            if outcome.result is not None
        ]
        parts: dict[str, dict[str, list[Cell]]] = {}
        apart = self._apart()
        for cell in made:
            part = _named(cell.varied, self.grid.varied[:apart])
            group = _named(cell.varied, self.grid.varied[apart:])
            parts.setdefault(part, {}).setdefault(group, []).append(cell)
        return [self._chart(part, groups) for part, groups in parts.items()]

    def _apart(self) -> int:
        """Return how many keys, from the first on, have plots of their own."""
        sizes = [len(self.grid.axes[key]) for key in self.grid.varied]
        for apart in range(len(sizes)):
            lines = 1
            for size in sizes[apart:]:
                lines *= size
            if lines <= _MAX_LINES:
                return apart
        return max(len(sizes) - 1, 0)

    def _chart(self, part: str, groups: Mapping[str, Sequence[Cell]]) -> Chart:
        found = {
            group: [paths(self.out / cell.folder / "run") for cell in cells]
            for group, cells in groups.items()
        }
        metrics = dict.fromkeys(m for runs in found.values() for run in runs for m in run)
        is_virtual = self.grid.mode == "simulate"
        rows = [over_axes(found, m, f"test {m}", is_virtual=is_virtual) for m in metrics]
        name = file_name(f"metrics-{part}" if part else "metrics")
        return Chart(name, part or "Test metrics", f"{CONVENTION} {self._laws()}", rows)

    def _laws(self) -> str:
        if self.grid.mode != "simulate":
            return "Real seconds of this machine."
        if "delay" in self.grid.varied:
            return "Delays as named."
        return f"Delays {self.facts()['delay']}."

    def facts(self) -> dict[str, str]:
        """Return what is the same in all runs."""
        settings = self.grid.cells[0].settings
        return {
            "mode": self.grid.mode,
            "seeds": ", ".join(map(str, self.grid.seeds)),
            **{
                key.replace("_", " "): self.grid.spell(key, value)
                for key, value in settings.items()
                if key not in ("mode", "seed", *self.grid.varied) and value is not None
            },
        }


def over_axes(
    found: Mapping[str, Sequence[Paths]],
    metric: str,
    title: str,
    *,
    is_virtual: bool,
    log_y: bool = False,
) -> list[Panel]:
    """Return a panel an axis, with a line for each group of runs that differ by their seeds.

    Args:
        found: What `deploy.experiment.results.paths` returns of each run, by group.
        metric: What is drawn.
        title: Of the first panel.
        is_virtual: Whether seconds are.
        log_y: Whether the metric has a logarithmic axis.
    """
    panels = []
    for axis, label in AXES.items():
        lines = []
        for colour, (group, runs) in enumerate(found.items()):
            points = [(run[metric][axis], run[metric][metric]) for run in runs if metric in run]
            if (band := spread(points)) is not None:
                x, y, low, high = band
                lines.append(Line(group or "all", colour, x, y, low, high))
        name = "virtual seconds" if axis == "seconds" and is_virtual else label
        panels.append(Panel(title if axis == "gradients" else "", name, lines, log_y=log_y))
    return panels


def compare(
    grids: Mapping[str, Grid], out: Path, *, jobs: int, console: Console
) -> dict[str, Compared]:
    """Make the runs of grids that are missing below ``out``, in a folder for each by its name.

    The grids have one mode. One without a name has no folder of its own.

    Raises:
        UsageError: A grid says something that cannot be.
        RecordError: Runs of other settings are there.
        KeyboardInterrupt: Ctrl-C; what was finished by then is kept.
    """
    pieces = [
        replace(
            cell.piece,
            name=", ".join(filter(None, [name, cell.piece.name])),
            folder=str(Path(name) / cell.folder),
        )
        for name, grid in grids.items()
        for cell in grid.cells
    ]
    at_once = all(grid.mode == "simulate" for grid in grids.values())
    outcomes = iter(make_all(pieces, out, jobs=jobs, console=console, at_once=at_once))
    return {
        name: Compared(grid, out / name, [next(outcomes) for _ in grid.cells])
        for name, grid in grids.items()
    }


def findings(compared: Compared, title: str) -> Findings:
    """Return all that is told of a grid on its own."""
    grid, summary = compared.grid, compared.summary
    return Findings(
        title=title,
        about=f"{len(grid.cells)} runs: {len(summary)} settings, {len(grid.seeds)} seeds each",
        facts=compared.facts(),
        tables=[compared.table("Medians over seeds, with the least and the largest")],
        charts=compared.charts(),
        failed=compared.failed,
        files={"cells": compared.rows, "summary": summary},
    )


def _brief(summary: Sequence[Row], varied: Sequence[str]) -> list[Row]:
    """Leave out what people need not read, such as a second column of the same numbers."""
    stems = [key.removesuffix("_median") for key in summary[0] if key.endswith("_median")]
    shown = [s for s in stems if s.startswith("final_") or s in _SHOWN]
    if all(row.get("updates_median") == row.get("gradients_median") for row in summary):
        shown = [stem for stem in shown if not stem.startswith("updates")]
    counts = ["failed"] if any(row["failed"] for row in summary) else []
    return [
        {
            **{key: row[key] for key in (*varied, *counts)},
            **{s.replace("_", " "): _with_range(row, s) for s in shown},
            **({"reached": row[_REACHED]} if _REACHED in row else {}),
        }
        for row in summary
    ]


def _with_range(row: Mapping[str, Any], stem: str) -> object:
    """Write a median, and with what changes most also the least and the largest."""
    middle, low, high = (row.get(f"{stem}_{part}") for part in ("median", "min", "max"))
    if stem.startswith("final_") and middle is not None and low != high:
        return f"{middle:.4g} [{low:.4g}, {high:.4g}]"
    return middle


def _named(varied: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {varied[key]}" for key in keys)
