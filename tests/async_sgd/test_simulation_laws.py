"""What theory says of staleness and of its effect on a quadratic, asked of simulated runs.

Exact statements are checked exactly. Where a number is a mean of random ones, four standard errors
are allowed, and the seed is fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import solve_discrete_lyapunov

from async_sgd.damping import DynSGD, InverseDamping
from async_sgd.delays import Exponential
from async_sgd.jobs import Job
from async_sgd.rules import Asynchronous
from paramserver.ledger import Move
from paramserver.optimizers import SGD, Momentum
from paramserver.optimizers.base import Optimizer
from paramserver.sequencer import Sequencer
from tests.support.virtual import DOUBLE, Slope, Still, Watch, columns, simulation

Array = NDArray[np.float64]

DELAYS = [
    "exponential",
    "constant",
    "pareto:alpha=1.5",
    "gamma:cv=0.5,factors=1/2/3/4/10/0.3",
]
FREE = [  # nobody waits
    "asp",
    "softsync:n=1",
    "softsync:n=2",
    "k-of-n:k=3,mode=batch-sync",
    "k-of-n:k=4,mode=batch-async",
    "bounded:limit=4",
    "bounded:limit=4,action=damp",
    "ringmaster:limit=4",
    "rennala:batch=5",
    "fedbuff:size=3",
]
WAITING = [
    "k-of-n:k=3,mode=sync",
    "k-of-n:k=4,mode=async",
    "ssp:bound=0",
    "ssp:bound=2",
    "bsp",
    "sync-switch:after=20",
]
LR = 0.05


# ---------------------------------------------------------------- conservation


def check_conserved(sequencer: Sequencer, watch: Watch) -> int:
    """Check the law from the rows and from what was in flight; return its right side."""
    rows = sequencer.ledger.columns()
    accepted = np.flatnonzero(rows["dropped"] == 0)
    versions = np.append(rows["version"][accepted], sequencer.version + 1)
    updates = accepted[np.diff(versions) > 0]  # the pushes that completed one
    is_update = np.isin(np.arange(len(rows["version"])), updates)
    assert len(updates) == sequencer.version
    np.testing.assert_array_equal(
        rows["staleness"], np.cumsum(is_update) - is_update - rows["read_version"]
    )
    right = int(np.array(watch.num_others)[updates].sum())
    assert rows["staleness"].sum() + watch.ages(sequencer.version) == right
    return right


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("rule", FREE)
def test_staleness_of_all_pushes_is_updates_times_the_others(rule: str, delay: str) -> None:
    watch = Watch(Still())
    run = simulation(6, updates=120, rule=rule, delay=delay, gradients=watch)

    run.run()

    assert check_conserved(run.sequencer, watch) == 120 * 5


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("one_way_s", [0.0, 0.2])
@pytest.mark.parametrize(
    ("rule", "age"),
    [
        ("ringmaster:limit=4,cancel=true", 4),
        ("rennala:batch=5,cancel=true", 1),
        ("k-of-n:k=3,mode=batch-sync,cancel=true", 1),
    ],
)
def test_what_is_cancelled_is_as_old_as_the_rule_says_and_is_conserved(
    rule: str, age: int, delay: str, one_way_s: float
) -> None:
    watch = Watch(Still())
    run = simulation(6, updates=120, rule=rule, delay=delay, one_way_s=one_way_s, gradients=watch)

    run.run()

    rows, moves = columns(run), run.sequencer.ledger.moves()
    cancelled = int((moves["kind"] == Move.CANCEL).sum())
    assert cancelled == len(watch.abandoned) == run.sequencer.num_cancelled > 0
    assert not rows["dropped"].any()
    assert rows["staleness"].max() <= age - 1
    left = rows["staleness"].sum() + age * cancelled + watch.ages(run.sequencer.version)
    assert left == 120 * 5


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("rule", WAITING)
def test_staleness_is_conserved_where_workers_wait(rule: str, delay: str) -> None:
    watch = Watch(Still())
    run = simulation(6, updates=120, rule=rule, delay=delay, gradients=watch)

    run.run()

    nobody_waited = rule == "ssp:bound=2" and delay == "constant"
    assert (check_conserved(run.sequencer, watch) == 120 * 5) == nobody_waited


@pytest.mark.parametrize("rule", ["asp", "softsync:n=2", "bounded:limit=4", "ssp:bound=1", "bsp"])
def test_a_queue_and_a_network_conserve_staleness(rule: str) -> None:
    watch = Watch(Still())
    run = simulation(
        6, updates=300, rule=rule, service="exponential:mean=0.4", one_way_s=0.3, gradients=watch
    )

    run.run()

    right = check_conserved(run.sequencer, watch)
    assert (right == 300 * 5) == (rule not in ("ssp:bound=1", "bsp"))


@pytest.mark.parametrize(
    ("rule", "size"), [("asp", 1), ("softsync:n=2", 3), ("fedbuff:size=5", 5), ("softsync:n=1", 6)]
)
def test_mean_staleness_is_the_others_over_the_size_of_an_update(rule: str, size: int) -> None:
    run = simulation(6, updates=600 // size, rule=rule, delay="pareto:alpha=1.5")

    run.run()

    pushes = len(run.sequencer.ledger)
    assert pushes == 600
    short_of = 5 / size - columns(run)["staleness"].mean()  # the ages in flight over the pushes
    assert 0 <= short_of <= run.sequencer.conservation.in_flight_age / pushes + 1e-12


# ---------------------------------------------------------------- distributions


def test_each_worker_is_as_stale_as_its_share_says() -> None:
    times, cv, updates = np.array([1.0, 2.0, 3.0, 4.0, 10.0]), 0.5, 15_000
    run = simulation(5, updates=updates, delay=f"gamma:cv={cv},factors=1/2/3/4/10")

    run.run()

    rows = columns(run)
    p = (1 / times) / (1 / times).sum()
    for worker in range(5):
        mine = rows["worker"] == worker
        staleness, last = rows["staleness"][mine], rows["version"][mine][-1]
        assert staleness.sum() == last - mine.sum()  # it ages by the updates of others: exact
        # Renewal theory: pushes in a long time vary by cv**2 times their number.
        share_error = cv * math.sqrt(p[worker] * (1 - p[worker]) / updates) + 1 / updates
        assert abs(mine.mean() - p[worker]) < 4 * share_error
        predicted = times[worker] * (1 / times).sum() - 1
        assert abs(staleness.mean() - predicted) < 4 * share_error / p[worker] ** 2


def test_workers_that_take_turns_are_one_less_stale_than_there_are() -> None:
    run = simulation(8, updates=200, delay="constant")

    run.run()

    rows = columns(run)
    assert rows["staleness"].tolist() == [*range(8), *[7] * 192]
    assert rows["worker"].tolist() == [*range(8)] * 25


@pytest.mark.parametrize(("n", "mean"), [(1, 0.967), (15, 14.5), (30, 29.0)])
def test_softsync_of_alike_workers_is_hardly_ever_staler_than_2n(n: int, mean: float) -> None:
    run = simulation(30, updates=90 * n, rule=f"softsync:n={n}", delay="gamma:cv=0.1")

    run.run()

    staleness = columns(run)["staleness"]
    assert len(staleness) == 2700
    assert (staleness > 2 * n).mean() < 1e-3
    in_flight = run.sequencer.conservation.in_flight_age / 2700
    assert staleness.mean() + in_flight == pytest.approx(n * 29 / 30) == pytest.approx(mean, 1e-3)


@cache
def exponential_rows(num_workers: int, damping: DynSGD | InverseDamping) -> dict[str, Array]:
    run = simulation(num_workers, updates=12_000, damping=damping)
    run.run()
    return columns(run)


def geometric_p_value(staleness: NDArray[np.float64], p: float) -> float:
    """Return how likely independent geometric numbers from 0 on are as far off as ``staleness``."""
    size = len(staleness)
    last = int(math.log(5 / size) / math.log1p(-p))  # P(k >= last) is 5 in all
    chances = np.append(p * (1 - p) ** np.arange(last), (1 - p) ** last)
    observed = np.bincount(np.minimum(staleness.astype(int), last), minlength=last + 1)
    return float(stats.chisquare(observed, chances * size).pvalue)


def test_staleness_of_equal_memoryless_workers_is_geometric() -> None:
    rows = exponential_rows(8, DynSGD())

    late = rows["version"] > 200
    for worker in range(8):  # one worker's are independent; those of different workers are not
        staleness = rows["staleness"][late & (rows["worker"] == worker)]
        assert geometric_p_value(staleness, 1 / 8) > 1e-3
        assert geometric_p_value(staleness, 1 / 6) < 1e-6
        error = math.sqrt(stats.geom.var(1 / 8) / len(staleness))
        assert abs(staleness.mean() - 7) < 4 * error
    assert stats.chisquare(np.bincount(rows["worker"])).pvalue > 1e-3


def test_staleness_of_unequal_memoryless_workers_is_geometric_with_their_shares() -> None:
    rates = np.array([1.0, 2.0, 4.0, 1.0])
    run = simulation(4, updates=8000, delay="exponential:factors=1/0.5/0.25/1")

    run.run()

    rows = columns(run)
    late = rows["version"] > 200
    for worker, rate in enumerate(rates):
        staleness = rows["staleness"][late & (rows["worker"] == worker)]
        assert geometric_p_value(staleness, rate / rates.sum()) > 1e-3
    assert stats.chisquare(np.bincount(rows["worker"]), 8000 * rates / rates.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("damping", "mean"),
    [(DynSGD(), math.log(8) / 7), (InverseDamping(), (1 + math.log(8)) / 8)],
    ids=["dynsgd", "inverse"],
)
def test_memoryless_workers_take_the_mean_step_that_damping_promises(
    damping: DynSGD | InverseDamping, mean: float
) -> None:
    scale = exponential_rows(8, damping)["scale"][200:]

    assert abs(scale.mean() - mean) < 4 * error_of_mean(scale)


def error_of_mean(series: Array, num_parts: int = 50) -> float:
    """Return the standard error of the mean of a series whose near values depend on each other."""
    parts = np.array([part.mean() for part in np.array_split(series, num_parts)])
    return float(parts.std(ddof=1) / math.sqrt(num_parts))


# ---------------------------------------------------------------- momentum by asynchrony


@dataclass(frozen=True)
class Ensemble:
    """The paths of independent runs under exponential delays, all from 1."""

    num_workers: int
    c: Array
    """Step times curvature, one a column."""
    noise: Array
    """Variance of a step's noise, one a column."""
    paths: Array
    """Shape ``(runs, versions, columns)``."""

    @property
    def mean(self) -> Array:
        return np.asarray(self.paths.mean(axis=0))

    @property
    def error(self) -> Array:
        return standard_error(self.paths)

    def fitted(self, column: int = 0) -> tuple[float, float]:
        """Return momentum and step times curvature of the heavy ball that fits the mean best."""
        return fit_heavy_ball(self.mean[:, column])

    def fit_errors(self, column: int = 0, num_parts: int = 20) -> Array:
        """Return the standard errors of `fitted`."""
        parts = np.array_split(self.paths[:, :, column], num_parts)
        fits = np.array([fit_heavy_ball(part.mean(axis=0)) for part in parts])
        return np.asarray(fits.std(axis=0, ddof=1) / math.sqrt(num_parts))


