"""Delay laws fitted to runs whose delays are known, and what they predict of others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from async_sgd.calibration import calibrate, distance
from async_sgd.delays import DELAYS, DelayLaw, Gamma, LogNormal
from async_sgd.traces import read_own_delays
from deploy.flags import spell
from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from tests.support.virtual import simulation

WORKERS, PUSHES = 4, 6000


def recorded(folder: Path, delay: str, *, slowed: bool = False) -> Path:
    """Write the ledger of a run with ``delay``, all workers slow at times if ``slowed``."""
    run = simulation(WORKERS, updates=PUSHES, delay=delay)
    run.run()
    ledger = run.sequencer.ledger
    if slowed:
        for name in ("start", "end"):
            ledger.rows(0)[name] = warped(ledger.rows(0)[name])
    ledger.save(folder / "updates.npz")
    return folder


def warped(times: np.ndarray) -> np.ndarray:
    """Return the times of a clock that runs 5 times slower in every second 100 seconds."""
    whole, part = np.divmod(times, 200.0)
    return whole * 600.0 + np.minimum(part, 100.0) + 5.0 * np.maximum(part - 100.0, 0.0)


def predicted(law: DelayLaw, seed: int) -> tuple[dict[int, int], float]:
    run = simulation(WORKERS, updates=PUSHES, delay=spell(DELAYS, law), seed=seed)
    run.run()
    return run.sequencer.ledger.staleness.histogram(), PUSHES / run.now


@pytest.mark.parametrize(
    ("delay", "kind"),
    [
        ("gamma:mean=0.2,cv=0.4,factors=1/1/1.2/2", Gamma),
        ("lognormal:mean=3,cv=0.6", LogNormal),
        ("shifted-exponential:shift=0.7,mean=0.3", LogNormal),  # the nearer one of the two
    ],
)
def test_a_law_is_found_again_and_predicts_another_run(
    tmp_path: Path, delay: str, kind: type[DelayLaw]
) -> None:
    found = calibrate(recorded(tmp_path, delay))

    histogram, rate = predicted(found.law, seed=1)
    assert isinstance(found.law, kind)
    assert distance(found.staleness, histogram) < 0.1
    assert rate == pytest.approx(found.gradients_per_s, rel=0.03)


def test_factors_and_variation_are_those_of_the_run(tmp_path: Path) -> None:
    law = calibrate(recorded(tmp_path, "gamma:mean=0.2,cv=0.2,factors=1/1/1.2/2")).law

    assert isinstance(law, Gamma)
    assert law.factors is not None
    assert np.array(law.factors) / law.factors[0] == pytest.approx([1, 1, 1.2, 2], rel=0.03)
    assert law.cv == pytest.approx(0.2, rel=0.1)


def test_what_slows_all_workers_at_once_changes_no_staleness(tmp_path: Path) -> None:
    found = calibrate(recorded(tmp_path, "gamma:cv=0.3", slowed=True))

    histogram, rate = predicted(found.law, seed=1)
    assert distance(found.staleness, histogram) < 0.1
    assert rate == pytest.approx(found.gradients_per_s, rel=0.1)


def test_resampled_delays_predict_a_run_that_keeps_its_order_at_times(tmp_path: Path) -> None:
    """Two runs in one: no law that is the same all the time has the staleness of both."""
    random = np.random.default_rng(0)
    half = PUSHES // WORKERS // 2
    lines = ["worker,seconds"]
    for worker in range(WORKERS):
        for cv in (0.02, 0.6):
            delays = random.gamma(1 / cv**2, cv**2, size=half)
            lines += [f"{worker},{delay}" for delay in delays]
    (tmp_path / "delays.csv").write_text("\n".join(lines))
    recorded(tmp_path, f"trace:path={tmp_path / 'delays.csv'}")

    found = calibrate(tmp_path)

    by_law, by_record = (predicted(law, seed=1)[0] for law in (found.law, found.resampled))
    assert distance(found.staleness, by_record) < 0.08
    assert distance(found.staleness, by_law) > 0.2


def test_resampled_delays_are_those_around_their_place(tmp_path: Path) -> None:
    recorded(tmp_path, "gamma:mean=0.2,cv=0.4,factors=1/1/1.2/2")
    own = read_own_delays(tmp_path)
    law = DELAYS.parse(f"resampled:path={tmp_path},around=3")
    law.check(WORKERS)

    drawn = law.draws(2, WORKERS, np.random.default_rng(0))(3 * len(own[2]))

    for i, delay in enumerate(drawn):
        place = i % len(own[2])
        assert delay in own[2][max(place - 3, 0) : place + 4]
    pieces = law.draws(2, WORKERS, np.random.default_rng(0))
    again = np.concatenate([pieces(n) for n in (1, 7, 0, 500)])
    np.testing.assert_array_equal(again, drawn[: len(again)])
    assert sum(1 / delays.mean() for delays in own.values()) == pytest.approx(
        calibrate(tmp_path).gradients_per_s
    )


def test_resampled_delays_are_of_the_workers_that_were_there(tmp_path: Path) -> None:
    law = DELAYS.parse(f"resampled:path={recorded(tmp_path, 'exponential')}")

    with pytest.raises(ValueError, match=r"has delays of 4 workers and 5 are needed$"):
        law.check(5)


def test_the_distance_of_histograms() -> None:
    assert distance({0: 10}, {0: 3}) == 0.0
    assert distance({0: 10}, {1: 3}) == 1.0
    assert distance({0: 1, 1: 1}, {1: 1, 2: 1}) == pytest.approx(0.5)


def test_too_few_pushes_fit_nothing(tmp_path: Path) -> None:
    run = simulation(2, updates=20)
    run.run()
    run.sequencer.ledger.save(tmp_path / "updates.npz")

    with pytest.raises(RecordError, match=re.escape("pushes of one worker: it takes 20 of each")):
        calibrate(tmp_path)
    Ledger().save(tmp_path / "updates.npz")
    with pytest.raises(RecordError, match="0 pushes"):
        calibrate(tmp_path)
    with pytest.raises(RecordError, match="cannot read"):
        calibrate(tmp_path / "nowhere")
