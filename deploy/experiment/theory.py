"""What theory says of quadratics and of time, in closed form or as a small linear recursion.

M workers share a quadratic of curvature λ, start from 1 and take steps of η, with c = η λ.
Staleness, the updates applied between a read and its push, is M - 1 for all where workers take
turns, and geometric with that mean where their times are exponential.

Sources: Mitliagkas et al., "Asynchrony begets Momentum", Allerton 2016, arXiv:1605.09774 (the heavy
ball). Hakimi et al., arXiv:1907.11612 (DANA). Chen et al., arXiv:1604.00981, and Dutta et al.,
AISTATS 2018, arXiv:1803.01113 (order statistics of waiting). The rest is derived here.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from async_sgd.delays import (
    Constant,
    DelayLaw,
    Exponential,
    Gamma,
    Pareto,
    ShiftedExponential,
    Straggler,
)

Array = NDArray[np.float64]

# ---------------------------------------------------------------- asynchrony as momentum


def mean_path(num_workers: int, c: float, steps: int) -> Array:
    """Return E w at versions 0 to ``steps`` under exponential times: a heavy ball.

    E w_1 = 1 - c; then dm_{t+1} = (1 - 1/M) dm_t - (c/M) m_t, with m = E w and dm its steps.
    """
    mean = [1.0, 1 - c]
    for _ in range(steps - 1):
        mean.append(mean[-1] + (1 - 1 / num_workers) * (mean[-1] - mean[-2]))
        mean[-1] -= c / num_workers * mean[-2]
    return np.array(mean[: steps + 1])


def fit_heavy_ball(mean: Array) -> tuple[float, float]:
    """Return momentum and step of the least squares fit of dm_{t+1} = mu dm_t - step m_t."""
    steps = np.diff(mean)
    table = np.stack([steps[:-1], -mean[1:-1]], axis=1)
    (mu, step), *_ = np.linalg.lstsq(table, steps[1:], rcond=None)
    return float(mu), float(step)


def mean_squares(num_workers: int, c: float, noise: float, steps: int) -> Array:
    """Return E w^2 at versions 0 to ``steps`` under exponential times.

    The state is the means of w^2, of w times a worker's copy, of a copy's square, and of the
    product of two copies; ``noise`` is the variance of a step's noise.
    """
    m = num_workers
    a = np.array([1, -2 * c, c**2, 0])  # w'^2, from the state
    x = np.array([0, 1, 0, -c])  # w' times another worker's copy
    unit_c, unit_d = np.eye(4)[2:]
    matrix = np.stack(
        [a, (a + (m - 1) * x) / m, (a + (m - 1) * unit_c) / m, (2 * x + (m - 2) * unit_d) / m]
    )
    added = noise * np.array([1, 1 / m, 1 / m, 0])
    state, squares = np.ones(4), [1.0]
    for _ in range(steps):
        state = matrix @ state + added
        squares.append(float(state[0]))
    return np.array(squares)


# ---------------------------------------------------------------- where momentum is kept


def push_matrix(placement: str, worker: int, num_workers: int, c: float, mu: float) -> Array:
    """Return what a push does to (w, what each worker has read, each worker's velocity).

    ``placement`` is momentum, local-momentum, dana or dana-slim. The server's one velocity is
    worker 0's.
    """
    size = 1 + 2 * num_workers
    w, read = 0, 1 + worker
    v = 1 + num_workers + (0 if placement == "momentum" else worker)
    velocity, step, shown = np.eye(size), np.eye(size), np.eye(size)
    velocity[v, v], velocity[v, read] = mu, c  # v <- mu v + c r
    step[w, v] = -1  # w <- w - v
    if placement == "dana-slim":
        step[w, v], step[w, read] = -mu, -c  # w <- w - (c r + mu v)
    shown[read, read], shown[read, w] = 0, 1  # r <- w
    if placement == "dana":
        shown[read, 1 + num_workers :] = -mu  # r <- w - mu sum v
    return shown @ step @ velocity


def stability_limit(placement: str, num_workers: int, mu: float) -> float:
    """Return the largest stable c of workers that take turns, by bisection.

    Stable means that the spectral radius of one turn of all workers is at most 1.
    """

    def grows(c: float) -> bool:
        turn = np.eye(1 + 2 * num_workers)
        for worker in range(num_workers):
            turn = push_matrix(placement, worker, num_workers, c, mu) @ turn
        return bool(np.abs(np.linalg.eigvals(turn)).max() > 1 + 1e-12)

    low, high = 1e-4, 5.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


# ---------------------------------------------------------------- time


def harmonic(n: int) -> float:
    """Return 1 + 1/2 + … + 1/n."""
    return sum(1 / i for i in range(1, n + 1))


def mean_delay(law: DelayLaw) -> float:
    """Return the mean of a law that `order_statistic` knows."""
    return order_statistic(law, 1, 1)


def order_statistic(law: DelayLaw, k: int, n: int) -> float:
    """Return the mean of the ``k``-th of ``n`` delays of equal workers.

    By an integral for gamma, else in closed form.

    Raises:
        ValueError: Another law.
    """
    memoryless = harmonic(n) - harmonic(n - k)
    match law:
        case Constant():
            return law.time
        case Straggler():
            p = law.probability  # the k-th straggles if more than n - k of them do
            late = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(n - k + 1, n + 1))
            return law.time * (1 + (law.factor - 1) * late)
        case Exponential():
            return law.mean * memoryless
        case ShiftedExponential():
            return law.shift + law.mean * memoryless
        case Pareto():
            a = 1 / law.alpha
            logs = (
                math.lgamma(n + 1) + math.lgamma(n - k + 1 - a)
                - math.lgamma(n - k + 1) - math.lgamma(n + 1 - a)
            )  # fmt: skip
            return law.scale * math.exp(logs)
        case Gamma():
            shape = 1 / law.cv**2
            step = (1 + 14 * law.cv) / 200_000
            x = (np.arange(200_000) + 0.5) * step  # in means, the middles of steps
            density = np.exp(
                shape * math.log(shape) + (shape - 1) * np.log(x) - shape * x - math.lgamma(shape)
            )
            return law.mean * _mean_of_kth(density, step, k, n)
    raise ValueError(f"there is no formula for the order statistics of {law}")


def slowest_of(law: DelayLaw, num_workers: int) -> float:
    """Return the mean of the longest delay of all workers, who differ only if all are constant."""
    if isinstance(law, Constant) and law.factors is not None:
        return law.time * max(law.factors)
    return order_statistic(law, num_workers, num_workers)


def gradients_a_second(law: DelayLaw, num_workers: int) -> float:
    """Return how many gradients workers compute who wait for nobody, by renewal theory."""
    if isinstance(law, Constant) and law.factors is not None:
        return sum(1 / (law.time * factor) for factor in law.factors)
    return num_workers / mean_delay(law)


def _mean_of_kth(density: Array, step: float, k: int, n: int) -> float:
    """Return the integral of the chance that fewer than ``k`` of ``n`` are below x."""
    below = np.cumsum(density) - density / 2
    below /= density.sum()
    chance = sum(
        math.comb(n, j) * below**j * (1 - below) ** (n - j) for j in range(k)
    )  # fewer than k
    return float(np.sum(chance) * step)


def time_with_backups(needed: int, num_workers: int) -> float:
    """Return the mean time of an update of the first ``needed`` gradients, exponential of mean 1.

    Late workers are not stopped: they first end what will be dropped. So ``num_workers - needed``
    of them begin each update with nothing that counts. A walk over gradients gathered and late
    workers still computing.
    """
    extra = num_workers - needed
    times = np.zeros((needed + 1, extra + 1))
    for gathered in range(needed - 1, -1, -1):
        for late in range(extra + 1):
            busy = num_workers - gathered
            then = (busy - late) * times[gathered + 1, late]
            if late:
                then += late * times[gathered, late - 1]
            times[gathered, late] = (1 + then) / busy
    return float(times[0, extra])
