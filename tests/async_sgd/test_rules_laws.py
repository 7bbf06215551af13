"""Facts about staleness that a rule must reproduce: exact ones exactly, random ones by a test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from async_sgd.rules import BSP, SSP, Asynchronous, BoundedStaleness, KofN, NSoftsync
from paramserver.rules import RuleSpec
from tests.support.rule_driver import DELAYS, RuleDriver


@pytest.mark.parametrize(
    ("workers", "bound", "staleness"),
    [(2, 0, 1), (2, 1, 3), (2, 3, 7), (4, 0, 3), (4, 1, 9), (4, 3, 21)],
)
def test_ssp_attains_its_bounds(workers: int, bound: int, staleness: int) -> None:
    heavy_tail = DELAYS["pareto without a mean"]
    driver = RuleDriver(SSP(bound=bound).build(workers), workers=workers, seconds=heavy_tail)

    driver.run(5000)  # raises where a bound is broken

    assert driver.worst == driver.limits
    assert driver.limits == {"clock gap": bound + 1, "staleness": staleness}


@pytest.mark.parametrize("delay", DELAYS)
def test_bsp_keeps_the_time_of_ssp_0_with_no_staleness(delay: str) -> None:
    bsp = RuleDriver(BSP().build(4), workers=4, seconds=DELAYS[delay])
    ssp = RuleDriver(SSP(bound=0).build(4), workers=4, seconds=DELAYS[delay])

    in_rounds, lock_step = bsp.run(400), ssp.run(400)

    assert bsp.ended == ssp.ended  # lock-step either way: each waits for the slowest
    assert in_rounds["staleness"].max() == 0
    assert lock_step["staleness"].max() == 3
    assert (bsp.version, ssp.version) == (100, 400)


@pytest.mark.parametrize("delay", DELAYS)
def test_n_of_n_decides_as_bsp(delay: str) -> None:
    n_of_n = RuleDriver(KofN(k=4).build(4), workers=4, seconds=DELAYS[delay])
    bsp = RuleDriver(BSP().build(4), workers=4, seconds=DELAYS[delay])

    np.testing.assert_equal(n_of_n.run(400), bsp.run(400))


@pytest.mark.parametrize("delay", DELAYS)
def test_ssp_without_a_bound_decides_as_asp(delay: str) -> None:
    ssp = RuleDriver(SSP(bound=10**9).build(4), workers=4, seconds=DELAYS[delay])
    asp = RuleDriver(Asynchronous().build(4), workers=4, seconds=DELAYS[delay])

    np.testing.assert_equal(ssp.run(400), asp.run(400))


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(
    "spec", [Asynchronous(), NSoftsync(n=2), NSoftsync(n=1), KofN(k=3, mode="batch-async")]
)
def test_staleness_is_conserved_to_the_integer(spec: RuleSpec, delay: str) -> None:
    workers = 10
    driver = RuleDriver(spec.build(workers), workers=workers, seconds=DELAYS[delay])

    columns = driver.run(1000)

    in_flight = driver.conservation.report()["in_flight"]
    assert columns["staleness"].sum() == driver.version * (workers - 1) - in_flight


def test_dropped_staleness_is_conserved_too() -> None:
    driver = RuleDriver(BoundedStaleness(limit=5).build(12), workers=12)

    columns = driver.run(1000)

    in_flight = driver.conservation.report()["in_flight"]
    assert columns["dropped"].any()
    assert columns["staleness"].sum() == driver.version * 11 - in_flight


def test_constant_times_make_constant_staleness() -> None:
    driver = RuleDriver(Asynchronous().build(8), workers=8, seconds=DELAYS["constant"])

    staleness = driver.run(200)["staleness"]

    assert staleness[:8].tolist() == list(range(8))
    assert set(staleness[8:].tolist()) == {7}


def test_exponential_times_make_geometric_staleness() -> None:
    workers = 8
    driver = RuleDriver(Asynchronous().build(workers), workers=workers)

    staleness = driver.run(20_000)["staleness"]

    thinned = staleness[200::20]  # far enough apart to be nearly independent
    values = np.arange(25)
    expected = (1 / workers) * (1 - 1 / workers) ** values
    expected = np.append(expected, 1 - expected.sum()) * len(thinned)
    observed = np.bincount(np.minimum(thinned, 25), minlength=26)
    assert stats.chisquare(observed, expected).pvalue > 0.01
    assert staleness.var() == pytest.approx(workers * (workers - 1), rel=0.05)


@pytest.mark.parametrize(("n", "mean"), [(1, 0.967), (15, 14.5), (30, 29.0)])
def test_softsync_has_about_n_staleness(n: int, mean: float) -> None:
    driver = RuleDriver(NSoftsync(n=n).build(30), workers=30)

    driver.run(6000)

    assert driver.ledger.staleness.mean == pytest.approx(mean, rel=0.02)
    assert n * (1 - 1 / 30) == pytest.approx(mean, abs=5e-4)


def test_backup_workers_spare_the_stragglers() -> None:
    bsp = RuleDriver(BSP().build(5), workers=5, seconds=DELAYS["pareto"])
    backup = RuleDriver(KofN(k=4).build(5), workers=5, seconds=DELAYS["pareto"])

    bsp.run(1000)
    backup.run(1000)

    assert backup.now / backup.version < 0.7 * bsp.now / bsp.version
    assert backup.ledger.drop_reasons()["late"] > 0
    assert backup.worst == {"staleness": 0}
