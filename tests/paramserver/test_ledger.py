from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.conservation import Conservation
from paramserver.errors import RecordError
from paramserver.ledger import COLUMNS, Ledger, StalenessStats, WorkerStaleness


def append(ledger: Ledger, **changes: Any) -> None:
    """Append a plain row, changed as given."""
    row = {
        "version": 1, "worker": 0, "incarnation": 0, "seq": 0, "clock": 1, "read_version": 0,
        "staleness": 0, "start": 0.0, "end": 1.0, "samples": 32, "loss": 0.5, "grad_norm": 0.25,
    }  # fmt: skip
    ledger.append(**{**row, **changes})


def test_a_row_holds_what_was_appended() -> None:
    ledger = Ledger()
    row = {
        "version": 2**40, "worker": 3, "incarnation": 1, "seq": 7, "clock": 8,
        "read_version": 2**40 - 5, "staleness": 4, "scale": 0.5, "start": 1.5, "end": 2.25,
        "samples": 64, "loss": 0.125, "grad_norm": 3.0,
    }  # fmt: skip

    ledger.append(**row)

    columns = ledger.columns()
    assert {name: column.item() for name, column in columns.items()} == {**row, "dropped": 0}
    assert tuple(columns) == COLUMNS.names


def test_a_ledger_grows_past_its_first_room() -> None:
    ledger = Ledger()

    for version in range(1, 3001):
        append(ledger, version=version)

    assert len(ledger) == 3000
    assert np.array_equal(ledger.columns()["version"], np.arange(1, 3001))


def test_columns_are_copies() -> None:
    ledger = Ledger()
    append(ledger)

    ledger.columns()["version"][0] = 99

    assert ledger.columns()["version"][0] == 1


def test_rows_are_those_since_a_number() -> None:
    ledger = Ledger()
    for version in range(1, 6):
        append(ledger, version=version)

    assert ledger.rows(3)["version"].tolist() == [4, 5]
    assert len(ledger.rows(5)) == 0


def test_drops_are_counted_by_reason_and_leave_staleness_alone() -> None:
    ledger = Ledger()
    append(ledger, dropped="stale", staleness=9)
    append(ledger, dropped="late", staleness=1)
    append(ledger, staleness=2)
    append(ledger, dropped="stale", staleness=8)

    columns = ledger.columns()

    assert ledger.drop_reasons() == {"stale": 2, "late": 1}
    assert [ledger.reasons()[code] for code in columns["dropped"]] == [
        "stale", "late", "applied", "stale",
    ]  # fmt: skip
    assert columns["scale"].tolist() == [0, 0, 1, 0]
    assert ledger.staleness.histogram() == {2: 1}


def test_a_saved_ledger_loads_and_goes_on(tmp_path: Path) -> None:
    ledger = Ledger()
    append(ledger, staleness=3, loss=float("nan"))
    append(ledger, dropped="late")
    ledger.save(tmp_path / "updates.npz")

    loaded = Ledger.load(tmp_path / "updates.npz")

    for each in (ledger, loaded):
        append(each, staleness=1, worker=2)
        append(each, dropped="late")
        append(each, dropped="stale")
    np.testing.assert_equal(loaded.columns(), ledger.columns())
    assert loaded.reasons() == ledger.reasons() == ("applied", "late", "stale")
    assert loaded.drop_reasons() == ledger.drop_reasons() == {"late": 2, "stale": 1}
    assert loaded.staleness.per_worker() == ledger.staleness.per_worker()


def test_an_empty_ledger_saves_and_loads(tmp_path: Path) -> None:
    Ledger().save(tmp_path / "updates.npz")

    assert len(Ledger.load(tmp_path / "updates.npz")) == 0


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.save(tmp_path / "updates.npz")
    append(ledger)

    ledger.save(tmp_path / "updates.npz")

    assert [file.name for file in tmp_path.iterdir()] == ["updates.npz"]
    assert len(Ledger.load(tmp_path / "updates.npz")) == 1


