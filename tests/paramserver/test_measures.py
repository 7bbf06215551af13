from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paramserver.ledger import Ledger
from paramserver.measures import MEASURES, Gauge, measured, measures_of, summary
from paramserver.messages import Action, Kind, Message
from paramserver.optimizers import DANA, SGD, Momentum, Optimizer
from tests.support.fleet import Fleet

N = 128
DOUBLE = torch.float64


def vector(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def constant(read: Tensor, step: int) -> Tensor:
    """A gradient whose norm and multiples are exact: 2 of 128 elements are 3 and 4."""
    grad = torch.zeros_like(read)
    grad[0], grad[100] = 3.0, 4.0
    return grad


def gauged(
    optimizer: Optimizer | None = None,
    cuts: tuple[range, ...] = (range(N),),
    workers: int = 3,
    start: Tensor | None = None,
) -> tuple[Fleet, list[Gauge]]:
    """Return shards of ``cuts`` that measure everything, and their gauges."""
    params = torch.zeros(N, dtype=DOUBLE) if start is None else start
    gauges = [Gauge(MEASURES, params[cut.start : cut.stop]) for cut in cuts]
    fleet = Fleet(optimizer or SGD(lr=1.0), params, constant, cuts=cuts, workers=workers)
    for shard, gauge in zip(fleet.shards, gauges, strict=True):
        shard._gauge = gauge
    return fleet, gauges


def found(gauges: list[Gauge]) -> dict[str, np.ndarray]:
    return measured(MEASURES, [gauge.sums() for gauge in gauges])


def test_under_constant_velocity_the_gap_is_staleness_times_the_step_exactly() -> None:
    fleet, gauges = gauged()

    fleet.train([0, 1, 2, 0, 0, 1, 2, 2])

    stale = [0, 1, 2, 2, 0, 3, 3, 0]
    columns = found(gauges)
    assert columns["step"].tolist() == [5.0] * 8
    assert columns["gap"].tolist() == [5.0 * tau for tau in stale]


def test_the_cosine_of_constant_gradients_is_1_and_there_is_none_before_the_first_update() -> None:
    fleet, gauges = gauged()

    fleet.train([0, 1, 2, 0])

    cosine = found(gauges)["cosine"]
    assert math.isnan(cosine[0])
    assert cosine[1:].tolist() == [1.0] * 3


def test_each_measure_is_what_a_plain_loop_finds() -> None:
    start, order = vector(0), [0, 1, 1, 2, 0, 2, 1]
    fleet, gauges = gauged(Momentum(lr=0.1, momentum=0.9), start=start)
    fleet._gradient = lambda read, step: read + vector(step + 1)

    fleet.train(order)

    w, v, before = start.clone(), torch.zeros(N, dtype=DOUBLE), torch.zeros(N, dtype=DOUBLE)
    reads = {worker: start.clone() for worker in range(3)}
    expected: dict[str, list[float]] = {"gap": [], "cosine": [], "step": []}
    for step, worker in enumerate(order):
        g = reads[worker] + vector(step + 1)
        expected["gap"].append(float((w - reads[worker]).norm()))
        expected["cosine"].append(float(torch.cosine_similarity(-g, before, dim=0)))
        v = 0.9 * v + g
        before = -0.1 * v
        w = w + before
        expected["step"].append(float(before.norm()))
        reads[worker] = w.clone()
    expected["cosine"][0] = math.nan
    for name, values in found(gauges).items():
        assert values == pytest.approx(expected[name], rel=1e-9, abs=1e-12, nan_ok=True), name


def test_shards_joined_measure_the_whole_vector() -> None:
    cuts = (range(64), range(64, N))
    whole, of_one = gauged(start=vector(0))
    parts, of_two = gauged(start=vector(0), cuts=cuts)
    for fleet in (whole, parts):
        fleet._gradient = lambda read, step: read + vector(step)
        fleet.train([0, 1, 2, 1, 0])

    for name, values in found(of_two).items():
        assert values == pytest.approx(found(of_one)[name], rel=1e-14, nan_ok=True), name


def test_one_shard_measures_cuts_apart_and_has_the_bits_of_as_many_shards() -> None:
    cuts = (range(64), range(64, N))
    whole, _ = gauged(start=vector(0))
    gauge = whole.shards[0]._gauge = Gauge(MEASURES, vector(0), cuts)
    parts, of_two = gauged(start=vector(0), cuts=cuts)
    for fleet in (whole, parts):
        fleet._gradient = lambda read, step: read + vector(step)
        fleet.train([0, 1, 2, 1, 0])

    for name, values in found(of_two).items():
        assert np.array_equal(values, found([gauge])[name], equal_nan=True), name


def test_under_dana_the_gap_is_from_the_point_that_was_shown() -> None:
    fleet, gauges = gauged(DANA(lr=1.0, momentum=0.5), workers=1)

    fleet.train([0, 0])

    assert found(gauges)["gap"].tolist() == [0.0, 2.5]  # η μ v = 0.5 · 5 ahead, nothing moved


def test_a_push_that_completes_no_update_has_no_step() -> None:
    fleet, (gauge,) = gauged()
    grad = constant(torch.zeros(N, dtype=DOUBLE), 0)
    shard = fleet.shards[0]
    for worker, step in ((0, 0), (1, 1)):
        shard.hold(worker, 1, 1, grad)
        shard.execute(
            Message(
                Kind.ORDER, Action.TAKE, worker, 1, 1, version=step, samples=1, step=step, scale=1.0
            )
        )

    assert np.array_equal(found([gauge])["step"], [math.nan, 5.0], equal_nan=True)


def test_only_what_is_asked_for_is_measured() -> None:
    gauge = Gauge(("gap",), torch.zeros(N))
    gauge.on_take(torch.ones(N), torch.ones(N), torch.zeros(N))
    gauge.on_update(torch.ones(N))

    columns = measured(("gap",), [gauge.sums()])

    assert list(columns) == ["gap"]
    assert columns["gap"] == pytest.approx([math.sqrt(N)])


def test_sixteen_bits_are_summed_in_32() -> None:
    numel = 8192
    gauge = Gauge(("gap",), torch.zeros(numel, dtype=torch.bfloat16))
    read = torch.zeros(numel, dtype=torch.bfloat16)
    gauge.on_take(read, torch.ones(numel, dtype=torch.bfloat16), read)

    assert measured(("gap",), [gauge.sums()])["gap"] == pytest.approx([math.sqrt(numel)], rel=1e-6)


def test_names_are_read_in_any_order_and_refused_by_name() -> None:
    assert measures_of("step, gap") == ("step", "gap")
    assert measures_of(None) == ()

    with pytest.raises(ValueError, match=r"^measure must be some of gap, cosine, step, got 'gaps'"):
        measures_of("gaps")
    with pytest.raises(ValueError, match=r"^each measure is named once, got gap,gap"):
        measures_of("gap,gap")


def append(ledger: Ledger, version: int, dropped: str | None = None) -> None:
    ledger.append(
        version=version, worker=0, incarnation=0, seq=0, clock=1, read_version=0, staleness=0,
        start=0.0, end=1.0, samples=1, loss=0.0, grad_norm=0.0, dropped=dropped,
    )  # fmt: skip


def test_a_ledger_keeps_measures_of_applied_rows_through_a_file_and_a_resume(
    tmp_path: Path,
) -> None:
    ledger = Ledger()
    for version, dropped in ((1, None), (1, "stale"), (2, None)):
        append(ledger, version, dropped)
    ledger.measure({"gap": np.array([1.0, 2.0])})
    ledger.save(tmp_path / "updates.npz")

    resumed = Ledger.load(tmp_path / "updates.npz")
    append(resumed, 3)
    resumed.measure({"gap": np.array([3.0]), "step": np.array([4.0])})

    columns = resumed.columns()
    assert np.array_equal(columns["gap"], [1.0, math.nan, 2.0, 3.0], equal_nan=True)
    assert np.array_equal(columns["step"], [math.nan] * 3 + [4.0], equal_nan=True)
    assert summary(columns) == {
        "gap": {"mean": 2.0, "max": 3.0},
        "step": {"mean": 4.0, "max": 4.0},
    }


def test_measures_of_a_run_that_measured_nothing_yet_have_no_value() -> None:
    assert summary({"gap": np.array([math.nan])}) == {"gap": {"mean": None, "max": None}}
