from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploy.curves import applied_pushes, counters, curves, staleness_counts
from paramserver.ledger import Ledger
from paramserver.record import Record


def make_record(pushes: list[dict[str, Any]], **changes: Any) -> Record:
    """Return the record of a killed run with a row for each of ``pushes``."""
    ledger = Ledger()
    for push in pushes:
        row = {
            "version": 1, "worker": 0, "incarnation": 0, "seq": 0, "clock": 1, "read_version": 0,
            "staleness": 0, "start": 0.0, "end": 1.0, "samples": 32, "loss": 0.5, "grad_norm": 1.0,
        }  # fmt: skip
        ledger.append(**{**row, **push})
    plain = {"path": Path("run"), "config": {}, "result": None, "metrics": []}
    return Record(**{**plain, "updates": ledger.columns(), **changes})


def test_time_starts_at_the_first_read_and_goes_on_after_a_resume() -> None:
    clock = [(3.0, 3.5), (3.2, 4.0), (0.4, 1.0), (0.5, 1.25)]  # the server started anew after two
    record = make_record([{"start": start, "end": end} for start, end in clock])

    pushes = applied_pushes(record)

    assert pushes is not None
    assert pushes["seconds"].tolist() == [0.5, 1.0, 1.0, 1.25]


def test_dropped_pushes_are_not_counted() -> None:
    record = make_record([{"version": 1}, {"version": 1, "dropped": "late"}, {"version": 2}])

    columns = counters(record)

    assert columns is not None
    assert columns["gradients"].tolist() == [1, 2]
    assert columns["updates"].tolist() == [1, 2]


def test_the_loss_of_every_push_is_the_train_curve() -> None:
    lines = [{"kind": "train", "gradients": 1, "updates": 1, "seconds": 1.0, "loss": 9.0}]
    pushes = [{"loss": 0.5}, {"loss": 0.25}]

    ((_, of_pushes, _),) = curves(make_record(pushes, metrics=lines))
    ((_, logged, _),) = curves(make_record([], metrics=lines))

    assert of_pushes["loss"].tolist() == [0.5, 0.25]
    assert logged["loss"].tolist() == [9.0]


def test_metrics_come_loss_first_and_null_is_nan() -> None:
    at = {"kind": "test", "gradients": 2, "updates": 1, "seconds": 1.0}
    lines = [{**at, "accuracy": 0.5, "loss": 1.0}, {**at, "accuracy": None, "loss": 2.0}]

    (_, _, first), (label, columns, _) = curves(make_record([], metrics=lines))

    assert (first, label) == ("loss", "test accuracy")
    assert np.array_equal(columns["accuracy"], [0.5, np.nan], equal_nan=True)


def test_the_batch_size_is_a_curve_where_it_follows_the_noise() -> None:
    line = {"kind": "train", "gradients": 1, "updates": 1, "seconds": 1.0, "batch_size": 20}
    config = {"adaptive_batch": {"name": "cabs"}}
    pushes = [{"samples": 16}, {"samples": 24}]

    _, (label, of_pushes, key) = curves(make_record(pushes, config=config))
    ((_, logged, other),) = curves(make_record([], config=config, metrics=[line]))

    assert label == "train batch size"
    assert of_pushes[key].tolist() == [16, 24]
    assert logged[other].tolist() == [20]


def test_staleness_is_counted_from_the_ledger_where_the_result_is_missing() -> None:
    pushes = [{"staleness": 0}, {"staleness": 2}, {"staleness": 2}]
    summed_up = {"staleness": {"histogram": {"7": 3}}}

    assert staleness_counts(make_record(pushes)) == {0: 1, 2: 2}
    assert staleness_counts(make_record(pushes, result=summed_up)) == {7: 3}
    assert staleness_counts(make_record(pushes, updates=None)) == {}
