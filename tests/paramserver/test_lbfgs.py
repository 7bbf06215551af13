"""L-BFGS against dense BFGS, scipy, and itself on slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

from paramserver.errors import CurvatureError
from paramserver.optimizers.bfgs import updated
from paramserver.optimizers.lbfgs import LBFGS, coefficients, combined
from paramserver.rounds import Ask, Runner, Sample, gram, minimise
from tests.support.programs import (
    Answers,
    assert_resumes_exactly,
    assert_state_changes_only_between_rounds,
    built,
    loss_and_gradient,
    minimise_in_slices,
    quadratic,
    rosenbrock,
    same,
)


def start(n: int) -> Tensor:
    return torch.tensor([-1.2, 1.0] * (n // 2), dtype=torch.float64)


def pairs(k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return k pairs of a quadratic, and a gradient."""
    a, g = quadratic([1.0 + i for i in range(n)])
    steps = torch.randn(k, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return steps, steps @ a, g


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_direction_is_that_of_dense_bfgs_from_the_same_pairs(k: int) -> None:
    steps, changes, g = pairs(k, 8)
    scale = steps[-1] @ changes[-1] / (changes[-1] @ changes[-1])
    h = scale * torch.eye(8, dtype=torch.float64)
    for s, y in zip(steps, changes, strict=True):
        h = updated(h, s, y, float(s @ y))
    vectors = torch.cat([steps, changes, g[None]])

    c = coefficients(vectors @ vectors.T)
    d = combined(c, steps, changes, g)

    torch.testing.assert_close(d, -h @ g, rtol=1e-9, atol=1e-10)


def test_the_gram_matrix_of_long_vectors_is_added_up_in_double_precision() -> None:
    n = 150_001
    generator = torch.Generator().manual_seed(0)
    steps, changes = torch.randn(2, 2, n, generator=generator).unbind()
    g = torch.randn(n, generator=generator)
    v = torch.cat([steps, changes, g[None]]).double()

    request = next(gram([*steps, *changes, g]))

    torch.testing.assert_close(request.values, v @ v.T, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("n", [2, 10])
def test_it_finds_rosenbrocks_minimum_as_scipy_does(n: int) -> None:
    x, answers = torch.zeros(n, dtype=torch.float64), Answers(rosenbrock)
    theirs = scipy.optimize.minimize(
        scipy.optimize.rosen,
        x.numpy(),
        jac=scipy.optimize.rosen_der,
        method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-5},
    )

    runner = minimise(built(LBFGS(), x), x, answers, max_rounds=1000)

    assert runner.stop is not None
    assert runner.stop.startswith("the gradient's norm is ")
    torch.testing.assert_close(runner.x, torch.ones(n).double(), rtol=0, atol=1e-5)
    assert answers.count["gradient"] <= 1.5 * theirs.njev


def test_slices_walk_as_the_whole_vector_does() -> None:
    x = torch.zeros(10, dtype=torch.float64)
    whole = minimise(built(LBFGS(), x), x, Answers(rosenbrock), max_rounds=200)

    copies = minimise_in_slices(LBFGS(), x, Answers(rosenbrock), sizes=[4, 1, 5], max_rounds=200)

    assert whole.stop is not None
    assert copies.rounds == whole.rounds
    torch.testing.assert_close(copies.x, whole.x, rtol=0, atol=1e-10)


def test_a_round_sums_one_matrix_for_its_direction() -> None:
    x, answers = start(6), Answers(rosenbrock)
    copies = minimise_in_slices(LBFGS(history=3), x, answers, sizes=[2, 4], max_rounds=8)
    (first, _) = copies.runners

    first.begin()  # the point is known, so the direction's products come first

    assert first.request is not None
    assert first.request.values.shape == (7, 7)


def test_it_keeps_the_latest_pairs_only() -> None:
    x = start(6)
    program, points = built(LBFGS(history=3), x), [x]

    minimise(
        program,
        x,
        Answers(rosenbrock),
        max_rounds=9,
        on_round=lambda runner: points.append(runner.x),
    )

    walked = torch.stack(points)
    gradients = torch.stack([loss_and_gradient(rosenbrock, p)[1] for p in points])
    assert torch.equal(program.memory["steps"], walked.diff(dim=0)[-3:])
    assert torch.equal(program.memory["changes"], gradients.diff(dim=0)[-3:])


def test_pairs_of_too_little_curvature_are_left_out() -> None:
    # the first pair is s = (1, 1) and y = (1, 10), times a number: its cosine is 0.774
    x = torch.tensor([10.0, 1.0], dtype=torch.float64)
    kept, left = built(LBFGS(min_curvature=0.77), x), built(LBFGS(min_curvature=0.78), x)

    for program in (kept, left):
        minimise(program, x, Answers(lambda x: x[0] ** 2 + 10 * x[1] ** 2), max_rounds=1)

    assert len(kept.memory["steps"]) == 1
    assert set(left.memory) == {"loss", "gradient", "square"}


def test_with_a_batch_both_gradients_of_a_pair_are_of_one_sample() -> None:
    tilts = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).double()
    a, _ = quadratic([1.0, 2.0, 4.0, 8.0])

    def sampled(ask: Ask, round_: int) -> Any:
        return lambda x: 0.5 * x @ a @ x - 10 * tilts[round_] @ x

    x, answers = start(4), Answers(of=sampled)

    runner = minimise(built(LBFGS(batch=8), x), x, answers, max_rounds=6)

    # Every sample has the same Hessian and another gradient: y = A s holds within samples only.
    memory = runner.program.memory
    torch.testing.assert_close(memory["changes"], memory["steps"] @ a, rtol=1e-9, atol=1e-9)
    assert len(memory["steps"]) == 6
    assert "gradient" not in memory
    assert {ask.on for _, ask in answers.asked} == {Sample("gradient", 8)}


