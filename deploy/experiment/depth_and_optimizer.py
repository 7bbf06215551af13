"""Staleness harms deep nets more than shallow ones, and some optimizers more than others.

Eight workers have a cache each, and every update reaches each cache up to s iterations late, see
`async_sgd.caches`. What counts is the batches until worker 0's cache meets a target, as a multiple
of those with s = 0: the slowdown. Learning rates are the same for every s. A classifier without
hidden layers and a factorisation are the convex, or nearly convex, end of the scale.

Source: Dai et al., "Toward Understanding the Impact of Staleness in Distributed Machine Learning",
ICLR 2019, arXiv:1810.03264. Its nets and data are larger; the learning rates are its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeAlias, cast

import torch

from async_sgd.caches import Caches
from deploy.experiment.charts import Chart, Line, Panel
from deploy.experiment.findings import Claim, Findings, Table, file_name
from deploy.experiment.mixture import Nets, mixture, table
from deploy.experiment.named import Bench
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.pool import make_all
from deploy.experiment.results import Row
from paramserver.optimizers import OPTIMIZERS, SGD
from paramserver.optimizers.base import Optimizer
from workers.task import Task

_OPTIMIZERS = {
    "sgd": "sgd:lr={lr}",
    "momentum": "momentum:lr={lr}",
    "adam": "adam:lr=0.001",
    "adagrad": "adagrad:lr={lr}",
    "rmsprop": "rmsprop:lr={lr},alpha=0.9",
}
_ROBUST, _FRAGILE = ("sgd", "adagrad"), ("momentum", "adam", "rmsprop")
_WORKERS = 8
_LATE = (0, 4, 8, 12, 16)
_SLACK = 0.05


@dataclass(frozen=True, slots=True)
class _Net:
    """What is trained, and until when."""

    task: Callable[[], Task]
    target: float
    lr: float = 0.01
    """Of all optimizers but Adam."""
    falls: bool = False
    """Whether the metric falls to the target."""

    def met(self, value: float) -> bool:
        """Whether ``value`` of the metric is as good as the target."""
        return value <= self.target if self.falls else value >= self.target


_NETS: Mapping[str, _Net] = {
    "no hidden layer": _Net(partial(mixture, 0), 0.75),
    "depth 1": _Net(partial(mixture, 1), 0.85),
    "depth 4": _Net(partial(mixture, 4), 0.85),
    "factorisation": _Net(table, 0.03, lr=0.005, falls=True),
}
_LINEAR, _SHALLOW, _DEEP, _ = _NETS

_Key: TypeAlias = tuple[str, str, int, int]
"""Net, optimizer, workers, and s."""


def find(bench: Bench) -> Findings:
    """Train every net with every optimizer and lateness."""
    seeds = list(range(2 if bench.quick else bench.seeds or 5))
    keys = list(_keys(quick=bench.quick))
    pieces = [_piece(*key, seeds, quick=bench.quick) for key in keys]
    exact = Piece("s = 0 against a plain loop", "exact", {"iterations": 20}, make_exact)
    *outcomes, is_exact = make_all(
        [*pieces, exact], bench.out, jobs=bench.jobs, console=bench.console
    )
    took = {
        key: [math.inf if n is None else n for n in o.done["iterations"]]
        for key, o in zip(keys, outcomes, strict=True)
        if o.result is not None
    }
    slowdowns = dict(_slowdowns(took))
    middle = {key: median(of) for key, of in slowdowns.items()}
    rows = [_row(key, iterations, slowdowns.get(key)) for key, iterations in took.items()]
    return Findings(
        title="Depth, optimizers and staleness",
        about="How many times as many batches stale updates need, by depth and optimizer",
        facts={
            "nets": "48 units a layer, ten classes in a mixture of 30 clusters; factors of rank 5 "
            "of a 500 by 400 table",
            "targets": "; ".join(f"{name}: {net.target:g}" for name, net in _NETS.items()),
            "learning rates": "0.01, of the factors 0.005; Adam 0.001; the same for every s",
            "staleness": "each update reaches each cache s / 2 + 1 iterations late on average",
            "seeds": ", ".join(map(str, seeds)),
            "given up": f"after {_most(_WORKERS, quick=bench.quick):,} iterations of {_WORKERS} "
            "workers, or as many batches of one",
        },
        claims=[
            *([_exact_claim(is_exact.done)] if is_exact.result is not None else []),
            *_claims(middle),
        ],
        tables=[
            Table(
                f"Slowdown with {_WORKERS} workers, medians over seeds",
                list(_by_lateness(middle)),
                "slowdown",
                "Where more than half of the seeds did not reach the target there is none.",
            ),
            Table("All settings", rows, "cells"),
        ],
        charts=[_chart(slowdowns)],
        failed=[f"{o.piece.name}: {o.error}" for o in (*outcomes, is_exact) if o.error],
    )


# ---------------------------------------------------------------- runs


def _keys(*, quick: bool) -> Iterator[_Key]:
    """Yield all there is to train: with one worker only the two depths, and the largest s."""
    if quick:
        for net in (_SHALLOW, _DEEP):
            for optimizer in ("adam", "adagrad"):
                for late in (_LATE[0], _LATE[-1]):
                    yield net, optimizer, _WORKERS, late
        return
    for net in _NETS:
        for optimizer in _OPTIMIZERS:
            for late in _LATE:
                yield net, optimizer, _WORKERS, late
    for net in (_SHALLOW, _DEEP):
        for optimizer in _OPTIMIZERS:
            for late in (_LATE[0], _LATE[-1]):
                yield net, optimizer, 1, late


def _most(num_workers: int, *, quick: bool) -> int:
    """Return the iterations after which a run is given up."""
    return 40 if quick else 1000 * _WORKERS // num_workers


def _piece(
    net: str, optimizer: str, workers: int, late: int, seeds: Sequence[int], *, quick: bool
) -> Piece:
    settings = {
        "net": net,
        "target": 0.3 if quick else _NETS[net].target,
        "optimizer": _OPTIMIZERS[optimizer].format(lr=_NETS[net].lr),
        "workers": workers,
        "late": late,
        "seeds": list(seeds),
        "most": _most(workers, quick=quick),
    }
    name = f"{net}, {optimizer}, {workers} workers, s={late}"
    return Piece(name, f"runs/{file_name(name)}", settings, make_run)


def make_run(settings: Settings, folder: Path) -> Settings:
    """Return for each seed the iterations until worker 0's cache meets the target, or None."""
    of, seeds = _NETS[settings["net"]], settings["seeds"]
    net = _Net(of.task, settings["target"], of.lr, falls=of.falls)
    nets = Nets(net.task(), settings["workers"], seeds)
    caches = Caches(
        nets.start,
        cast(Optimizer, OPTIMIZERS.parse(settings["optimizer"])),
        nets.gradients,
        num_workers=settings["workers"],
        most=settings["late"],
        seeds=seeds,
    )
    iterations: list[int | None] = [None] * len(seeds)
    while caches.iteration < settings["most"] and None in iterations:
        caches.step()
        for replica, reached in enumerate(iterations):
            if reached is None and net.met(nets.judged(caches.caches[replica, 0])):
                iterations[replica] = caches.iteration
    return {"iterations": iterations}


