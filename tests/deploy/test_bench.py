from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.bench import allreduce, ours, pushpull
from deploy.bench.figures import Report
from deploy.bench.processes import ray_for_bench
from deploy.bench.work import tasks

pytestmark = [pytest.mark.system, pytest.mark.timeout(90)]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with ray_for_bench(quick=True):
        yield


@pytest.mark.long
def test_push_and_pull_is_measured_through_a_real_shard() -> None:
    report = Report("pushpull", json=True, quick=True)

    rounds = pushpull.measure(report, 1024, 2, 1, peers=False)

    assert not report.ours_failed
    assert {name for name, values in rounds.items() if len(values) == 1} == {
        pushpull.COPIED,
        pushpull.IN_PLACE,
        pushpull.LIMIT,
    }


def test_asynchronous_training_is_measured_through_real_workers() -> None:
    task = next(iter(tasks(mnist=False, quick=True).values()))

    assert ours.async_rate(task, 1, warm_s=0.1, measure_s=0.4) > 0


@pytest.mark.long
def test_a_synchronous_step_is_measured() -> None:
    report = Report("allreduce", json=True, quick=True)

    rounds = allreduce.measure(report, 1024, 2, 1, peers=False)

    assert rounds[allreduce.OURS][0] > 0
