"""The oracle is the spectral radius of one turn of all workers, written as a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_sgd.compensation import DCASGD
from async_sgd.jobs import Job
from async_sgd.rules import RULES
from async_sgd.setup import Setup
from paramserver.optimizers import DANA, OPTIMIZERS, DANASlim, LocalMomentum, Momentum
from tests.support.virtual import Slope, simulation
from workers.config import RunConfig
from workers.estimate import Estimated
from workers.tasks import task

PLACED: dict[str, Any] = {
    "momentum": Momentum,
    "local-momentum": LocalMomentum,
    "dana": DANA,
    "dana-slim": DANASlim,
}
MU = 0.9

Array = NDArray[np.float64]


def push(name: str, i: int, workers: int, c: float) -> Array:
    """Return what a push of worker ``i`` does to (w, all it was read at, all velocities).

    ``c`` is the learning rate times the curvature. The server's one velocity is worker 0's.
    """
    size = 1 + 2 * workers
    w, read = 0, 1 + i
    v = 1 + workers + (0 if name == "momentum" else i)
    velocity, step, shown = np.eye(size), np.eye(size), np.eye(size)
    velocity[v, v], velocity[v, read] = MU, c  # v <- mu v + c r
    step[w, v] = -1  # w <- w - v
    if name == "dana-slim":
        step[w, v], step[w, read] = -MU, -c  # w <- w - (c r + mu v)
    shown[read], shown[read, w] = 0, 1  # r <- w
    if name == "dana":
        shown[read, 1 + workers :] = -MU  # r <- w - mu sum v
    return shown @ step @ velocity


def radius(name: str, workers: int, c: float) -> float:
    turn = np.eye(1 + 2 * workers)
    for worker in range(workers):
        turn = push(name, worker, workers, c) @ turn
    return float(np.abs(np.linalg.eigvals(turn)).max())


def limit(name: str, workers: int) -> float:
    """Return the largest stable ``c``, by bisection."""
    low, high = 0.001, 5.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if radius(name, workers, middle) <= 1 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("name", "workers", "expected"),
    [
        ("momentum", 1, 2 * (1 + MU)),
        ("local-momentum", 1, 2 * (1 + MU)),
        ("dana", 1, 2 * (1 + MU) / (1 + 2 * MU)),
        ("dana-slim", 1, 2 * (1 + MU) / (1 + 2 * MU)),
        ("momentum", 2, 1 - MU),
        ("local-momentum", 2, 1 - MU**2),
    ],
)
def test_the_oracle_has_the_limits_that_are_known(name: str, workers: int, expected: float) -> None:
    assert limit(name, workers) == pytest.approx(expected, rel=1e-4)


class Peaks(Slope):
    """Gradients of a quadratic for each curvature, and the largest |w| read in each ``span``."""

    def __init__(self, curvature: Tensor, span: int) -> None:
        super().__init__(curvature)
        self._span, self._num = span, 0
        self.peaks: list[Tensor] = []

    def finish(self, job: Job) -> tuple[Tensor, Estimated]:
        if self._num % self._span == 0:
            self.peaks.append(job.params.abs())
        self._num += 1
        torch.maximum(self.peaks[-1], job.params.abs(), out=self.peaks[-1])
        return self.curvature * job.params, Estimated(0.0, 0.0)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", PLACED)
def test_the_largest_stable_learning_rate_is_that_of_the_recursion(name: str, workers: int) -> None:
    curvature = torch.logspace(-2, 0.7, 1600, dtype=torch.float64)  # steps of 0.4 %
    gradients = Peaks(curvature, span=400)

    simulation(
        workers,
        updates=1600,
        delay="constant",
        optimizer=PLACED[name](lr=1.0, momentum=MU),
        gradients=gradients,
        start=torch.ones_like(curvature),
    ).run()

    grows = ~(gradients.peaks[-1] <= gradients.peaks[1])  # also where it is NaN by now
    found = float(curvature[int(grows.int().argmax())])
    assert found == pytest.approx(limit(name, workers), rel=0.01)


def setup(optimizer: str, rule: str) -> Setup:
    return Setup(
        task("quadratic"), OPTIMIZERS.parse(optimizer), RunConfig(workers=4),
        rule=RULES.parse(rule), damping=None, compensation=None, shards=1,
    )  # fmt: skip


GATHERING = [
    "bsp",
    "k-of-n:k=2",
    "softsync:n=1",
    "rennala:batch=4",
    "fedbuff",
    "sync-switch:after=9",
]


@pytest.mark.parametrize("rule", GATHERING)
@pytest.mark.parametrize("name", ["local-momentum", "dana", "dana-slim"])
def test_a_velocity_for_each_worker_needs_gradients_that_are_told_apart(
    name: str, rule: str
) -> None:
    short = rule.partition(":")[0]

    with pytest.raises(
        ValueError,
        match=rf"^{name} keeps a velocity for each worker, and rule {short} averages the gradients "
        "of several, which is nobody's: use asp, ssp, bounded or ringmaster, or optimizer ",
    ):
        setup(name, rule)


@pytest.mark.parametrize("rule", ["asp", "ssp:bound=1", "bounded:limit=4", "ringmaster:limit=4"])
@pytest.mark.parametrize("name", ["local-momentum", "dana", "dana-slim", "delayed-nesterov"])
def test_rules_that_average_nothing_take_them(name: str, rule: str) -> None:
    assert setup(name, rule).optimizer_name == name


@pytest.mark.parametrize("rule", GATHERING)
def test_delayed_nesterov_takes_means_as_well(rule: str) -> None:
    assert setup("delayed-nesterov", rule).optimizer_name == "delayed-nesterov"


def test_dana_goes_with_delay_compensation() -> None:
    Setup(
        task("quadratic"), DANA(), RunConfig(workers=4),
        rule=None, damping=None, compensation=DCASGD(strength=2), shards=3,
    )  # fmt: skip
