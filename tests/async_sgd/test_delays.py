"""Delay laws against their closed forms, their streams' independence, and traces.

Samples are seeded, so a test passes always or never; the bounds in standard errors say how unlikely
its failure would be for another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from async_sgd.delays import DELAYS, DelayLaw, Gamma, Trace
from async_sgd.streams import Delays, Stream
from paramserver.errors import PluginError, RecordError
from paramserver.ledger import Ledger
from workers.batches import _PARTITION, _PASS
from workers.samples import _SAMPLE

CLOSED_FORMS = {
    "exponential:mean=2": stats.expon(scale=2),
    "shifted-exponential:shift=0.25,mean=0.75": stats.expon(0.25, 0.75),
    "gamma:mean=2,cv=0.1": stats.gamma(100, scale=0.02),
    "gamma:mean=3,cv=2": stats.gamma(0.25, scale=12),
    "pareto:alpha=1.2,scale=2": stats.pareto(1.2, scale=2),
    "pareto:alpha=5,scale=0.5": stats.pareto(5, scale=0.5),
    "lognormal:mean=2,cv=0.5": stats.lognorm(math.sqrt(math.log(1.25)), scale=2 / math.sqrt(1.25)),
    "half-normal:mean=2,plus=1": stats.halfnorm(1, 2 * math.sqrt(math.pi / 2)),
    "uniform:low=0,high=3": stats.uniform(0, 3),
}
"""Every continuous law, as scipy has it."""

STANDARD_DEVIATIONS = {
    "constant": 0.0,
    "exponential": 1.0,
    "shifted-exponential": 0.5,
    "gamma": 0.1,
    "pareto": math.sqrt(0.8),
    "lognormal": 0.5,
    "half-normal": math.sqrt(math.pi / 2 - 1),
    "uniform": 1 / math.sqrt(12),
    "straggler": 0.8 * 5 * math.sqrt(0.05 * 0.95),
}
"""Of every law but the trace, with its defaults."""


def stream(worker: int = 0, *, seed: int = 0) -> np.random.Generator:
    key = np.random.SeedSequence(seed, spawn_key=(Stream.COMPUTE, worker))
    return np.random.Generator(np.random.Philox(key))


def sample(text: str, n: int, *, worker: int = 0, num_workers: int = 1) -> NDArray[np.float64]:
    law = DELAYS.parse(text)
    law.check(num_workers)
    return law.draws(worker, num_workers, stream(worker))(n)


def table(
    law: str, num_workers: int, n: int, *, seed: int = 0, of: int = 16
) -> NDArray[np.float64]:
    """Return ``n`` delays of each worker, drawn in turns, shape ``(n, num_workers)``."""
    delays = Delays(DELAYS.parse(law), num_workers, seed=seed, stream=of)
    return np.array([[delays.draw(w) for w in range(num_workers)] for _ in range(n)])


def trace(path: Path) -> DelayLaw:
    return DELAYS.build({"name": "trace", "path": str(path)})


def of_workers(law: DelayLaw, num_workers: int, n: int) -> list[list[float]]:
    delays = Delays(law, num_workers, seed=0, stream=Stream.COMPUTE)
    return [[delays.draw(worker) for _ in range(n)] for worker in range(num_workers)]


def text_file(folder: Path, text: str) -> Path:
    path = folder / "delays.csv"
    path.write_text(text, encoding="utf-8")
    return path


def record(folder: Path, *rows: tuple[int, float, float], dropped: int = -1) -> Path:
    """Write a run's ledger of pushes ``(worker, start, end)``; row ``dropped`` was not applied."""
    ledger = Ledger()
    for version, (worker, start, end) in enumerate(rows, 1):
        ledger.append(
            version=version, worker=worker, incarnation=1, seq=0, clock=1, read_version=0,
            staleness=0, start=start, end=end, samples=1, loss=0.0, grad_norm=0.0,
            dropped="late" if version == dropped + 1 else None,
        )  # fmt: skip
    ledger.save(folder / "updates.npz")
    return folder


