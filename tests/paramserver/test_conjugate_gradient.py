"""Conjugate gradients against what is known of them, scipy and slices."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch
from torch import Tensor

from paramserver.errors import CurvatureError
from paramserver.optimizers.conjugate_gradient import (
    ConjugateGradient,
    End,
    Solution,
    cg_solve,
    conjugate_gradient,
)
from paramserver.rounds import Ask, Request, Round, RoundProgram, Sample, Step, minimise
from tests.support.programs import (
    Answers,
    Copies,
    assert_resumes_exactly,
    assert_state_changes_only_between_rounds,
    built,
    loss_and_gradient,
    minimise_in_slices,
    quadratic,
    rosenbrock,
)

EXACT = ConjugateGradient(c1=1e-10, c2=1e-9, tolerance=1e-7, max_evaluations=40)


def start(n: int) -> Tensor:
    return torch.tensor([-1.2, 1.0] * (n // 2), dtype=torch.float64)


# ---- linear


@pytest.mark.parametrize("distinct", [1, 2, 4])
def test_as_many_iterations_as_distinct_eigenvalues_solve_a_system(distinct: int) -> None:
    a, b = quadratic([1.0 + 3 * (i % distinct) for i in range(12)])

    solution = conjugate_gradient(a, b, tolerance=1e-10)

    assert solution.iterations == distinct
    assert solution.end is End.CONVERGED
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)


def test_directions_are_conjugate_and_residuals_orthogonal() -> None:
    a, b = quadratic([1.0, 2.0, 3.5, 5.0, 8.0, 13.0])
    directions: list[Tensor] = []

    def multiply(v: Tensor) -> Tensor:
        directions.append(v.clone())
        return a @ v

    residuals = [conjugate_gradient(a, b, tolerance=0, max_iterations=k).residual for k in range(6)]
    conjugate_gradient(multiply, b, tolerance=0, max_iterations=6)

    p, r = torch.stack(directions), torch.stack(residuals)
    for gram in (p @ a @ p.T, r @ r.T):
        size = gram.diagonal().sqrt()
        torch.testing.assert_close(
            gram / size / size[:, None], torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_the_solver_agrees_with_scipy_after_each_iteration() -> None:
    a, b = quadratic([0.1 * 1.7**i for i in range(10)])
    for k in (1, 3, 7):
        expected, _ = scipy.sparse.linalg.cg(a.numpy(), b.numpy(), rtol=0, maxiter=k)

        x = conjugate_gradient(a, b, tolerance=0, max_iterations=k).x

        torch.testing.assert_close(x, torch.from_numpy(expected), rtol=1e-9, atol=1e-11)


def test_it_starts_where_it_is_told_and_reports_an_exhausted_budget() -> None:
    a, b = quadratic([1.0, 2.0, 3.0])
    exact = torch.linalg.solve(a, b)

    there = conjugate_gradient(a, b, x0=exact, tolerance=1e-12)
    short = conjugate_gradient(a, b, tolerance=1e-12, max_iterations=1)

    assert there.iterations == 0
    assert there.end is End.CONVERGED
    assert short.end is End.MAX_ITERATIONS
    assert short.iterations == 1
    assert short.residual_norm == pytest.approx(float((b - a @ short.x).norm()))


def test_a_zero_right_hand_side_has_a_zero_solution() -> None:
    solution = conjugate_gradient(torch.eye(3), torch.zeros(3))

    assert solution.iterations == 0
    assert torch.equal(solution.x, torch.zeros(3))


def test_negative_curvature_ends_it_with_a_direction_downhill() -> None:
    a, b = quadratic([4.0, 2.0, 1.0, -0.5])

    solution = conjugate_gradient(a, b)

    assert solution.end is End.NEGATIVE_CURVATURE
    assert solution.direction is not None
    assert solution.curvature == pytest.approx(float(solution.direction @ a @ solution.direction))
    assert solution.curvature < 0
    assert float(solution.direction @ b) > 0


def test_a_singular_matrix_is_no_endless_loop() -> None:
    solution = conjugate_gradient(torch.zeros(3, 3), torch.ones(3))

    assert solution.end is End.NEGATIVE_CURVATURE
    assert solution.curvature == 0


def test_a_product_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(CurvatureError, match=r"^the curvature pᵀA p in conjugate gradients is nan"):
        conjugate_gradient(lambda v: v * float("nan"), torch.ones(2))


class _Newton(RoundProgram):
    """One Newton step with `cg_solve` on Hessian products."""

    solution: Solution

    def round(self, x: Tensor) -> Round:
        answer = yield Ask("gradient", x, Sample("gradient"))

        def product(v: Tensor) -> Generator[Request, Any, Tensor]:
            return (yield Ask("hvp", x, Sample("curvature"), v)).vector

        self.solution = yield from cg_solve(product, -answer.vector, tolerance=1e-12)
        return Step(x + self.solution.x, answer.loss)


class _NewtonSpec:
    def build(self, params: Any) -> _Newton:
        return _Newton(params, {})


def test_the_solver_in_slices_solves_with_products_that_are_asked_for() -> None:
    a, b = quadratic([1.0, 2.0, 2.0, 5.0, 5.0, 9.0, 9.0])
    answers = Answers(lambda x: 0.5 * x @ a @ x - b @ x)
    x = torch.zeros(7, dtype=torch.float64)

    copies = minimise_in_slices(_NewtonSpec(), x, answers, sizes=[3, 1, 3], max_rounds=1)

    torch.testing.assert_close(copies.x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    assert answers.count["hvp"] == 4


# ---- nonlinear


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_exact_searches_minimise_a_quadratic_in_as_many_rounds_as_distinct_eigenvalues(
    distinct: int,
) -> None:
    a, b = quadratic([1.0 + 2 * (i % distinct) for i in range(10)])
    x = torch.zeros(10, dtype=torch.float64)

    runner = minimise(built(EXACT, x), x, Answers(lambda x: 0.5 * x @ a @ x - b @ x), max_rounds=20)

    assert runner.rounds == distinct
    assert runner.stop is not None
    assert runner.stop.startswith("the gradient's norm is ")
    torch.testing.assert_close(runner.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-6)


def test_its_iterates_on_a_quadratic_are_those_of_the_linear_method() -> None:
    a, b = quadratic([1.0, 2.0, 3.0, 5.0, 9.0])
    x = torch.zeros(5, dtype=torch.float64)
    path: list[Tensor] = []

    minimise(
        built(EXACT, x),
        x,
        Answers(lambda x: 0.5 * x @ a @ x - b @ x),
        max_rounds=4,
        on_round=lambda runner: path.append(runner.x),
    )

    for k, point in enumerate(path, start=1):
        expected = conjugate_gradient(a, b, tolerance=0, max_iterations=k).x
        torch.testing.assert_close(point, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [2, 10])
def test_it_finds_rosenbrocks_minimum_as_scipy_does(n: int) -> None:
    x, answers = torch.zeros(n, dtype=torch.float64), Answers(rosenbrock)
    theirs = scipy.optimize.minimize(
        scipy.optimize.rosen, x.numpy(), jac=scipy.optimize.rosen_der, method="CG"
    )

    runner = minimise(built(ConjugateGradient(), x), x, answers, max_rounds=1000)

    assert runner.stop is not None
    torch.testing.assert_close(runner.x, torch.ones(n).double(), rtol=0, atol=1e-4)
    assert answers.count["gradient"] <= 2 * theirs.njev


def test_slices_reach_the_same_gradient_norm() -> None:
    x = start(12)
    whole = minimise(built(ConjugateGradient(), x), x, Answers(rosenbrock), max_rounds=2000)

    copies = minimise_in_slices(
        ConjugateGradient(), x, Answers(rosenbrock), sizes=[5, 1, 6], max_rounds=2000
    )

    for point, stop in ((whole.x, whole.stop), (copies.x, copies.stop)):
        assert stop is not None
        assert stop.startswith("the gradient's norm")
        _, gradient = loss_and_gradient(rosenbrock, point)
        assert float(gradient.norm()) <= 1.01e-5


def test_it_restarts_after_the_rounds_it_is_told_or_as_many_as_parameters() -> None:
    x = start(6)
    for spec, every in ((ConjugateGradient(restart=3), 3), (ConjugateGradient(), 6)):
        copies = minimise_in_slices(spec, x, Answers(rosenbrock), sizes=[2, 4], max_rounds=0)
        since = []
        for _ in range(2 * every):
            copies.round(Answers(rosenbrock))
            since.append(copies.runners[0].program.memory["since"])

        assert max(since) < every
        assert 0 in since


def test_a_restart_forgets_the_last_direction() -> None:
    x, points = start(4), [start(4)]

    minimise(
        built(ConjugateGradient(restart=1), x),
        x,
        Answers(rosenbrock),
        max_rounds=4,
        on_round=lambda runner: points.append(runner.x),
    )

    for here, there in itertools.pairwise(points):  # each line runs down the gradient
        _, gradient = loss_and_gradient(rosenbrock, here)
        cosine = torch.nn.functional.cosine_similarity(here - there, gradient, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-12)


def test_a_direction_not_clearly_downhill_is_passed_over() -> None:
    x = start(4)
    program = built(ConjugateGradient(), x)
    _, gradient = loss_and_gradient(rosenbrock, x)
    program.memory.update(direction=gradient, beta=0.995, since=1, fall=-1.0)

    minimise(program, x, Answers(rosenbrock), max_rounds=1)

    assert torch.equal(program.memory["direction"], -gradient)


def test_the_state_changes_only_between_rounds() -> None:
    assert_state_changes_only_between_rounds(
        ConjugateGradient(), start(6), Answers(rosenbrock), rounds=15
    )


@pytest.mark.parametrize("cut_at", [0, 1, 7])
def test_a_saved_run_goes_on_bit_for_bit(cut_at: int) -> None:
    assert_resumes_exactly(
        ConjugateGradient(), start(6), Answers(rosenbrock), rounds=20, cut_at=cut_at
    )


def test_on_all_samples_no_point_is_evaluated_twice() -> None:
    x, answers = start(4), Answers(rosenbrock)

    minimise(built(ConjugateGradient(), x), x, answers, max_rounds=10)

    points = {tuple(ask.at.tolist()) for _, ask in answers.asked}
    assert len(points) == len(answers.asked)


def test_with_a_batch_each_round_evaluates_its_own_sample_first() -> None:
    def noisy(ask: Ask, round_: int) -> Any:
        return lambda x: rosenbrock(x) + 0.1 * (round_ + 1) * (x * x).sum()

    x, answers = start(4), Answers(of=noisy)

    runner = minimise(built(ConjugateGradient(batch=8), x), x, answers, max_rounds=5)

    assert runner.stop is None
    assert {ask.on for _, ask in answers.asked} == {Sample("gradient", 8)}
    firsts = {r: ask.at for r, ask in reversed(answers.asked)}
    assert torch.equal(firsts[0], x)
    assert len(firsts) == 5
    assert set(runner.program.memory) == {"direction", "beta", "since", "fall"}


def test_at_the_minimum_it_stops_without_a_step() -> None:
    x, answers = torch.zeros(3, dtype=torch.float64), Answers(lambda x: (x * x).sum())

    runner = minimise(built(ConjugateGradient(tolerance=0), x), x, answers, max_rounds=5)

    assert (runner.rounds, runner.stop) == (1, "the gradient's norm is 0.0e+00")
    assert torch.equal(runner.x, x)
    assert answers.count["gradient"] == 1


def test_a_start_that_is_not_finite_is_an_error() -> None:
    x = torch.ones(2, dtype=torch.float64)

    with pytest.raises(CurvatureError, match=r"^the loss is nan"):
        minimise(
            built(ConjugateGradient(), x),
            x,
            Answers(lambda x: x.sum() * float("nan")),
            max_rounds=1,
        )


def test_the_edge_of_where_the_loss_is_finite_is_not_crossed() -> None:
    x = torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64)

    runner = minimise(
        built(ConjugateGradient(lr=100.0), x),
        x,
        Answers(lambda x: (x - 3 * torch.log(x) - torch.log(1 - x)).sum()),
        max_rounds=200,
    )

    best = scipy.optimize.brentq(lambda t: 1 - 3 / t + 1 / (1 - t), 0.5, 0.99)
    torch.testing.assert_close(runner.x, torch.full((3,), best).double(), rtol=1e-5, atol=0)


def test_in_float32_it_ends_with_a_reason() -> None:
    x = torch.zeros(6)

    runner = minimise(
        built(ConjugateGradient(tolerance=0), x),
        x,
        Answers(lambda x: 1 + rosenbrock(x)),
        max_rounds=3000,
    )

    assert runner.stop is not None
    assert runner.loss < 1.001


def test_its_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^restart must be 0 rounds or more, got -1"):
        ConjugateGradient(restart=-1)
    with pytest.raises(ValueError, match=r"^c1 and c2 must be in order"):
        ConjugateGradient(c2=1.0)


def test_copies_with_nothing_in_common_would_be_noticed() -> None:
    x = start(4)
    copies = minimise_in_slices(
        ConjugateGradient(), x, Answers(rosenbrock), sizes=[2, 2], max_rounds=1
    )
    copies.runners[1].program.settings["batch"] = 3

    with pytest.raises(AssertionError):
        Copies(copies.runners).round(Answers(rosenbrock))
