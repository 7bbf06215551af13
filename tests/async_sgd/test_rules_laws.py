"""Facts about staleness that a rule must reproduce: exact ones exactly, random ones by a test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from async_sgd.rules import (
    BSP,
    SSP,
    Asynchronous,
    BoundedStaleness,
    FedBuff,
    KofN,
    NSoftsync,
    Rennala,
    Ringleader,
    Ringmaster,
    SyncSwitch,
)
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
def test_rennala_decides_as_batch_sync(delay: str) -> None:
    rennala = RuleDriver(Rennala(batch=6).build(4), workers=4, seconds=DELAYS[delay])
    batch_sync = RuleDriver(KofN(k=6, mode="batch-sync").build(4), workers=4, seconds=DELAYS[delay])

    np.testing.assert_equal(rennala.run(400), batch_sync.run(400))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_rennala_wastes_almost_half_of_equal_workers(workers: int) -> None:
    driver = RuleDriver(
        Rennala(batch=workers).build(workers), workers=workers, seconds=DELAYS["constant"]
    )
    cycle = 2 * workers - 1  # times of a gradient: BSP makes an update in each

    columns = driver.run(3 * cycle * workers)

    assert driver.now == 3 * cycle
    assert driver.version == 3 * workers
    assert columns["dropped"].sum() == 3 * workers * (workers - 1)
    assert not columns["dropped"][:workers].any()  # the first update is that of BSP


@pytest.mark.parametrize("delay", DELAYS)
def test_fedbuff_decides_as_batch_async_and_damps(delay: str) -> None:
    fedbuff = RuleDriver(FedBuff(size=6).build(4), workers=4, seconds=DELAYS[delay])
    batch_async = RuleDriver(
        KofN(k=6, mode="batch-async").build(4), workers=4, seconds=DELAYS[delay]
    )

    damped, plain = fedbuff.run(400), batch_async.run(400)

    factors = damped.pop("scale") / plain.pop("scale")
    np.testing.assert_allclose(factors, 1 / np.sqrt(1 + plain["staleness"]), rtol=1e-15)
    np.testing.assert_equal(damped, plain)


def test_fedbuff_averages_one_gradient_of_each_of_equal_workers_as_bsp() -> None:
    fedbuff = RuleDriver(FedBuff(size=4).build(4), workers=4, seconds=DELAYS["constant"])
    bsp = RuleDriver(BSP().build(4), workers=4, seconds=DELAYS["constant"])

    buffered, in_rounds = fedbuff.run(400), bsp.run(400)

    for name in ("version", "worker", "end"):
        np.testing.assert_equal(buffered[name], in_rounds[name])
    # But who pushed before the last of a round went on at once, from the version before.
    assert buffered["staleness"].tolist() == [0, 0, 0, 0] + [1, 1, 1, 0] * 99
    np.testing.assert_equal(buffered["scale"][:4], in_rounds["scale"][:4])


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("threshold", [1, 4])
def test_ringmaster_decides_as_bounded_by_one_less(threshold: int, delay: str) -> None:
    ringmaster = RuleDriver(Ringmaster(limit=threshold).build(4), workers=4, seconds=DELAYS[delay])
    bounded = RuleDriver(
        BoundedStaleness(limit=threshold - 1).build(4), workers=4, seconds=DELAYS[delay]
    )

    np.testing.assert_equal(ringmaster.run(400), bounded.run(400))


def test_ringmaster_attains_its_bound() -> None:
    driver = RuleDriver(Ringmaster(limit=6).build(12), workers=12)

    driver.run(1000)

    assert driver.worst == driver.limits == {"staleness": 5}


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(("after", "same"), [(0, Asynchronous()), (10**9, BSP())], ids=str)
def test_sync_switch_at_either_end_decides_as_its_halves(
    after: int, same: RuleSpec, delay: str
) -> None:
    for crash_rate in (0.0, 0.1):
        switch, half = (
            RuleDriver(
                spec.build(4), workers=4, seconds=DELAYS[delay], seed=3, crash_rate=crash_rate
            )
            for spec in (SyncSwitch(after=after), same)
        )

        np.testing.assert_equal(switch.run(400), half.run(400))


@pytest.mark.parametrize("delay", DELAYS)
def test_sync_switch_loses_nothing_at_its_switch(delay: str) -> None:
    workers, after = 4, 30
    switch = RuleDriver(
        SyncSwitch(after=after).build(workers), workers=workers, seconds=DELAYS[delay]
    )
    bsp = RuleDriver(BSP().build(workers), workers=workers, seconds=DELAYS[delay])

    columns, in_rounds = switch.run(400), bsp.run(after * workers)

    for name, column in in_rounds.items():
        np.testing.assert_equal(columns[name][: after * workers], column)
    free = {name: column[after * workers :] for name, column in columns.items()}
    assert not free["dropped"].any()
    assert free["version"].tolist() == list(range(after + 1, switch.version + 1))
    assert free["read_version"].min() == after
    in_flight = switch.conservation.report()["in_flight"]
    assert free["staleness"].sum() == (switch.version - after) * (workers - 1) - in_flight


@pytest.mark.parametrize("delay", DELAYS)
def test_ssp_without_a_bound_decides_as_asp(delay: str) -> None:
    ssp = RuleDriver(SSP(bound=10**9).build(4), workers=4, seconds=DELAYS[delay])
    asp = RuleDriver(Asynchronous().build(4), workers=4, seconds=DELAYS[delay])

    np.testing.assert_equal(ssp.run(400), asp.run(400))


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(
    "spec",
    [
        Asynchronous(),
        NSoftsync(n=2),
        NSoftsync(n=1),
        KofN(k=3, mode="batch-async"),
        FedBuff(size=3),
        FedBuff(size=15),
    ],
)
def test_staleness_is_conserved_to_the_integer(spec: RuleSpec, delay: str) -> None:
    workers = 10
    driver = RuleDriver(spec.build(workers), workers=workers, seconds=DELAYS[delay])

    columns = driver.run(1000)

    in_flight = driver.conservation.report()["in_flight"]
    assert columns["staleness"].sum() == driver.version * (workers - 1) - in_flight


@pytest.mark.parametrize(
    "spec", [BoundedStaleness(limit=5), Ringmaster(limit=6), Rennala(batch=5), Rennala(batch=20)]
)
def test_dropped_staleness_is_conserved_too(spec: RuleSpec) -> None:
    driver = RuleDriver(spec.build(12), workers=12)

    columns = driver.run(1000)

    in_flight = driver.conservation.report()["in_flight"]
    assert columns["dropped"].any()
    assert columns["staleness"].sum() == driver.version * 11 - in_flight


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize(
    ("spec", "age"),
    [
        (Ringmaster(limit=6, cancel=True), 6),
        (Rennala(batch=5, cancel=True), 1),
        (KofN(k=4, mode="batch-sync", cancel=True), 1),
    ],
)
def test_cancelled_staleness_is_conserved_and_nothing_is_dropped(
    spec: RuleSpec, age: int, delay: str
) -> None:
    driver = RuleDriver(spec.build(12), workers=12, seconds=DELAYS[delay])

    columns = driver.run(1000)

    left = columns["staleness"].sum() + age * driver.num_cancelled
    assert driver.num_cancelled > 0
    assert not columns["dropped"].any()
    assert columns["staleness"].max() <= age - 1
    assert left == driver.version * 11 - driver.conservation.report()["in_flight"]


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_ringleader_makes_one_update_a_worker_in_every_round(workers: int, delay: str) -> None:
    driver = RuleDriver(Ringleader().build(workers), workers=workers, seconds=DELAYS[delay])

    columns = driver.run(1000)

    ends = np.flatnonzero(np.diff(columns["version"]) > 0)  # rows that make an update
    makers = columns["worker"][ends]
    rounds = makers[: len(makers) // workers * workers].reshape(-1, workers)
    assert len(rounds) >= 1
    assert (np.sort(rounds, axis=1) == np.arange(workers)).all()
    in_flight = driver.conservation.report()["in_flight"]
    assert columns["staleness"].sum() == driver.version * (workers - 1) - in_flight


def test_ringleader_attains_its_bound() -> None:
    """A worker that is first in one round, with surplus, and last in the next."""
    driver = RuleDriver(Ringleader().build(4), workers=4, seconds=DELAYS["pareto"])

    driver.run(5000)

    assert driver.worst["staleness"] == driver.limits["staleness"] == 2 * 4 - 2


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