@pytest.mark.parametrize("text", CLOSED_FORMS)
def test_a_law_is_its_closed_form(text: str) -> None:
    delays = sample(text, 50_000)

    assert stats.kstest(delays, CLOSED_FORMS[text].cdf).pvalue > 0.001
    assert delays.min() >= CLOSED_FORMS[text].support()[0]


@pytest.mark.parametrize("text", [text for text in CLOSED_FORMS if "alpha=1.2" not in text])
def test_mean_and_standard_deviation_are_within_three_standard_errors(text: str) -> None:
    mean, variance, _, kurtosis = map(float, CLOSED_FORMS[text].stats("mvsk"))
    n = 100_000

    delays = sample(text, n)

    assert delays.mean() == pytest.approx(mean, abs=3 * math.sqrt(variance / n))
    assert delays.var() == pytest.approx(variance, abs=3 * variance * math.sqrt((kurtosis + 2) / n))


@pytest.mark.parametrize("name", STANDARD_DEVIATIONS)
def test_every_law_has_a_mean_of_1_s_by_default(name: str) -> None:
    delays = sample(name, 100_000)

    assert delays.mean() == pytest.approx(1, abs=3 * STANDARD_DEVIATIONS[name] / math.sqrt(100_000))


def test_every_law_is_tested() -> None:
    assert [entry.name for entry in DELAYS] == [*STANDARD_DEVIATIONS, "trace", "resampled"]
    assert {text.partition(":")[0] for text in CLOSED_FORMS} == set(STANDARD_DEVIATIONS) - {
        "constant",
        "straggler",
    }


def test_a_constant_is_constant_and_may_be_0() -> None:
    assert sample("constant:time=0", 3).tolist() == [0, 0, 0]
    assert sample("constant:time=2.5", 3).tolist() == [2.5, 2.5, 2.5]


def test_a_straggler_takes_its_factor_as_long_with_its_probability() -> None:
    n = 100_000

    delays = sample("straggler:time=2,factor=7,probability=0.1", n)

    assert set(delays.tolist()) == {2, 14}
    assert np.mean(delays == 14) == pytest.approx(0.1, abs=3 * math.sqrt(0.1 * 0.9 / n))


def test_stragglers_may_be_none_or_all() -> None:
    assert set(sample("straggler:probability=0", 1000).tolist()) == {0.8}
    assert set(sample("straggler:time=1,probability=1", 1000).tolist()) == {6}


@pytest.mark.parametrize(
    "text", [*STANDARD_DEVIATIONS, "gamma:spread=0.6", "exponential:factors=3"]
)
def test_delays_do_not_depend_on_how_many_are_drawn_at_a_time(text: str) -> None:
    law = DELAYS.parse(text)
    law.check(1)
    draw = law.draws(0, 1, stream())

    pieces = np.concatenate([draw(n) for n in (1, 2, 64, 1, 500, 7, 0, 425)])

    np.testing.assert_array_equal(pieces, law.draws(0, 1, stream())(1000))


@pytest.mark.parametrize("text", ["exponential", "gamma:spread=0.6", "straggler", "constant"])
def test_delays_one_by_one_are_those_of_the_law(text: str) -> None:
    drawn = table(text, num_workers=3, n=200)

    for worker in range(3):
        np.testing.assert_array_equal(drawn[:, worker], sample(text, 200, worker=worker))


def test_a_workers_delays_depend_on_no_other_worker_and_not_on_when_it_joins() -> None:
    alone = Delays(DELAYS.parse("gamma:spread=0.6"), 100, seed=3, stream=Stream.COMPUTE)

    late = [alone.draw(7) for _ in range(100)]

    assert late == table("gamma:spread=0.6", num_workers=8, n=100, seed=3)[:, 7].tolist()


