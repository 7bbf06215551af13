from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paramserver.ledger import Ledger
from paramserver.recount import recount

Columns = dict[str, np.ndarray[Any, Any]]


def ledger(rows: list[tuple[int, int, int, str | None]]) -> Columns:
    """Make columns of (worker, version, read_version, drop reason); all else is in order."""
    book = Ledger()
    for seq, (worker, version, read_version, dropped) in enumerate(rows):
        arrival = version - (dropped is None)
        book.append(
            version=version, worker=worker, incarnation=0, seq=seq, clock=seq,
            read_version=read_version, staleness=arrival - read_version, start=0.0, end=1.0,
            samples=1, loss=0.0, grad_norm=0.0, dropped=dropped,
        )  # fmt: skip
    return book.columns()


@pytest.fixture
def columns() -> Columns:
    return ledger([(0, 1, 0, None), (1, 2, 0, None), (0, 2, 1, "stale"), (0, 3, 2, None)])


@pytest.fixture
def gathered() -> Columns:
    return ledger([(0, 1, 0, None), (1, 1, 0, None), (2, 1, 0, "late"), (2, 2, 1, None)])


def test_a_ledger_in_order_has_nothing_wrong(columns: Columns, gathered: Columns) -> None:
    assert recount(columns) == []
    assert recount(gathered, gathers=True) == []
    assert recount(ledger([])) == []


def test_a_resumed_ledger_starts_at_its_version() -> None:
    columns = ledger([(0, 8, 7, None)])

    assert recount(columns, first_version=7) == []
    assert recount(columns) == [
        "version does not follow from the rows before: 1 rows, the first is row 0"
    ]


@pytest.mark.parametrize(
    ("column", "row", "value", "violation"),
    [
        ("staleness", 1, 0, "staleness is not the version at arrival minus read_version"),
        ("read_version", 3, 3, "read_version is later than the push's arrival"),
        ("version", 1, 3, "version does not follow from the rows before"),
        ("version", 2, 3, "version does not follow from the rows before"),
        ("seq", 3, 0, "(worker, incarnation, seq) is applied again"),
        ("read_version", 3, 1, "read_version is older than the worker's own last push"),
        ("scale", 2, 1.0, "scale is not above 0 where applied and 0 where dropped"),
        ("scale", 0, 0.0, "scale is not above 0 where applied and 0 where dropped"),
        ("end", 2, -1.0, "end is before start"),
    ],
)
def test_a_wrong_number_is_found(
    columns: Columns, column: str, row: int, value: float, violation: str
) -> None:
    columns[column][row] = value

    assert f"{violation}: 1 rows, the first is row {row}" in recount(columns)


@pytest.mark.parametrize("versions", [[1, 1, 2, 2], [1, 3, 2, 3], [1, 1, 0, 3], [2, 2, 1, 3]])
def test_a_gathered_ledger_out_of_order_is_found(gathered: Columns, versions: list[int]) -> None:
    gathered["version"][:] = versions

    assert any("version does not follow" in line for line in recount(gathered, gathers=True))


def test_a_push_that_was_dropped_may_be_applied_under_its_own_number(columns: Columns) -> None:
    columns["seq"][3] = columns["seq"][2]

    assert recount(columns) == []