def standard_error(samples: Array) -> Array:
    return np.asarray(samples.std(axis=0, ddof=1) / math.sqrt(len(samples)))


def fit_heavy_ball(mean: Array) -> tuple[float, float]:
    """Return mu and c of the least squares fit of dm_{t+1} = mu dm_t - c m_t, from t = 1 on."""
    steps = np.diff(mean)
    table = np.stack([steps[:-1], -mean[1:-1]], axis=1)
    (mu, c), *_ = np.linalg.lstsq(table, steps[1:], rcond=None)
    return float(mu), float(c)


def ensemble(
    num_workers: int, replicas: int, steps: int, optimizer: Optimizer, delay: str | None = None
) -> Ensemble:
    """Run ``replicas`` of five quadratics at once: their columns share a run, the runs nothing."""
    limit = exponential_limit(num_workers)
    c = np.array([0.05, 0.05, 0.3, 0.6 * limit, 1.5 * limit])
    sigma = np.array([0.0, 1.0, 1.0, 0.0, 0.0])
    curvature, spread = torch.from_numpy(c / LR), torch.from_numpy(sigma)
    paths = []
    for replica in range(replicas):
        noise = iter(np.random.default_rng([num_workers, replica]).normal(size=steps + 1))
        slope = Slope(curvature, lambda job, noise=noise: spread * next(noise))  # type: ignore[misc]
        run = simulation(
            num_workers,
            updates=steps + 1,
            delay=delay or Exponential(),
            rule=Asynchronous(),
            optimizer=optimizer,
            gradients=slope,
            start=torch.ones(len(c), dtype=DOUBLE),
            seed=replica,
        )
        run.run()
        paths.append(slope.path())
    return Ensemble(num_workers, c, (LR * sigma) ** 2, np.stack(paths))