def test_a_save_that_fails_keeps_the_file_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "updates.npz"
    Ledger().save(path)
    before = path.read_bytes()

    def full_disk(*args: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)

    with pytest.raises(RecordError, match=r"^cannot write the ledger .*No space left"):
        Ledger().save(path)

    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    ledger = Ledger()
    append(ledger)
    ledger.save(good)
    (tmp_path / "short.npz").write_bytes(good.read_bytes()[:-100])
    np.savez(tmp_path / "foreign.npz", version=np.zeros(3))
    (tmp_path / "text.npz").write_text("not a ledger")

    for name in ("short.npz", "foreign.npz", "text.npz", "missing.npz"):
        with pytest.raises(RecordError, match=rf"^cannot read .*{name} as a ledger: "):
            Ledger.load(tmp_path / name)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1))
def test_streaming_statistics_are_those_of_the_whole(pushes: list[tuple[int, int]]) -> None:
    stats = StalenessStats()
    for worker, staleness in pushes:
        stats.add(worker, staleness)

    values = np.array([staleness for _, staleness in pushes])
    mine = np.array([staleness for worker, staleness in pushes if worker == pushes[0][0]])
    assert stats.pushes == len(values)
    assert stats.mean == pytest.approx(values.mean())
    assert stats.max == values.max()
    for q in (0.5, 0.95, 1.0):
        assert stats.quantile(q) == np.quantile(values, q, method="inverted_cdf")
    assert stats.histogram() == Counter(values.tolist())
    assert stats.per_worker()[pushes[0][0]] == WorkerStaleness(
        len(mine), pytest.approx(mine.mean()), mine.max()
    )


def test_a_record_says_what_staleness_was() -> None:
    stats = StalenessStats()
    for staleness in (0, 1, 1, 6):
        stats.add(0, staleness)

    assert stats.summary() == {
        "mean": 2.0, "max": 6, "p50": 1, "p95": 6, "histogram": {0: 1, 1: 2, 6: 1},
    }  # fmt: skip


def test_no_push_has_no_staleness() -> None:
    assert StalenessStats().summary() == {
        "mean": 0.0, "max": 0, "p50": 0, "p95": 0, "histogram": {},
    }  # fmt: skip


@pytest.mark.parametrize("q", [0.0, 1.5])
def test_a_quantile_outside_its_range_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match=r"^q must be above 0 and at most 1"):
        StalenessStats().quantile(q)


def test_conservation_of_two_workers_in_turn() -> None:
    law = Conservation(version=5)
    law.on_read(0, 5)
    law.on_read(1, 5)
    law.on_arrival(0, 5, 5)
    law.on_bump(6)
    law.on_read(0, 6)
    law.on_arrival(1, 5, 6)
    law.on_bump(7)

    assert law.report() == {
        "left": 2, "right": 2, "holds": True, "arrived": 1, "in_flight": 1, "abandoned": 0,
    }  # fmt: skip


def test_conservation_knows_what_each_worker_read() -> None:
    law = Conservation()
    law.on_read(0, 0)
    assert law.read_version(0) == 0

    law.on_arrival(0, 0, 0)

    assert law.read_version(0) is None


class _Events(Conservation):
    """Random but lawful events: workers read, push and die, and updates happen, at any time."""

    def __init__(self, choices: list[tuple[str, int]]) -> None:
        super().__init__()
        self.version = 0
        self.reads: dict[int, int] = {}
        for kind, worker in choices:
            if kind == "read":
                self.reads[worker] = self.version
                self.on_read(worker, self.version)
            elif kind == "die":
                self.reads.pop(worker, None)
                self.on_abandon(worker, self.version)
            elif kind == "push" and worker in self.reads:
                self.on_arrival(worker, self.reads.pop(worker), self.version)
            elif kind == "update":
                self.version += 1
                self.on_bump(self.version)


events = st.lists(
    st.tuples(st.sampled_from(["read", "read", "push", "update", "die"]), st.integers(0, 3))
).map(_Events)


@given(events)
def test_conservation_holds_whatever_happens_in_whatever_order(law: _Events) -> None:
    assert law.holds


@given(events, st.integers(1, 5))
def test_conservation_sees_a_push_that_claims_another_version(law: _Events, off: int) -> None:
    law.on_read(0, law.version)

    law.on_arrival(0, law.version + off, law.version)

    assert not law.holds


@given(events)
def test_conservation_sees_an_update_that_counts_twice(law: _Events) -> None:
    law.on_read(0, law.version)

    law.on_bump(law.version + 2)

    assert not law.holds