def make_exact(settings: Settings, folder: Path) -> Settings:
    """Train with s = 0, and by a plain loop of summed SGD steps; tell whether bits are the same."""
    lr, seeds = 0.01, [0, 1]
    nets, again = (Nets(mixture(1), _WORKERS, seeds) for _ in range(2))
    caches = Caches(
        nets.start, SGD(lr=lr), nets.gradients, num_workers=_WORKERS, most=0, seeds=seeds
    )
    plain = again.start.clone()
    for iteration in range(settings["iterations"]):
        caches.step()
        grads = again.gradients(plain.unsqueeze(1).repeat(1, _WORKERS, 1), iteration)
        total = torch.zeros_like(plain)
        for worker in range(_WORKERS):
            total += -lr * grads[:, worker]
        plain += total
    same = all(torch.equal(caches.caches[:, w], plain) for w in range(_WORKERS))
    off = float((caches.caches[:, 0] - plain).abs().max())
    return {"same": same, "off": off, "iterations": settings["iterations"]}


# ---------------------------------------------------------------- what came of it


def _slowdowns(took: Mapping[_Key, Sequence[float]]) -> Iterator[tuple[_Key, list[float]]]:
    """Yield each seed's iterations as multiples of its own with s = 0, if all have reached that."""
    for key, iterations in took.items():
        base = took.get((*key[:3], _LATE[0]))
        if base is not None and max(base) < math.inf:
            yield key, [n / at_once for n, at_once in zip(iterations, base, strict=True)]