@cache
def small_ensemble(num_workers: int) -> Ensemble:
    return ensemble(num_workers, replicas=700, steps=30, optimizer=SGD(lr=LR))


@cache
def large_ensemble(num_workers: int) -> Ensemble:
    return ensemble(num_workers, replicas=20_000, steps=60, optimizer=SGD(lr=LR))


def heavy_ball(num_workers: int, c: Array, steps: int) -> Array:
    """Return the mean path from 1, shape ``(steps + 1, columns)``."""
    mean = [np.ones_like(c), 1 - c]
    for _ in range(steps - 1):
        pull = c / num_workers * mean[-1]
        mean.append(mean[-1] + (1 - 1 / num_workers) * (mean[-1] - mean[-2]) - pull)
    return np.stack(mean)


def moments(num_workers: int, c: float) -> tuple[Array, Array]:
    """Return matrix T and vector n of the recursion x' = T x + n s2 of A, B, C and D.

    A is the mean of w^2, B that of w times a worker's copy, C that of a copy's square, D that of
    the product of two copies; s2 is the variance of a step's noise.
    """
    m = num_workers
    a = np.array([1, -2 * c, c**2, 0])
    x = np.array([0, 1, 0, -c])  # w' times another worker's copy
    unit_c, unit_d = np.eye(4)[2:]
    matrix = [a, (a + (m - 1) * x) / m, (a + (m - 1) * unit_c) / m, (2 * x + (m - 2) * unit_d) / m]
    return np.stack(matrix), np.array([1, 1 / m, 1 / m, 0])


