"""What happened to every push: one row each, and staleness statistics.

The `Ledger` is written by whoever orders the pushes, in that order, and is the record a run leaves
behind. `StalenessStats`, and `paramserver.conservation`, are kept up while the run goes, in
constant time a push, so that a report or a check never reads the rows again. `paramserver.recount`
does read them again: the same facts once more, from the rows alone.
"""

from __future__ import annotations

import enum
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramserver.errors import RecordError
from paramserver.measures import MEASURES

COLUMNS = np.dtype(
    [
        ("version", np.int64),
        ("worker", np.int32),
        ("incarnation", np.int32),
        ("seq", np.int64),
        ("clock", np.int64),
        ("read_version", np.int64),
        ("staleness", np.int64),
        ("scale", np.float64),
        ("dropped", np.int8),
        ("start", np.float64),
        ("end", np.float64),
        ("samples", np.int32),
        ("loss", np.float64),
        ("grad_norm", np.float64),
    ]
)
"""A push's row; `Ledger.append` says what each column holds."""

MOVES = np.dtype(
    [
        ("row", np.int64),
        ("kind", np.int8),
        ("worker", np.int32),
        ("incarnation", np.int32),
        ("time", np.float64),
    ]
)
"""A row of what happened between pushes; `Ledger.move` says what each column holds."""


class Move(enum.IntEnum):
    """What happened between two pushes."""

    JOIN = 0
    """A worker took part from then on."""
    LEAVE = 1
    """It did not any more, dead or done."""
    RESUME = 2
    """The run was stopped and went on later; everything that was in flight then is lost."""
    CANCEL = 3
    """What a worker was computing was cancelled, and it read anew."""


class Ledger:
    """One row a push, in the order the server decided about them. Not thread-safe."""

    def __init__(self) -> None:
        self._rows = np.zeros(1024, COLUMNS)
        self._num_rows = 0
        self._codes: dict[str, int] = {}  # drop reason -> code in the column, 1, 2, …
        self._drops: dict[str, int] = {}  # drop reason -> pushes
        self._moves: list[tuple[int, int, int, int, float]] = []
        self._measures: dict[str, NDArray[np.float64]] = {}
        self._num_loaded = 0  # rows that came from a file, with their measures
        self.staleness = StalenessStats()
        """Staleness of the applied pushes so far."""

    def __len__(self) -> int:
        return self._num_rows

    def append(
        self,
        *,
        version: int,
        worker: int,
        incarnation: int,
        seq: int,
        clock: int,
        read_version: int,
        staleness: int,
        start: float,
        end: float,
        samples: int,
        loss: float,
        grad_norm: float,
        scale: float = 1.0,
        dropped: str | None = None,
    ) -> None:
        """Add a row, in amortised constant time.

        Args:
            version: The version the push's update makes, whether it is applied now or is still
                being gathered; for a dropped push the version at its arrival.
            worker: Who computed the gradient.
            incarnation: Which life of that worker.
            seq: The push's number within that life.
            clock: Iterations the worker had ended, this one included.
            read_version: The version the gradient was computed on.
            staleness: The version at arrival minus ``read_version``.
            start: When the worker read, in seconds of the run.
            end: When the push arrived, in seconds of the run.
            samples: Samples the gradient is the mean of.
            loss: The loss at the parameters that were read.
            grad_norm: The gradient's 2-norm.
            scale: Factor on the gradient's step; a dropped push has 0 in its row.
            dropped: Why the push was not used; None if it was.
        """
        if self._num_rows == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        code = 0
        if dropped is None:
            self.staleness.add(worker, staleness)
        else:
            code, scale = self._count_drop(dropped), 0.0
        # One tuple into a structured row: 0.6 us; an item into each of 14 arrays takes 1.1 us.
        self._rows[self._num_rows] = (
            version, worker, incarnation, seq, clock, read_version, staleness,
            scale, code, start, end, samples, loss, grad_norm,
        )  # fmt: skip
        self._num_rows += 1

    def move(self, kind: Move, worker: int, incarnation: int, time: float) -> None:
        """Note at ``time``, in seconds of the run, what happened after the pushes so far."""
        self._moves.append((self._num_rows, kind, worker, incarnation, time))

    def moves(self) -> NDArray[np.void]:
        """Return what happened between pushes, in order, as an array of `MOVES`.

        ``row`` is the number of pushes that came before.
        """
        return np.array(self._moves, MOVES)

    def measure(self, measures: Mapping[str, NDArray[np.float64]]) -> None:
        """Add columns: a value for each applied push since the ledger was made or loaded.

        Where there are fewer values the rest is NaN, as in rows of dropped pushes and in rows of
        a resumed run from before it measured. They take the place of what was added before.
        """
        new = self._rows[self._num_loaded : self._num_rows]
        applied = self._num_loaded + np.flatnonzero(new["dropped"] == 0)
        for name, values in measures.items():
            column = np.full(self._num_rows, np.nan)
            before = self._measures.get(name, column)[: self._num_loaded]
            column[: len(before)] = before
            column[applied[: len(values)]] = values
            self._measures[name] = column

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return a copy of each column, by name; measures come last, where there are any."""
        columns: dict[str, NDArray[Any]] = {
            name: self._rows[name][: self._num_rows].copy() for name in COLUMNS.names or ()
        }
        for name, values in self._measures.items():
            columns[name] = np.full(self._num_rows, np.nan)
            columns[name][: len(values)] = values
        return columns

    def rows(self, start: int) -> NDArray[np.void]:
        """Return the rows from number ``start`` on, without a copy, as one structured array."""
        return self._rows[start : self._num_rows]

    def reasons(self) -> tuple[str, ...]:
        """Return what the codes in the column ``dropped`` mean: ``reasons()[code]``."""
        return ("applied", *self._codes)

    def drop_reasons(self) -> dict[str, int]:
        """Return how many pushes were dropped, by reason."""
        return dict(self._drops)

    def save(self, path: Path) -> None:
        """Write the columns, ``reasons`` and ``moves`` to the npz file ``path``, all or nothing.

        Raises:
            RecordError: The file cannot be written; one that was there is as it was.
        """
        arrays: dict[str, Any] = {
            **self.columns(),
            "reasons": np.array(self.reasons()),
            "moves": self.moves(),
        }
        written = path.with_name(f"{path.name}.tmp")
        try:
            with written.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            written.replace(path)
        except OSError as error:
            written.unlink(missing_ok=True)
            raise RecordError(f"cannot write the ledger {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read what `save` wrote; the ledger can be appended to.

        Raises:
            RecordError: The file is missing, damaged, or not a ledger.
        """
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                reasons = [str(reason) for reason in file["reasons"]]
                columns = {name: file[name] for name in COLUMNS.names or ()}
                moves = file["moves"].astype(MOVES).tolist()
                measures = {name: file[name] for name in MEASURES if name in file}
            rows = np.zeros(len(columns["version"]), COLUMNS)
            for name, column in columns.items():
                rows[name] = column
            dropped = [reasons[code] for code in rows["dropped"] if code]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise RecordError(f"cannot read {path} as a ledger: {error}") from error
        ledger = cls()
        ledger._codes = {reason: code for code, reason in enumerate(reasons) if code}
        for reason in dropped:
            ledger._count_drop(reason)
        applied = rows[rows["dropped"] == 0]
        for worker, staleness in applied[["worker", "staleness"]].tolist():
            ledger.staleness.add(worker, staleness)
        ledger._rows = np.concatenate([rows, ledger._rows])
        ledger._num_rows = ledger._num_loaded = len(rows)
        ledger._measures = measures
        ledger._moves = moves
        return ledger

    def __getstate__(self) -> dict[str, object]:
        """Pickle the rows there are, not the room for more."""
        return {**self.__dict__, "_rows": self._rows[: max(self._num_rows, 1)]}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take rows that may be read-only, as Ray's are."""
        self.__dict__.update(state)
        self._rows = self._rows.copy()

    def _count_drop(self, reason: str) -> int:
        self._drops[reason] = self._drops.get(reason, 0) + 1
        return self._codes.setdefault(reason, len(self._codes) + 1)