def _row(key: _Key, iterations: Sequence[float], slowdown: Sequence[float] | None) -> Row:
    net, optimizer, workers, late = key
    of = slowdown or [math.inf]
    return {
        "net": net,
        "optimizer": optimizer,
        "workers": workers,
        "s": late,
        "batches": _or_none(workers * median(iterations)),
        "slowdown": _or_none(median(of)),
        "least": _or_none(min(of)),
        "largest": _or_none(max(of)),
        "reached": sum(map(math.isfinite, iterations)),
    }


def _by_lateness(slowdown: Mapping[_Key, float]) -> Iterator[Row]:
    pairs = dict.fromkeys((net, opt) for net, opt, workers, _ in slowdown if workers == _WORKERS)
    for net, optimizer in pairs:
        found = {late: slowdown.get((net, optimizer, _WORKERS, late), math.inf) for late in _LATE}
        yield {
            "net": net,
            "optimizer": optimizer,
            **{f"s={late}": _or_none(value) for late, value in found.items()},
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exact_claim(found: Settings) -> Claim:
    return Claim(
        "s = 0 is synchronous SGD with summed updates, bit for bit",
        found["same"],
        f"{found['iterations']} iterations, {found['off']:g} off",
    )


def _claims(slowdown: Mapping[_Key, float]) -> Iterator[Claim]:
    """Claim what the source found; a slowdown without end is "never"."""

    def at_most(net: str, optimizer: str) -> float | None:
        return slowdown.get((net, optimizer, _WORKERS, _LATE[-1]))

    last = f"s = {_LATE[-1]}"
    for net in (_SHALLOW, _DEEP):
        for optimizer in _OPTIMIZERS:
            path = [
                of for late in _LATE
                if (of := slowdown.get((net, optimizer, _WORKERS, late))) is not None
            ]  # fmt: skip
            if path:
                yield Claim(
                    f"{net}, {optimizer}: the slowdown does not fall as s grows, to 5 %",
                    all(b >= (1 - _SLACK) * a for a, b in itertools.pairwise(path)),
                    ", ".join(map(_said, path)),
                )
    for optimizer in ("sgd", *_FRAGILE):
        shallow, deep = at_most(_SHALLOW, optimizer), at_most(_DEEP, optimizer)
        if shallow is not None and deep is not None:
            yield Claim(
                f"{optimizer}: {last} slows {_DEEP} more than {_SHALLOW}",
                deep > shallow,
                f"{_said(deep)} against {_said(shallow)}",
            )
    base = at_most(_DEEP, "sgd")
    for optimizer, factor in (("momentum", 2.0), ("adam", 1.5)):
        found = at_most(_DEEP, optimizer)
        if base is not None and found is not None:
            yield Claim(
                f"{_DEEP}, {last}: the slowdown of {optimizer} is {factor:g} times SGD's or more",
                found >= factor * base < math.inf,
                f"{_said(found)} against {_said(base)}",
            )
    robust, fragile = (
        [of for optimizer in which if (of := at_most(_DEEP, optimizer)) is not None]
        for which in (_ROBUST, _FRAGILE)
    )
    if len(robust) + len(fragile) == len(_OPTIMIZERS):
        yield Claim(
            f"{_DEEP}, {last}: {' and '.join(_ROBUST)} slow down less than {', '.join(_FRAGILE)}",
            max(robust) < min(fragile),
            f"at most {_said(max(robust))} against at least {_said(min(fragile))}",
        )
    if (linear := at_most(_LINEAR, "sgd")) is not None:
        yield Claim(
            f"{_LINEAR}, sgd: {last} slows it less than 1.5 times", linear < 1.5, _said(linear)
        )


def _said(slowdown: float) -> str:
    return f"{slowdown:.3g}" if math.isfinite(slowdown) else "never"


def _chart(slowdowns: Mapping[_Key, Sequence[float]]) -> Chart:
    panels = []
    for net in dict.fromkeys(key[0] for key in slowdowns):
        lines = []
        for colour, optimizer in enumerate(_OPTIMIZERS):
            found = {
                late: of
                for late in _LATE
                if (of := slowdowns.get((net, optimizer, _WORKERS, late))) is not None
                and math.isfinite(max(of))
            }
            middle, low, high = ([f(of) for of in found.values()] for f in (median, min, max))
            lines.append(Line(optimizer, colour, list(found), middle, low, high))
        panels.append(Panel(f"{net}: slowdown", "s", lines, log_y=True))
    caption = (
        f"Batches to the target, as multiples of those with s = 0; {_WORKERS} workers. Lines are "
        "medians over seeds, bands from the least to the largest; they end where a seed did not "
        "reach the target."
    )
    return Chart("slowdown", "What staleness costs", caption, [panels[:2], panels[2:]])