def mean_squares(e: Ensemble, column: int, steps: int) -> Array:
    """Return the exact mean of w^2 at versions 0 to ``steps``."""
    matrix, noise = moments(e.num_workers, e.c[column])
    state, squares = np.ones(4), [1.0]
    for _ in range(steps):
        state = matrix @ state + noise * e.noise[column]
        squares.append(state[0])
    return np.array(squares)


def exponential_limit(num_workers: int) -> float:
    """Return the largest step times curvature at which the mean of w^2 stays finite."""

    def grows(c: float) -> bool:
        return bool(np.abs(np.linalg.eigvals(moments(num_workers, c)[0])).max() > 1)

    low, high = 1e-3, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


def test_the_mean_square_limit_of_two_memoryless_workers_is_known() -> None:
    assert exponential_limit(2) == pytest.approx((1 + math.sqrt(17)) / 4)


def check_mean_path(e: Ensemble, columns: slice) -> None:
    predicted = heavy_ball(e.num_workers, e.c, e.paths.shape[1] - 1)
    np.testing.assert_allclose(e.mean[:2, 0], predicted[:2, 0], rtol=1e-12)  # no chance in these
    off = np.abs(e.mean - predicted)[1:, columns]
    assert (off <= 4 * e.error[1:, columns] + 1e-12).all()


def check_mean_squares(e: Ensemble, column: int, steps: int) -> None:
    squares = e.paths[:, : steps + 1, column] ** 2
    off = np.abs(squares.mean(axis=0) - mean_squares(e, column, steps))
    assert (off <= 4 * standard_error(squares) + 1e-12).all()


@pytest.mark.parametrize("num_workers", [4, 8])
def test_the_mean_path_of_memoryless_workers_is_a_heavy_ball(num_workers: int) -> None:
    e = small_ensemble(num_workers)

    check_mean_path(e, slice(0, 3))


@pytest.mark.parametrize("num_workers", [4, 8])
def test_the_momentum_of_asynchrony_can_be_measured(num_workers: int) -> None:
    e = small_ensemble(num_workers)

    mu, step = e.fitted()

    mu_error, step_error = e.fit_errors()
    assert abs(mu - (1 - 1 / num_workers)) < 4 * mu_error < 0.03
    assert abs(step - 0.05 / num_workers) < 4 * step_error < 0.2 * 0.05 / num_workers