@dataclass(frozen=True, slots=True)
class WorkerStaleness:
    """Staleness of one worker's applied pushes."""

    pushes: int
    mean: float
    max: int


class StalenessStats:
    """Counts how often each staleness occurred; everything else follows from the counts."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # staleness -> pushes
        self._workers: dict[int, list[int]] = {}  # worker -> [pushes, sum, max]

    def add(self, worker: int, staleness: int) -> None:
        """Count an applied push."""
        assert staleness >= 0, f"worker {worker} read a version that was not there yet"
        self._counts[staleness] = self._counts.get(staleness, 0) + 1
        mine = self._workers.get(worker)
        if mine is None:
            self._workers[worker] = [1, staleness, staleness]
            return
        mine[0] += 1
        mine[1] += staleness
        mine[2] = max(mine[2], staleness)

    @property
    def pushes(self) -> int:
        """Pushes counted."""
        return sum(self._counts.values())

    @property
    def mean(self) -> float:
        """Mean staleness; 0 before the first push."""
        total = sum(staleness * pushes for staleness, pushes in self._counts.items())
        return total / max(self.pushes, 1)

    @property
    def max(self) -> int:
        """Largest staleness; 0 before the first push."""
        return max(self._counts, default=0)

    def quantile(self, q: float) -> int:
        """Return the least staleness that a share ``q`` of the pushes do not exceed; 0 if none."""
        if not 0 < q <= 1:
            raise ValueError(f"q must be above 0 and at most 1, got {q}")
        counts = self.histogram()
        up_to = zip(counts, accumulate(counts.values()), strict=True)
        return next((s for s, pushes in up_to if pushes >= q * self.pushes), 0)

    def histogram(self) -> dict[int, int]:
        """Return pushes by staleness, in order of staleness."""
        return dict(sorted(self._counts.items()))

    def per_worker(self) -> dict[int, WorkerStaleness]:
        """Return each worker's figures, in order of their numbers."""
        return {
            worker: WorkerStaleness(pushes, total / pushes, largest)
            for worker, (pushes, total, largest) in sorted(self._workers.items())
        }

    def summary(self) -> dict[str, object]:
        """Return what a run's record says about staleness."""
        return {
            "mean": self.mean,
            "max": self.max,
            "p50": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "histogram": self.histogram(),
        }