def test_a_sample_without_a_lower_point_leaves_all_as_it_was_and_the_run_goes_on() -> None:
    def sampled(ask: Ask, round_: int) -> Any:
        return _lying if round_ == 2 else rosenbrock

    x, answers = torch.zeros(4, dtype=torch.float64), Answers(of=sampled)
    program, points, states = built(LBFGS(batch=4), x), [x], []

    def on_round(runner: Runner) -> None:
        points.append(runner.x)
        states.append(copy.deepcopy(program.state_dict()))

    runner = minimise(program, x, answers, max_rounds=4, on_round=on_round)

    assert torch.equal(points[3], points[2])
    assert same(states[2], states[1])
    assert (runner.rounds, runner.stop) == (4, None)
    assert float(rosenbrock(runner.x)) < float(rosenbrock(points[3]))


def test_all_samples_without_a_lower_point_end_the_run_after_steepest_descent_was_tried() -> None:
    x, answers = torch.zeros(4, dtype=torch.float64), Answers(rosenbrock)
    program = built(LBFGS(max_evaluations=9), x)
    before = minimise(program, x, answers, max_rounds=3)
    lying = Answers(_lying)
    program.memory.pop("gradient")

    runner = minimise(program, before.x, lying, max_rounds=5)

    assert runner.rounds == 1
    assert runner.stop is not None
    assert runner.stop.startswith("along steepest descent, no lower loss in 9 steps down to ")
    assert torch.equal(runner.x, before.x)
    assert lying.count["gradient"] == 1 + 9 + 9


def _lying(x: Tensor) -> Tensor:
    """Return the same loss everywhere, with a gradient that promises a lower one."""
    return 1 + (x - x.detach()) @ torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)


def test_the_state_changes_only_between_rounds() -> None:
    assert_state_changes_only_between_rounds(
        LBFGS(history=4), start(6), Answers(rosenbrock), rounds=15
    )


@pytest.mark.parametrize("batch", [None, 8])
@pytest.mark.parametrize("cut_at", [0, 1, 7])
def test_a_saved_run_goes_on_bit_for_bit(cut_at: int, batch: int | None) -> None:
    assert_resumes_exactly(
        LBFGS(history=4, batch=batch), start(6), Answers(rosenbrock), rounds=20, cut_at=cut_at
    )


def test_the_state_is_vectors_of_the_slices_length_and_numbers() -> None:
    x = start(6)
    program = built(LBFGS(), x)
    minimise(program, x, Answers(rosenbrock), max_rounds=3)

    for value in program.memory.values():
        if isinstance(value, Tensor):
            assert value.shape[-1] == 6
        else:
            assert isinstance(value, float)


def test_on_all_samples_no_point_is_evaluated_twice() -> None:
    x, answers = start(4), Answers(rosenbrock)

    minimise(built(LBFGS(), x), x, answers, max_rounds=10)

    points = {tuple(ask.at.tolist()) for _, ask in answers.asked}
    assert len(points) == len(answers.asked)


def test_a_loss_that_is_nan_beyond_an_edge_is_minimised_within_it() -> None:
    x = torch.full((4,), 1e-3, dtype=torch.float64)

    runner = minimise(
        built(LBFGS(lr=1e6), x),
        x,
        Answers(lambda x: (x * torch.log(x)).sum()),  # NaN below 0, lowest at 1/e
        max_rounds=200,
    )

    assert runner.stop is not None
    torch.testing.assert_close(
        runner.x, torch.full((4,), 0.36787944117).double(), rtol=1e-5, atol=0
    )


def test_a_start_that_is_not_finite_is_an_error() -> None:
    x = torch.full((2,), -1.0, dtype=torch.float64)

    with pytest.raises(CurvatureError, match=r"^the loss is nan"):
        minimise(built(LBFGS(), x), x, Answers(lambda x: torch.log(x).sum()), max_rounds=1)


def test_in_float32_it_ends_with_a_reason() -> None:
    x = torch.zeros(6)

    runner = minimise(
        built(LBFGS(tolerance=0), x), x, Answers(lambda x: 1 + rosenbrock(x)), max_rounds=3000
    )

    assert runner.stop is not None
    assert runner.loss < 1.001


def test_its_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^history must be 1 pair or more, got 0"):
        LBFGS(history=0)