@pytest.mark.parametrize("num_workers", [4, 8])
def test_workers_that_take_turns_are_no_heavy_ball(num_workers: int) -> None:
    turns = ensemble(num_workers, 1, 30, SGD(lr=LR), delay="constant")

    mu, step = turns.fitted()

    e = small_ensemble(num_workers)
    mu_error, step_error = e.fit_errors()
    assert abs(mu - (1 - 1 / num_workers)) > 10 * mu_error
    assert abs(step - 0.05 / num_workers) > 10 * step_error
    far = np.abs(turns.paths[0] - heavy_ball(num_workers, e.c, 30))[:, 0] > 10 * e.error[:, 0]
    assert far[2:15].all()


def test_momentum_of_the_server_and_of_asynchrony_multiply() -> None:
    mu, q = 0.5, 1 / 4

    e = ensemble(4, 400, 25, Momentum(lr=LR, momentum=mu))

    mean = [np.ones(5), 1 - e.c]
    copies = (mean[1] + 3 * mean[0]) / 4  # the mean over the workers of what they have read
    mean.append(mean[1] + mu * (mean[1] - mean[0]) - e.c * copies)
    for _ in range(23):
        m0, m1, m2 = mean[-3:]
        step = mu * (m2 - m1) + (1 - q) * ((m2 - m1) - mu * (m1 - m0)) - q * e.c * m2
        mean.append(m2 + step)
    off = np.abs(e.mean - np.stack(mean))[1:, :2]
    assert (off <= 4 * e.error[1:, :2] + 1e-12).all()


@pytest.mark.parametrize("num_workers", [4, 8])
def test_the_mean_square_under_memoryless_workers_follows_its_recursion(num_workers: int) -> None:
    e = small_ensemble(num_workers)

    for column in (0, 1, 2):
        check_mean_squares(e, column, steps=30)


@pytest.mark.parametrize("num_workers", [4, 8])
def test_the_mean_square_limit_lies_between_a_stable_and_an_unstable_step(num_workers: int) -> None:
    e = small_ensemble(num_workers)

    squares = (e.paths**2).mean(axis=0)
    stable, unstable = squares[:, 3], squares[:, 4]
    for column in (3, 4):
        check_mean_squares(e, column, steps=15)  # later the rare large paths are too few
    assert stable[30] < 0.5 * stable[15]
    assert unstable[30] > 2 * unstable[15] > 2


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_workers", [2, 4, 8, 16])
def test_asynchrony_begets_momentum(num_workers: int) -> None:
    e = large_ensemble(num_workers)

    mu, step = e.fitted()

    assert mu == pytest.approx(1 - 1 / num_workers, abs=0.01)
    assert step == pytest.approx(0.05 / num_workers, rel=0.02)
    check_mean_path(e, slice(0, 3))
    for column in (0, 1, 2):
        check_mean_squares(e, column, steps=60)
    squares = (e.paths[:, :, 1] ** 2).mean(axis=0)
    np.testing.assert_allclose(squares, mean_squares(e, 1, 60), rtol=0.03)


# ---------------------------------------------------------------- limits of the step


def largest_stable(num_workers: int, around: float, optimizer: Optimizer) -> float:
    """Return the largest step times curvature under which a run of workers in turn does not grow.

    All curvatures of a fine grid are columns of one run. The energy over a long time is compared
    with that of as long a time before.
    """
    c = around * np.arange(0.997, 1.003, 5e-5)
    slope = Slope(torch.from_numpy(c / optimizer.lr))
    length = 800
    run = simulation(
        num_workers,
        updates=2 * length + 400,
        delay="constant",
        optimizer=optimizer,
        gradients=slope,
        start=torch.ones(len(c), dtype=DOUBLE),
    )
    run.run()
    energies = [(part**2).sum(axis=0) for part in np.split(slope.path()[-2 * length :], 2)]
    grows = energies[1] > energies[0]
    edge = int(grows.argmax())
    assert edge > 0, "the grid begins too high"
    assert not grows[:edge].any()
    assert grows[edge:].all()
    return float(c[edge - 1])


