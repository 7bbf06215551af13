"""Asynchrony begets momentum: with M memoryless workers, momentum 1 - 1/M and step η / M.

The mean of many independent runs of plain asynchronous SGD on a quadratic is fitted as a heavy
ball, dm_{t+1} = mu dm_t - step m_t. Workers that take turns are the control: their mean is none.
With one worker every path fits with many pairs of momentum and step, so it is compared as it is.

Source: Mitliagkas et al., "Asynchrony begets Momentum, with an Application to Deep Learning",
Allerton 2016, arXiv:1605.09774. The start from one point, and the second moment, are derived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from async_sgd.delays import DELAYS
from async_sgd.rules import Asynchronous
from deploy.experiment import theory
from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.findings import Claim, Findings, Table
from deploy.experiment.named import Bench
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.pool import make_all
from deploy.experiment.quadratics import Slopes, simulation
from deploy.experiment.results import Row
from paramserver.optimizers import SGD

Array = NDArray[np.float64]

_WORKERS = (1, 2, 4, 8, 16, 32)
_STEPS = 60
_LR = 0.05
_NOISY = 16
"""Coordinates with noise: noise of their own, delays in common."""
_REPLICAS = 1000
"""Of one piece."""


def find(bench: Bench) -> Findings:
    """Run the ensembles, and fit them."""
    workers = (1, 4) if bench.quick else _WORKERS
    replicas = 15 if bench.quick else _REPLICAS
    parts = bench.seeds or (3 if bench.quick else 20)
    pieces = [
        *(_piece(m, "exponential", replicas, part) for m in workers for part in range(parts)),
        *(_piece(m, "constant", 1, 0) for m in workers if m > 1),
    ]
    outcomes = make_all(pieces, bench.out, jobs=bench.jobs, console=bench.console)
    failed = [f"{o.piece.name}: {o.error}" for o in outcomes if o.error]
    made = [o for o in outcomes if o.result is not None]

    def of(m: int, delay: str) -> list[Settings]:
        here = {"workers": m, "delay": delay}
        return [o.done for o in made if o.piece.settings.items() >= here.items()]

    ensembles = [_Ensemble(m, of(m, "exponential")) for m in workers if of(m, "exponential")]
    controls = {m: np.array(of(m, "constant")[0]["mean"]) for m in workers if of(m, "constant")}
    return Findings(
        title="Asynchrony begets momentum",
        about="Plain asynchronous SGD on a quadratic, as the heavy ball that its mean follows",
        facts={
            "delays": "exponential, mean 1; the control: constant",
            "replicas": f"{parts * replicas:,} independent runs a row, {_STEPS} updates each",
            "step times curvature": "0.05, with 32 workers 0.02",
            "staleness": "updates applied between the read of a gradient and its own",
        },
        claims=[*_claims(ensembles), *_control_claims(controls)],
        tables=[Table("The mean of all runs, fitted", [e.row for e in ensembles], "fits")],
        charts=[_chart(ensembles, controls)],
        failed=failed,
    )


def _curvature(num_workers: int) -> float:
    """Return η λ; a small one for 32 workers, whose path is else too short to tell much."""
    return 0.02 if num_workers == 32 else 0.05


def _piece(num_workers: int, delay: str, replicas: int, part: int) -> Piece:
    settings = {
        "workers": num_workers,
        "delay": delay,
        "replicas": replicas,
        "part": part,
        "steps": _STEPS,
        "c": _curvature(num_workers),
    }
    name = f"M={num_workers}, {delay}, part {part + 1}"
    return Piece(name, f"ensembles/{num_workers}-{delay}-{part}", settings, make_ensemble)


def make_ensemble(settings: Settings, folder: Path) -> Settings:
    """Run the replicas of one piece, and return sums over them.

    The first coordinate has no noise, its mean is fitted. The steps of the others have noise of
    deviation `_LR`.
    """
    c, steps, replicas = settings["c"], settings["steps"], settings["replicas"]
    curvature = torch.full((1 + _NOISY,), c / _LR, dtype=torch.float64)
    paths = np.empty((replicas, steps + 1, 1 + _NOISY))
    for replica in range(replicas):
        number = settings["part"] * replicas + replica
        generator = np.random.default_rng([settings["workers"], number])
        draws = generator.normal(size=(steps + 2, 1 + _NOISY))
        draws[:, 0] = 0
        noise = iter(torch.from_numpy(draws))
        slopes = Slopes(curvature, lambda noise=noise: next(noise))  # type: ignore[misc]
        simulation(
            settings["workers"],
            DELAYS.parse(settings["delay"]),
            Asynchronous(),
            seed=number,
            gradients=slopes,
            updates=steps + 1,
            optimizer=SGD(lr=_LR),
            size=1 + _NOISY,
        ).run()
        paths[replica] = slopes.path()[: steps + 1]
    clean, noisy = paths[:, :, 0], paths[:, :, 1:]
    return {
        "replicas": replicas,
        "mean": clean.mean(axis=0).tolist(),
        "variance": clean.var(axis=0).tolist(),
        "square": (noisy**2).mean(axis=(0, 2)).tolist(),
    }


@dataclass
class _Ensemble:
    """All replicas of one number of workers."""

    num_workers: int
    parts: Sequence[Settings]

    def __post_init__(self) -> None:
        self.c = _curvature(self.num_workers)
        self.means = np.array([part["mean"] for part in self.parts])
        self.mean = self.means.mean(axis=0)
        within = np.array([part["variance"] for part in self.parts]).mean(axis=0)
        num_replicas = sum(part["replicas"] for part in self.parts)
        # The variance of all is that within parts and that of their means.
        self.error = np.sqrt((within + self.means.var(axis=0)) / num_replicas)
        self.square = np.array([part["square"] for part in self.parts]).mean(axis=0)
        self.momentum, self.step = theory.fit_heavy_ball(self.mean)
        fits = np.array([theory.fit_heavy_ball(mean) for mean in self.means])
        spread = fits.std(axis=0, ddof=1) if len(fits) > 1 else np.full(2, math.nan)
        self.momentum_error, self.step_error = spread / math.sqrt(len(fits))

    @property
    def expected(self) -> tuple[float, float]:
        """Momentum and step that theory gives."""
        return 1 - 1 / self.num_workers, self.c / self.num_workers

    @property
    def farthest(self) -> float:
        """How far the mean is from its path at most, in standard errors."""
        off = np.abs(self.mean - theory.mean_path(self.num_workers, self.c, len(self.mean) - 1))
        exact = self.error < 1e-12  # no chance has a part in it yet
        assert (off[exact] < 1e-9).all(), "a path without chance is wrong"
        return float((off[~exact] / self.error[~exact]).max(initial=0.0))

    @property
    def square_off(self) -> float:
        """How far the mean square is from its recursion at most, as a share of that."""
        exact = theory.mean_squares(self.num_workers, self.c, _LR**2, len(self.square) - 1)
        return float(np.abs(self.square / exact - 1).max())

    @property
    def row(self) -> Row:
        momentum, step = self.expected
        can_fit = self.num_workers > 1
        return {
            "workers": self.num_workers,
            "momentum": self.momentum if can_fit else None,
            "its error": self.momentum_error if can_fit else None,
            "1 - 1/M": momentum,
            "step": self.step if can_fit else None,
            "error of step": self.step_error if can_fit else None,
            "c/M": step,
            "mean off (errors)": self.farthest,
            "mean square off": self.square_off,
        }


def _claims(ensembles: Sequence[_Ensemble]) -> Iterator[Claim]:
    for e in ensembles:
        m, (momentum, step) = e.num_workers, e.expected
        if m > 1:
            off = abs(e.momentum - momentum)
            yield Claim(
                f"M={m}: fitted momentum is 1 - 1/M = {momentum:.4g}, to 0.01",
                off <= 0.01,
                f"{e.momentum:.4f} ± {e.momentum_error:.4f}, {off:.4f} off",
            )
            share = abs(e.step / step - 1)
            yield Claim(
                f"M={m}: fitted step is c/M = {step:.4g}, to 2 %",
                share <= 0.02,
                f"{e.step:.5f} ± {e.step_error:.5f}, {100 * share:.2f} % off",
            )
        yield Claim(
            f"M={m}: the mean is within 4 standard errors of its path at every update",
            e.farthest <= 4,
            f"{e.farthest:.2f} at most",
        )
        yield Claim(
            f"M={m}: the mean square is within 3 % of its recursion at every update",
            e.square_off <= 0.03,
            f"{100 * e.square_off:.2f} % at most",
        )


def _control_claims(controls: dict[int, Array]) -> Iterator[Claim]:
    for m, path in controls.items():
        momentum, step = theory.fit_heavy_ball(path)
        off, share = abs(momentum - (1 - 1 / m)), abs(step * m / _curvature(m) - 1)
        yield Claim(
            f"M={m}, control: under constant delays momentum or step is not as above",
            off > 0.01 or share > 0.02,
            f"momentum {momentum:.4f}, {off:.4f} off; step {100 * share:.0f} % off",
        )


def _chart(ensembles: Sequence[_Ensemble], controls: dict[int, Array]) -> Chart:
    means, turns, squares = [], [], []
    for colour, e in enumerate(ensembles):
        label = f"M={e.num_workers}"
        t = np.arange(len(e.mean))
        path = theory.mean_path(e.num_workers, e.c, len(t) - 1)
        exact = theory.mean_squares(e.num_workers, e.c, _LR**2, len(t) - 1)
        means.append(Line(label, colour, t, path, is_theory=True))
        means.append(Line(label, colour, t[::2], e.mean[::2], is_points=True))
        squares.append(Line(label, colour, t, exact, is_theory=True))
        squares.append(Line(label, colour, t[::2], e.square[::2], is_points=True))
        if e.num_workers in controls:
            turns.append(Line(label, colour, t, path, is_theory=True))
            turns.append(Line(label, colour, t[::2], controls[e.num_workers][::2], is_points=True))
    return Chart(
        "paths",
        "Mean paths",
        "Points are simulated, lines the recursions. Updates, gradients and versions are one here. "
        "Staleness is the number of updates between a read and its push.",
        [
            [
                Panel("mean, exponential delays", "updates", means),
                Panel("mean square with noise, exponential", "updates", squares),
                Panel("control: constant delays", "updates", turns),
            ]
        ],
    )
