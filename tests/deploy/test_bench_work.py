from __future__ import annotations

import pytest

from deploy.bench.pushpull_peers import layer_shapes
from deploy.bench.train import ASYNC, missed
from deploy.bench.train_peers import ALONE
from deploy.bench.work import Meter


@pytest.mark.parametrize("numel", [64, 1024, 2**18, 2**25])
def test_layers_hold_every_float_once(numel: int) -> None:
    shapes = layer_shapes(numel)

    assert sum(n for (n,) in shapes) == numel
    assert all(n > 0 for (n,) in shapes)


def test_a_meter_counts_only_after_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr("deploy.bench.work.time.perf_counter", lambda: next(times))
    meter = Meter(warm_s=2.0, measure_s=2.0)

    going = [meter.count(2) for _ in range(5)]

    assert going == [True, True, True, True, False]
    assert meter.rate() == pytest.approx(2.0)  # 4 gradients from 12 to 14 s


def test_a_missed_aim_is_told() -> None:
    assert not missed("ConvNet, batch 128", {ASYNC: [170.0], ALONE: [100.0]})
    (line,) = missed("MLP 784-4096-4096-10, batch 8", {ASYNC: [120.0], ALONE: [100.0]})
    assert line == "ours, async is 1.20 times one process; the aim is 1.3"