@pytest.mark.parametrize(
    ("num_workers", "limit"), [(1, 2.0), (2, 1.0), (4, 0.44504), (8, 0.20906), (16, 0.10130)]
)
def test_workers_in_turn_are_stable_up_to_the_limit_of_levin_and_may(
    num_workers: int, limit: float
) -> None:
    exact = 2 * math.sin(math.pi / (2 * (2 * num_workers - 1)))

    measured = largest_stable(num_workers, exact, SGD(lr=LR))

    assert exact == pytest.approx(limit, rel=1e-4)
    assert measured == pytest.approx(exact, rel=1e-3)


def momentum_limit(mu: float, staleness: int) -> float:
    """Return the limit for v' = mu v + g, w' = w - lr v', with g the slope at an older w."""

    def grows(c: float) -> bool:
        # state: w_t, ..., w_{t - staleness}, lr v_t
        matrix = np.zeros((staleness + 2, staleness + 2))
        matrix[-1, -1], matrix[-1, staleness] = mu, c
        matrix[0] = -matrix[-1]
        matrix[0, 0] += 1
        matrix[np.arange(1, staleness + 1), np.arange(staleness)] = 1
        return bool(np.abs(np.linalg.eigvals(matrix)).max() > 1 + 1e-12)

    low, high = 1e-4, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


@pytest.mark.parametrize(("num_workers", "limit"), [(1, 3.8), (2, 0.1), (4, None)])
def test_momentum_on_the_server_is_stable_up_to_the_limit_of_its_recursion(
    num_workers: int, limit: float | None
) -> None:
    exact = momentum_limit(0.9, num_workers - 1)

    measured = largest_stable(num_workers, exact, Momentum(lr=LR, momentum=0.9))

    assert limit is None or exact == pytest.approx(limit, rel=1e-6)  # 2 (1 + mu), 1 - mu
    assert measured == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_workers_in_turn_begin_to_oscillate_where_they_should(num_workers: int) -> None:
    staleness = num_workers - 1
    critical = staleness**staleness / num_workers**num_workers
    slope = Slope(torch.tensor([0.99, 1.01], dtype=DOUBLE) * critical / LR)
    run = simulation(
        num_workers,
        updates=100 * num_workers,
        delay="constant",
        optimizer=SGD(lr=LR),
        gradients=slope,
        start=torch.ones(2, dtype=DOUBLE),
    )

    run.run()

    below, above = slope.path().T
    assert (below > 0).all()
    assert (above < 0).any()


# ---------------------------------------------------------------- the floor that noise leaves


def delayed_floor(c: float, staleness: int) -> float:
    """Return E w^2 of w' = w - c w_old - noise of variance 1 over that without delay."""
    matrix = np.zeros((staleness + 1, staleness + 1))
    matrix[0, 0] = 1
    matrix[0, staleness] -= c
    matrix[np.arange(1, staleness + 1), np.arange(staleness)] = 1
    noise = np.zeros_like(matrix)
    noise[0, 0] = 1
    return float(solve_discrete_lyapunov(matrix, noise)[0, 0] * c * (2 - c))


def memoryless_floor(c: float, num_workers: int) -> float:
    matrix, noise = moments(num_workers, c)
    return float(np.linalg.solve(np.eye(4) - matrix, noise)[0] * c * (2 - c))


def settled(num_workers: int, c: float, delay: str, copies: int, updates: int) -> Array:
    """Return w^2 over the sequential floor, after it has settled, shape ``(versions, copies)``."""
    rng = np.random.default_rng(num_workers)
    slope = Slope(c / LR, lambda job: torch.from_numpy(rng.normal(size=copies)))
    burn_in = 200
    run = simulation(
        num_workers,
        updates=burn_in + updates,
        delay=delay,
        optimizer=SGD(lr=LR),
        gradients=slope,
        start=torch.zeros(copies, dtype=DOUBLE),
    )
    run.run()
    floor = LR**2 / (c * (2 - c))
    return np.asarray(slope.path()[burn_in:] ** 2 / floor)


@pytest.mark.parametrize(
    ("num_workers", "c", "ratio"),
    [(1, 0.1, 1.0), (2, 0.1, 1.10582), (2, 0.05, 1.0513), (4, 0.05, 1.1629), (8, 0.05, 1.4321)],
)
def test_workers_in_turn_raise_the_noise_floor_by_the_known_ratio(
    num_workers: int, c: float, ratio: float
) -> None:
    exact = delayed_floor(c, num_workers - 1)

    per_copy = settled(num_workers, c, "constant", copies=4000, updates=300).mean(axis=0)

    error = standard_error(per_copy)  # delays are fixed, so copies are independent
    assert exact == pytest.approx(ratio, rel=1e-4)
    assert abs(per_copy.mean() - exact) < 4 * error < 0.04
    if num_workers == 2:
        assert exact == pytest.approx((1 + c) * (2 - c) / ((1 - c) * (2 + c)), rel=1e-9)


