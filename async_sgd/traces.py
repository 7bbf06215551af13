"""Delays that were measured: of a run's record, or of a text file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.record import RunFolder

Recorded: TypeAlias = dict[int, NDArray[np.float64]] | NDArray[np.float64]
"""Delays in seconds by worker, in their order; or one list for all workers."""

_LEAST_PUSHES = 20
"""Pushes of every worker that it takes to say something about its delays."""


@dataclass(frozen=True, slots=True)
class Pushes:
    """What a run's record says of when its pushes were made, in the order of their arrival."""

    delays: NDArray[np.float64]
    """Seconds from the read to the arrival, above 0, shape ``(n,)``."""
    worker: NDArray[np.integer]
    """Whose each is, shape ``(n,)``."""
    num_workers: int
    """All of them have pushed."""
    per_s: float
    """Pushes a second while the run went."""
    staleness: Mapping[int, int]
    """Of those that were applied: how many had which."""


def read_pushes(folder: Path) -> Pushes:
    """Read when the pushes of a recorded run were made, but those that came after its end.

    Raises:
        RecordError: There is no ledger, or too little in it.
    """
    ledger = Ledger.load(RunFolder(folder).updates)
    rows = ledger.rows(0)
    reasons = np.array(ledger.reasons())[rows["dropped"]]
    rows = rows[reasons != "ended"]  # a worker that is told to stop may have been held up by that
    delays, worker = rows["end"] - rows["start"], rows["worker"]
    num_workers = int(worker.max(initial=-1)) + 1
    least = int(np.bincount(worker, minlength=num_workers).min()) if num_workers else 0
    if least < _LEAST_PUSHES:
        raise RecordError(
            f"{folder} has {least} pushes of one worker: it takes {_LEAST_PUSHES} of each to fit a "
            "delay law"
        )
    if not (delays > 0).all():
        raise RecordError(f"{folder} has pushes that took no time: no law fits them")
    seconds = float(rows["end"].max() - rows["start"].min())
    return Pushes(delays, worker, num_workers, len(rows) / seconds, ledger.staleness.histogram())


def without_common(pushes: Pushes) -> NDArray[np.float64]:
    """Return delays divided by the median of those around them, about two of each worker.

    Where processes share processors, something slows all workers at once, and what they have in
    common changes no order: it makes delays longer, not pushes staler. A straggler alone moves no
    median.
    """
    each_side = pushes.num_workers
    ends = np.pad(pushes.delays, each_side, mode="reflect")
    around = np.median(sliding_window_view(ends, 2 * each_side + 1), axis=1)
    relative: NDArray[np.float64] = pushes.delays / around
    return relative


def read_own_delays(folder: Path) -> dict[int, NDArray[np.float64]]:
    """Read each worker's delays from a run's record, without what all had in common.

    They are in seconds, such that with them as many pushes a second are made as in the run.

    Raises:
        RecordError: There is no ledger, or too little in it.
    """
    pushes = read_pushes(folder)
    relative = without_common(pushes)
    own = {worker: relative[pushes.worker == worker] for worker in range(pushes.num_workers)}
    scale = sum(1 / float(delays.mean()) for delays in own.values()) / pushes.per_s
    return {worker: delays * scale for worker, delays in own.items()}


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
