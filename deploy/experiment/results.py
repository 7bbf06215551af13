"""Figures of finished runs, as rows: one a run, or one over the seeds of the same settings."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy import curves
from paramserver.durable import write_durably
from paramserver.errors import RecordError
from paramserver.record import AXES, read_record
from workers.config import Target

Row = dict[str, Any]

Array = NDArray[np.float64]

Paths = Mapping[str, Mapping[str, Array]]
"""By metric: its values, and their places on every axis."""

_MAX_POINTS = 120
"""Points of a line over seeds."""


def figures(folder: Path, until: str | None) -> Row:
    """Return the figures of the run in ``folder``.

    Args:
        folder: Its record.
        until: The target of the run; None has none. Where it was reached is told as the first
            evaluation that reached it, with the gradients, updates and seconds it took until then.

    Raises:
        RecordError: The run has not ended.
    """
    record = read_record(folder)
    if record.result is None:
        raise RecordError(f"{folder} holds a run that has not ended")
    result = record.result
    row: Row = {key: result[key] for key in ("updates", "gradients", "samples", "seconds")}
    row["gradients_per_s"] = result["gradients_per_s"]
    for when in ("final", "best"):
        row |= {
            f"{when}_{name}": value
            for name, value in result[when].items()
            if name not in curves.NOT_METRICS
        }
    if until is not None:
        target = Target.parse(until)
        tests = (line for line in record.metrics if line.get("kind") == "test")
        at = next((line for line in tests if _reaches(target, line)), dict.fromkeys(AXES))
        row |= {f"{axis}_to_target": at[axis] for axis in AXES}
    if "staleness" in result:
        row |= {f"staleness_{key}": result["staleness"][key] for key in ("mean", "p95", "max")}
    if "dropped" in result:
        row["dropped"] = sum(result["dropped"].values())
    return {**row, "stopped_because": result["stopped_because"]}


def _reaches(target: Target, line: Mapping[str, Any]) -> bool:
    return line[target.metric] is not None and target.reached(dict(line))


def over_seeds(rows: Sequence[Row], varied: Sequence[str]) -> list[Row]:
    """Return a row for each combination of ``varied``: median, least and largest of each figure.

    Rows of runs that failed have no figures, and are counted.
    """
    summary = []
    numbers = _numbers(rows, {*varied, "seed"})
    for group, members in by_group(rows, varied).items():
        line: Row = {
            **dict(zip(varied, group, strict=True)),
            "seeds": len(members),
            "failed": sum("updates" not in row for row in members),
        }
        for key in numbers:
            values = [row[key] for row in members if row.get(key) is not None]
            if key.endswith("_to_target"):
                line[f"{key}_reached"] = len(values)
            for name, of in (("median", statistics.median), ("min", min), ("max", max)):
                line[f"{key}_{name}"] = of(values) if values else None
        summary.append(line)
    return summary


def by_group(rows: Iterable[Row], varied: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows of each combination of ``varied``, in the order they came."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in varied), []).append(row)
    return groups


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the columns that any of them has; what is missing is empty.

    Raises:
        RecordError: It cannot be written.
    """
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, text.getvalue().encode())
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error}") from error


def paths(folder: Path) -> Paths:
    """Return each test metric of the run in ``folder`` over time, with its place on every axis."""
    record = read_record(folder)
    found: dict[str, dict[str, Array]] = {}
    for label, columns, key in curves.curves(record):
        if label.startswith("test "):
            finite = np.isfinite(columns[key])
            found[key] = {name: column[finite] for name, column in columns.items()}
    return found


def spread(lines: Sequence[tuple[Array, Array]]) -> tuple[Array, Array, Array, Array] | None:
    """Return x, median, least and largest y of lines that were measured at different x.

    They are taken between the last line's first x and the first one's last, and straight between
    two of their points. None: there is no such range.
    """
    lines = [(x, y) for x, y in lines if len(x)]
    if not lines:
        return None
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if low > high:
        return None
    longest = max(len(x) for x, _ in lines)
    x = np.linspace(low, high, min(longest, _MAX_POINTS))
    table = np.stack([np.interp(x, *line) for line in lines])
    return x, np.median(table, axis=0), table.min(axis=0), table.max(axis=0)


def _numbers(rows: Iterable[Row], without: set[str]) -> list[str]:
    """Return the columns that hold numbers."""
    return list(
        dict.fromkeys(
            key
            for row in rows
            for key, value in row.items()
            if key not in without and isinstance(value, int | float)
        )
    )