def test_a_generator_is_made_at_a_workers_first_draw_and_once() -> None:
    asked: list[tuple[int, int]] = []

    class Watched:
        def check(self, num_workers: int) -> None:
            assert num_workers == 10**5

        def draws(
            self, worker: int, num_workers: int, generator: np.random.Generator
        ) -> Callable[[int], NDArray[np.float64]]:
            asked.append((worker, num_workers))
            return generator.random

    delays = Delays(Watched(), 10**5, seed=0, stream=Stream.SERVICE)
    for _ in range(200):
        delays.draw(99_999)

    assert asked == [(99_999, 10**5)]


def test_seeds_streams_and_workers_have_unrelated_delays() -> None:
    n = 3000
    columns = [
        table("exponential", 5, n, seed=seed, of=of) for seed in (0, 1) for of in (*Stream, 19)
    ]

    correlations = np.asarray(np.corrcoef(np.hstack(columns), rowvar=False))

    apart = correlations[np.triu_indices(40, k=1)]
    assert len(apart) == 780
    assert np.abs(apart).max() < 4.5 / math.sqrt(n)  # 780 stay below with 99.5 %


def test_the_slowest_of_16_takes_their_harmonic_number() -> None:
    n = 4000
    error = math.sqrt(sum(1 / k**2 for k in range(1, 17)) / n)

    slowest = table("exponential", 16, n).max(axis=1).mean()

    assert slowest == pytest.approx(3.38073, abs=3 * error)


def test_delays_share_no_key_with_batches() -> None:
    assert set(Stream).isdisjoint({_PARTITION, _PASS, _SAMPLE})


def test_each_worker_is_slower_by_its_factor() -> None:
    slowed = table("exponential:mean=2,factors=1/2.5/0.1", num_workers=3, n=100)

    equal = table("exponential:mean=2", num_workers=3, n=100)
    np.testing.assert_array_equal(slowed, equal * [1, 2.5, 0.1])


def test_spread_draws_a_factor_for_each_worker_and_keeps_it() -> None:
    first, second = table("constant:time=2,spread=0.6", num_workers=4000, n=2)

    assert (first == second).all()
    assert stats.kstest(first, stats.gamma(1 / 0.36, scale=0.36 * 2).cdf).pvalue > 0.001


def test_with_spread_a_worker_has_the_law_times_its_factor() -> None:
    factors = sample("constant:spread=0.6", 1, worker=5, num_workers=8)

    delays = sample("exponential:spread=0.6", 20_000, worker=5, num_workers=8)

    assert stats.kstest(delays / factors[0], stats.expon.cdf).pvalue > 0.001


