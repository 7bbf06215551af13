"""What the batch size changes: noise, speed, and the minimum that is found.

One worker trains a net with batches from a few samples to all of them, in three ways: as many
passes and the same learning rate, as many passes and a rate in proportion to the batch, and as many
updates and the same rate. A larger batch at one rate takes fewer steps in a pass, so the first way
trains it less; the second makes up for that while the rate is not too large; the third gives it
more passes.

Sources: Keskar et al., "On Large-Batch Training for Deep Learning: Generalization Gap and Sharp
Minima", ICLR 2017, arXiv:1609.04836 (gap, sharpness). Goyal et al., arXiv:1706.02677 (a rate in
proportion). De et al., arXiv:1610.05792, and any book on sampling: without replacement a batch of B
from N samples has a mean with covariance (S / B) (1 - B / N), S with N - 1 below.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from async_sgd.delays import Constant
from async_sgd.simulator import Simulator
from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.findings import Claim, Findings, Table
from deploy.experiment.named import Bench
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.pool import make_all
from deploy.experiment.results import Row, over_seeds
from paramserver.checkpoint import load_checkpoint
from paramserver.layout import Layout
from paramserver.optimizers import SGD
from paramserver.rounds import Sample
from workers.config import RunConfig
from workers.oracles import Oracle
from workers.samples import Piece as Drawn
from workers.sharpness import sharpness
from workers.task import build_data, build_model, evaluate
from workers.tasks import task
from workers.threads import torch_threads

_TASK = "digits:hidden=32"
_RATE, _BASE = 0.1, 16
"""The learning rate, and the batch it is meant for."""
_EPOCHS = 40
_DRAWS = 400
"""Batches that the variance of a gradient is measured on."""
_EPSILON = 5e-4
"""Half the width of the box that sharpness looks at; one of the two of Keskar et al."""

_NOTHING = 1e-10
"""What a variance of 0 may come out as."""

_PASSES, _SCALED, _UPDATES = "same passes", "same passes, rate in proportion", "same updates"
_WAYS = (_PASSES, _SCALED, _UPDATES)


def find(bench: Bench) -> Findings:
    """Train with every batch size, then time gradients alone."""
    num_train = len(build_data(task(_TASK)).train)
    sizes = (16, 64) if bench.quick else (4, 16, 64, 256, num_train)
    seeds = range(1 if bench.quick else bench.seeds or 3)
    pieces = [
        _piece(way, size, seed, num_train, quick=bench.quick)
        for way, size, seed in itertools.product(_WAYS, sizes, seeds)
    ]
    noises = [_noise_piece(sizes, seed, quick=bench.quick) for seed in seeds]
    outcomes = make_all([*pieces, *noises], bench.out, jobs=bench.jobs, console=bench.console)
    done = [o for o in outcomes if o.result is not None]
    made = [o for o in done if "way" in o.piece.settings]
    noise = _noise_rows([o.done for o in done if "way" not in o.piece.settings])
    rows: list[Row] = [
        {**{k: o.piece.settings[k] for k in ("way", "batch", "seed", "lr")}, **o.done} for o in made
    ]
    summary = over_seeds(rows, ["way", "batch"])
    speeds = _speeds(sizes, bench)
    return Findings(
        title="Batch size",
        about="Noise, speed and the minimum that is found, from a few samples a batch to all",
        facts={
            "net": f"{_TASK}, {num_train:,} training samples, plain SGD, one worker",
            "learning rate": f"{_RATE:g}; in proportion: times batch / {_BASE}",
            "passes": f"{_epochs(quick=bench.quick):g}; the same updates are those of them at "
            f"batch {_BASE}",
            "sharpness": f"per cent, epsilon {_EPSILON:g}; a lower bound",
            "staleness": "none: there is one worker",
            "seeds": ", ".join(map(str, seeds)),
        },
        claims=[
            *_variance_claims(noise),
            *_speed_claims(speeds),
            *_minimum_claims(summary, sizes),
        ],
        tables=[
            Table("Medians over seeds", [_brief(row) for row in summary]),
            Table("Variance of a gradient at the start, mean over seeds", noise, "noise"),
            Table("A gradient alone, on this machine", speeds, "speeds"),
        ],
        charts=[_chart(summary, noise)],
        failed=[f"{o.piece.name}: {o.error}" for o in outcomes if o.error],
        files={"cells": rows, "summary": summary},
    )


def _epochs(*, quick: bool) -> float:
    return 0.5 if quick else _EPOCHS


def _piece(way: str, batch: int, seed: int, num_train: int, *, quick: bool) -> Piece:
    epochs = _epochs(quick=quick)
    updates = math.ceil(epochs * num_train / (_BASE if way == _UPDATES else batch))
    settings = {
        "task": _TASK,
        "way": way,
        "batch": batch,
        "seed": seed,
        "updates": updates,
        "lr": _RATE * batch / _BASE if way == _SCALED else _RATE,
        "epsilon": _EPSILON,
    }
    folder = f"{way.replace(', ', '-').replace(' ', '-')}/{batch}-seed-{seed}"
    return Piece(f"{way}, batch {batch}, seed {seed}", folder, settings, make_run)


def make_run(settings: Settings, folder: Path) -> Settings:
    """Train, and measure where it ended."""
    what, seed, batch = task(settings["task"]), settings["seed"], settings["batch"]
    config = RunConfig(
        workers=1,
        batch_size=batch,
        updates=settings["updates"],
        seed=seed,
        evaluate_every_s=0,
        on_nan="drop",
        out=folder / "run",
    )
    result = Simulator(what, SGD(lr=settings["lr"]), config, delay=Constant()).fit()
    assert result.checkpoint is not None, "a run that has ended has one"
    x = load_checkpoint(result.checkpoint).params
    model, data = build_model(what, seed), build_data(what)
    layout = Layout.of(model, what.groups)
    layout.load(model, x)
    oracle = Oracle(what, model, layout, data.train, seed)
    train = evaluate(what, model, data.train)

    def everything(point: Tensor) -> tuple[float, Tensor]:
        _, loss, rows = oracle.answer("gradient", point, Drawn(Sample("all"), 0, 0, 1), None)
        return loss, rows[0]

    is_finite = math.isfinite(train["loss"])
    return {
        "updates": result.record["updates"],
        "passes": result.record["samples"] / len(data.train),
        "train_loss": train["loss"],
        "test_loss": result.metrics["loss"],
        "train_accuracy": train["accuracy"],
        "test_accuracy": result.metrics["accuracy"],
        "gap": result.metrics["loss"] - train["loss"],
        "sharpness": sharpness(everything, x, seed=seed, epsilon=settings["epsilon"])
        if is_finite
        else None,
    }


def _noise_piece(sizes: Sequence[int], seed: int, *, quick: bool) -> Piece:
    settings = {
        "task": _TASK,
        "sizes": list(sizes),
        "seed": seed,
        "draws": 40 if quick else _DRAWS,
    }
    return Piece(f"noise, seed {seed}", f"noise/seed-{seed}", settings, make_noise)


def make_noise(settings: Settings, folder: Path) -> Settings:
    """Measure the variance of a batch's gradient where training starts, for every size."""
    what, seed = task(settings["task"]), settings["seed"]
    model, data = build_model(what, seed), build_data(what)
    layout = Layout.of(model)
    oracle = Oracle(what, model, layout, data.train, seed)
    found = _variances(
        oracle, layout.flatten(model), settings["sizes"], len(data.train), settings["draws"]
    )
    return {"sizes": settings["sizes"], "variances": [list(pair) for pair in found]}


