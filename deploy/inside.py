"""The part of a run's page that looks inside the net: what `workers.diagnostics` saw, over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deploy import page, plots
from deploy.curves import Columns
from paramserver.record import AXES, Record

_MAX_LAYERS = 12
"""Layers that are drawn: weights before biases, and then some from the first to the last."""

_FIGURES = {
    "gradient": "gradient norm",
    "step": "step of an update / norm of the parameter",
}

_CAPTION = (
    "Norms on the same training samples each time. A gradient that is much smaller in one layer "
    "than in another vanishes there; a step of about 0.001 of the parameter's norm is usual."
)


def section(record: Record) -> Iterator[str]:
    """Return what a page shows of it, nothing if the net was not looked at."""
    yield from _curvature(record)
    lines = [line for line in record.metrics if line.get("kind") == "diagnostics"]
    if not lines:
        return
    for warning in (record.result or {}).get("warnings", []):
        yield page.note(warning)
    names = _shown(list(lines[-1]["gradient"]))
    legend = [(name, colour) for colour, name in enumerate(names)]
    rows: dict[str, list[plots.Series]] = {}
    for figure, title in _FIGURES.items():
        series = [plots.Series(n, c, _columns(lines, figure, n), n) for n, c in legend]
        rows[title] = [s for s in series if len(s.columns[s.key])]
    rows["gradient noise scale (samples)"] = [plots.Series("", 0, _scale(lines), "noise_scale")]
    rows = {title: series for title, series in rows.items() if series}
    yield page.figure(plots.progress("inside", rows), "Layers over time", _CAPTION, legend)
    yield page.table(["parameter", "norm", "gradient norm", "step"], list(_table(lines[-1])))
    units = lines[-1]["units"]
    if units:
        yield page.table(
            ["activation", "share at rest"],
            [
                (name, f"{100 * share:.1f} % {kind}")
                for name, of in units.items()
                for kind, share in of.items()
            ],
        )


def _curvature(record: Record) -> Iterator[str]:
    """Return what `paramserver diagnose` found of the run, if it was asked."""
    rows = []
    for line in record.metrics:
        if line.get("kind") == "curvature":
            count = f"{line['negative']:,}" if line["whole"] else f"{line['negative']:,} or more"
            low, high = _number(line["ritz"][0]), _number(line["ritz"][-1])
            where = f"{line['samples']:,} {line['data']}"
            rows.append((f"{line['version']:,}", where, low, high, count, line["verdict"]))
    if rows:
        head = ["version", "samples", "smallest eigenvalue", "largest", "negative", "this is"]
        yield page.table(head, rows, wide=True)


def _shown(names: Sequence[str]) -> list[str]:
    weights = [name for name in names if not name.endswith("bias")] or list(names)
    if len(weights) <= _MAX_LAYERS:
        return weights
    chosen = np.linspace(0, len(weights) - 1, _MAX_LAYERS).round().astype(int)
    return [weights[number] for number in chosen]


def _columns(lines: Sequence[Mapping[str, Any]], figure: str, name: str) -> Columns:
    there = [line for line in lines if line[figure].get(name) is not None]
    columns = {axis: np.array([line[axis] for line in there], dtype=float) for axis in AXES}
    return {**columns, name: np.array([line[figure][name] for line in there], dtype=float)}


def _scale(lines: Sequence[Mapping[str, Any]]) -> Columns:
    columns = {axis: np.array([line[axis] for line in lines], dtype=float) for axis in AXES}
    values = [math.nan if line["noise_scale"] is None else line["noise_scale"] for line in lines]
    return {**columns, "noise_scale": np.array(values, dtype=float)}


def _table(line: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, gradient in line["gradient"].items():
        yield (
            name,
            _number(line["weight"][name]),
            _number(gradient),
            _number(line["step"].get(name)),
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