def test_a_law_is_written_with_its_keys_and_rebuilt_from_a_record() -> None:
    law = DELAYS.parse("gamma:mean=2,cv=0.1,factors=1/3")

    assert law == Gamma(mean=2.0, cv=0.1, factors=(1.0, 3.0))
    assert DELAYS.build({**DELAYS.describe(law), "factors": [1, 3]}) == law
    assert DELAYS.parse("trace:path=a/b.csv") == Trace(path="a/b.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constant:time=-1", "time must be 0 or more and finite, got -1.0"),
        ("constant:time=inf", "time must be 0 or more and finite, got inf"),
        ("exponential:mean=0", "mean must be above 0 and finite, got 0.0"),
        ("exponential:mean=nan", "mean must be above 0 and finite, got nan"),
        ("shifted-exponential:shift=-1", "shift must be 0 or more and finite, got -1.0"),
        ("shifted-exponential:mean=0", "mean must be above 0 and finite, got 0.0"),
        ("gamma:mean=inf", "mean must be above 0 and finite, got inf"),
        ("gamma:cv=0", "cv must be 1e-06 to 10, got 0.0"),
        ("pareto:alpha=1", "alpha must be above 1 and finite, got 1.0: up to 1 there is no mean"),
        ("pareto:alpha=inf", "alpha must be above 1 and finite, got inf"),
        ("pareto:scale=0", "scale must be above 0 and finite, got 0.0"),
        ("lognormal:mean=-2", "mean must be above 0 and finite, got -2.0"),
        ("lognormal:cv=11", "cv must be 1e-06 to 10, got 11.0"),
        ("half-normal:mean=0", "mean must be above 0 and finite, got 0.0"),
        ("half-normal:plus=-1", "plus must be 0 or more and finite, got -1.0"),
        ("uniform:low=-1", "low must be 0 or more and finite, got -1.0"),
        ("uniform:low=2,high=2", r"high must be above low \(2.0\) and finite, got 2.0"),
        ("uniform:high=inf", r"high must be above low \(0.5\) and finite, got inf"),
        ("straggler:time=0", "time must be above 0 and finite, got 0.0"),
        ("straggler:factor=0", "factor must be above 0 and finite, got 0.0"),
        ("straggler:probability=1.1", "probability must be 0 to 1, got 1.1"),
        ("straggler:probability=nan", "probability must be 0 to 1, got nan"),
        ("gamma:factors=1/0", "the factor of worker 1 must be above 0 and finite, got 0.0"),
        ("gamma:spread=-0.1", "spread must be 1e-06 to 10, got -0.1"),
        ("gamma:spread=nan", "spread must be 1e-06 to 10, got nan"),
        ("gamma:factors=1/2,spread=1", "factors and spread both say how workers differ"),
        ("resampled:path=a,around=-1", "around must be 0 places or more, got -1"),
    ],
)
def test_a_value_out_of_range_is_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=f"^delay '{text.partition(':')[0]}': {message}"):
        DELAYS.parse(text)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_factors_are_one_for_each_worker(num_workers: int) -> None:
    law = DELAYS.parse("exponential:factors=1/2")

    law.check(2)

    message = rf"^factors must be one for each of the {num_workers} workers, got 2$"
    with pytest.raises(ValueError, match=message):
        Delays(law, num_workers, seed=0, stream=Stream.COMPUTE)


