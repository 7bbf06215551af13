"""What truncating backpropagation through time does, and what clipping is for.

First a scalar recurrence, whose gradient is known: what comes back over T steps is a^(T - 1) times
as large, so it vanishes or explodes, and what a truncated gradient leaves out is all that lies
further back. Then a language model of characters with two asynchronous workers, in three ways:
windows of 50 characters with clipping, without clipping, and windows ten times as long.

Sources: Williams & Peng, Neural Computation 2, 1990 (truncation). Bengio, Simard & Frasconi, IEEE
Transactions on Neural Networks 5(2), 1994, and Pascanu, Mikolov & Bengio, ICML 2013,
arXiv:1211.5063 (vanishing and exploding gradients, clipping by norm).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.comparison import Compared, compare
from deploy.experiment.findings import Claim, Findings, Table
from deploy.experiment.grid import Grid
from deploy.experiment.named import Bench
from deploy.experiment.results import Array, Row, paths, spread
from paramserver.ledger import Ledger
from paramserver.record import RunFolder
from workers.recurrent import Recurrent, State
from workers.windows import TensorSeries, Windows

_LENGTH = 50
_FACTORS = (0.9, 1.0, 1.1)
_EXACT = 1e-9

_WINDOW, _LONG = 50, 500
_CLIPPED, _UNCLIPPED, _TOO_LONG = "clipped", "not clipped", f"windows of {_LONG}"
_TARGET = 1.9
"""Nats a character on the validation part."""
_WORSE = 0.1
"""Nats a character that the other two ways are behind, at least."""
_BATCH = 32


def find(bench: Bench) -> Findings:
    """Compute the recurrence's gradients, then train."""
    gradients = [_row(a, k2) for a, k2 in itertools.product(_FACTORS, (1, 10, _LENGTH))]
    seeds = tuple(range(1 if bench.quick else bench.seeds or 3))
    grids = {
        _CLIPPED: _grid(bench, seeds, _WINDOW, clip=True),
        _UNCLIPPED: _grid(bench, seeds, _WINDOW, clip=False),
        _TOO_LONG: _grid(bench, seeds, _LONG, clip=True),
    }
    arms = compare(grids, bench.out, jobs=bench.jobs, console=bench.console)
    return Findings(
        title="Truncated backpropagation through time",
        about="A recurrent net by windows: clipped, not clipped, and by windows too long",
        facts={
            "net": f"{_task(_WINDOW)}, batches of {_BATCH} streams, SGD with lr=4",
            "clip": "by norm 1 at the worker, where it is clipped",
            "windows": f"{_WINDOW} characters, or {_LONG}",
            "workers": "2, asynchronous" + (", simulated" if bench.quick else ", real processes"),
            "passes": f"{_epochs(bench):g} through the training text each",
            "staleness": "of a state: versions between the reads of its two windows",
            "seeds": ", ".join(map(str, seeds)),
        },
        claims=[*_gradient_claims(gradients), *_training_claims(arms)],
        tables=[
            Table(
                f"d h_{_LENGTH} / d x_1 of h_t = a h_(t-1) + x_t, by how far a gradient goes back",
                gradients,
                "gradients",
            ),
            Table("Nats a character on the validation part, medians over seeds", _losses(arms)),
        ],
        charts=[_chart(arms)],
        failed=[line for part in arms.values() for line in part.failed],
        files={
            "cells": [{"way": arm, **row} for arm, part in arms.items() for row in part.rows],
            "summary": [{"way": arm, **row} for arm, part in arms.items() for row in part.summary],
        },
    )


# ---------------------------------------------------------------- a recurrence


class _Scalar(nn.Module):
    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a
        self.b = nn.Parameter(torch.ones((), dtype=torch.float64))


def _row(a: float, k2: int) -> Row:
    """Return d h_T / d x_1 of ``h_t = a h_(t-1) + x_t`` with a gradient that goes back ``k2``."""
    inputs = torch.zeros(_LENGTH, dtype=torch.float64)
    inputs[0] = 1.0
    how = Recurrent(initial=_zero, loss=_last, k1=1, k2=k2)
    windows = Windows(_LENGTH, 1, k1=1, k2=k2, worker=0, num_workers=1)
    model, series, state = _Scalar(a), TensorSeries(inputs, window=1), None
    for clock in range(_LENGTH):
        loss, state = how.unroll(model, windows.read(series, clock), state)
    (slope,) = torch.autograd.grad(loss, [model.b])
    expected = a ** (_LENGTH - 1) if k2 >= _LENGTH else 0.0
    return {"a": a, "k2": k2, "gradient": slope.item(), "a^(T-1), or 0": expected}


def _zero(model: nn.Module, num_streams: int) -> State:
    return (torch.zeros(num_streams, dtype=torch.float64),)


