"""Where to keep momentum: on the server it fails as workers are added; as DANA keeps it, it holds.

First a quadratic with workers in turn: the largest stable η λ of each placement, by simulation and
as the spectral radius of one turn. Then a net under nearly equal times: with momentum, and with
plain SGD, which shows what damping and compensation do where no velocity carries stale gradients
on. The learning rate is chosen for one worker and the same for all. Of SGD rates above 0.1 are not
tried: one worker likes 0.5 better, but with four, dc-asgd-adaptive overflows. Each run has as many
gradients.

Sources: Hakimi et al., "Taming Momentum in a Distributed Asynchronous Environment", 2019,
arXiv:1907.11612 (DANA, and times of cv 0.1). Zhang et al., arXiv:1511.05950, and Jiang et al.,
SIGMOD 2017 (damping by staleness). Zheng et al., arXiv:1609.08326 (delay compensation). Barkai et
al., arXiv:1909.10802 (gap-aware).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from async_sgd.delays import Constant
from async_sgd.rules import Asynchronous
from deploy.experiment import theory
from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.comparison import CONVENTION, Compared, compare
from deploy.experiment.findings import Claim, Findings, Table
from deploy.experiment.grid import Grid
from deploy.experiment.named import Bench
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.pool import make_all
from deploy.experiment.quadratics import Slopes, simulation
from deploy.experiment.results import Row
from paramserver.optimizers import DANA, DANASlim, LocalMomentum, Momentum

_PLACEMENTS = {
    "momentum": Momentum,
    "local-momentum": LocalMomentum,
    "dana": DANA,
    "dana-slim": DANASlim,
}
_MOMENTUM = 0.9
_TOLERANCE = 0.01

_CORRECTED: Mapping[str, Mapping[str, str]] = {
    "": {},
    " with dynsgd": {"damping": "dynsgd"},
    " with dc-asgd-adaptive": {"compensation": "dc-asgd-adaptive"},
    " with gap-aware": {"compensation": "gap-aware"},
}
_DAMPED, *_COMPENSATED = list(_CORRECTED)[1:]


@dataclass(frozen=True, slots=True)
class _Family:
    """Ways to train the net that share a learning rate."""

    name: str
    """Of the optimizer whose rate is chosen, with one worker."""
    others: Sequence[str] = ()

    @property
    def arms(self) -> list[str]:
        """The names of every arm."""
        return [*(self.name + how for how in _CORRECTED), *self.others]

    def flags(self, best: float) -> dict[str, dict[str, str]]:
        """Return the flags of every arm."""
        lr = f"lr={best:g}"
        corrected = [{**flags, "optimizer": f"{self.name}:{lr}"} for flags in _CORRECTED.values()]
        others = [{"optimizer": f"{name}:{lr}"} for name in self.others]
        return dict(zip(self.arms, [*corrected, *others], strict=True))


_RATES: Mapping[str, Sequence[float]] = {
    "momentum": (0.005, 0.01, 0.02, 0.05, 0.1),
    "sgd": (0.02, 0.05, 0.1),
}
_FAMILIES = (
    _Family("momentum", others=("dana",)),
    _Family("sgd"),
)


def find(bench: Bench) -> Findings:
    """Find the limits, then train."""
    few = (2,) if bench.quick else (1, 2, 4, 8)
    pieces = [_piece(name, m) for name in _PLACEMENTS for m in few]
    outcomes = make_all(pieces, bench.out, jobs=bench.jobs, console=bench.console)
    limits = [_limit_row(o.piece.settings, o.done) for o in outcomes if o.result is not None]
    failed = [f"{o.piece.name}: {o.error}" for o in outcomes if o.error]

    tried = _made(bench, {f"rates-{name}": _rate_grid(bench, name) for name in _RATES})
    rates = {name: _best_rate(name, tried[f"rates-{name}"]) for name in _RATES}
    workers = {"workers": (1, 4) if bench.quick else (1, 4, 8, 16)}
    grids = {
        arm: _grid(bench, workers, flags)
        for family in _FAMILIES
        for arm, flags in family.flags(rates[family.name]).items()
    }
    arms = _made(bench, grids)
    return Findings(
        title="Where to keep momentum",
        about="Momentum under staleness: on the server, damped, compensated, and as DANA keeps it",
        facts={
            "momentum": str(_MOMENTUM),
            **{
                f"learning rate, {name}": f"{rates[name]:g}, the best of "
                f"{', '.join(map(str, of))} for {name} with one worker"
                for name, of in _RATES.items()
            },
            "net": "digits, 32 hidden units, batches of 16, equal gradients",
            "delays of the net": "gamma, mean 1, cv 0.1",
            "delays of the quadratic": "constant: workers take turns",
            "staleness": "updates applied between the read of a gradient and its own",
            "seeds": ", ".join(map(str, grids["dana"].seeds)),
        },
        claims=[*_limit_claims(limits), *_net_claims(arms)],
        tables=[
            Table("Largest stable step times curvature, workers in turn", limits, "limits"),
            *(part.table("The learning rate, with one worker") for part in tried.values()),
            Table(
                "Test accuracy, median over seeds, by workers",
                _accuracies(arms),
                "accuracy",
                _in_words(arms),
            ),
            Table("Test loss, median over seeds, by workers", _losses(arms), "loss"),
        ],
        charts=[_chart(arms)],
        failed=[
            *failed,
            *(line for part in (*tried.values(), *arms.values()) for line in part.failed),
        ],
        files={
            "cells": [{"arm": arm, **row} for arm, part in arms.items() for row in part.rows],
            "summary": [{"arm": arm, **row} for arm, part in arms.items() for row in part.summary],
        },
    )


# ---------------------------------------------------------------- a quadratic


def _piece(placement: str, num_workers: int) -> Piece:
    settings = {
        "placement": placement,
        "workers": num_workers,
        "momentum": _MOMENTUM,
        "updates": 800 * max(num_workers, 2),
    }
    folder = f"limits/{placement}-{num_workers}"
    return Piece(f"limit of {placement}, M={num_workers}", folder, settings, make_limit)


def make_limit(settings: Settings, folder: Path) -> Settings:
    """Return the smallest step times curvature that grows, of a grid in steps of 0.4 %.

    All curvatures share a run; one grows if its largest value in the last quarter is above that in
    the second, or is no longer finite.
    """
    curvature = torch.logspace(-2.1, 0.7, 1600, dtype=torch.float64)
    slopes = Slopes(curvature)
    optimizer = _PLACEMENTS[settings["placement"]](lr=1.0, momentum=settings["momentum"])
    simulation(
        settings["workers"],
        Constant(),
        Asynchronous(),
        seed=0,
        gradients=slopes,
        updates=settings["updates"],
        optimizer=optimizer,
        size=len(curvature),
    ).run()
    _, before, _, after = np.array_split(np.abs(slopes.path()), 4)
    grows = ~(after.max(axis=0) <= before.max(axis=0))
    return {"limit": float(curvature[int(grows.argmax())])}


def _limit_row(settings: Settings, result: Settings) -> Row:
    expected = theory.stability_limit(
        settings["placement"], settings["workers"], settings["momentum"]
    )
    return {
        "momentum kept by": settings["placement"],
        "workers": settings["workers"],
        "simulated": result["limit"],
        "spectral radius 1": expected,
        "off": result["limit"] / expected - 1,
    }


def _limit_claims(limits: Sequence[Row]) -> Iterator[Claim]:
    for row in limits:
        yield Claim(
            f"{row['momentum kept by']}, M={row['workers']}: stable up to "
            f"{row['spectral radius 1']:.4g}, to 1 %",
            abs(row["off"]) <= _TOLERANCE,
            f"{row['simulated']:.4g}, {100 * abs(row['off']):.2f} % off",
        )


# ---------------------------------------------------------------- a net


def _rate_grid(bench: Bench, optimizer: str) -> Grid:
    rates = _RATES[optimizer][2:3] if bench.quick else _RATES[optimizer]
    return _grid(bench, {"optimizer": [f"{optimizer}:lr={lr}" for lr in rates]}, {"workers": 1})


def _grid(bench: Bench, axes: Mapping[str, Sequence[object]], run: Mapping[str, object]) -> Grid:
    return Grid(
        axes=axes,
        seeds=tuple(range(1 if bench.quick else bench.seeds or 3)),
        run={
            "task": "digits:hidden=32",
            "batch_size": 16,
            "delay": "gamma:mean=1,cv=0.1",
            "epochs": 0.3 if bench.quick else 10,
            "evaluate_every_s": 5,
            "on_nan": "drop",
            **run,
        },
    )


def _made(bench: Bench, grids: Mapping[str, Grid]) -> dict[str, Compared]:
    return compare(grids, bench.out, jobs=bench.jobs, console=bench.console)


def _best_rate(optimizer: str, tried: Compared) -> float:
    losses = [row.get("final_loss_median") for row in tried.summary]
    rates = _RATES[optimizer] if len(losses) > 1 else _RATES[optimizer][2:3]
    finite = {lr: loss for lr, loss in zip(rates, losses, strict=True) if loss is not None}
    return min(finite, key=lambda lr: finite[lr])


def _by_workers(part: Compared, figure: str) -> dict[int, float | None]:
    rows = zip(part.grid.axes["workers"], part.summary, strict=True)
    return {m: row.get(f"final_{figure}_median") for m, row in rows}


def _accuracies(arms: Mapping[str, Compared]) -> list[Row]:
    return [{"arm": a, **_named(_by_workers(part, "accuracy"))} for a, part in arms.items()]


def _losses(arms: Mapping[str, Compared]) -> list[Row]:
    return [{"arm": a, **_named(_by_workers(part, "loss"))} for a, part in arms.items()]


def _named(by_workers: Mapping[int, float | None]) -> Row:
    return {f"M={m}": value for m, value in by_workers.items()}


def _net_claims(arms: Mapping[str, Compared]) -> Iterator[Claim]:
    accuracy = {
        arm: {m: value or 0.0 for m, value in _by_workers(part, "accuracy").items()}
        for arm, part in arms.items()
    }
    alone, most = min(accuracy["dana"]), max(accuracy["dana"])
    few = 8 if 8 in accuracy["dana"] else most
    base = accuracy["momentum"][alone]
    lost = base - accuracy["dana"][few]
    yield Claim(
        f"dana with {few} workers is within 2 points of momentum with one",
        lost <= 0.02,
        f"{accuracy['dana'][few]:.4f} against {base:.4f}",
    )
    at_most = {arm: of[most] for arm, of in accuracy.items()}
    yield Claim(
        f"with {most} workers momentum is 10 points below dana",
        at_most["dana"] - at_most["momentum"] >= 0.1,
        f"{at_most['momentum']:.4f} against {at_most['dana']:.4f}",
    )
    for family in _FAMILIES:
        yield from _order_claims(family.name, most, at_most)
    for how in _COMPENSATED:
        arm = f"momentum{how}"
        yield Claim(
            f"with {most} workers {arm} does no better than dana, to 1 point",
            at_most[arm] <= at_most["dana"] + 0.01,
            f"{at_most[arm]:.4f} against {at_most['dana']:.4f}",
        )


def _order_claims(plain: str, most: int, accuracy: Mapping[str, float]) -> Iterator[Claim]:
    """Claim the order of the literature: as it is, far below damped, below compensated."""
    damped = accuracy[plain + _DAMPED]
    yield Claim(
        f"with {most} workers {plain} is 10 points below itself{_DAMPED}",
        damped - accuracy[plain] >= 0.1,
        f"{accuracy[plain]:.4f} against {damped:.4f}",
    )
    for how in _COMPENSATED:
        yield Claim(
            f"with {most} workers {plain}{_DAMPED} does worse than{how}",
            damped < accuracy[plain + how],
            f"{damped:.4f} against {accuracy[plain + how]:.4f}",
        )


def _in_words(arms: Mapping[str, Compared]) -> str:
    """Say where the order of the literature is found, and why it is not elsewhere."""
    most = max(_by_workers(arms["dana"], "accuracy"))
    accuracy = {arm: _by_workers(part, "accuracy")[most] or 0.0 for arm, part in arms.items()}
    said = []
    for family in _FAMILIES:
        holds = all(claim.holds for claim in _order_claims(family.name, most, accuracy))
        found = ", ".join(f"{accuracy[family.name + how]:.3f}" for how in _CORRECTED)
        said.append(f"{family.name}: {'found' if holds else 'not found'} ({found})")
    limits = [theory.stability_limit("momentum", most, mu) for mu in (_MOMENTUM, 0.0)]
    return (
        f"The order of the literature with {most} workers, which is as it is, far below{_DAMPED}, "
        f"below{_COMPENSATED[0]} and{_COMPENSATED[1]}: {'; '.join(said)}. On a quadratic with "
        f"{most} workers in turn steps are stable up to η λ = {limits[0]:.2g} with momentum on the "
        f"server and {limits[1]:.2g} without it. Damping divides the step by the staleness, and so "
        "brings back what is far beyond that. Delay compensation corrects a gradient to first "
        "order in how far the parameters have moved, and so cannot, least of all what a velocity "
        "adds up; it is the better of the two where a step is not far beyond the limit."
    )


def _chart(arms: Mapping[str, Compared]) -> Chart:
    rows = [
        [_panel(family, figure, arms) for figure in ("accuracy", "loss")] for family in _FAMILIES
    ]
    caption = f"Delays gamma, mean 1, cv 0.1; equal gradients. {CONVENTION}"
    return Chart("by-workers", "A net with more and more workers", caption, rows)


def _panel(family: _Family, figure: str, arms: Mapping[str, Compared]) -> Panel:
    lines = []
    for colour, arm in enumerate(family.arms):
        part = arms[arm]
        rows = [
            (m, row)
            for m, row in zip(part.grid.axes["workers"], part.summary, strict=True)
            if row.get(f"final_{figure}_median") is not None
        ]
        middle, low, high = (
            [row[f"final_{figure}_{which}"] for _, row in rows]
            for which in ("median", "min", "max")
        )
        name = "as it is" if arm == family.name else arm.removeprefix(f"{family.name} ")
        lines.append(Line(name, colour, [m for m, _ in rows], middle, low, high))
    title = f"{family.name}: final test {figure}"
    return Panel(title, "workers", lines, log_x=True, log_y=figure == "loss")
