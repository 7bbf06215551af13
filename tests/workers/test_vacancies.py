"""What is said of workers that lost their node and have no other place yet."""

from __future__ import annotations

import pytest

from paramserver.errors import ResourceError
from workers.vacancies import Vacancies

LACK = "1 of 4 workers: it needs 1 CPU"


def test_what_is_missing_is_told_once_after_ray_had_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vacancies = Vacancies(lambda: LACK, limit_s=60.0)
    vacancies.open(now=100.0)

    for now in (101.0, 103.0, 104.0, 1000.0):
        vacancies.look(3, now)

    assert caplog.messages == [f"waiting for {LACK}; the run goes on with those it has"]


def test_a_run_with_no_worker_and_no_place_ends_by_name() -> None:
    vacancies = Vacancies(lambda: LACK, limit_s=60.0)
    vacancies.open(now=100.0)
    vacancies.look(0, 159.0)

    with pytest.raises(ResourceError, match=f"^no worker is left.* 60 s later for {LACK}: add"):
        vacancies.look(0, 161.0)


def test_a_node_that_ray_learns_late_of_is_told_and_a_place_ends_the_looking(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found: list[str | None] = [None, LACK, None, "never asked for"]
    vacancies = Vacancies(lambda: found.pop(0), limit_s=300.0)
    vacancies.open(now=100.0)

    for now in (103.0, 120.0, 161.0, 500.0):
        vacancies.look(2, now)

    assert found == ["never asked for"]
    assert caplog.messages == [f"waiting for {LACK}; the run goes on with those it has"]
