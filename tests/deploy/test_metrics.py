"""What a run tells Ray, whose own classes make way for some that write down what they hear."""

from __future__ import annotations

import json
import re
from collections import Counter as Multiset
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import deploy
from deploy import metrics
from deploy.metrics import Metrics

FOLDER = Path(deploy.__file__).parent
STATUS: Mapping[str, Any] = {
    "run": "a", "updates": 10, "gradients": 12, "samples": 120, "gradient_bytes": 4800,
    "waited_s": 1.5, "failures": 0, "dropped": {"stale": 2}, "updates_per_s": 5.0, "loss": 0.5,
    "waiting": {0: ([1], 0.1)}, "live": [0, 1], "metrics": {"accuracy": 0.9},
    "staleness": {0: 3, 4: 2},
}  # fmt: skip


class Told:
    """What was told under one metric's name, by the tags that matter."""

    def __init__(self, kind: str, name: str, tags: Sequence[str]) -> None:
        self.kind, self.name, self.tags = kind, name, tuple(tags)
        self.values: dict[str, float] = {}
        self.seen: Multiset[float] = Multiset()

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        key = self._key(tags)
        self.values[key] = self.values.get(key, 0) + value

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.values[self._key(tags)] = value

    def observe(self, value: float, tags: Mapping[str, str]) -> None:
        self._key(tags)
        self.seen[value] += 1

    def _key(self, tags: Mapping[str, str]) -> str:
        assert set(tags) == set(self.tags)
        return "/".join(tags[tag] for tag in self.tags)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Told]:
    """What is told from now on, by the name it is exported under."""
    by_name: dict[str, Told] = {}

    def keep(kind: str, end: str) -> Any:
        def make(name: str, description: str, *rest: Any) -> Told:
            assert description.endswith(".")
            by_name[f"ray_{name}{end}"] = Told(kind, name, rest[-1])
            return by_name[f"ray_{name}{end}"]

        return make

    monkeypatch.setattr(metrics, "Counter", keep("counter", "_total"))
    monkeypatch.setattr(metrics, "Gauge", keep("gauge", ""))
    monkeypatch.setattr(metrics, "Histogram", keep("histogram", ""))
    return by_name


def test_counters_grow_by_what_is_new(told: dict[str, Told]) -> None:
    tell = Metrics("async")
    tell(STATUS)

    tell({**STATUS, "updates": 17, "dropped": {"stale": 2, "nonfinite": 1}})

    assert told["ray_paramserver_updates_total"].values == {"a/async": 17}
    assert told["ray_paramserver_wait_seconds_total"].values == {"a/async": 1.5}
    dropped = told["ray_paramserver_dropped_total"].values
    assert dropped == {"a/async/stale": 2, "a/async/nonfinite": 1}


def test_gauges_show_what_is_now(told: dict[str, Told]) -> None:
    Metrics("async")(STATUS)

    assert told["ray_paramserver_waiting"].values == {"a/async": 1}
    assert told["ray_paramserver_live"].values == {"a/async": 2}
    assert told["ray_paramserver_metric"].values == {"a/async/accuracy": 0.9}


def test_every_push_counts_in_the_histogram_of_staleness(told: dict[str, Told]) -> None:
    Metrics("async")(STATUS)

    assert told["ray_paramserver_staleness"].seen == {0: 3, 4: 2}


def test_a_synchronous_run_says_nothing_of_staleness(told: dict[str, Told]) -> None:
    Metrics("sync")({"run": "a", "updates": 1, "updates_per_s": 1.0})

    assert not told["ray_paramserver_staleness"].seen


def test_the_dashboard_names_metrics_that_exist(told: dict[str, Told]) -> None:
    Metrics("async")
    histograms = {
        f"{name}{end}"
        for name, one in told.items()
        if one.kind == "histogram"
        for end in ("_bucket", "_count", "_sum")
    }
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    text = json.dumps(dashboard)

    named = set(re.findall(r"ray_\w+", text))

    assert named - {"ray_paramserver_staleness_bucket"} <= set(told)
    assert named <= set(told) | histograms
    shown = {name.removesuffix("_bucket") for name in named}
    assert set(told) <= shown


def test_the_dashboard_groups_by_labels_that_exist(told: dict[str, Told]) -> None:
    Metrics("async")
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    for expression in expressions:
        (name,) = re.findall(r"ray_\w+", expression)
        known = {*told[name.removesuffix("_bucket")].tags, "le"}
        labels = re.findall(r"by \(([^)]*)\)", expression)
        assert {label.strip() for group in labels for label in group.split(",")} <= known


def test_the_page_lists_each_metric_with_its_kind_and_labels(told: dict[str, Told]) -> None:
    Metrics("async")
    rows = [
        [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        for line in (FOLDER / "METRICS.md").read_text().splitlines()
        if line.startswith("| `ray_")
    ]

    listed = {name: (kind, labels) for name, kind, labels, _ in rows}

    assert listed == {name: (one.kind, ", ".join(one.tags[2:])) for name, one in told.items()}
