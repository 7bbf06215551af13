"""Line searches on functions whose minimum along the line is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.optimizers.line_search import (
    Found,
    NotFound,
    Point,
    Search,
    backtracking,
    begin,
    check_search,
    check_wolfe,
    evaluate,
    remember,
    stop_at,
    strong_wolfe,
)
from paramserver.rounds import Ask, Sample, Sum
from tests.support.programs import Answers, rosenbrock

ALL = Sample("gradient")


def drive(going: Any, answer: Answers) -> Any:
    """Run a generator to its end in this process."""
    reply: Any = None
    while True:
        try:
            request = going.send(reply)
        except StopIteration as ended:
            return ended.value
        reply = request.values if isinstance(request, Sum) else answer(request, 0)


def on_line(
    phi: Callable[[Tensor], Tensor],
    searching: Callable[..., Search] = strong_wolfe,
    *,
    at: float = 0.0,
    towards: float = 1.0,
    first: float = 1.0,
    **keys: Any,
) -> tuple[Found | NotFound, Point, Answers]:
    """Search a function of one number."""
    answers = Answers(lambda x: phi(x[0]))
    x = torch.tensor([at], dtype=torch.float64)
    start = drive(evaluate(x, ALL), answers)
    d = torch.tensor([towards], dtype=torch.float64)
    slope = float(start.gradient @ d)
    found = drive(searching(start, d, slope, on=ALL, first=first, **keys), answers)
    return found, start, answers


def _third(t: Tensor) -> Tensor:
    b, waves = 0.01, 39
    kink = torch.where(
        t <= 1 - b, 1 - t, torch.where(t >= 1 + b, t - 1, (t - 1) ** 2 / (2 * b) + b / 2)
    )
    return kink + 2 * (1 - b) / (waves * math.pi) * torch.sin(waves * math.pi / 2 * t)


# Moré & Thuente, "Line search algorithms with guaranteed sufficient decrease", ACM TOMS 20(3),
# 1994: test functions 1, 2 and 3 with their conditions, and first steps over six orders.
MORE_THUENTE: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "1": (lambda t: -t / (t * t + 2), 1e-3, 0.1),
    "2": (lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4, 0.09, 0.1),
    "3": (_third, 0.1, 0.1),
}


@pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
@pytest.mark.parametrize("name", MORE_THUENTE)
def test_the_step_meets_the_strong_wolfe_conditions(name: str, first: float) -> None:
    phi, c1, c2 = MORE_THUENTE[name]

    found, start, answers = on_line(phi, first=first, c1=c1, c2=c2, max_evaluations=30)

    assert isinstance(found, Found)
    assert found.meets_conditions
    slope = float(start.gradient[0])
    assert found.point.loss <= start.loss + c1 * found.step * slope
    assert abs(float(found.point.gradient[0])) <= c2 * abs(slope)
    assert found.slope == float(found.point.gradient[0])
    assert float(found.point.x[0]) == found.step
    assert answers.count["gradient"] <= 20


@pytest.mark.parametrize("first", [1e-2, 0.3, 50.0])
def test_a_small_c2_makes_the_search_exact_on_a_parabola(first: float) -> None:
    found, _, answers = on_line(lambda t: 3 * (t - 2) ** 2, first=first, c1=1e-10, c2=1e-9)

    assert isinstance(found, Found)
    assert found.step == pytest.approx(2, rel=1e-9)
    assert answers.count["gradient"] <= 5  # the start, the first step, and the cubic's minimum


@pytest.mark.parametrize("searching", [strong_wolfe, backtracking])
@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_was_too_long(searching: Any, outside: float) -> None:
    def barrier(t: Tensor) -> Tensor:
        return t * t - 1.8 * t if float(t.detach()) < 1 else t * outside

    found, _, _ = on_line(barrier, searching, first=1e4)

    assert isinstance(found, Found)
    assert found.meets_conditions
    assert 0 < found.step < 1


def test_a_gradient_that_is_not_finite_was_too_long_too() -> None:
    # the square root has a finite value at 1 and an infinite slope there
    found, _, _ = on_line(lambda t: -torch.sqrt((1 - t).clamp(min=0)) - 2 * t, first=1.0)

    assert isinstance(found, Found)
    assert math.isfinite(found.point.square)
    assert found.step < 1


@pytest.mark.parametrize("searching", [strong_wolfe, backtracking])
def test_nothing_lower_is_a_clear_outcome(searching: Any) -> None:
    # a slope that lies: the loss rises wherever one goes
    def lying(t: Tensor) -> Tensor:
        return t.detach().abs() - (t - t.detach())

    found, _, answers = on_line(lying, searching, max_evaluations=12)

    assert isinstance(found, NotFound)
    assert found.evaluations == 12 == answers.count["gradient"] - 1
    assert 0 < found.shortest < 1e-3
    assert str(found).startswith("no lower loss in 12 steps down to ")


def test_when_evaluations_run_out_the_lowest_point_is_returned() -> None:
    found, start, _ = on_line(lambda t: torch.exp(-t), first=1e-3, c2=1e-3, max_evaluations=2)

    assert isinstance(found, Found)
    assert not found.meets_conditions
    assert found.point.loss < start.loss


def test_an_equal_loss_counts_only_with_a_shorter_gradient() -> None:
    def flat(t: Tensor, slope_after: float) -> Tensor:
        return 1 + (t - t.detach()) * (-1.0 if float(t.detach()) == 0 else slope_after)

    found, _, _ = on_line(lambda t: flat(t, 0.5), first=1e-20)
    not_found, _, _ = on_line(lambda t: flat(t, 1.0), first=1e-20)

    assert isinstance(found, Found)
    assert isinstance(not_found, NotFound)


def test_backtracking_shortens_by_the_parabola() -> None:
    found, _, answers = on_line(lambda t: (t - 1) ** 2, backtracking, first=4.0)

    assert isinstance(found, Found)
    assert found.step == pytest.approx(1)
    assert answers.count["gradient"] == 3


def test_all_trials_are_on_the_sample_of_the_start() -> None:
    answers = Answers(rosenbrock)
    sample = Sample("gradient", 7)
    start = drive(evaluate(torch.zeros(2, dtype=torch.float64), sample), answers)

    drive(
        strong_wolfe(start, -start.gradient, -start.square, on=sample, first=1.0),
        answers,
    )

    assert {ask.on for _, ask in answers.asked} == {sample}
    assert len(answers.asked) > 2


def test_a_round_on_all_samples_begins_with_what_the_last_one_kept() -> None:
    answers, memory = Answers(rosenbrock), dict[str, Any]()
    x = torch.zeros(2, dtype=torch.float64)
    point = drive(begin(x, ALL, memory), answers)
    remember(point, ALL, memory)

    again = drive(begin(x, ALL, memory), answers)

    assert answers.count["gradient"] == 1
    assert again.loss == point.loss == 1.0
    assert torch.equal(again.gradient, point.gradient)


def test_a_round_on_a_new_sample_keeps_nothing() -> None:
    answers, memory, sample = Answers(rosenbrock), dict[str, Any](), Sample("gradient", 3)
    x = torch.zeros(2, dtype=torch.float64)

    remember(drive(begin(x, sample, memory), answers), sample, memory)

    assert memory == {}


def test_a_trial_makes_one_request_and_one_sum() -> None:
    answers = Answers(lambda x: (x * x).sum())
    x = torch.ones(3, dtype=torch.float64)
    start = drive(evaluate(x, ALL), answers)
    going = strong_wolfe(start, -start.gradient, -start.square, on=ALL, first=0.5)

    ask = going.send(None)
    assert isinstance(ask, Ask)
    total = going.send(answers(ask, 0))

    assert isinstance(total, Sum)
    assert total.values.shape == (2,)


def test_a_run_stops_at_its_tolerance_and_never_for_a_sample_without_one() -> None:
    point = Point(torch.zeros(1), 1.0, torch.zeros(1), square=0.0)

    assert stop_at(point, 1e-5, Sample("gradient", 8)) == "the gradient's norm is 0.0e+00"
    assert stop_at(point, 0.0, ALL) == "the gradient's norm is 0.0e+00"
    assert stop_at(point, 0.0, Sample("gradient", 8)) is None


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"^lr must be above 0"):
        check_search(0.0, None, 0.0)
    with pytest.raises(ValueError, match=r"^batch must be 1 sample or more"):
        check_search(1.0, 0, 0.0)
    with pytest.raises(ValueError, match=r"^tolerance must be 0 or more"):
        check_search(1.0, None, -1.0)
    with pytest.raises(ValueError, match=r"^c1 and c2 must be in order"):
        check_wolfe(0.5, 0.4, 10)
    with pytest.raises(ValueError, match=r"^max_evaluations must be 1 or more"):
        check_wolfe(0.1, 0.4, 0)
