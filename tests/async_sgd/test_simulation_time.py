"""Virtual time against order statistics, renewal theory and queueing theory.

Exact statements are checked exactly. Where a number is a mean of random ones, four standard errors
are allowed, and the seed is fixed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import gammaln

from async_sgd.network import Network
from async_sgd.streams import Stream
from paramserver.ledger import Move
from tests.support.virtual import columns, delays, simulation

Array = NDArray[np.float64]


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


ORDER_STATISTICS: dict[str, Callable[[int, int], float]] = {
    "exponential:mean=2": lambda k, n: 2 * (harmonic(n) - harmonic(n - k)),
    "shifted-exponential:shift=0.5,mean=1.5": lambda k, n: (
        0.5 + 1.5 * (harmonic(n) - harmonic(n - k))
    ),
    "uniform:low=1,high=3": lambda k, n: 1 + 2 * k / (n + 1),
    "pareto:alpha=2.5,scale=1": lambda k, n: pareto_order_statistic(k, n, 2.5),
}
"""Mean of the k-th of n delays, by law."""


def pareto_order_statistic(k: int, n: int, alpha: float) -> float:
    logs = gammaln([n + 1, n - k + 1 - 1 / alpha, n - k + 1, n + 1 - 1 / alpha])
    return float(np.exp(logs @ [1, 1, -1, -1]))


def update_times(rows: dict[str, NDArray[Any]]) -> Array:
    """Return when each version was made, from version 1 on."""
    taken = rows["dropped"] == 0
    versions, ends = rows["version"][taken], rows["end"][taken]
    is_last = np.append(np.diff(versions) > 0, True)
    return np.asarray(ends[is_last])


def check_mean(samples: Array, expected: float) -> None:
    """Check the mean of independent ``samples``, and that there are enough of them."""
    error = samples.std(ddof=1) / math.sqrt(len(samples))
    assert abs(samples.mean() - expected) < 4 * error < 0.2 * expected


def test_the_formulas_have_the_values_known() -> None:
    assert harmonic(16) == pytest.approx(3.38073, abs=5e-6)
    assert harmonic(100) - harmonic(4) == pytest.approx(3.10404, abs=5e-6)
    assert pareto_order_statistic(16, 16, 2.5) == pytest.approx(4.5483, abs=5e-5)
    assert pareto_order_statistic(12, 16, 2.5) == pytest.approx(1.7029, abs=5e-5)


# ---------------------------------------------------------------- waiting for others


@pytest.mark.parametrize("delay", ORDER_STATISTICS)
def test_bsp_waits_for_the_slowest_of_all(delay: str) -> None:
    run = simulation(8, updates=400, delay=delay, rule="bsp")

    run.run()

    rounds = np.diff(update_times(columns(run)), prepend=0.0)
    check_mean(rounds, ORDER_STATISTICS[delay](8, 8))


@pytest.mark.parametrize("delay", ORDER_STATISTICS)
def test_the_first_update_of_k_of_n_waits_for_the_kth(delay: str) -> None:
    runs = [simulation(8, updates=1, delay=delay, rule="k-of-n:k=5", seed=s) for s in range(250)]

    for run in runs:
        run.run()

    check_mean(np.array([run.now for run in runs]), ORDER_STATISTICS[delay](5, 8))


def time_of_k_of_n(k: int, n: int) -> float:
    """Return the mean time of an update under delays of mean 1 without memory.

    Workers that are late are not stopped: they first end what will be dropped. So ``n - k`` of them
    begin each update with nothing that counts.
    """
    times = np.zeros((k + 1, n - k + 1))  # by gradients gathered and late workers computing
    for gathered in range(k - 1, -1, -1):
        for late in range(n - k + 1):
            busy = n - gathered
            then = (busy - late) * times[gathered + 1, late]
            if late:
                then += late * times[gathered, late - 1]
            times[gathered, late] = (1 + then) / busy
    return float(times[0, n - k])


def test_the_time_of_k_of_n_has_its_ends_right() -> None:
    assert time_of_k_of_n(8, 8) == pytest.approx(harmonic(8))
    assert time_of_k_of_n(1, 2) == pytest.approx(3 / 4)  # the late one ends first with chance 1/2


@pytest.mark.parametrize("k", [3, 6])
def test_late_workers_end_what_will_be_dropped_before_they_help(k: int) -> None:
    run = simulation(8, updates=500, rule=f"k-of-n:k={k}")

    run.run()

    check_mean(np.diff(update_times(columns(run)), prepend=0.0), time_of_k_of_n(k, 8))
    assert time_of_k_of_n(k, 8) > 1.2 * (harmonic(8) - harmonic(8 - k))  # if they were stopped


@pytest.mark.parametrize("rule", ["k-of-n:k=5,mode=sync", "k-of-n:k=5,mode=async", "bsp"])
def test_memoryless_workers_that_wait_do_so_for_the_harmonic_time(rule: str) -> None:
    run = simulation(5, updates=600, rule=rule)

    run.run()

    check_mean(np.diff(update_times(columns(run)), prepend=0.0), harmonic(5))


# ---------------------------------------------------------------- nobody waits


@pytest.mark.parametrize(("rule", "size"), [("asp", 1), ("k-of-n:k=3,mode=batch-async", 3)])
@pytest.mark.parametrize(
    ("delay", "mean", "cv"),
    [
        ("constant:time=2", 2.0, 0.0),
        ("exponential", 1.0, 1.0),
        ("gamma:mean=3,cv=0.3", 3.0, 0.3),
        ("uniform:low=0.5,high=1.5", 1.0, 1 / math.sqrt(12)),
        ("pareto:alpha=3.5,scale=1", 1.4, 1 / math.sqrt(3.5 * 1.5)),
        ("lognormal:cv=0.8", 1.0, 0.8),
        ("straggler:time=0.8,factor=6,probability=0.05", 1.0, 0.8 * 5 * math.sqrt(0.05 * 0.95)),
    ],
)
def test_the_time_of_an_update_is_its_share_of_the_mean_for_any_law(
    delay: str, mean: float, cv: float, rule: str, size: int
) -> None:
    workers, pushes = 5, 3000
    run = simulation(workers, updates=pushes // size, delay=delay, rule=rule)

    run.run()

    assert len(run.sequencer.ledger) == pushes
    # Renewal theory: in a long time the number of pushes varies by cv**2 times itself, and each
    # worker, which started from nothing, has (cv**2 - 1) / 2 more than the time over the mean.
    expected = mean * size / workers
    error = 4 * cv / math.sqrt(pushes) + workers * abs(cv**2 - 1) / 2 / pushes
    assert run.now / run.sequencer.version == pytest.approx(expected, rel=error)


# ---------------------------------------------------------------- SSP


BOUNDS = [0, 1, 3, 8, 10**9]


def ends_by_clock(rows: dict[str, NDArray[Any]]) -> dict[tuple[int, int], float]:
    keys = zip(rows["worker"].tolist(), rows["clock"].tolist(), strict=True)
    return dict(zip(keys, rows["end"].tolist(), strict=True))


def share_of_waiting(rows: dict[str, NDArray[Any]], num_workers: int) -> float:
    """Return the time workers spent between a push and the next read, of the whole."""
    waited = 0.0
    for worker in range(num_workers):
        mine = rows["worker"] == worker
        waited += (rows["start"][mine][1:] - rows["end"][mine][:-1]).sum()
    return float(waited / (num_workers * rows["end"].max()))


@pytest.mark.parametrize("delay", ["exponential", "pareto:alpha=1.5"])
def test_a_larger_bound_lets_no_gradient_end_later(delay: str) -> None:
    runs = [simulation(4, updates=10**6, delay=delay, rule=f"ssp:bound={s}") for s in BOUNDS]
    asp = simulation(4, updates=10**6, delay=delay)
    bsp = simulation(4, updates=10**6, delay=delay, rule="bsp")

    for run in [*runs, asp, bsp]:
        assert run.run(until=150.0)

    ends = [ends_by_clock(columns(run)) for run in runs]
    for tight, loose in itertools.pairwise(ends):
        assert len(tight) < len(loose)
        assert all(loose[key] <= end for key, end in tight.items())
    assert ends[0] == ends_by_clock(columns(bsp))
    assert ends[-1] == ends_by_clock(columns(asp))
    waiting = [share_of_waiting(columns(run), 4) for run in runs]
    assert waiting == sorted(waiting, reverse=True)
    assert waiting[0] > 0.2
    assert waiting[-1] == 0


# ---------------------------------------------------------------- Ringmaster


def time_bound(times: Array, threshold: int) -> float:
    """Return t(R) of Maranjyan et al.: the longest that R updates take."""
    m = np.arange(1, len(times) + 1)
    return float(2 * (m / np.cumsum(1 / np.sort(times)) * (1 + threshold / m)).min())


@pytest.mark.parametrize("cancel", ["false", "true"])
@pytest.mark.parametrize("law", ["constant:time=1", "uniform:low=0,high=1"])
@pytest.mark.parametrize(("num_workers", "threshold"), [(2, 1), (4, 8), (10, 3), (20, 10)])
def test_ringmaster_makes_its_updates_in_time(
    num_workers: int, threshold: int, law: str, cancel: str
) -> None:
    slowest = np.random.default_rng([num_workers, threshold]).lognormal(0.0, 1.5, num_workers)
    factors = "/".join(map(str, slowest))
    run = simulation(
        num_workers,
        updates=400,
        delay=f"{law},factors={factors}",
        rule=f"ringmaster:limit={threshold},cancel={cancel}",
    )

    run.run()

    rows = columns(run)
    times = np.append(0.0, update_times(rows))
    longest = (times[threshold:] - times[:-threshold]).max()
    assert 0.1 < longest / time_bound(slowest, threshold) <= 1
    assert rows["staleness"][rows["dropped"] == 0].max() <= threshold - 1


@pytest.mark.parametrize("law", ["constant:time=1", "uniform:low=0,high=1"])
@pytest.mark.parametrize("num_workers", [1, 2, 5, 20])
def test_a_round_of_ringleader_takes_at_most_twice_the_longest_time(
    num_workers: int, law: str
) -> None:
    slowest = np.random.default_rng(num_workers).lognormal(0.0, 1.0, num_workers)
    factors = "/".join(map(str, slowest))
    run = simulation(num_workers, updates=400, delay=f"{law},factors={factors}", rule="ringleader")

    run.run()

    ends_of_rounds = np.append(0.0, update_times(columns(run)))[::num_workers]
    longest = np.diff(ends_of_rounds).max()
    assert 0.3 < longest / (2 * slowest.max()) <= 1


def test_cancelling_spares_backup_workers_what_nobody_takes() -> None:
    """Two fast workers make every update; the slow one, cancelled, is never done."""
    runs = [
        simulation(
            3,
            updates=40,
            delay="constant:time=1,factors=1/1/2.5",
            rule=f"k-of-n:k=2,cancel={cancel}",
        )
        for cancel in ("false", "true")
    ]

    for run in runs:
        run.run()

    plain, cancelled = map(columns, runs)
    assert set(plain["worker"]) == {0, 1, 2}
    assert set(cancelled["worker"]) == {0, 1}
    assert cancelled["end"][-1] == 40.0


def test_a_cancelled_worker_begins_anew_at_that_second() -> None:
    run = simulation(
        2, updates=6, delay="constant:time=1,factors=1/2.5", rule="ringmaster:limit=2,cancel=true"
    )

    run.run()

    moves = run.sequencer.ledger.moves()
    cancelled = moves[moves["kind"] == Move.CANCEL]
    assert cancelled["time"].tolist() == [2.0, 4.0]  # of versions 0 and 2; the run ends at 6
    assert cancelled["worker"].tolist() == [1, 1]
    assert columns(run)["worker"].tolist() == [0] * 6


# ---------------------------------------------------------------- network and server


@pytest.mark.parametrize("rule", ["asp", "ssp:bound=1", "bsp", "k-of-n:k=2"])
def test_a_gradient_takes_its_delay_and_two_ways(rule: str) -> None:
    run = simulation(4, updates=200, rule=rule, one_way_s=0.25)

    run.run()

    rows = columns(run)
    drawn = delays("exponential", 4, 0, Stream.COMPUTE)
    expected = [rows["start"][i] + 0.5 + drawn.draw(w) for i, w in enumerate(rows["worker"])]
    assert rows["end"].tolist() == expected


def test_the_network_adds_two_ways_to_every_round() -> None:
    near = simulation(4, updates=100, rule="bsp")
    far = simulation(4, updates=100, rule="bsp", one_way_s=0.25)

    near.run()
    far.run()

    assert far.now == pytest.approx(near.now + 100 * 0.5, rel=1e-12)


def test_a_message_takes_latency_and_its_bytes() -> None:
    assert Network().seconds(10**12) == 0
    assert Network(latency=0.25).seconds(1000) == 0.25
    assert Network(latency=0.25, bandwidth=500).seconds(1000) == 2.25


@pytest.mark.parametrize(("rule", "num_workers"), [("asp", 6), ("bsp", 6), ("softsync:n=2", 5)])
def test_the_server_takes_pushes_one_by_one_as_they_arrive(rule: str, num_workers: int) -> None:
    run = simulation(
        num_workers, updates=150, rule=rule, service="exponential:mean=0.3", one_way_s=0.25
    )

    run.run()

    arrivals, services, ends = timeline(columns(run), num_workers, "exponential:mean=0.3", 0.5)
    assert (np.diff(arrivals) >= 0).all()
    free_at = 0.0
    for arrival, service, end in zip(arrivals, services, ends, strict=True):
        assert end == max(arrival, free_at) + service
        free_at = end


def timeline(
    rows: dict[str, NDArray[Any]], num_workers: int, service: str, both_ways_s: float = 0.0
) -> tuple[Array, Array, Array]:
    """Return when each push arrived at the server, how long it was served, and when it was done.

    Arrivals and services are drawn once more, from the same streams.
    """
    thinking = delays("exponential", num_workers, 0, Stream.COMPUTE)
    serving = delays(service, num_workers, 0, Stream.SERVICE)
    workers = rows["worker"].tolist()
    thought = np.array([thinking.draw(worker) for worker in workers])
    served = np.array([serving.draw(worker) for worker in workers])
    return rows["start"] + both_ways_s + thought, served, rows["end"]


def mean_value_analysis(num_workers: int, think: float, service: float) -> tuple[float, float]:
    """Return throughput and mean queue of a closed network: workers think, one server serves."""
    queue = throughput = 0.0
    for m in range(1, num_workers + 1):
        response = service * (1 + queue)
        throughput = m / (think + response)
        queue = throughput * response
    return throughput, queue


@pytest.mark.parametrize(("num_workers", "service"), [(3, 0.2), (6, 0.3)])
def test_a_contended_server_has_the_throughput_and_queue_of_exact_theory(
    num_workers: int, service: float
) -> None:
    run = simulation(num_workers, updates=8000, service=f"exponential:mean={service}")

    run.run()

    throughput, queue = mean_value_analysis(num_workers, 1.0, service)
    arrivals, _, ends = timeline(columns(run), num_workers, f"exponential:mean={service}")
    parts = np.split(np.arange(8000), 40)
    gaps = np.array([(ends[part[-1]] - ends[part[0]]) / (len(part) - 1) for part in parts])
    check_mean(gaps, 1 / throughput)
    responses = np.array([(ends - arrivals)[part].mean() for part in parts])
    check_mean(responses, queue / throughput)
    check_mean(responses / gaps, queue)  # the area under the queue's length, over time


@pytest.mark.parametrize(("num_workers", "service"), [(2, 0.25), (3, 0.5), (6, 0.5)])
def test_a_server_without_chance_is_as_fast_as_its_bottleneck(
    num_workers: int, service: float
) -> None:
    run = simulation(
        num_workers, updates=40 * num_workers, delay="constant", service=f"constant:time={service}"
    )

    run.run()

    ends = columns(run)["end"][num_workers:]
    fastest = min(num_workers / (1 + service), 1 / service)
    assert (ends[-1] - ends[-1 - 20 * num_workers]) / (20 * num_workers) == 1 / fastest


def test_service_without_time_changes_nothing() -> None:
    free = simulation(4, updates=300)
    instant = simulation(4, updates=300, service="constant:time=0")

    free.run()
    instant.run()

    np.testing.assert_equal(columns(instant), columns(free))
