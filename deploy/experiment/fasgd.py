"""FASGD against SASGD: stale gradients divided by their usual magnitude, and not by age alone.

SASGD divides a gradient by its staleness plus one (damping dynsgd here), FASGD also each element by
a running mean of its size. Batch times clients is 128 in four ways, then there are more and more
clients; each run has as many updates. First with the two rates of the source, then each method with
the best of as many rates of its own, for each of the four ways: the first is what the source
claims, the second tells whether the method does more than a better rate would.

Source: Odena, "Faster Asynchronous SGD", 2016, arXiv:1601.04033: a net of 200 hidden units on
MNIST, 100,000 updates, rates 0.04 and 0.005.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.comparison import CONVENTION, Compared, compare, over_axes
from deploy.experiment.findings import Claim, Findings, Table, file_name
from deploy.experiment.grid import Grid
from deploy.experiment.named import Bench
from deploy.experiment.results import Row

_TASK = "digits:hidden=200"
_UPDATES = 3000
_PAIRS = ((1, 128), (4, 32), (8, 16), (32, 4))
"""Batch and clients, whose product is the same."""
_MANY = ((8, 16), (8, 64), (8, 256))
"""Batch and clients, with more and more of them."""
_FACTORS = (0.25, 1.0, 4.0, 16.0)
"""Of the source's rate, that are tried."""
_TUNING_SEED = 100
_EVALUATIONS = 20
"""Of a run."""


@dataclass(frozen=True, slots=True)
class _Method:
    """A method, and the rate that its source gives it."""

    lr: float
    flags: Mapping[str, str]


_METHODS: Mapping[str, _Method] = {
    "sasgd": _Method(0.04, {"damping": "dynsgd"}),
    "fasgd": _Method(0.005, {"compensation": "fasgd"}),
}
_SASGD, _FASGD = _METHODS
_GIVEN, _BEST, _TRIED = "the source's", "its best", "tried"

_Pair: TypeAlias = tuple[int, int]
_Key: TypeAlias = tuple[str, str, int, int]
"""Which rate, method, batch and clients."""


def find(bench: Bench) -> Findings:
    """Train at the source's rates, then at the best ones."""
    run = _run(bench)
    seeds = tuple(range(1 if bench.quick else bench.seeds or 3))
    pairs = _PAIRS[-2:] if bench.quick else _PAIRS
    many = _MANY[:1] if bench.quick else _MANY
    factors = _FACTORS[1:3] if bench.quick else _FACTORS
    tried = _made(
        bench,
        {
            (_TRIED, method, *pair): _grid(run, method, pair, factors, (_TUNING_SEED,))
            for method in _METHODS
            for pair in pairs
        },
    )
    rates = {
        (_GIVEN, method, *pair): 1.0
        for method in _METHODS
        for pair in dict.fromkeys((*pairs, *many))
    }
    for (_, *key), part in tried.items():
        rates[_BEST, *key] = min(zip(_losses(part), factors, strict=True))[1]
    grids = {key: _grid(run, key[1], key[2:], (factor,), seeds) for key, factor in rates.items()}
    made = _made(bench, grids)
    losses = {key: _loss(part) for key, part in made.items()}
    return Findings(
        title="FASGD",
        about="Stale gradients divided by their age, and by their usual magnitude as well",
        facts={
            "net": f"{run['task']}, {run['updates']:,} updates each, plain SGD",
            "methods": "SASGD divides by staleness + 1; FASGD also by a running mean of |g|",
            "the source's rates": f"{_METHODS[_SASGD].lr:g} and {_METHODS[_FASGD].lr:g}",
            "its best": f"of {len(_FACTORS)} rates, those of the source times "
            f"{', '.join(f'{f:g}' for f in _FACTORS)}, by the loss with seed {_TUNING_SEED}",
            "delays": "exponential, mean 1",
            "staleness": "updates applied between the read of a gradient and its own",
            "seeds": ", ".join(map(str, seeds)),
        },
        claims=list(_claims(losses, pairs, many)),
        tables=[
            Table(
                "Test loss at the end, median over seeds",
                [_row(key, _rate(key, rates), part) for key, part in made.items()],
                "losses",
                _in_words(losses, pairs),
            ),
        ],
        charts=[_by_clients(losses, pairs, many), _over_time(made, pairs)],
        failed=[f for part in (*tried.values(), *made.values()) for f in part.failed],
        files={
            "cells": [
                {**_told(key, _rate(key, rates)), **row}
                for key, part in made.items()
                for row in part.rows
            ]
        },
    )


# ---------------------------------------------------------------- runs


def _run(bench: Bench) -> dict[str, Any]:
    return {
        **(bench.trained or {"task": _TASK}),
        "updates": 20 if bench.quick else _UPDATES,
        "delay": "exponential",
        "on_nan": "drop",
    }


def _grid(
    run: Mapping[str, Any],
    method: str,
    pair: _Pair,
    factors: Sequence[float],
    seeds: tuple[int, ...],
) -> Grid:
    """Return runs at rates that are multiples of the source's."""
    (batch, clients), of = pair, _METHODS[method]
    return Grid(
        axes={"optimizer": [f"sgd:lr={factor * of.lr:g}" for factor in factors]},
        seeds=seeds,
        run={
            **run,
            **of.flags,
            "workers": clients,
            "batch_size": batch,
            "evaluate_every_s": run["updates"] / clients / _EVALUATIONS,
        },
    )


