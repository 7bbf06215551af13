"""Check a ledger from its rows alone, sharing no code and no state with the server that wrote it.

A run's record says what its staleness was; anybody can recount it from ``updates.npz``:

    columns = Ledger.load(path).columns()
    assert recount(columns) == []
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def recount(
    columns: Mapping[str, NDArray[Any]], *, gathers: bool = False, first_version: int = 0
) -> list[str]:
    """Return what is wrong with a ledger, a sentence for each kind of violation.

    Checked are

    - staleness: the version at arrival minus the version read, and not negative;
    - order: every applied push makes the next version, and a dropped one leaves it. Where a rule
      gathers, versions rise by one at a time, and only after a gradient was taken;
    - once: no (worker, incarnation, seq) is applied twice;
    - reads: a worker reads the version of its own last push or a later one, so its reads never
      overlap and no update is missing in what it read (but where it fetches less often than it
      pushes, which is reported);
    - scales: above 0 if applied, 0 if dropped; and no push ends before it starts.

    Args:
        columns: As `Ledger.columns` returns them, rows in the server's order.
        gathers: Whether several pushes may make one update, `paramserver.rules.Rule.gathers`.
        first_version: The version before the first row.
    """
    version, read_version = columns["version"], columns["read_version"]
    if not len(version):
        return []
    applied = columns["dropped"] == 0
    arrival = version - applied  # the server's version when the push came in
    staleness, scale = columns["staleness"], columns["scale"]
    bad: dict[str, Mask] = {
        "staleness is not the version at arrival minus read_version": (
            staleness != arrival - read_version
        ),
        "read_version is later than the push's arrival": read_version > arrival,
        "version does not follow from the rows before": (
            _gathered_out_of_order(arrival, applied, first_version)
            if gathers
            else arrival != first_version + np.cumsum(applied) - applied
        ),
        "(worker, incarnation, seq) is applied again": _repeated(columns, applied),
        "read_version is older than the worker's own last push": _read_too_early(
            columns["worker"], read_version, arrival if gathers else version
        ),
        "scale is not above 0 where applied and 0 where dropped": (
            np.where(applied, scale <= 0, scale != 0)
        ),
        "end is before start": columns["end"] < columns["start"],
    }
    return [
        f"{what}: {mask.sum()} rows, the first is row {mask.argmax()}"
        for what, mask in bad.items()
        if mask.any()
    ]


def _gathered_out_of_order(arrival: NDArray[Any], applied: Mask, first_version: int) -> Mask:
    """Mark rows whose version at arrival is not the last row's, or one more without a gradient."""
    rise = np.diff(arrival, prepend=first_version)
    taken: NDArray[Any] = np.cumsum(applied) - applied  # gradients taken before each row
    starts = np.flatnonzero(rise)  # rows that are the first of a version
    taken_at_starts = np.concatenate([[0], taken[starts]])
    empty = np.zeros(len(arrival), bool)
    empty[starts] = np.diff(taken_at_starts) == 0
    return (rise < 0) | (rise > 1) | empty


def _repeated(columns: Mapping[str, NDArray[Any]], applied: Mask) -> Mask:
    """Mark applied rows whose identity an applied row before them has."""
    names = ("worker", "incarnation", "seq")
    ids = np.stack([columns[name].astype(np.int64) for name in names], axis=1)
    rows = np.flatnonzero(applied)
    first = np.unique(ids[rows], axis=0, return_index=True)[1]
    mask = applied.copy()
    mask[rows[first]] = False
    return mask


def _read_too_early(worker: NDArray[Any], read_version: NDArray[Any], seen: NDArray[Any]) -> Mask:
    """Mark rows read at a version below the one their worker's last push had already ``seen``."""
    order = np.argsort(worker, kind="stable")
    same = worker[order][1:] == worker[order][:-1]
    mask = np.zeros(len(worker), bool)
    mask[order[1:]] = same & (read_version[order][1:] < seen[order][:-1])
    return mask
