"""n-softsync: how stale gradients are, and whether dividing the learning rate by that is enough.

Of λ workers' gradients floor(λ / n) make an update and nobody waits, so a gradient is about n
updates late. First the staleness itself, where nothing is trained. Then a net, with momentum on the
server: α₀ is the largest rate of a grid at which waiting for all (hardsync, here bsp) still trains,
and is used as it is and divided by each gradient's staleness. At so large a rate even a divided
step is too long, so the same is done with a quarter of it. What each rate of the grid does with
n = λ is told too, for all three alike.

Source: Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI 2016,
arXiv:1511.05950. Its staleness is told of λ = 30 learners and n of 1, 15, 30; its net is trained on
CIFAR-10 with batches of 4, α₀ = 0.001 and momentum 0.9.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from async_sgd.delays import DELAYS
from async_sgd.rules import RULES
from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.comparison import CONVENTION, Compared, compare, over_axes
from deploy.experiment.findings import Claim, Findings, Table
from deploy.experiment.grid import Grid
from deploy.experiment.named import Bench
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.pool import make_all
from deploy.experiment.quadratics import Still, simulation
from deploy.experiment.results import Row
from deploy.flags import UsageError

_WORKERS = 30
_DELAY = "gamma:mean=1,cv=0.1"
_COUNTED = (1, 15, 30)
_SPLITS = (1, 2, 5, 15, 30)
_RATES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_CONVERGES = 1.5
"""Hardsync trains at a rate if its error is at most this many times the least of any rate."""
_CHANCE = 0.85
"""Error from which on a net of ten classes has learnt next to nothing."""
_TUNING_SEED = 100

_SHARES: Mapping[str, float] = {"α₀": 1.0, "α₀ / 4": 0.25}

_ARMS: Mapping[str, Mapping[str, str]] = {
    "hardsync": {"rule": "bsp"},
    "fixed": {"rule": "softsync:n={n}"},
    "divided": {"rule": "softsync:n={n}", "damping": "inverse"},
}
_HARD, _FIXED, _DIVIDED = _ARMS


_Key: TypeAlias = tuple[str, str, int]
"""Rate, arm, and n."""


def find(bench: Bench) -> Findings:
    """Count staleness, choose α₀, and train."""
    gradients = 600 if bench.quick else 30_000
    pieces = [_piece(n, gradients) for n in _COUNTED]
    outcomes = make_all(pieces, bench.out, jobs=bench.jobs, console=bench.console)
    counted = [_staleness_row(o.piece.settings, o.done) for o in outcomes if o.result is not None]
    failed = [f"{o.piece.name}: {o.error}" for o in outcomes if o.error]

    run = _run(bench)
    rates = _RATES[3:5] if bench.quick else _RATES
    tried = _made(
        bench,
        {f"rates/{arm}": _grid(run, arm, _WORKERS, rates, (_TUNING_SEED,)) for arm in _ARMS},
    )
    by_rate = {
        arm: dict(zip(rates, _errors(part), strict=True))
        for arm, part in zip(_ARMS, tried.values(), strict=True)
    }
    alpha = _largest(by_rate[_HARD])
    seeds = tuple(range(1 if bench.quick else bench.seeds or 3))
    splits = (_WORKERS,) if bench.quick else _SPLITS
    arms = [(_HARD, 1), *((arm, n) for arm in (_FIXED, _DIVIDED) for n in splits)]
    keys = [(share, arm, n) for share in _SHARES for arm, n in arms]
    grids = {
        f"runs/{_SHARES[share]:g}/{arm}-{n}": _grid(run, arm, n, [alpha * _SHARES[share]], seeds)
        for share, arm, n in keys
    }
    made = dict(zip(keys, _made(bench, grids).values(), strict=True))
    errors = {key: _errors(part)[0] for key, part in made.items()}
    return Findings(
        title="n-softsync and the learning rate",
        about="How stale the gradients of n-softsync are, and the rate divided by their staleness",
        facts={
            "workers": f"{_WORKERS}, delays {_DELAY}",
            "net": f"{run['task']}, batches of {run['batch_size']}, {run['epochs']:g} epochs",
            "momentum": "0.9, on the server",
            "α₀": f"{alpha:g}, the largest of {', '.join(map(str, rates))} at which hardsync ends "
            f"within {_CONVERGES:g} times its least error, with seed {_TUNING_SEED}",
            "fixed; divided": "α₀ as it is; by max(staleness, 1), of each gradient's own",
            "staleness": "updates applied between the read of a gradient and its own",
            "seeds": ", ".join(map(str, seeds)),
        },
        claims=[*_staleness_claims(counted), *_error_claims(errors)],
        tables=[
            Table("Staleness", counted, "staleness"),
            Table("Test error, median over seeds", _error_rows(made, errors), "errors"),
            Table(
                f"Test error with n = {_WORKERS} by learning rate, one seed",
                [
                    {"rate": rate, **{arm: found[rate] for arm, found in by_rate.items()}}
                    for rate in rates
                ],
                "rates",
                _in_words(by_rate),
            ),
        ],
        charts=[_by_size(errors, by_rate), _over_time(made)],
        failed=[*failed, *(f for part in (*tried.values(), *made.values()) for f in part.failed)],
        files={"cells": [_told(*key, row) for key, part in made.items() for row in part.rows]},
    )


# ---------------------------------------------------------------- staleness


def _piece(n: int, gradients: int) -> Piece:
    settings = {"n": n, "workers": _WORKERS, "delay": _DELAY, "gradients": gradients}
    return Piece(f"staleness, n={n}", f"staleness/{n}", settings, make_histogram)


def make_histogram(settings: Settings, folder: Path) -> Settings:
    """Return the applied gradients by staleness, and what conservation says of their sum."""
    num_workers, n = settings["workers"], settings["n"]
    size = num_workers // n
    run = simulation(
        num_workers,
        DELAYS.parse(settings["delay"]),
        RULES.parse(f"softsync:n={n}"),
        seed=0,
        gradients=Still(),
        updates=settings["gradients"] // size,
    )
    run.run()
    sequencer = run.sequencer
    return {
        "histogram": {str(k): v for k, v in sequencer.ledger.staleness.histogram().items()},
        "conservation": sequencer.conservation.report()["holds"],
    }


def _staleness_row(settings: Settings, result: Settings) -> Row:
    histogram = {int(k): v for k, v in result["histogram"].items()}
    total = sum(histogram.values())
    n, most = settings["n"], max(histogram)
    return {
        "n": n,
        "gradients": total,
        "mean": sum(k * v for k, v in histogram.items()) / total,
        "(λ - 1) / floor(λ / n)": (_WORKERS - 1) / (_WORKERS // n),
        "largest": most,
        "share above 2 n": sum(v for k, v in histogram.items() if k > 2 * n) / total,
        "conserved": result["conservation"],
    }


def _staleness_claims(counted: Sequence[Row]) -> Iterator[Claim]:
    for row in counted:
        n, mean, expected = row["n"], row["mean"], row["(λ - 1) / floor(λ / n)"]
        yield Claim(
            f"n={n}: mean staleness is {expected:.4g}, to 1 %, and its sum conserved",
            abs(mean / expected - 1) <= 0.01 and row["conserved"],
            f"{mean:.4f}, {100 * abs(mean / expected - 1):.2f} % off",
        )
        yield Claim(
            f"n={n}: fewer than one of 1,000 gradients is staler than 2 n = {2 * n}",
            row["share above 2 n"] < 1e-3,
            f"{row['share above 2 n']:.2g}, the stalest {row['largest']}",
        )


# ---------------------------------------------------------------- a net


def _run(bench: Bench) -> dict[str, Any]:
    is_digits = not bench.trained
    epochs = 10.0 if is_digits else 5.0
    return {
        **(bench.trained or {"task": "digits:hidden=32"}),
        "workers": _WORKERS,
        "batch_size": 4,
        "delay": _DELAY,
        "epochs": epochs / 50 if bench.quick else epochs,
        "evaluate_every_s": 5 if is_digits else 50,
        "on_nan": "drop",
    }


def _grid(
    run: Mapping[str, Any], arm: str, n: int, rates: Sequence[float], seeds: tuple[int, ...]
) -> Grid:
    flags = {key: value.format(n=n) for key, value in _ARMS[arm].items()}
    optimizers = [f"momentum:lr={rate:g}" for rate in rates]
    return Grid(axes={"optimizer": optimizers}, seeds=seeds, run={**run, **flags})


def _made(bench: Bench, grids: Mapping[str, Grid]) -> dict[str, Compared]:
    return compare(grids, bench.out, jobs=bench.jobs, console=bench.console)


def _errors(part: Compared) -> list[float]:
    """Return the median test error of every setting; that of a run that failed is 1."""
    if not any("final_accuracy_median" in row for row in part.summary):
        task = part.grid.run["task"]
        raise UsageError(f"softsync tells of errors, and task {task} has no accuracy")
    medians = (row.get("final_accuracy_median") for row in part.summary)
    return [1.0 if accuracy is None else 1 - accuracy for accuracy in medians]


def _largest(by_rate: Mapping[float, float]) -> float:
    """Return the largest rate whose error is near the least."""
    limit = _CONVERGES * min(by_rate.values())
    return max(rate for rate, error in by_rate.items() if error <= limit)


def _told(share: str, arm: str, n: int, row: Row) -> Row:
    return {"rate": share, "arm": arm, "n": None if arm == _HARD else n, **row}


def _error_rows(made: Mapping[_Key, Compared], errors: Mapping[_Key, float]) -> list[Row]:
    rows = []
    for key, part in made.items():
        (over,) = part.summary
        low, high = over["final_accuracy_max"], over["final_accuracy_min"]
        told = {
            "error": errors[key],
            "least": None if low is None else 1 - low,
            "largest": None if high is None else 1 - high,
            "updates": over["updates_median"],
            "staleness": over["staleness_mean_median"],
        }
        rows.append(_told(*key, told))
    return rows


def _error_claims(errors: Mapping[_Key, float]) -> Iterator[Claim]:
    """Claim what the source found; nothing holds beside a hardsync that has learnt nothing."""
    most = max(n for _, _, n in errors)
    for share in _SHARES:
        hard, fixed = errors[share, _HARD, 1], errors[share, _FIXED, most]
        yield Claim(
            f"at {share}, fixed, n={most}: the error is 5 times that of hardsync, or chance "
            f"({_CHANCE:g} and above)",
            hard < _CHANCE and (fixed >= 5 * hard or fixed >= _CHANCE),
            f"{fixed:.4f} against {hard:.4f}",
        )
        for (at, arm, n), error in errors.items():
            if at == share and arm == _DIVIDED:
                yield Claim(
                    f"at {share}, divided, n={n}: the error is within 2 points of hardsync's",
                    hard < _CHANCE and abs(error - hard) <= 0.02,
                    f"{error:.4f} against {hard:.4f}",
                )


def _in_words(by_rate: Mapping[str, Mapping[float, float]]) -> str:
    """Say at which rates both claims hold with the most splits."""
    hard, fixed, divided = (by_rate[arm] for arm in _ARMS)
    good = [r for r in hard if hard[r] < _CHANCE / 5 and abs(divided[r] - hard[r]) <= 0.02]
    bad = [r for r in good if fixed[r] >= 5 * hard[r] or fixed[r] >= _CHANCE]
    said = [", ".join(f"{rate:g}" for rate in rates) or "none" for rates in (good, bad)]
    return (
        f"Rates at which hardsync trains and the divided one ends within 2 points: {said[0]}; of "
        f"these the fixed one fails at: {said[1]}."
    )


def _by_size(errors: Mapping[_Key, float], by_rate: Mapping[str, Mapping[float, float]]) -> Chart:
    splits = sorted({n for _, arm, n in errors if arm == _FIXED})
    panels = []
    for share in _SHARES:
        lines = [Line(_HARD, 0, splits, [errors[share, _HARD, 1]] * len(splits))]
        for colour, arm in enumerate((_FIXED, _DIVIDED), start=1):
            lines.append(Line(arm, colour, splits, [errors[share, arm, n] for n in splits]))
        panels.append(Panel(f"test error at {share}", "n", lines, log_x=True))
    rates = [
        Line(arm, colour, list(found), list(found.values()))
        for colour, (arm, found) in enumerate(by_rate.items())
    ]
    panels.append(Panel(f"test error, n = {_WORKERS}", "learning rate", rates, log_x=True))
    return Chart(
        "errors",
        "Test error at the end of equal epochs",
        f"λ = {_WORKERS}, delays {_DELAY}, momentum 0.9. {CONVENTION}",
        [panels],
    )


def _over_time(made: Mapping[_Key, Compared]) -> Chart:
    rows = []
    for share in _SHARES:
        for n in sorted({n for _, arm, n in made if arm == _FIXED and n in (1, _WORKERS)}):
            found = {
                _HARD: made[share, _HARD, 1].paths(),
                _FIXED: made[share, _FIXED, n].paths(),
                _DIVIDED: made[share, _DIVIDED, n].paths(),
            }
            title = f"{share}, n = {n}: test accuracy"
            rows.append(over_axes(found, "accuracy", title, is_virtual=True))
    return Chart("over-time", "Training over time", f"Delays {_DELAY}. {CONVENTION}", rows)
