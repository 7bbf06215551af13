"""A run's figures as metrics of its Ray cluster, which exports them for Prometheus.

Ray calls them ``ray_paramserver_…``, with ``_total`` behind counters, and exports them every ten
seconds on each node's metrics port. ``deploy/METRICS.md`` lists them, ``deploy/grafana.json`` shows
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_STALENESS_BOUNDS = [0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5, 128.5, 256.5, 1024.5]
"""Between whole numbers: a push with staleness 4 is below 4.5. Ray takes no bound of 0."""

_COUNTERS: Mapping[str, str] = {
    "updates": "Updates of the parameters.",
    "gradients": "Gradients that became part of an update.",
    "samples": "Samples those gradients were computed on.",
    "gradient_bytes": "Bytes of those gradients.",
    "waited_s": "Seconds that workers have waited for others, added up.",
    "failures": "Processes that were lost and replaced.",
}
"""Figures that only grow, by their name in the run's status."""

_NAMES: Mapping[str, str] = {"waited_s": "wait_seconds"}
"""What a figure is called among metrics, if not as in the status."""


class Metrics:
    """Shows where one run stands as Ray metrics. Used by one thread, while Ray is there."""

    def __init__(self, mode: str) -> None:
        """Describe metrics of a run in ``mode``; Ray is not needed yet."""
        tags = ("run", "mode")
        self._mode = mode
        self._counters = {
            name: Counter(f"paramserver_{_NAMES.get(name, name)}", doc, tags)
            for name, doc in _COUNTERS.items()
        }
        self._dropped = Counter(
            "paramserver_dropped", "Gradients that were refused, by reason.", (*tags, "reason")
        )
        self._rate = Gauge("paramserver_updates_per_second", "Updates a second, lately.", tags)
        self._loss = Gauge("paramserver_loss", "Mean loss of the latest gradients.", tags)
        self._waiting = Gauge("paramserver_waiting", "Workers that wait for others now.", tags)
        self._live = Gauge("paramserver_live", "Workers that take part now.", tags)
        self._metric = Gauge(
            "paramserver_metric", "The task's metrics on held-out data.", (*tags, "metric")
        )
        self._staleness = Histogram(
            "paramserver_staleness",
            "Updates between a gradient's parameters and its own.",
            _STALENESS_BOUNDS,
            tags,
        )
        self._told: dict[str, float] = {}

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Tell Ray where the run stands."""
        tags = {"run": str(status["run"]), "mode": self._mode}
        for name, counter in self._counters.items():
            self._grow(counter, name, status.get(name, 0), tags)
        for reason, count in status.get("dropped", {}).items():
            self._grow(self._dropped, f"dropped {reason}", count, {**tags, "reason": reason})
        self._rate.set(status["updates_per_s"], tags)
        self._waiting.set(len(status.get("waiting", ())), tags)
        if "live" in status:
            self._live.set(len(status["live"]), tags)
        if "loss" in status:
            self._loss.set(status["loss"], tags)
        for name, value in status.get("metrics", {}).items():
            self._metric.set(value, {**tags, "metric": name})
        for staleness, pushes in status.get("staleness", {}).items():
            for _ in range(pushes):
                self._staleness.observe(staleness, tags)

    def _grow(self, counter: Counter, name: str, value: float, tags: dict[str, str]) -> None:
        more = value - self._told.get(name, 0)
        if more > 0:
            counter.inc(more, tags)
            self._told[name] = value
