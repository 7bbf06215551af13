"""BFGS against its closed forms, conjugate gradients and scipy."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from torch import Tensor

from paramserver.errors import CurvatureError, LayoutError
from paramserver.optimizers.bfgs import BFGS, updated
from paramserver.optimizers.conjugate_gradient import ConjugateGradient
from paramserver.rounds import minimise
from tests.support.programs import (
    Answers,
    Spec,
    assert_resumes_exactly,
    assert_state_changes_only_between_rounds,
    built,
    quadratic,
    rosenbrock,
)


def start(n: int) -> Tensor:
    return torch.tensor([-1.2, 1.0] * (n // 2), dtype=torch.float64)


def path_of(spec: Spec, x: Tensor, answers: Answers, rounds: int) -> list[Tensor]:
    path: list[Tensor] = []
    minimise(
        built(spec, x),
        x,
        answers,
        max_rounds=rounds,
        on_round=lambda runner: path.append(runner.x),
    )
    return path


def test_the_update_is_the_published_formula() -> None:
    h, s = quadratic([1.0, 2.0, 3.0, 4.0])
    y = torch.linalg.solve(h, s) + 0.1 * s
    sy = float(s @ y)
    i = torch.eye(4, dtype=torch.float64)
    left = i - torch.outer(s, y) / sy

    after = updated(h, s, y, sy)

    torch.testing.assert_close(after, left @ h @ left.T + torch.outer(s, s) / sy)
    torch.testing.assert_close(after @ y, s)  # the secant equation
    assert torch.equal(after, after.T)


@pytest.mark.parametrize("scale", [True, False])
def test_exact_searches_learn_the_inverse_hessian_of_a_quadratic(scale: bool) -> None:
    a, b = quadratic([1.0, 2.0, 3.0, 5.0, 8.0])
    x = torch.zeros(5, dtype=torch.float64)
    program = built(BFGS(scale=scale, c1=1e-10, c2=1e-9, tolerance=0, max_evaluations=40), x)

    runner = minimise(program, x, Answers(lambda x: 0.5 * x @ a @ x - b @ x), max_rounds=5)

    torch.testing.assert_close(runner.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(program.memory["inverse"], a.inverse(), rtol=1e-4, atol=1e-5)


def test_with_exact_searches_from_the_identity_it_walks_as_conjugate_gradients_do() -> None:
    a, b = quadratic([1.0, 2.0, 3.0, 5.0, 8.0, 9.0])
    x, answers = torch.zeros(6, dtype=torch.float64), Answers(lambda x: 0.5 * x @ a @ x - b @ x)

    ours = path_of(BFGS(scale=False, c1=1e-10, c2=1e-9, max_evaluations=40), x, answers, 6)
    theirs = path_of(ConjugateGradient(c1=1e-10, c2=1e-9, max_evaluations=40), x, answers, 6)

    assert len(ours) == len(theirs) == 6
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [2, 10])
def test_it_finds_rosenbrocks_minimum_as_scipy_does(n: int) -> None:
    x, answers = torch.zeros(n, dtype=torch.float64), Answers(rosenbrock)
    theirs = scipy.optimize.minimize(
        scipy.optimize.rosen, x.numpy(), jac=scipy.optimize.rosen_der, method="BFGS"
    )

    runner = minimise(built(BFGS(), x), x, answers, max_rounds=1000)

    assert runner.stop is not None
    assert runner.stop.startswith("the gradient's norm is ")
    torch.testing.assert_close(runner.x, torch.from_numpy(theirs.x), rtol=0, atol=1e-4)
    torch.testing.assert_close(runner.x, torch.ones(n).double(), rtol=0, atol=1e-5)
    assert answers.count["gradient"] <= 1.3 * theirs.njev


def test_the_first_pair_gives_the_inverse_its_size() -> None:
    x = torch.ones(3, dtype=torch.float64)
    program = built(BFGS(tolerance=0), x)

    minimise(program, x, Answers(lambda x: 2e6 * (x * x).sum()), max_rounds=1)

    inverse = program.memory["inverse"]
    torch.testing.assert_close(inverse, torch.eye(3).double() / 4e6, rtol=0, atol=1e-15)


def test_pairs_of_too_little_curvature_are_left_out() -> None:
    # the first pair is s = (1, 1) and y = (1, 10), times a number: its cosine is 0.774
    x = torch.tensor([10.0, 1.0], dtype=torch.float64)
    kept, left = built(BFGS(min_curvature=0.77), x), built(BFGS(min_curvature=0.78), x)

    for program in (kept, left):
        minimise(program, x, Answers(lambda x: x[0] ** 2 + 10 * x[1] ** 2), max_rounds=1)

    assert "inverse" in kept.memory
    assert set(left.memory) == {"loss", "gradient", "square"}


def test_a_direction_uphill_is_passed_over_and_the_inverse_forgotten() -> None:
    x = torch.tensor([3.0, -2.0], dtype=torch.float64)
    program = built(BFGS(min_curvature=0.999999), x)
    program.memory["inverse"] = -torch.eye(2, dtype=torch.float64)

    runner = minimise(program, x, Answers(lambda x: x[0] ** 4 + 30 * x[1] ** 2), max_rounds=1)

    assert runner.stop is None
    assert "inverse" not in program.memory
    gradient = torch.tensor([108.0, -120.0], dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(x - runner.x, gradient, dim=0)
    assert float(cosine) == pytest.approx(1)


def test_the_state_changes_only_between_rounds() -> None:
    assert_state_changes_only_between_rounds(BFGS(), start(6), Answers(rosenbrock), rounds=15)


@pytest.mark.parametrize("cut_at", [0, 1, 7])
def test_a_saved_run_goes_on_bit_for_bit(cut_at: int) -> None:
    assert_resumes_exactly(BFGS(), start(6), Answers(rosenbrock), rounds=20, cut_at=cut_at)


def test_on_all_samples_no_point_is_evaluated_twice() -> None:
    x, answers = start(4), Answers(rosenbrock)

    minimise(built(BFGS(), x), x, answers, max_rounds=10)

    points = {tuple(ask.at.tolist()) for _, ask in answers.asked}
    assert len(points) == len(answers.asked)


def test_more_parameters_than_its_limit_are_refused_when_it_is_built() -> None:
    assert built(BFGS(), torch.zeros(5000)).whole

    with pytest.raises(LayoutError, match=r"^bfgs holds a 5,001 x 5,001 matrix.*: use lbfgs$"):
        built(BFGS(), torch.zeros(5001))
    built(BFGS(limit=6000), torch.zeros(5001))


def test_a_function_without_a_lowest_point_ends_with_a_reason() -> None:
    x = torch.zeros(1, dtype=torch.float64)

    runner = minimise(built(BFGS(), x), x, Answers(lambda x: -torch.exp(-x).sum()), max_rounds=500)

    assert runner.stop is not None
    assert runner.stop.startswith("along steepest descent, no lower loss in ")
    assert torch.isfinite(runner.x).all()


def test_a_start_that_is_not_finite_is_an_error() -> None:
    x = torch.ones(2, dtype=torch.float64)

    with pytest.raises(CurvatureError, match=r"^the loss is inf"):
        minimise(built(BFGS(), x), x, Answers(lambda x: (x / 0).sum()), max_rounds=1)


def test_in_float32_it_ends_with_a_reason() -> None:
    x = torch.zeros(6)

    runner = minimise(
        built(BFGS(tolerance=0), x), x, Answers(lambda x: 1 + rosenbrock(x)), max_rounds=3000
    )

    assert runner.stop is not None
    assert runner.loss < 1.001


def test_its_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^min_curvature must be 0 or more and below 1"):
        BFGS(min_curvature=1.0)
    with pytest.raises(ValueError, match=r"^limit must be 1 parameter or more, got 0"):
        BFGS(limit=0)
