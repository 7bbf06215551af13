from __future__ import annotations

import math

import pytest

from async_sgd.damping import DAMPINGS, DynSGD, InverseDamping, NoDamping
from paramserver.rules import Damping

DAMPING_NAMES = [entry.name for entry in DAMPINGS]


@pytest.mark.parametrize("name", DAMPING_NAMES)
def test_a_fresh_gradient_is_not_damped_and_an_older_one_never_less(name: str) -> None:
    damping = DAMPINGS.parse(name)

    scales = [damping.scale(staleness) for staleness in range(1000)]

    assert scales[0] == 1
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] > 0


@pytest.mark.parametrize("name", DAMPING_NAMES)
def test_a_damping_is_rebuilt_from_what_a_record_stores(name: str) -> None:
    damping = DAMPINGS.parse(name)

    assert DAMPINGS.build(DAMPINGS.describe(damping)) == damping


@pytest.mark.parametrize(
    ("damping", "mean"),
    [(NoDamping(), 1), (DynSGD(), math.log(8) / 7), (InverseDamping(), (1 + math.log(8)) / 8)],
)
def test_the_mean_factor_under_exponential_times_is_the_known_one(
    damping: Damping, mean: float
) -> None:
    geometric = [(7 / 8) ** staleness / 8 for staleness in range(1000)]

    measured = sum(p * damping.scale(staleness) for staleness, p in enumerate(geometric))

    assert measured == pytest.approx(mean, rel=1e-9)