def _variances(
    oracle: Oracle, x: Tensor, sizes: Sequence[int], num_train: int, draws: int
) -> list[tuple[float, float]]:
    """Return the variance of a batch's gradient at ``x``, summed over elements: drawn, and exact.

    Both are told of each of ``sizes``. The exact one is (S / B) (1 - B / N), S the variance of a
    sample's gradient.
    """
    whole = Drawn(Sample("all"), 0, 0, 1)
    mean = oracle.answer("gradient", x, whole, None)[2][0].double()
    one_each = (Drawn(Sample("all"), 0, i, num_train) for i in range(num_train))
    scatter = sum(_distance(oracle, x, one, mean) for one in one_each) / (num_train - 1)
    found = []
    for batch in sizes:
        some = (Drawn(Sample("drawn", batch), i, 0, 1) for i in range(draws))
        drawn = sum(_distance(oracle, x, one, mean) for one in some) / draws
        found.append((drawn, scatter / batch * (1 - batch / num_train)))
    return found


def _distance(oracle: Oracle, x: Tensor, piece: Drawn, mean: Tensor) -> float:
    """Return the squared distance of a piece's gradient from the mean gradient."""
    gradient = oracle.answer("gradient", x, piece, None)[2][0].double()
    return float((gradient - mean).square().sum())