@pytest.mark.parametrize(
    ("num_workers", "seed", "message"),
    [
        (0, 0, r"^num_workers must be 1 or more, got 0$"),
        (1, -1, r"^seed must be 0 or more, got -1$"),
    ],
)
def test_delays_refuse_values_out_of_range(num_workers: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Delays(DELAYS.parse("constant"), num_workers, seed=seed, stream=Stream.COMPUTE)


def test_there_is_no_worker_before_the_first_or_after_the_last() -> None:
    delays = Delays(DELAYS.parse("constant"), 2, seed=0, stream=Stream.SERVICE)

    with pytest.raises(AssertionError, match=r"^there is no worker -1$"):
        delays.draw(-1)
    with pytest.raises(IndexError):
        delays.draw(2)


def test_a_run_is_played_again_worker_by_worker_with_what_was_dropped(tmp_path: Path) -> None:
    rows = [(1, 0.0, 2.0), (0, 0.0, 2.5), (1, 2.0, 5.0), (0, 2.5, 2.5), (1, 5.0, 5.25)]
    law = trace(record(tmp_path, *rows, dropped=2))

    assert of_workers(law, 2, 5) == [[2.5, 0, 2.5, 0, 2.5], [2, 3, 0.25, 2, 3]]


def test_a_long_run_keeps_the_order_of_each_worker(tmp_path: Path) -> None:
    law = trace(record(tmp_path, *((row % 3, 0.0, float(row)) for row in range(600))))

    assert of_workers(law, 3, 200) == [list(range(worker, 600, 3)) for worker in range(3)]


@pytest.mark.parametrize(
    "text",
    [
        "worker,seconds\n1,2\n0,2.5\n1,3\n0,0\n1,0.25\n",
        "\ufeff worker, seconds \r\n\r\n1, 2\r\n1,3e0\r\n0 ,2.5\r\n0,0\r\n\r\n1,.25",
    ],
)
def test_a_file_with_workers_gives_each_its_own(tmp_path: Path, text: str) -> None:
    law = trace(text_file(tmp_path, text))

    assert of_workers(law, 2, 5) == [[2.5, 0, 2.5, 0, 2.5], [2, 3, 0.25, 2, 3]]


def test_a_file_without_workers_is_for_all_and_each_starts_elsewhere(tmp_path: Path) -> None:
    law = trace(text_file(tmp_path, "1\n2\n\n3\n4\n5\n"))

    assert of_workers(law, 3, 6) == [[1, 2, 3, 4, 5, 1], [2, 3, 4, 5, 1, 2], [4, 5, 1, 2, 3, 4]]


def test_a_trace_does_not_depend_on_how_many_are_drawn_at_a_time(tmp_path: Path) -> None:
    law = trace(text_file(tmp_path, "\n".join(map(str, range(100)))))
    law.check(3)
    draw = law.draws(1, 3, stream())

    pieces = np.concatenate([draw(n) for n in (1, 2, 64, 0, 433)])

    assert pieces.tolist() == [(33 + i) % 100 for i in range(500)]


def test_a_trace_is_read_once(tmp_path: Path) -> None:
    path = text_file(tmp_path, "1\n2\n")
    law = trace(path)
    law.check(2)

    path.unlink()

    assert of_workers(law, 2, 2) == [[1, 2], [2, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^the trace \S+ has no delays$"),
        ("\n\n", r"^the trace \S+ has no delays$"),
        ("worker,seconds\n", r"^the trace \S+ has no delays$"),
        ("1\nfast\n", r"^\S+delays\.csv, line 2: 'fast' is not a number of seconds$"),
        ("1\n2,3\n", r"^\S+, line 2: '2,3' is not a number of seconds$"),
        ("\n1\n\n-2\n", r"^\S+, line 4: a delay must be 0 s or more and finite, got -2$"),
        ("inf\n", r"^\S+, line 1: a delay must be 0 s or more and finite, got inf$"),
        ("nan\n", r"^\S+, line 1: a delay must be 0 s or more and finite, got nan$"),
        ("0,1\n1,2\n", r"^\S+, line 1: the header must be worker,seconds, got '0,1'$"),
        ("worker,seconds\n0,1\n-1,2\n", r"^\S+, line 3: '-1' is not the number of a worker$"),
        ("worker,seconds\n4\n", r"^\S+, line 2, worker 4: '' is not a number of seconds$"),
        ("worker,seconds\n4,1,2\n", r"^\S+, line 2, worker 4: '1,2' is not a number of seconds$"),
        ("worker,seconds\n4, -1\n", r"^\S+, line 2, worker 4: a delay must .* finite, got -1$"),
    ],
)
def test_a_file_that_holds_no_delays_is_refused(tmp_path: Path, text: str, message: str) -> None:
    law = trace(text_file(tmp_path, text))

    with pytest.raises(RecordError, match=message):
        law.check(1)


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_a_run_with_a_delay_that_cannot_be_is_refused(
    tmp_path: Path, start: float, end: float
) -> None:
    law = trace(record(tmp_path, (0, 0.0, 1.0), (3, start, end)))

    message = rf"updates\.npz, row 1: worker 3 cannot have taken from {start} s to {end} s$"
    with pytest.raises(RecordError, match=message):
        law.check(1)


def test_a_run_without_pushes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"^the trace \S+ has no delays$"):
        trace(record(tmp_path)).check(1)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"^cannot read the trace \S+gone\.csv, .*No such file"):
        trace(tmp_path / "gone.csv").check(1)
    with pytest.raises(RecordError, match=r"^cannot read \S+updates\.npz as a ledger"):
        trace(tmp_path).check(1)


def test_a_trace_that_is_no_text_is_refused(tmp_path: Path) -> None:
    record(tmp_path, (0, 0.0, 1.0))

    with pytest.raises(RecordError, match=r"npz, a run's folder or a text file: 'utf-8' codec"):
        trace(tmp_path / "updates.npz").check(1)


def test_a_trace_has_every_worker_of_the_run(tmp_path: Path) -> None:
    law = trace(text_file(tmp_path, "worker,seconds\n0,1\n2,1\n1,1\n7,1\n"))

    law.check(3)

    message = r"has delays of 4 workers and 5 are needed: there is none of worker 3$"
    with pytest.raises(ValueError, match=message):
        law.check(5)
