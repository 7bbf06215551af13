from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from async_sgd.damping import (
    DAMPINGS,
    LEAST,
    DynSGD,
    ExponentialDamping,
    HingeDamping,
    InverseDamping,
    KoloskovaDamping,
    MishchenkoDamping,
    NoDamping,
    PolynomialDamping,
)
from paramserver.errors import PluginError
from paramserver.rules import Damping

STALENESS = st.integers(0, 10**9)
WORKERS = st.integers(1, 10**5)

EXAMPLES: Mapping[str, st.SearchStrategy[Damping]] = {
    "none": st.builds(NoDamping),
    "inverse": st.builds(InverseDamping),
    "dynsgd": st.builds(DynSGD),
    "polynomial": st.builds(PolynomialDamping, power=st.floats(0, 100)),
    "hinge": st.builds(HingeDamping, slope=st.floats(0, 1e300), start=st.integers(0, 10**6)),
    "exponential": st.builds(ExponentialDamping, rate=st.floats(0, 1, exclude_min=True)),
    "mishchenko": st.builds(MishchenkoDamping),
    "koloskova": st.builds(KoloskovaDamping, limit=st.none() | st.integers(1, 10**6)),
}

every_damping = pytest.mark.parametrize("name", EXAMPLES)


def test_every_registered_damping_is_held_to_the_contract() -> None:
    assert EXAMPLES.keys() == {entry.name for entry in DAMPINGS}


@every_damping
@settings(deadline=None)
@given(data=st.data(), workers=WORKERS, staleness=STALENESS, later=STALENESS)
def test_a_fresh_gradient_is_not_damped_and_an_older_one_never_less(
    name: str, data: st.DataObject, workers: int, staleness: int, later: int
) -> None:
    damping = data.draw(EXAMPLES[name])
    staleness, later = sorted((staleness, later))

    fresh, older, oldest = (damping.scale(t, workers) for t in (0, staleness, later))

    assert fresh == 1
    rounding = 1 + 1e-15  # a power is right to the last place, not beyond
    assert 0 < oldest <= older * rounding <= rounding


@every_damping
@settings(deadline=None)
@given(data=st.data())
def test_a_damping_is_rebuilt_from_what_a_record_stores(name: str, data: st.DataObject) -> None:
    damping = data.draw(EXAMPLES[name])

    assert DAMPINGS.build(DAMPINGS.describe(damping)) == damping


@pytest.mark.parametrize("workers", [1, 4, 100])
@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("polynomial:power=0", "none"),
        ("polynomial:power=1", "dynsgd"),
        ("hinge:slope=0", "none"),
        ("hinge:slope=1,start=0", "dynsgd"),
        ("exponential:rate=1", "none"),
        ("koloskova:limit=1", "inverse"),
    ],
)
def test_some_dampings_have_others_as_special_cases(text: str, same: str, workers: int) -> None:
    one, other = DAMPINGS.parse(text), DAMPINGS.parse(same)

    for staleness in range(300):
        assert one.scale(staleness, workers) == pytest.approx(
            other.scale(staleness, workers), rel=1e-15
        )


def test_mishchenko_damps_from_the_number_of_workers_on() -> None:
    damping = MishchenkoDamping()

    assert [damping.scale(t, 4) for t in (3, 4, 7)] == [1, 4 / 5, 1 / 2]
    assert [damping.scale(t, 1) for t in (0, 1, 2)] == [DynSGD().scale(t, 1) for t in (0, 1, 2)]


@pytest.mark.parametrize("damping", [KoloskovaDamping(limit=4), KoloskovaDamping()])
def test_koloskova_keeps_step_times_staleness_above_its_limit(damping: Damping) -> None:
    assert [damping.scale(t, 4) for t in (3, 4, 5, 8)] == [1, 1, 4 / 5, 1 / 2]


def test_hinge_damps_above_its_start() -> None:
    damping = DAMPINGS.parse("hinge")

    assert [damping.scale(t, 8) for t in (4, 5, 6)] == [1, 1 / 11, 1 / 21]


def test_a_factor_that_falls_fast_stays_above_0_in_float32() -> None:
    assert ExponentialDamping(rate=0.5).scale(10_000, 8) == LEAST
    assert PolynomialDamping(power=100).scale(10_000, 8) == LEAST
    assert HingeDamping(slope=1e300).scale(10_000, 8) == LEAST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polynomial:power=-1", "power must be 0 or more, got -1"),
        ("polynomial:power=nan", "power must be 0 or more, got nan"),
        ("hinge:slope=-1", "slope must be 0 or more and finite, got -1"),
        ("hinge:slope=inf", "slope must be 0 or more and finite, got inf"),
        ("hinge:start=-1", "start must be 0 updates or more, got -1"),
        ("exponential:rate=0", "rate must be above 0 and at most 1, got 0"),
        ("exponential:rate=1.5", "rate must be above 0 and at most 1, got 1.5"),
        ("koloskova:limit=0", "limit must be 1 update or more, got 0"),
    ],
)
def test_a_bad_setting_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        DAMPINGS.parse(text)


def mean_factor(damping: Damping, workers: int) -> float:
    """Sum over the geometric staleness of exponential compute times, with all but 1e-17 of it."""
    q = 1 / workers
    return math.fsum(
        q * (1 - q) ** staleness * damping.scale(staleness, workers)
        for staleness in range(40 * workers)
    )


def root_polylog(z: float) -> float:
    """Return Li_(1/2)(z), by its integral."""
    integral = integrate.quad(lambda u: 2 * z / (math.exp(u * u) - z), 0, 20)[0]
    return float(integral) / math.sqrt(math.pi)


P = 7 / 8
TAIL = math.log(8) - sum(P**k / k for k in range(1, 9))
"""Sum of p^k / k over k above 8, as all of it is ln 8."""


@pytest.mark.parametrize(
    ("damping", "mean"),
    [
        (NoDamping(), 1),
        (DynSGD(), math.log(8) / 7),
        (InverseDamping(), (1 + math.log(8)) / 8),
        (PolynomialDamping(power=0.5), root_polylog(P) / 7),
        (PolynomialDamping(power=2), special.spence(1 - P) / 7),
        (HingeDamping(slope=1, start=0), math.log(8) / 7),
        (HingeDamping(), 1 - P**4 + P**4 / 8 * special.hyp2f1(1, 0.1, 1.1, P)),
        (ExponentialDamping(rate=0.9), 1 / (8 - 0.9 * 7)),
        (MishchenkoDamping(), 1 - P**8 + 8 / 7 * TAIL),
        (KoloskovaDamping(), 1 - P**9 + TAIL),
    ],
)
def test_the_mean_factor_under_exponential_times_is_the_known_one(
    damping: Damping, mean: float
) -> None:
    assert mean_factor(damping, workers=8) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("damping", [MishchenkoDamping(), KoloskovaDamping()])
def test_damping_by_the_number_of_workers_leaves_most_of_the_step(damping: Damping) -> None:
    limit = 1 - 1 / math.e + special.exp1(1)

    assert mean_factor(damping, workers=2000) == pytest.approx(limit, abs=1e-3)
    assert limit == pytest.approx(0.8515, abs=1e-4)
