"""Waiting, not waiting and local steps on one task, each with as many gradients: which pays when.

Every way of training is given the same few learning rates, and takes on each cluster the one that
reaches the target first with a seed of its own. Then it is run with other seeds, to the end of the
budget, and told by the time, gradients and pushes that the target took.

All-reduce is what ``bsp`` is here: an update is a mean of one gradient of each worker and takes as
long as the slowest. They differ where the server takes time, which all-reduce has none of. Messages
take no time, so what local steps save is told as pushes.

Sources: those of the rules in `async_sgd.rules` and of the local steps in `workers.local`; that all
are tuned alike, from Dutta et al., AISTATS 2018, arXiv:1803.01113, whose comparison is in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from deploy.experiment import clusters
from deploy.experiment.clusters import CLUSTERS, WORKERS, Cluster, Rate
from deploy.experiment.comparison import Compared, compare
from deploy.experiment.findings import Claim, Findings, Table, file_name
from deploy.experiment.grid import Grid
from deploy.experiment.named import Bench
from deploy.experiment.pool import make_all
from deploy.experiment.results import Row
from deploy.experiment.ways import (
    ALL_REDUCE,
    BOUND,
    STEPS,
    WAYS,
    Part,
    by_way,
    chart,
    in_words,
    measured,
    verdicts,
)
from deploy.flags import UsageError
from workers.task import build_data
from workers.tasks import task as find_task

_TASK = "digits:hidden=32"
_TARGET = "loss<=0.2"
_BATCH = 8
_GRADIENTS = 1800
_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
_TUNING_SEED = 100


def find(bench: Bench) -> Findings:
    """Measure times, choose learning rates, and train."""
    if bench.trained and bench.until is None:
        raise UsageError(
            f"what value of which metric {bench.trained['task']} is to reach must be said, such as "
            "--until loss<=0.5"
        )
    target = bench.until or _TARGET
    compared = _clusters(bench)
    pieces = clusters.pieces(compared, runs=3 if bench.quick else 20)
    outcomes = make_all(pieces, bench.out, jobs=bench.jobs, console=bench.console)
    rates = [Rate.of(o.piece, o.done) for o in outcomes if o.result is not None]
    failed = [f"{o.piece.name}: {o.error}" for o in outcomes if o.error]

    run = _run(bench)
    seeds = tuple(range(1 if bench.quick else bench.seeds or 3))
    tried = _made(bench, {name: _tried(bench, run, *name) for name in _combinations(compared)})
    best = {
        name: _best(part, target, name[1])
        for name, part in tried.items()
        if any(outcome.result is not None for outcome in part.outcomes)
    }
    made = _made(
        bench,
        {name: _grid(run, *name, rates=[best[name]], seeds=seeds, stage="runs") for name in best},
    )
    parts = [
        Part(cluster, way, best[cluster, way], part, measured(part, target, WAYS[way].steps))
        for (cluster, way), part in made.items()
        if any(outcome.result is not None for outcome in part.outcomes)
    ]
    return Findings(
        title="When asynchrony pays",
        about="Waiting for all, for some or for nobody, and local steps, with as many gradients",
        facts={
            "task": f"{run['task']}, {WORKERS} workers, batches of {_BATCH}",
            "budget": f"{run['epochs']:.3g} epochs, which are {_gradients(bench):,} gradients",
            "target": target,
            "learning rates tried": f"{', '.join(map(str, _RATES))} for all, a twentieth for AdamW",
            "chosen": f"by the time to the target, on each cluster, with seed {_TUNING_SEED}",
            "all-reduce": "as bsp, but for the server, of which it has none; messages take no time",
            "local steps": f"{STEPS} between two pushes; DiLoCo with AdamW, outer Nesterov 0.7",
            "staleness": "updates applied between the read of a gradient and its own",
            "seeds": ", ".join(map(str, seeds)),
        },
        claims=[*clusters.claims(rates), *_stale_claims(parts), *_claims(parts)],
        tables=[
            Table("Gradients a second", clusters.rows(rates), "times"),
            Table(
                f"To {target}: medians over seeds, with the least and the largest",
                [part.row for part in parts],
                "ways",
                "Where more than half of the seeds did not reach it there is no time.",
            ),
            Table("Which pays", list(verdicts(parts)), "verdicts", in_words(parts)),
        ],
        charts=[chart(parts)],
        failed=[*failed, *(f for part in (*tried.values(), *made.values()) for f in part.failed)],
        files={"cells": [row for part in parts for row in part.rows]},
    )


# ---------------------------------------------------------------- runs


def _clusters(bench: Bench) -> dict[str, Cluster]:
    few = ("busy server",) if bench.quick else tuple(CLUSTERS)
    return {name: CLUSTERS[name] for name in few}


def _combinations(compared: Mapping[str, Cluster]) -> Iterator[tuple[str, str]]:
    """Yield cluster and way; all-reduce is made where it is not bsp once more."""
    for cluster, what in compared.items():
        for way in WAYS:
            if way != ALL_REDUCE or what.service:
                yield cluster, way


def _gradients(bench: Bench) -> int:
    return 2 * WORKERS * STEPS if bench.quick else _GRADIENTS


def _run(bench: Bench) -> dict[str, Any]:
    """Return the flags that all runs have."""
    trained = bench.trained or {"task": _TASK}
    named = trained["task"]
    if "data_dir" in trained:
        named += f"{',' if ':' in named else ':'}data_dir={trained['data_dir']}"
    num_train = len(build_data(find_task(named)).train)
    return {
        **trained,
        "workers": WORKERS,
        "batch_size": _BATCH,
        "epochs": _gradients(bench) * _BATCH / num_train,
        "evaluate_every_s": 1,
        "on_nan": "drop",
    }


def _grid(
    run: Mapping[str, Any],
    cluster: str,
    way: str,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    stage: str,
) -> Grid:
    of = WAYS[way]
    varied = "optimizer" if of.local is None else "local"
    flags = [of.flags(rate) for rate in rates]
    fixed = {key: value for key, value in flags[0].items() if key != varied}
    return Grid(
        axes={varied: [f[varied] for f in flags]},
        seeds=tuple(seeds),
        run={**run, **fixed, **CLUSTERS[cluster].flags(has_server=of.has_server)},
        name=f"{stage}/{file_name(cluster)}/{file_name(way)}",
    )


def _tried(bench: Bench, run: Mapping[str, Any], cluster: str, way: str) -> Grid:
    rates = _RATES[:1] if bench.quick else _RATES
    return _grid(run, cluster, way, rates=rates, seeds=(_TUNING_SEED,), stage="rates")


def _made(bench: Bench, grids: Mapping[tuple[str, str], Grid]) -> dict[tuple[str, str], Compared]:
    named = {grid.name: grid for grid in grids.values()}
    made = compare(named, bench.out, jobs=bench.jobs, console=bench.console)
    return {key: made[grid.name] for key, grid in grids.items()}


def _best(tried: Compared, target: str, way: str) -> float:
    """Return the rate that was first at the target, or else ended with the least loss."""
    made = (o.result is not None for o in tried.outcomes)
    rates = [rate for rate, is_made in zip(_RATES, made, strict=False) if is_made]

    def badness(found: tuple[float, Row]) -> tuple[float, float]:
        took, loss = found[1]["seconds_to_target"], found[1]["final_loss"]
        return (math.inf if took is None else took), (math.inf if loss is None else loss)

    rows = measured(tried, target, WAYS[way].steps)
    return min(zip(rates, rows, strict=True), key=badness)[0]


# ---------------------------------------------------------------- claims


def _stale_claims(parts: Sequence[Part]) -> Iterator[Claim]:
    """Claim what the rules promise of staleness."""
    most = {
        way: max(row["staleness_max"] for p in parts if p.way == way for row in p.measured)
        for way in ("bsp", "ssp")
    }
    limit = (2 * BOUND + 1) * (WORKERS - 1)
    yield Claim("bsp: no gradient is stale", most["bsp"] == 0, f"{most['bsp']} at most")
    yield Claim(
        f"ssp: staleness is at most (2s + 1)(M - 1) = {limit}", most["ssp"] <= limit,
        f"{most['ssp']} at most",
    )  # fmt: skip
    means = [row["staleness_mean"] for p in parts if p.way == "asp" for row in p.measured]
    yield Claim(
        f"asp: mean staleness is M - 1 = {WORKERS - 1} on every cluster, or up to 2 % less for "
        "what is in flight at the end",
        all(0.98 * (WORKERS - 1) <= mean <= WORKERS - 1 for mean in means),
        f"{min(means):.4f} to {max(means):.4f}",
    )


def _claims(parts: Sequence[Part]) -> Iterator[Claim]:
    """Claim what is said of waiting and not waiting."""
    for cluster, ways in by_way(parts).items():
        here = partial(_claim, cluster, ways)
        if CLUSTERS[cluster].service:
            yield here("seconds", ALL_REDUCE, "less than", "asp")
            yield here("seconds", "asp", "less than", "bsp")
        elif CLUSTERS[cluster] == CLUSTERS["equal workers"]:
            yield here("seconds", "asp", "no less than", ALL_REDUCE)
        else:
            yield here("seconds", "asp", "less than", ALL_REDUCE)
        yield here("gradients", "asp", "no less than", ALL_REDUCE)
        for way in ("local sgd", "diloco"):
            yield here("pushes", way, "less than", ALL_REDUCE)


def _claim(
    cluster: str, ways: Mapping[str, Part], axis: str, one: str, how: str, other: str
) -> Claim:
    """Claim that to the target ``one`` takes less than ``other``, or no less.

    Of what nobody reached nothing holds.
    """
    took, limit = ways[one].to_target(axis), ways[other].to_target(axis)
    return Claim(
        f"{cluster}: to the target {one} takes {how} {other}, in {axis}",
        took < limit if how == "less than" else limit < math.inf and took >= limit,
        f"{took:.4g} against {limit:.4g}".replace("inf", "never"),
    )