def _speeds(sizes: Sequence[int], bench: Bench) -> list[Row]:
    """Time a gradient of each size, in turns."""
    what = task(_TASK)
    model, data = build_model(what, 0), build_data(what)
    batches = {size: data.train.batch(torch.arange(size)) for size in sizes}

    def gradient(size: int) -> Callable[[], None]:
        def compute() -> None:
            model.zero_grad()
            what.loss(model, batches[size]).backward()

        return compute

    rounds = 3 if bench.quick else 15
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    with torch_threads(1):
        for _ in range(rounds):
            for size in sizes:
                seconds[size].append(_timed(gradient(size), times=max(1, 256 // size)))
    num_train = len(data.train)
    return [
        {
            "batch": size,
            "updates a pass": math.ceil(num_train / size),
            "us a gradient": 1e6 * statistics.median(seconds[size]),
            "us a sample": 1e6 * statistics.median(seconds[size]) / size,
        }
        for size in sizes
    ]


def _timed(do: Callable[[], None], *, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        do()
    return (time.perf_counter() - start) / times


def _noise_rows(found: Sequence[Settings]) -> list[Row]:
    """Return the means over seeds, a row a size."""
    if not found:
        return []
    means = [
        [statistics.mean(pair[which] for pair in pairs) for which in (0, 1)]
        for pairs in zip(*(one["variances"] for one in found), strict=True)
    ]
    return [
        {"batch": batch, "drawn": drawn, "S/B (1 - B/N)": exact}
        for batch, (drawn, exact) in zip(found[0]["sizes"], means, strict=True)
    ]


def _variance_claims(noise: Sequence[Row]) -> Iterator[Claim]:
    for row in noise:
        batch, drawn, exact = row.values()
        if exact == 0:  # the batch is all there is
            yield Claim(
                f"batch {batch} is all samples: its gradient has no variance",
                drawn < _NOTHING,
                f"{drawn:.2g}",
            )
            continue
        off = drawn / exact - 1
        yield Claim(
            f"batch {batch}: the variance of an update is S/B (1 - B/N), to 15 %",
            abs(off) <= 0.15,
            f"{drawn:.3g} against {exact:.3g}, {100 * off:+.1f} %",
        )


def _speed_claims(speeds: Sequence[Row]) -> Iterator[Claim]:
    first, last = speeds[0], speeds[-1]
    yield Claim(
        f"a sample takes less time in a batch of {last['batch']} than in one of {first['batch']}",
        last["us a sample"] < first["us a sample"],
        f"{last['us a sample']:.3g} us against {first['us a sample']:.3g} us",
    )


def _minimum_claims(summary: Sequence[Row], sizes: Sequence[int]) -> Iterator[Claim]:
    of = {(row["way"], row["batch"]): row for row in summary}
    small, large = sizes[0], sizes[-1]

    def both(way: str, figure: str) -> tuple[float, float]:
        found = [of.get((way, size), {}).get(f"{figure}_median") for size in (small, large)]
        return tuple(math.nan if value is None else value for value in found)  # type: ignore[return-value]

    for way in _WAYS:
        before, after = both(way, "sharpness")
        yield Claim(
            f"{way}: batches of {large} end in a sharper minimum than batches of {small}",
            after > before,
            f"{after:.3g} against {before:.3g}",
        )
        before, after = both(way, "gap")
        yield Claim(
            f"{way}: batches of {large} end with a larger gap between test and training loss",
            after > before,
            f"{after:.3g} against {before:.3g}",
        )
    base = of.get((_PASSES, _BASE), {}).get("test_accuracy_median")
    for size in (size for size in sizes if size > _BASE):
        scaled = of.get((_SCALED, size), {}).get("test_accuracy_median")
        if base is None or scaled is None:
            continue
        yield Claim(
            f"batch {size} at a rate in proportion is within 2 points of batch {_BASE}",
            base - scaled <= 0.02,
            f"{scaled:.4f} against {base:.4f}",
        )


_SHOWN = ("updates", "train_loss", "test_loss", "gap", "test_accuracy", "sharpness")


def _brief(row: Mapping[str, object]) -> Row:
    return {
        "way": row["way"],
        "batch": row["batch"],
        **{name.replace("_", " "): row.get(f"{name}_median") for name in _SHOWN},
    }


def _chart(summary: Sequence[Row], noise: Sequence[Row]) -> Chart:
    figures = {
        "sharpness": "sharpness (%)",
        "gap": "test loss - training loss",
        "test_accuracy": "test accuracy",
    }
    panels = []
    for figure, title in figures.items():
        lines = []
        for colour, way in enumerate(_WAYS):
            rows = [
                row for row in summary
                if row["way"] == way and row.get(f"{figure}_median") is not None
            ]  # fmt: skip
            middle, low, high = (
                [row[f"{figure}_{which}"] for row in rows] for which in ("median", "min", "max")
            )
            lines.append(Line(way, colour, [row["batch"] for row in rows], middle, low, high))
        is_log = figure == "sharpness"
        panels.append(Panel(title, "batch", lines, log_x=True, log_y=is_log))
    noisy = [row for row in noise if row["drawn"] > _NOTHING]
    sizes = [row["batch"] for row in noisy]
    lines = [
        Line("drawn", len(_WAYS), sizes, [row["drawn"] for row in noisy], is_points=True),
        Line(
            "S/B (1 - B/N)", len(_WAYS), sizes, [row["S/B (1 - B/N)"] for row in noisy],
            is_theory=True,
        ),
    ]  # fmt: skip
    panels.append(
        Panel("variance of a gradient at the start", "batch", lines, log_x=True, log_y=True)
    )
    caption = (
        "Lines are medians over seeds, bands from the least to the largest; the thin line is the "
        "formula S/B (1 - B/N)."
    )
    return Chart("batch-size", "What the batch size changes", caption, [panels[:2], panels[2:]])
