from __future__ import annotations

import json

import pytest

from deploy.bench.figures import Report, figures


def test_times_are_compared_so_that_more_is_faster() -> None:
    (ours, peer) = figures("b", "s", "ms", {"ours": [2.0, 1.0, 4.0], "peer": [8.0]}, ["peer"])

    assert (ours.median, ours.min, ours.max, ours.ratio) == (2.0, 1.0, 4.0, 4.0)
    assert peer.ratio == 1.0


def test_rates_are_compared_so_that_more_is_faster() -> None:
    (ours, _) = figures("b", "s", "steps/s", {"ours": [30.0], "peer": [10.0]}, ["peer"])

    assert ours.ratio == pytest.approx(3.0)


def test_a_yardstick_that_did_not_run_is_left_out() -> None:
    (ours,) = figures("b", "s", "ms", {"ours": [1.0], "peer": []}, ["peer"])

    assert ours.ratio is None


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Report("b", json=True, quick=True).show("s", "ms", {"ours": [1.0], "peer": [2.0]}, ["peer"])

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["contender"], line["ratio"]) for line in lines] == [("ours", 2.0), ("peer", 1.0)]


def test_only_a_failure_of_ours_counts() -> None:
    report = Report("b", json=True, quick=False)

    report.failed("some peer", RuntimeError("no TensorPipe"))

    assert not report.ours_failed