def check_memoryless_floor(num_workers: int, ratio: float, updates: int) -> None:
    exact = memoryless_floor(0.05, num_workers)

    per_version = settled(num_workers, 0.05, "exponential", 100, updates).mean(axis=1)

    error = error_of_mean(per_version, num_parts=30)
    assert exact == pytest.approx(ratio, rel=1e-4)
    assert abs(per_version.mean() - exact) < 4 * error < (exact - 1) / 2


def test_memoryless_workers_raise_the_noise_floor_to_the_fixed_point() -> None:
    check_memoryless_floor(8, 1.3448, updates=8000)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_workers", "ratio"), [(2, 1.0489), (4, 1.1471), (16, 1.7463), (32, 2.5736)]
)
def test_more_memoryless_workers_raise_the_noise_floor_further(
    num_workers: int, ratio: float
) -> None:
    check_memoryless_floor(num_workers, ratio, updates=100_000)


# ---------------------------------------------------------------- bounds of rules


@pytest.mark.parametrize(
    ("num_workers", "bound", "largest"),
    [(2, 0, 1), (2, 1, 3), (2, 3, 7), (4, 0, 3), (4, 1, 9), (4, 3, 21)],
)
def test_heavy_tails_make_ssp_as_stale_as_it_may_be_and_no_more(
    num_workers: int, bound: int, largest: int
) -> None:
    run = simulation(num_workers, updates=1500, delay="lognormal:cv=10", rule=f"ssp:bound={bound}")

    run.run()

    rows = columns(run)
    assert rows["staleness"].max() == largest == (2 * bound + 1) * (num_workers - 1)
    clocks = np.zeros(num_workers, int)
    for worker in rows["worker"]:
        clocks[worker] += 1
        assert clocks.max() - clocks.min() <= bound + 1


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_ringmaster_takes_nothing_as_stale_as_its_threshold(limit: int) -> None:
    run = simulation(12, updates=600, rule=f"ringmaster:limit={limit}")

    run.run()

    rows = columns(run)
    taken = rows["dropped"] == 0
    assert rows["staleness"][taken].max() == limit - 1
    assert rows["staleness"][~taken].min() >= limit


# ---------------------------------------------------------------- unequal data


CURVATURES, OPTIMA = np.array([1.0, 0.5, 2.0, 1.0]), np.array([2.0, 0.0, -1.0, -3.0])
TIMES = np.array([1.0, 2.0, 4.0, 10.0])
OPTIMUM = (CURVATURES * OPTIMA).sum() / CURVATURES.sum()


def path_on_unequal_data(rule: str, lr: float, updates: int) -> Array:
    """Return the iterates of workers whose losses differ, and their speeds."""

    def gradient(job: Job) -> torch.Tensor:
        return torch.as_tensor(CURVATURES[job.worker] * (job.params - OPTIMA[job.worker]))

    slope = Slope(0.0, gradient)
    run = simulation(
        4,
        updates=updates,
        rule=rule,
        delay="gamma:cv=0.3,factors=1/2/4/10",
        optimizer=SGD(lr=lr),
        gradients=slope,
    )
    run.run()
    path: Array = slope.path()[:, 0]
    return path


def test_asp_finds_the_optimum_that_speeds_weigh() -> None:
    lr = 0.004

    path = path_on_unequal_data("asp", lr, 9000)[1500:]  # six times 1 / (lr curvature)

    weights = CURVATURES / TIMES
    biased = (weights * OPTIMA).sum() / weights.sum()
    error = error_of_mean(path, num_parts=20)
    assert abs(path.mean() - biased) < 4 * error + lr
    assert abs(biased - OPTIMUM) > 20 * (4 * error + lr)


def test_ringleader_finds_the_optimum_whatever_the_speeds() -> None:
    path = path_on_unequal_data("ringleader", 0.05, 1500)

    assert path[-100:] == pytest.approx(OPTIMUM, abs=1e-10)
