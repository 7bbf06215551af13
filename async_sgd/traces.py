"""Delays that were measured: of a run's record, or of a text file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.record import RunFolder

Recorded: TypeAlias = dict[int, NDArray[np.float64]] | NDArray[np.float64]
"""Delays in seconds by worker, in their order; or one list for all workers."""


def read_delays(path: Path) -> Recorded:
    """Read delays from the folder of a run's record, or from a text file.

    Raises:
        RecordError: There are none, or something in the file is not a delay; says where.
    """
    recorded = _read_ledger(RunFolder(path).updates) if path.is_dir() else _read_text(path)
    if len(recorded) == 0:
        raise RecordError(f"the trace {path} has no delays")
    return recorded


def _read_ledger(path: Path) -> dict[int, NDArray[np.float64]]:
    columns = Ledger.load(path).columns()
    workers, start, end = columns["worker"], columns["start"], columns["end"]
    wrong = np.flatnonzero(~((start <= end) & np.isfinite(start) & np.isfinite(end)))
    if len(wrong) > 0:
        row = wrong[0]
        raise RecordError(
            f"{path}, row {row}: worker {workers[row]} cannot have taken from {start[row]} s to "
            f"{end[row]} s"
        )
    by_worker = np.argsort(workers, kind="stable")
    names, first = np.unique(workers[by_worker], return_index=True)
    delays = np.split((end - start)[by_worker], first)[1:]  # nothing comes before the first
    return dict(zip(names.tolist(), delays, strict=True))


def _read_text(path: Path) -> Recorded:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(
            f"cannot read the trace {path}, a run's folder or a text file: {error}"
        ) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        return {}
    number, first = numbered[0]
    if "," not in first:
        return np.array([_seconds(line, f"{path}, line {number}") for number, line in numbered])
    if first.replace(" ", "") != "worker,seconds":
        raise RecordError(
            f"{path}, line {number}: the header must be worker,seconds, got {first!r}"
        )
    recorded: dict[int, list[float]] = {}
    for number, line in numbered[1:]:
        worker, _, seconds = line.partition(",")
        if not worker.strip().isdecimal():
            raise RecordError(f"{path}, line {number}: {worker!r} is not the number of a worker")
        delay = _seconds(seconds, f"{path}, line {number}, worker {int(worker)}")
        recorded.setdefault(int(worker), []).append(delay)
    return {worker: np.array(delays) for worker, delays in recorded.items()}


def _seconds(text: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise RecordError(f"{where}: {text!r} is not a number of seconds") from None
    if not 0 <= seconds < math.inf:
        raise RecordError(f"{where}: a delay must be 0 s or more and finite, got {text.strip()}")
    return seconds
