"""Clusters to compare ways of training on: how long gradients take, and the server.

What each computes in a second if all wait for the slowest, and if nobody waits, is known; here it
is measured with gradients of 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from async_sgd.delays import DELAYS, DelayLaw
from async_sgd.rules import RULES
from deploy.experiment import theory
from deploy.experiment.findings import Claim, file_name
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.quadratics import Still, simulation
from deploy.experiment.results import Row

WORKERS = 8


@dataclass(frozen=True, slots=True)
class Cluster:
    """What takes time on a cluster of `WORKERS` workers."""

    delay: str
    """Law of a gradient's seconds, as ``--delay`` takes it."""
    service: float = 0.0
    """Seconds of the server for each push."""

    @property
    def law(self) -> DelayLaw:
        """The law of a gradient's seconds."""
        return DELAYS.parse(self.delay)

    def flags(self, *, has_server: bool) -> Mapping[str, str]:
        """Return the flags of a run on it."""
        serves = {"service": f"constant:time={self.service}"} if self.service and has_server else {}
        return {"delay": self.delay, **serves}

    @property
    def together(self) -> float:
        """Gradients a second if all wait for the slowest, and then for the server."""
        return WORKERS / (theory.slowest_of(self.law, WORKERS) + WORKERS * self.service)

    @property
    def free(self) -> float:
        """Gradients a second if nobody waits; with a server that takes time, of equal workers."""
        each = WORKERS / theory.gradients_a_second(self.law, WORKERS)
        return WORKERS / (each + self.service)


CLUSTERS: Mapping[str, Cluster] = {
    "equal workers": Cluster("constant"),
    "two fast, two slow": Cluster("constant:factors=0.5/0.5/1/1/1/1/2/2"),
    "memoryless": Cluster("exponential"),
    "stragglers": Cluster("straggler:time=0.8,factor=6,probability=0.05"),
    "busy server": Cluster("constant", service=0.1),
}
"""All but the second are of equal workers who take 1 s on average."""


_WINDOW = 150.0
"""Virtual seconds in which gradients are counted."""


def pieces(clusters: Mapping[str, Cluster], *, runs: int) -> list[Piece]:
    """Return what measures each cluster, once all together and once free, in ``runs`` runs."""
    return [
        Piece(
            f"{name}, {rule}, {runs} runs",
            f"times/{file_name(name)}-{rule}",
            {
                "cluster": name,
                "delay": cluster.delay,
                "service": cluster.service,
                "rule": rule,
                "workers": WORKERS,
                "runs": runs,
                "window": _WINDOW,
            },
            make_rates,
        )
        for name, cluster in clusters.items()
        for rule in ("bsp", "asp")
    ]


def make_rates(settings: Settings, folder: Path) -> Settings:
    """Return the gradients a second of each run, in a window that begins once they have settled."""
    rates = []
    begin, window = 30.0, settings["window"]
    for seed in range(settings["runs"]):
        run = simulation(
            settings["workers"],
            DELAYS.parse(settings["delay"]),
            RULES.parse(settings["rule"]),
            seed=seed,
            gradients=Still(),
            service=DELAYS.parse(f"constant:time={settings['service']}"),
        )
        run.run(until=begin)
        before = run.sequencer.gradients
        run.run(until=begin + window)
        rates.append((run.sequencer.gradients - before) / window)
    return {"rates": rates}


@dataclass(frozen=True, slots=True)
class Rate:
    """Gradients a second, measured, and what they should be."""

    cluster: str
    is_free: bool
    measured: float
    error: float
    expected: float

    @classmethod
    def of(cls, piece: Piece, result: Settings) -> Rate:
        """Read the result of a piece."""
        rates = np.array(result["rates"])
        name, is_free = piece.settings["cluster"], piece.settings["rule"] == "asp"
        cluster = CLUSTERS[name]
        return cls(
            name,
            is_free,
            float(rates.mean()),
            float(rates.std(ddof=1) / math.sqrt(len(rates))),
            cluster.free if is_free else cluster.together,
        )


def rows(rates: Sequence[Rate]) -> list[Row]:
    """Return a row a cluster."""
    return [
        {
            "cluster": name,
            "delays": cluster.delay,
            "server": cluster.service,
            "all wait": together.measured,
            "theory": together.expected,
            "nobody waits": free.measured,
            "its theory": free.expected,
            "as many times": free.measured / together.measured,
        }
        for name, cluster, together, free in _pairs(rates)
    ]


def claims(rates: Sequence[Rate]) -> Iterator[Claim]:
    """Claim what theory says of time."""
    for name, _, together, free in _pairs(rates):
        for rate in (together, free):
            what = "without waiting" if rate.is_free else "waiting for the slowest"
            tolerance = max(3 * rate.error, 0.01 * rate.expected)
            yield Claim(
                f"{name}: {rate.expected:.4g} gradients a second {what}, to 3 standard errors or "
                "1 %",
                abs(rate.measured - rate.expected) <= tolerance,
                f"{rate.measured:.4g} ± {rate.error:.2g}",
            )
        gain, expected = free.measured / together.measured, free.expected / together.expected
        error = gain * math.hypot(free.error / free.measured, together.error / together.measured)
        yield Claim(
            f"{name}: who waits for nobody computes {expected:.4g} times as many, to 3 standard "
            "errors or 1 %",
            abs(gain - expected) <= max(3 * error, 0.01 * expected),
            f"{gain:.4g} ± {error:.2g}",
        )


def _pairs(rates: Sequence[Rate]) -> Iterator[tuple[str, Cluster, Rate, Rate]]:
    for name, cluster in CLUSTERS.items():
        of = {rate.is_free: rate for rate in rates if rate.cluster == name}
        if len(of) == 2:
            yield name, cluster, of[False], of[True]
