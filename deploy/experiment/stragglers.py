"""Stragglers: what waiting costs, against order statistics, and how long to wait for.

First time alone, on gradients of 0: the mean time of an update under rules that wait for all, for
the first K, or for nobody, under four laws. Then a net: fewer gradients in an update make updates
quicker and worse, so the time to a loss is shortest for some K in between.

Late workers are not stopped here: they first end what will be dropped. So the K-th of N delays is
the time of the first update alone; what later ones take is known for exponential delays.

Sources: Chen et al., "Revisiting Distributed Synchronous SGD", 2016, arXiv:1604.00981 (backup
workers). Dutta et al., "Slow and Stale Gradients Can Win the Race", AISTATS 2018, arXiv:1803.01113.
Ho et al., NIPS 2013 (SSP).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from async_sgd.delays import DELAYS
from async_sgd.rules import RULES
from deploy.experiment import theory
from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.comparison import CONVENTION, Compared, compare
from deploy.experiment.findings import Claim, Findings, Table, file_name
from deploy.experiment.grid import Grid
from deploy.experiment.named import Bench
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.pool import make_all
from deploy.experiment.quadratics import Still, simulation
from deploy.experiment.results import Row

_WORKERS = 16
_NEEDED = 12
"""Gradients in an update with backup workers, which are the others."""
_BATCH = 4
"""Gradients in an update that waits for nobody."""

_LAWS = (
    "exponential",
    "shifted-exponential:shift=0.5,mean=0.5",
    "pareto:alpha=2.5,scale=0.6",
    "gamma:mean=1,cv=0.5",
)
"""All of mean 1."""

_BOUNDS = (0, 1, 4, 16)
_BSP = "bsp"
_BACKUP = f"k-of-n:k={_NEEDED}"
_FREE = f"k-of-n:k={_BATCH},mode=batch-async"

_SYNC = (1, 2, 4, 8, 12, 16)
_ASYNC = (1, 2, 4, 8, 16)
_NAMES = ("first K, others dropped", "first K of any version")
_TARGET = "loss<=0.2"


def find(bench: Bench) -> Findings:
    """Measure times, then train."""
    runs = bench.seeds or (3 if bench.quick else 20)
    laws = _LAWS[:1] if bench.quick else _LAWS
    window = 20 if bench.quick else 150
    rules = [_BSP, _BACKUP, _FREE, *(f"ssp:bound={bound}" for bound in _BOUNDS)]
    pieces = [_piece(law, rule, runs, window) for law in laws for rule in rules]
    firsts = [_piece(law, _BACKUP, 10 * runs, 0) for law in laws]
    outcomes = make_all([*pieces, *firsts], bench.out, jobs=bench.jobs, console=bench.console)
    failed = [f"{o.piece.name}: {o.error}" for o in outcomes if o.error]
    timings = [_Timing.of(o.piece.settings, o.done) for o in outcomes if o.result is not None]

    grids = _grids(bench)
    compared = compare(grids, bench.out, jobs=bench.jobs, console=bench.console)
    waiting, free = compared["waiting"], compared["free"]
    return Findings(
        title="Stragglers",
        about="What an update costs that waits for all, for some or for nobody",
        facts={
            "workers": str(_WORKERS),
            "delays": f"of mean 1: {', '.join(laws)}; of the net exponential",
            "times": f"{runs} runs a row, {window} mean delays each",
            "net": f"digits, 32 hidden units, batches of 4, plain SGD, {_TARGET}",
            "seeds of the net": ", ".join(map(str, grids["free"].seeds)),
            "staleness": "updates applied between the read of a gradient and its own",
        },
        claims=[*_time_claims(timings), *_order_claims(timings), *_optimum_claims(waiting, free)],
        tables=[
            Table(
                "Virtual seconds of an update",
                [timing.row for timing in timings],
                "times",
                "For later updates with backup workers there is a formula under exponential "
                "delays alone: late workers end what will be dropped before they help.",
            ),
            waiting.table(f"Rounds of the first K of {_WORKERS}, the others dropped as late"),
            free.table("The first K gradients of whatever version, nobody waits"),
        ],
        charts=[_chart(waiting, free)],
        failed=[*failed, *(line for part in compared.values() for line in part.failed)],
        files={
            f"{kind}-{name}": rows
            for name, part in compared.items()
            for kind, rows in (("cells", part.rows), ("summary", part.summary))
        },
    )


# ---------------------------------------------------------------- time alone


def _piece(law: str, rule: str, runs: int, window: int) -> Piece:
    settings = {
        "law": law,
        "rule": rule,
        "workers": _WORKERS,
        "runs": runs,
        "window": window,
    }
    when = "first update" if window == 0 else f"{window} mean delays"
    name = f"{rule}, {law}, {when}"
    folder = file_name(f"{rule}-{law}-{window}")
    return Piece(name, f"times/{folder}", settings, make_times)


def make_times(settings: Settings, folder: Path) -> Settings:
    """Return the mean time of an update in each run.

    With a window of 0 that is the first update's, else of those in a window that begins once the
    start is forgotten: on average as many end in it as in any other time as long.
    """
    times = []
    for seed in range(settings["runs"]):
        run = simulation(
            settings["workers"],
            DELAYS.parse(settings["law"]),
            RULES.parse(settings["rule"]),
            seed=seed,
            gradients=Still(),
            updates=1 if settings["window"] == 0 else None,
        )
        if settings["window"] == 0:
            run.run()
            times.append(run.now)
            continue
        begin = 30.0
        run.run(until=begin)
        before = run.sequencer.version
        run.run(until=begin + settings["window"])
        times.append(settings["window"] / (run.sequencer.version - before))
    return {"times": times}


@dataclass(frozen=True, slots=True)
class _Timing:
    """Measured times of one rule under one law."""

    law: str
    rule: str
    is_first: bool
    """Of first updates alone."""
    mean: float
    error: float
    expected: float | None
    """None: there is no formula."""

    @classmethod
    def of(cls, settings: Settings, result: Settings) -> _Timing:
        times = np.array(result["times"])
        is_first = settings["window"] == 0
        error = float(times.std(ddof=1) / math.sqrt(len(times)))
        law, rule = settings["law"], settings["rule"]
        expected = _expected(law, rule, is_first=is_first)
        return cls(law, rule, is_first, float(times.mean()), error, expected)

    @property
    def off(self) -> float | None:
        """How far from what is expected, in standard errors; None without either."""
        if self.expected is None or self.error == 0:  # as of few runs with equal counts
            return None
        return (self.mean - self.expected) / self.error

    @property
    def row(self) -> Row:
        return {
            "delays": self.law,
            "rule": self.rule,
            "updates": "first" if self.is_first else "later",
            "seconds": self.mean,
            "error": self.error,
            "theory": self.expected,
            "off (errors)": self.off,
        }


def _expected(law: str, rule: str, *, is_first: bool) -> float | None:
    delay = DELAYS.parse(law)
    if rule == _BACKUP and is_first:
        return theory.order_statistic(delay, _NEEDED, _WORKERS)
    if rule == _BACKUP:
        return theory.time_with_backups(_NEEDED, _WORKERS) if law == "exponential" else None
    if rule == _BSP:
        return theory.order_statistic(delay, _WORKERS, _WORKERS)
    if rule == _FREE:
        return _BATCH * theory.mean_delay(delay) / _WORKERS
    if rule == "ssp:bound=0":  # a round of all, each of whose gradients is an update
        return theory.order_statistic(delay, _WORKERS, _WORKERS) / _WORKERS
    return None


def _time_claims(timings: Sequence[_Timing]) -> Iterator[Claim]:
    for t in timings:
        if t.expected is not None and t.off is not None:
            which = "first update" if t.is_first else "an update"
            yield Claim(
                f"{t.law}, {t.rule}: {which} takes {t.expected:.4g} s, to 3 standard errors",
                abs(t.off) <= 3,
                f"{t.mean:.4g} ± {t.error:.2g}, {abs(t.off):.2f} errors off",
            )


def _order_claims(timings: Sequence[_Timing]) -> Iterator[Claim]:
    """Claim that a looser bound of SSP is never slower, and no bound beats waiting for nobody."""
    for law in dict.fromkeys(t.law for t in timings):
        times = [t.mean for t in timings if t.law == law and t.rule.startswith("ssp")]
        fastest = theory.mean_delay(DELAYS.parse(law)) / _WORKERS
        falls = all(loose <= tight for tight, loose in itertools.pairwise(times))
        yield Claim(
            f"{law}: under SSP a gradient takes less time the looser the bound, down to "
            f"{fastest:.4g} s with none",
            falls and times[-1] >= 0.98 * fastest,
            ", ".join(f"{t:.4g} at {bound}" for bound, t in zip(_BOUNDS, times, strict=False)),
        )


# ---------------------------------------------------------------- a net


def _grids(bench: Bench) -> dict[str, Grid]:
    run = {
        "task": "digits:hidden=32",
        "optimizer": "sgd:lr=0.3",
        "workers": _WORKERS,
        "batch_size": 4,
        "delay": "exponential",
        "until": _TARGET,
        "epochs": 0.5 if bench.quick else 10,
        "evaluate_every_s": 2,
        "on_nan": "drop",
    }
    seeds = tuple(range(1 if bench.quick else min(bench.seeds or 3, 10)))
    waiting = [f"k-of-n:k={k}" for k in (_SYNC[::3] if bench.quick else _SYNC)]
    free = [f"k-of-n:k={k},mode=batch-async" for k in (_ASYNC[::2] if bench.quick else _ASYNC)]
    return {
        "waiting": Grid(axes={"rule": waiting}, seeds=seeds, run=run),
        "free": Grid(axes={"rule": free}, seeds=seeds, run=run),
    }


def _by_k(compared: Compared) -> dict[int, Row]:
    """Return the row over seeds of each K."""
    sizes = [int(rule.partition("k=")[2].partition(",")[0]) for rule in compared.grid.axes["rule"]]
    return dict(zip(sizes, compared.summary, strict=True))


def _optimum_claims(*compared: Compared) -> Iterator[Claim]:
    for what, part in zip(_NAMES, compared, strict=True):
        times = {}
        for k, row in _by_k(part).items():
            is_usual = row.get("seconds_to_target_reached", 0) > len(part.grid.seeds) / 2
            times[k] = row["seconds_to_target_median"] if is_usual else math.inf
        best = min(times, key=lambda k: times[k])
        ends = (min(times), max(times))
        yield Claim(
            f"{what}: the time to {_TARGET} is shortest for a K in between",
            best not in ends and times[best] < min(times[end] for end in ends),
            ", ".join(
                f"K={k} {f'{time:.0f} s' if time < math.inf else 'never'}"
                for k, time in times.items()
            ),
        )


def _chart(*compared: Compared) -> Chart:
    panels = []
    for axis, label in (
        ("seconds", "virtual seconds"),
        ("gradients", "gradients"),
        ("updates", "updates"),
    ):
        lines = []
        for colour, (name, part) in enumerate(zip(_NAMES, compared, strict=True)):
            rows = _by_k(part)
            reached = {k: r for k, r in rows.items() if r.get(f"{axis}_to_target_median")}
            middle, low, high = (
                [r[f"{axis}_to_target_{part}"] for r in reached.values()]
                for part in ("median", "min", "max")
            )
            lines.append(Line(name, colour, list(reached), middle, low, high))
        panels.append(
            Panel(f"{label} to {_TARGET}", "gradients in an update", lines, log_x=True, log_y=True)
        )
    caption = f"Delays exponential, mean 1. {CONVENTION}"
    return Chart("time-to-loss", "Time to a loss", caption, [panels])
