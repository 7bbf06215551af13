"""Ways of training that are compared with each other, and what came of each on a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from deploy.experiment.charts import Chart
from deploy.experiment.clusters import WORKERS
from deploy.experiment.comparison import CONVENTION, Compared, over_axes
from deploy.experiment.results import Paths, Row, figures

STEPS = 8
"""Of a worker between two pushes, with local steps."""
BOUND = 2
"""Of ssp."""
PAYS = 0.9
"""Asynchrony pays where it takes at most this share of the time."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way of training."""

    rule: str
    optimizer: str = "sgd:lr={lr:g}"
    local: str | None = None
    inner: float = 1.0
    """What rates are divided by: AdamW's are about the length of a step."""
    has_server: bool = True

    def flags(self, rate: float) -> dict[str, str]:
        """Return the flags of a run at ``rate``."""
        lr = rate / self.inner
        local = {} if self.local is None else {"local": self.local.format(lr=lr)}
        return {"rule": self.rule, "optimizer": self.optimizer.format(lr=lr), **local}

    @property
    def steps(self) -> int:
        """Gradients in a push."""
        return 1 if self.local is None else STEPS


ALL_REDUCE = "all-reduce"
WAYS: Mapping[str, Way] = {
    "bsp": Way("bsp"),
    ALL_REDUCE: Way("bsp", has_server=False),
    "k-of-n": Way(f"k-of-n:k={WORKERS - 2}"),
    "ssp": Way(f"ssp:bound={BOUND}"),
    "asp": Way("asp"),
    "local sgd": Way("bsp", "sgd:lr=1", f"sgd:steps={STEPS},lr={{lr:g}}"),
    "diloco": Way("bsp", "nesterov:lr=0.7", f"adamw:steps={STEPS},lr={{lr:g}}", inner=20),
}
ASYNCHRONOUS = ("ssp", "asp")


def measured(part: Compared, target: str, steps: int) -> list[Row]:
    """Return the figures of every run that was made, with what the target took.

    ``gradients`` are those of all ``steps`` of a push.
    """
    rows = []
    for cell, outcome in zip(part.grid.cells, part.outcomes, strict=True):
        if outcome.result is None:
            continue
        row = {"seed": cell.seed, **figures(part.out / cell.folder / "run", target)}
        row["pushes"], row["pushes_to_target"] = row["gradients"], row["gradients_to_target"]
        for name in ("gradients", "gradients_to_target", "gradients_per_s"):
            if row[name] is not None:
                row[name] *= steps
        rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class Part:
    """One way on one cluster, at its rate."""

    cluster: str
    way: str
    rate: float
    made: Compared
    measured: Sequence[Row]
    """A row a run."""

    def to_target(self, axis: str) -> float:
        """Return the median over seeds; infinite if most did not reach it."""
        took = [row[f"{axis}_to_target"] for row in self.measured]
        return median(math.inf if t is None else t for t in took)

    @property
    def rows(self) -> list[Row]:
        """A row a run, for other programs."""
        told = {"cluster": self.cluster, "way": self.way, "rate": self.rate}
        return [{**told, **row} for row in self.measured]

    @property
    def row(self) -> Row:
        """What people read."""
        others = [
            name for name in self.measured[0] if name.startswith("final_") and name != "final_loss"
        ]
        return {
            "cluster": self.cluster,
            "way": self.way,
            "rate": self.rate,
            "seconds": _spread([row["seconds_to_target"] for row in self.measured]),
            "gradients": _or_none(self.to_target("gradients")),
            "pushes": _or_none(self.to_target("pushes")),
            "gradients/s": median(row["gradients_per_s"] for row in self.measured),
            "staleness": median(row["staleness_mean"] for row in self.measured),
            "final loss": _spread([row["final_loss"] for row in self.measured]),
            **{
                name.removeprefix("final_"): median(row[name] for row in self.measured)
                for name in others
            },
        }


def _spread(values: Sequence[float | None]) -> str | None:
    """Write the median, least and largest; None if most values are missing."""
    known = [math.inf if value is None else value for value in values]
    middle = median(known)
    if math.isinf(middle):
        return None
    ends = ("never" if math.isinf(end) else f"{end:.3g}" for end in (min(known), max(known)))
    return f"{middle:.3g} [{', '.join(ends)}]"


def by_way(parts: Sequence[Part]) -> dict[str, dict[str, Part]]:
    """Return the parts of each cluster of which none failed, by way.

    All-reduce is bsp where there is no other.
    """
    found: dict[str, dict[str, Part]] = {}
    for part in parts:
        found.setdefault(part.cluster, {})[part.way] = part
    for ways in found.values():
        if "bsp" in ways:
            ways.setdefault(ALL_REDUCE, ways["bsp"])
    return {cluster: ways for cluster, ways in found.items() if len(ways) == len(WAYS)}


def verdicts(parts: Sequence[Part]) -> Iterator[Row]:
    """Yield for each cluster what not to wait has changed, and whether it pays."""
    for cluster, ways in by_way(parts).items():
        waiting = ways[ALL_REDUCE]
        best = min((ways[way] for way in ASYNCHRONOUS), key=lambda part: part.to_target("seconds"))
        shares = {
            axis: best.to_target(axis) / waiting.to_target(axis)
            if math.isfinite(waiting.to_target(axis))
            else math.nan
            for axis in ("seconds", "gradients")
        }
        took, limit = best.to_target("seconds"), PAYS * waiting.to_target("seconds")
        yield {
            "cluster": cluster,
            "all-reduce, seconds": _or_none(waiting.to_target("seconds")),
            "not waiting, seconds": _or_none(took),
            "by": best.way,
            **{f"{axis}, as a share": _or_none(share) for axis, share in shares.items()},
            "asynchrony pays": math.isfinite(took) and took <= limit,
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def in_words(parts: Sequence[Part]) -> str:
    """Return the verdicts as sentences."""
    rows = list(verdicts(parts))
    pays = [row["cluster"] for row in rows if row["asynchrony pays"]]
    not_so = [row["cluster"] for row in rows if not row["asynchrony pays"]]
    share = f"{100 * (1 - PAYS):.0f} %"
    return (
        f"Asynchrony does not pay (saves less than {share} of the time against all-reduce) with: "
        f"{'; '.join(not_so) or 'none of these'}. It pays with: {'; '.join(pays) or 'none'}."
    )


def chart(parts: Sequence[Part]) -> Chart:
    """Draw the test loss of every way, a row a cluster, against the three axes."""
    rows = []
    for cluster, ways in by_way(parts).items():
        found: dict[str, list[Paths]] = {}
        for name, way in WAYS.items():  # one that is not drawn here keeps its colour
            runs = ways[name].made.paths() if ways[name].way == name else []
            found[name] = [_of_all_steps(run, way.steps) for run in runs]
        title = f"{cluster}: test loss"
        rows.append(over_axes(found, "loss", title, is_virtual=True, log_y=True))
    caption = (
        f"Each way at its own best rate; all-reduce is drawn where it is not bsp. {CONVENTION}"
    )
    return Chart("ways", "Test loss of every way, on every cluster", caption, rows)


def _of_all_steps(run: Paths, steps: int) -> Paths:
    return {
        metric: {**columns, "gradients": steps * columns["gradients"]}
        for metric, columns in run.items()
    }