def _made(bench: Bench, grids: Mapping[_Key, Grid]) -> dict[_Key, Compared]:
    folders = {key: "-".join(map(file_name, map(str, key))) for key in grids}
    named = {folders[key]: grid for key, grid in grids.items()}
    made = compare(named, bench.out, jobs=bench.jobs, console=bench.console)
    return {key: made[folder] for key, folder in folders.items()}


def _loss(part: Compared) -> float:
    """Return the median over seeds; infinite where there is none."""
    return min(_losses(part))


def _losses(part: Compared) -> list[float]:
    """Return the median over seeds at every rate; infinite where there is none."""
    medians = (row.get("final_loss_median") for row in part.summary)
    return [math.inf if loss is None else loss for loss in medians]


# ---------------------------------------------------------------- what came of it


def _rate(key: _Key, factors: Mapping[_Key, float]) -> float:
    return factors[key] * _METHODS[key[1]].lr


def _told(key: _Key, lr: float) -> Row:
    which, method, batch, clients = key
    return {"method": method, "batch": batch, "clients": clients, "rate": which, "lr": lr}


def _row(key: _Key, lr: float, part: Compared) -> Row:
    (over,) = part.summary
    return {
        **_told(key, lr),
        "loss": over.get("final_loss_median"),
        "least": over.get("final_loss_min"),
        "largest": over.get("final_loss_max"),
        "staleness": over.get("staleness_mean_median"),
    }


def _wins(losses: Mapping[_Key, float], which: str, pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return where FASGD ended with the smaller loss."""
    return [p for p in pairs if losses[which, _FASGD, *p] < losses[which, _SASGD, *p]]


def _claims(
    losses: Mapping[_Key, float], pairs: Sequence[_Pair], many: Sequence[_Pair]
) -> Iterator[Claim]:
    for which in (_GIVEN, _BEST):
        for pair in pairs:
            batch, clients = pair
            yield Claim(
                f"batch {batch}, {clients} clients, {which} rate: FASGD ends with less loss",
                pair in _wins(losses, which, [pair]),
                f"{losses[which, _FASGD, *pair]:.4g} against {losses[which, _SASGD, *pair]:.4g}",
            )
        wins, needed = len(_wins(losses, which, pairs)), math.ceil(0.75 * len(pairs))
        yield Claim(
            f"{which} rate: FASGD ends with less loss in {needed} of {len(pairs)} ways or more",
            wins >= needed,
            f"in {wins}",
        )
    if len(many) > 1:
        margins = [losses[_GIVEN, _SASGD, *p] - losses[_GIVEN, _FASGD, *p] for p in many]
        yield Claim(
            f"{_GIVEN} rate: with batches of {many[0][0]} the margin grows with clients "
            f"({', '.join(str(clients) for _, clients in many)})",
            all(few < more for few, more in itertools.pairwise(margins)),
            ", ".join(f"{margin:.3g}" for margin in margins),
        )


def _in_words(losses: Mapping[_Key, float], pairs: Sequence[_Pair]) -> str:
    """Say what is left of the margin once both methods have their best rate."""
    given, best = (len(_wins(losses, which, pairs)) for which in (_GIVEN, _BEST))
    return (
        f"FASGD ends with less loss in {given} of {len(pairs)} ways at the source's rates, and in "
        f"{best} once each method has the best of as many rates. It divides by a running mean of "
        "|g|, which is far below 1 here, so at the source's rates its steps are the longer ones: "
        "part of its margin there is that of a better rate."
    )


def _by_clients(
    losses: Mapping[_Key, float], pairs: Sequence[_Pair], many: Sequence[_Pair]
) -> Chart:
    def panel(title: str, which: str, over: Sequence[_Pair]) -> Panel:
        lines = [
            Line(
                method, colour, [clients for _, clients in over],
                [losses[which, method, *pair] for pair in over],
            )
            for colour, method in enumerate(_METHODS)
        ]  # fmt: skip
        return Panel(title, "clients", lines, log_x=True, log_y=True)

    by_clients = sorted(pairs, key=lambda pair: pair[1])
    panels = [
        panel(f"batch times clients 128, {_GIVEN} rate", _GIVEN, by_clients),
        panel(f"the same, {_BEST} rate", _BEST, by_clients),
        panel(f"batch {many[0][0]}, {_GIVEN} rate", _GIVEN, many),
    ]
    caption = f"Delays exponential, mean 1; equal updates; medians over seeds. {CONVENTION}"
    return Chart("by-clients", "Test loss at the end, by clients", caption, [panels])


def _over_time(made: Mapping[_Key, Compared], pairs: Sequence[_Pair]) -> Chart:
    rows = []
    for batch, clients in pairs:
        found = {
            f"{method}, {which} rate": made[which, method, batch, clients].paths()
            for which in (_GIVEN, _BEST)
            for method in _METHODS
        }
        title = f"batch {batch}, {clients} clients: test loss"
        rows.append(over_axes(found, "loss", title, is_virtual=True, log_y=True)[:1])
    caption = f"Delays exponential, mean 1. {CONVENTION}"
    two = [[*a, *b] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return Chart("over-time", "Training over time", caption, two)