def _last(model: nn.Module, batch: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
    """Return the states' mean; a window that counts one step has its last state."""
    assert isinstance(model, _Scalar)
    (h,), states = state, []
    for x in batch[0].unbind(1):
        h = model.a * h + model.b * x
        states.append(h)
    return torch.stack(states).mean(), (h,)


def _gradient_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in rows:
        found, expected = row["gradient"], row["a^(T-1), or 0"]
        is_whole = row["k2"] >= _LENGTH
        yield Claim(
            f"a={row['a']:g}, k2={row['k2']}: what comes back over {_LENGTH} steps is "
            + (f"a^{_LENGTH - 1}" if is_whole else "cut off"),
            abs(found - expected) <= _EXACT * max(abs(expected), 1),
            f"{found:.4g} against {expected:.4g}",
        )


# ---------------------------------------------------------------- a net


def _task(window: int) -> str:
    return f"tinyshakespeare:cell=gru,hidden=128,k1={window}"


def _epochs(bench: Bench) -> float:
    return 0.01 if bench.quick else 3


def _grid(bench: Bench, seeds: Sequence[int], window: int, *, clip: bool) -> Grid:
    quick = {"evaluate_every_s": 0, "delay": "exponential"}
    return Grid(
        axes={},
        seeds=seeds,
        run={
            "task": _task(window),
            "workers": 2,
            "batch_size": _BATCH,
            "optimizer": "sgd:lr=4",
            "epochs": _epochs(bench),
            "on_nan": "drop",
            **({"clip": "norm:max_norm=1"} if clip else {}),
            **(quick if bench.quick else {"evaluate_every_s": 2}),
        },
        mode="simulate" if bench.quick else "async",
    )


def _final(arms: Mapping[str, Compared], arm: str) -> float:
    """Return the median loss at the end: inf if it is not finite, nan if a run failed."""
    if arms[arm].failed:
        return math.nan  # of which nothing holds
    (row,) = arms[arm].summary
    loss = row.get("final_loss_median")
    return math.inf if loss is None else float(loss)


def _training_claims(arms: Mapping[str, Compared]) -> Iterator[Claim]:
    best = _final(arms, _CLIPPED)
    yield Claim(
        f"clipped, 2 workers are under {_TARGET} nats a character", best < _TARGET, f"{best:.3f}"
    )
    for arm, why in (
        (_UNCLIPPED, "without clipping"),
        (_TOO_LONG, f"windows of {_LONG}, a tenth of the updates"),
    ):
        other = _final(arms, arm)
        yield Claim(
            f"{why}: {_WORSE} nats worse after as many characters",
            other >= best + _WORSE,
            f"{other:.3f} against {best:.3f}",
        )


def _losses(arms: Mapping[str, Compared]) -> list[Row]:
    rows: list[Row] = []
    for arm, part in arms.items():
        (row,) = part.summary
        rows.append(
            {
                "way": arm,
                "final loss": row.get("final_loss_median"),
                "best loss": row.get("best_loss_median"),
                "updates": row.get("updates_median"),
                "seconds": row.get("seconds_median"),
                "dropped": row.get("dropped_median"),
            }
        )
    return rows


def _chart(arms: Mapping[str, Compared]) -> Chart:
    by_text, by_second, norms = [], [], []
    for colour, (arm, part) in enumerate(arms.items()):
        folders = [
            part.out / cell.folder / "run"
            for cell, outcome in zip(part.grid.cells, part.outcomes, strict=True)
            if outcome.result is not None
        ]
        found = [paths(folder)["loss"] for folder in folders]
        read = 1e-6 * _BATCH * (_LONG if arm == _TOO_LONG else _WINDOW)
        line = partial(_line, arm, colour)
        by_text += line([(read * one["gradients"], one["loss"]) for one in found])
        by_second += line([(one["seconds"], one["loss"]) for one in found])
        if arm != _TOO_LONG:
            norms += line([_norms(folder) for folder in folders[:1]])
    nats = "nats a character"
    return Chart(
        "truncation",
        "A language model of characters, two asynchronous workers",
        "Lines are medians over seeds, bands from the least to the largest. Gradient norms are "
        "those before clipping, of the first seed, each the largest of ten in a row.",
        [
            [
                Panel(f"validation loss, {nats}", "million characters read", by_text),
                Panel("", "seconds", by_second),
                Panel("norm of gradients", "pushes", norms, log_y=True),
            ]
        ],
    )


def _line(label: str, colour: int, lines: Sequence[tuple[Array, Array]]) -> list[Line]:
    band = spread(lines)
    return [] if band is None else [Line(label, colour, *band)]


def _norms(folder: Path) -> tuple[Array, Array]:
    """Return every tenth push's number, and the largest finite norm of it and the nine before."""
    norms = Ledger.load(RunFolder(folder).updates).columns()["grad_norm"]
    whole = len(norms) // 10 * 10
    largest = np.where(np.isfinite(norms[:whole]), norms[:whole], 0).reshape(-1, 10).max(axis=1)
    return np.arange(10.0, whole + 1, 10), largest.astype(np.float64)
