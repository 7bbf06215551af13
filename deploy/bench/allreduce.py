"""Synchronous steps: two processes have a gradient each and end with the same new parameters.

Both begin with the gradient where its reduction wants it: ours in its slot, as the training loop
makes it. The peer is gloo's all-reduce of the gradient, its mean, and the fused momentum step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deploy.bench import figures
from deploy.bench.figures import OURS
from deploy.bench.processes import STARTUP_S, Processes, ask, ray_for_bench, timed
from deploy.bench.pushpull import QUICK_ROUNDS, QUICK_SIZES, ROUNDS, SIZES
from deploy.bench.work import OPTIMIZER, synthetic_gradient
from paramserver.layout import Layout
from sync import shared
from sync.step import Report, Stepper

GLOO = "gloo all-reduce, fused step"
NUM_RANKS = 2
_TOKEN = "bench"  # noqa: S105  guards nothing

Start = Callable[[Processes, int], list[Any]]
"""Starts the ranks for so many floats: actors with ``measure(repeats) -> milliseconds of each``."""


def run(report: figures.Report, *, peers: bool, quick: bool) -> None:
    """Measure every size and print a table each."""
    report.note(f"synchronous steps, {NUM_RANKS} processes, momentum SGD")
    with ray_for_bench(quick=quick):
        for numel, repeats in QUICK_SIZES if quick else SIZES:
            rounds = measure(report, numel, repeats, QUICK_ROUNDS if quick else ROUNDS, peers=peers)
            report.show(f"{numel:,} floats", "steps/s", rounds, [GLOO])


def measure(
    report: figures.Report, numel: int, repeats: int, num_rounds: int, *, peers: bool
) -> dict[str, list[float]]:
    """Return each contender's steps a second, one figure a round."""
    starts: dict[str, Start] = {OURS: _start_ours}
    if peers:
        starts[GLOO] = _start_gloo
    with Processes() as processes:
        contenders: dict[str, list[Any]] = {}
        for name, start in starts.items():
            try:
                contenders[name] = start(processes, numel)
            except Exception as error:  # one that cannot run must not end the others
                report.failed(name, error)
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(-1, num_rounds):  # the first round only warms up: memory, caches
            for name, ranks in list(contenders.items()):
                try:
                    times = ask([r.measure.remote(repeats) for r in ranks])[0]
                    if number >= 0:
                        rounds[name].append(1e3 / statistics.median(times))
                except Exception as error:
                    report.failed(name, error)
                    del contenders[name]
        return rounds


def _start_gloo(processes: Processes, numel: int) -> list[Any]:
    from deploy.bench import gloo_pattern  # noqa: PLC0415  fails where torch has no gloo

    ranks = gloo_pattern.start(processes, NUM_RANKS)
    ask([r.begin.remote(numel) for r in ranks])
    return ranks


def _start_ours(processes: Processes, numel: int) -> list[Any]:
    ranks = [processes.start(OurRank, rank, numel) for rank in range(NUM_RANKS)]
    (address,) = ask([ranks[0].listen.remote()])
    ask([r.join.remote(address) for r in ranks])
    return ranks


class OurRank:
    """A rank of a synchronous run on one machine, without a model."""

    def __init__(self, rank: int, numel: int) -> None:
        torch.set_num_threads(1)
        self._rank, self._numel = rank, numel
        self._number = 0

    def listen(self) -> str:
        """Open the group's door, at rank 0; return where."""
        self._host = shared.Host()
        return self._host.address

    def join(self, address: str) -> None:
        """Form the group; returns when it is complete."""
        layout = Layout.of(nn.ParameterList([nn.Parameter(torch.empty(self._numel))]))
        if self._rank == 0:
            group = self._host.form(layout, NUM_RANKS, _TOKEN, STARTUP_S)
        else:
            group = shared.join(address, self._rank, layout, NUM_RANKS, _TOKEN, STARTUP_S)
        self._stepper = Stepper(group, OPTIMIZER)
        # The mean over equal gradients is the gradient, so it may be reduced again and again.
        group.grad.copy_(synthetic_gradient((layout.numel,)))

    def measure(self, repeats: int) -> list[float]:
        """Return the milliseconds of each step of the group."""
        told = Report(samples=1.0, loss=0.0, norm=0.0, seconds=0.0)

        def step() -> None:
            self._number += 1
            self._stepper.step(self._number, told)

        return timed(step, repeats)
