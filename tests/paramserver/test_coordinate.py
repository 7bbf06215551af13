"""The oracles are Gauss-Seidel written out, direct solvers, and scikit-learn's Lasso."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, LogisticRegression
from torch import Tensor, nn

from paramserver.errors import CurvatureError
from paramserver.optimizers.coordinate import (
    COORDINATES_A_ROUND,
    BlockOrder,
    CoordinateDescent,
    minimise_block,
)
from paramserver.reshard import gather_state, scatter_state
from paramserver.rounds import Ask, Runner, minimise
from tests.support.programs import Answers, built, minimise_in_slices, quadratic, rosenbrock


def bowl(a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ a @ x / 2 - b @ x


def solve(
    spec: CoordinateDescent, f: Callable[[Tensor], Tensor], start: Tensor, max_rounds: int = 2000
) -> tuple[Runner, Answers]:
    answers = Answers(f)
    return minimise(built(spec, start), start, answers, max_rounds=max_rounds), answers


def gauss_seidel(a: Tensor, b: Tensor, x: Tensor, order: Sequence[Sequence[int]]) -> Tensor:
    """Solve the equations of each block in turn for the block's own unknowns."""
    x = x.clone()
    for block in order:
        own = list(block)
        rest = [j for j in range(len(x)) if j not in own]
        x[own] = torch.linalg.solve(a[own][:, own], b[own] - a[own][:, rest] @ x[rest])
    return x


A, B = quadratic([1, 2, 3, 5, 8, 13, 21])
START = torch.linspace(-2, 2, 7, dtype=torch.float64)


@pytest.mark.parametrize("sweeps", [1, 5])
@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_sweeps_on_a_quadratic_are_those_of_gauss_and_seidel(block: int, sweeps: int) -> None:
    runner, _ = solve(CoordinateDescent(block=block), bowl(A, B), START, sweeps)

    blocks = [range(i, min(i + block, 7)) for i in range(0, 7, block)]
    expected = gauss_seidel(A, B, START, blocks * sweeps)
    torch.testing.assert_close(runner.x, expected, rtol=0, atol=1e-12)


def test_a_random_order_is_gauss_and_seidel_in_that_order() -> None:
    runner, _ = solve(CoordinateDescent(order="random", seed=3), bowl(A, B), START, 4)

    order = BlockOrder(7, 1, "random", 3)
    expected = gauss_seidel(A, B, START, [order.at(i) for i in range(28)])
    torch.testing.assert_close(runner.x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        CoordinateDescent(tolerance=1e-12),
        CoordinateDescent(tolerance=1e-12, block=3, order="random"),
        CoordinateDescent(tolerance=1e-12, block=2, blocks_per_round=2),
    ],
)
def test_it_goes_on_to_the_solution_of_the_equations_and_stops(spec: CoordinateDescent) -> None:
    runner, _ = solve(spec, bowl(A, B), START)

    torch.testing.assert_close(runner.x, torch.linalg.solve(A, B), rtol=0, atol=1e-10)
    assert runner.stop is not None
    assert runner.stop.startswith("no parameter moved by more than")


def test_one_block_of_everything_is_newtons_method() -> None:
    runner, _ = solve(CoordinateDescent(block=7), bowl(A, B), START, 1)

    torch.testing.assert_close(runner.x, torch.linalg.solve(A, B), rtol=0, atol=1e-12)


def test_the_equations_with_every_delay_grow_and_in_turn_converge() -> None:
    # Chazan and Miranker, 1969: with J = I - D⁻¹A, steps from old points converge for every
    # delay only if the spectral radius of |J| is below 1. Here it is 1.4, and A is positive
    # definite, so steps in turn converge.
    a = torch.full((3, 3), 0.7, dtype=torch.float64).fill_diagonal_(1)
    zero, start = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    x, sizes = start.clone(), []
    for _ in range(10):
        old = x.clone()
        for i in range(3):  # each step is exact at the old point, and all are then made
            unit = torch.eye(3, dtype=torch.float64)[i : i + 1]
            x[i] += minimise_block(
                unit @ a @ unit.T, unit @ a @ old, old[i : i + 1], l1=0, lr=1, eps=0
            )[0]
        sizes.append(float(x.abs().max()))

    in_turn, _ = solve(CoordinateDescent(), bowl(a, zero), start, 10)

    assert float(torch.linalg.eigvalsh((torch.eye(3) - a).abs()).max()) == pytest.approx(1.4)
    assert sizes == pytest.approx([1.4**k for k in range(1, 11)], rel=1e-9)
    assert float(in_turn.x.abs().max()) < 0.1


def lasso_problem() -> tuple[Tensor, Tensor]:
    found = load_diabetes()
    x, y = torch.from_numpy(found.data) * 20, torch.from_numpy(found.target)
    return x, (y - y.mean()) / y.std()


@pytest.mark.parametrize(
    "spec",
    [
        CoordinateDescent(l1=0.1, tolerance=1e-11),
        CoordinateDescent(l1=0.1, tolerance=1e-11, order="random"),
        CoordinateDescent(l1=0.1, tolerance=1e-11, block=4),
        CoordinateDescent(l1=0.1, tolerance=1e-11, block=10),
    ],
)
def test_with_l1_least_squares_is_scikit_learns_lasso(spec: CoordinateDescent) -> None:
    x, y = lasso_problem()
    oracle = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = torch.from_numpy(oracle.fit(x.numpy(), y.numpy()).coef_)

    runner, _ = solve(spec, lambda w: ((x @ w - y) ** 2).mean() / 2, torch.zeros(10).double())

    assert runner.stop is not None
    torch.testing.assert_close(runner.x, expected, rtol=0, atol=1e-8)
    assert torch.equal(runner.x == 0, expected == 0)
    assert 0 < int((expected == 0).sum()) < 10


def test_l1_on_logistic_regression_is_scikit_learns() -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=noise, dtype=torch.float64)
    y = (x[:, 0] - x[:, 1] + torch.randn(80, generator=noise) > 0).double()
    c = 0.2  # its objective is ‖w‖₁ + C Σ loss
    oracle = LogisticRegression(
        l1_ratio=1.0, C=c, solver="liblinear", fit_intercept=False, tol=1e-12, max_iter=10_000
    )
    expected = torch.from_numpy(oracle.fit(x.numpy(), y.numpy()).coef_[0])

    runner, _ = solve(
        CoordinateDescent(l1=1 / (c * 80), tolerance=1e-10),
        lambda w: nn.functional.binary_cross_entropy_with_logits(x @ w, y),
        torch.zeros(6).double(),
    )

    torch.testing.assert_close(runner.x, expected, rtol=0, atol=1e-6)
    assert 0 < int((runner.x == 0).sum()) < 6


@pytest.mark.parametrize(
    "spec",
    [
        CoordinateDescent(tolerance=1e-9),
        CoordinateDescent(tolerance=1e-9, block=3, blocks_per_round=2),
        CoordinateDescent(tolerance=1e-9, block=4, order="random", l1=0.01),
    ],
)
def test_slices_make_the_same_steps_as_the_whole_to_the_bit(spec: CoordinateDescent) -> None:
    x, y = lasso_problem()
    answers = Answers(lambda w: ((x @ w - y) ** 2).mean() / 2 + (w**4).sum() / 9)
    start = torch.linspace(-1, 1, 10, dtype=torch.float64)
    whole = minimise(built(spec, start), start, answers, max_rounds=6)

    slices = minimise_in_slices(spec, start, answers, sizes=[2, 3, 5], max_rounds=6)

    assert torch.equal(slices.x, whole.x)
    assert slices.stop == whole.stop
    assert slices.loss == whole.loss


def test_padding_costs_nothing_and_stays_zero() -> None:
    def f(x: Tensor) -> Tensor:
        return bowl(A, B)(x[[0, 1, 2, 64, 65, 66, 67]])

    padded, start = torch.zeros(128, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)

    runner, answers = solve(CoordinateDescent(), f, padded, 3)
    _, dense = solve(CoordinateDescent(), bowl(A, B), start, 3)

    assert answers.count == dense.count
    expected = gauss_seidel(A, B, start, [[i] for i in range(7)] * 3)
    torch.testing.assert_close(runner.x[[0, 1, 2, 64, 65, 66, 67]], expected, rtol=0, atol=1e-12)
    assert int((runner.x != 0).sum()) == 7


def test_a_block_that_padding_reaches_into_is_solved_for_its_parameters() -> None:
    def f(x: Tensor) -> Tensor:
        return bowl(A, B)(x[:7])

    runner, answers = solve(CoordinateDescent(block=16), f, torch.zeros(16).double(), 1)

    torch.testing.assert_close(runner.x[:7], torch.linalg.solve(A, B), rtol=0, atol=1e-12)
    assert answers.count["hvp"] == 7


def test_a_sweep_takes_a_gradient_and_a_row_for_each_coordinate() -> None:
    _, answers = solve(CoordinateDescent(), bowl(A, B), START, 1)

    assert answers.count == {"gradient": 1 + 7, "hvp": 7}


def test_a_coordinate_that_l1_holds_at_zero_costs_nothing() -> None:
    _, answers = solve(CoordinateDescent(l1=1e3), bowl(A, B), torch.zeros(7).double(), 1)

    assert answers.count == {"gradient": 1}


def test_a_round_ends_after_some_blocks_and_at_the_end_of_a_sweep() -> None:
    start = START.clone()
    program = built(CoordinateDescent(block=2, blocks_per_round=3, tolerance=0.0), start)
    turns = []

    minimise(
        program,
        start,
        Answers(bowl(A, B)),
        max_rounds=4,
        on_round=lambda r: turns.append(r.program.memory["turns"]),
    )

    assert turns == [3, 4, 7, 8]


def test_a_long_sweep_takes_several_rounds() -> None:
    start = torch.zeros(COORDINATES_A_ROUND + 100, dtype=torch.float64)
    program = built(CoordinateDescent(block=100), start)

    minimise(program, start, Answers(lambda x: (x**2).sum()), max_rounds=1)

    assert program.memory["turns"] == 11


def test_where_there_is_no_curvature_the_step_is_a_gradient_step() -> None:
    runner, _ = solve(
        CoordinateDescent(lr=0.25), lambda x: -2 * x.sum(), torch.zeros(2).double(), 1
    )

    assert runner.x.tolist() == [0.5, 0.5]


def test_negative_curvature_does_not_lead_uphill() -> None:
    # Newton's method would go to the maximum at 0.
    runner, _ = solve(
        CoordinateDescent(lr=0.5, tolerance=1e-10),
        lambda x: (x**4 / 4 - x**2 / 2).sum(),
        torch.tensor([0.1, -0.2], dtype=torch.float64),
    )

    torch.testing.assert_close(runner.x, torch.tensor([1.0, -1.0]).double(), rtol=0, atol=1e-9)


def test_a_step_that_raises_the_loss_is_halved() -> None:
    # Newton's method diverges on sqrt(1 + x²) from beyond 1: x ← -x³.
    runner, _ = solve(
        CoordinateDescent(tolerance=1e-10),
        lambda x: torch.sqrt(1 + x**2).sum(),
        torch.tensor([3.0], dtype=torch.float64),
    )

    assert runner.stop is not None
    assert abs(runner.x.item()) < 1e-9


def test_a_step_to_where_the_loss_is_not_finite_is_halved() -> None:
    runner, _ = solve(
        CoordinateDescent(tolerance=1e-10),
        lambda x: (x - torch.log(x)).sum(),  # NaN below 0, where Newton's step from 3 leads
        torch.tensor([3.0], dtype=torch.float64),
    )

    assert runner.x.item() == pytest.approx(1.0, abs=1e-9)


def test_a_coordinate_that_no_step_improves_is_left_where_it_is() -> None:
    # At 0 the two slopes, 1 and -2, are averaged to -0.5, and the step it asks for goes uphill.
    runner, _ = solve(
        CoordinateDescent(),
        lambda x: torch.maximum(x, -2 * x).sum(),
        torch.zeros(1, dtype=torch.float64),
    )

    assert runner.x.item() == 0
    assert runner.stop == "no parameter moved by more than 0 in a sweep"


def test_a_sweep_of_several_rounds_is_judged_by_all_of_them() -> None:
    runner, _ = solve(
        CoordinateDescent(blocks_per_round=1),
        lambda x: (x[0] - 5) ** 2 + x[1] ** 2,
        torch.zeros(2, dtype=torch.float64),
    )

    assert runner.rounds == 4  # the first sweep moved, in its first round


def test_the_loss_never_rises_on_rosenbrocks_function() -> None:
    start, losses = torch.full((4,), 0.5, dtype=torch.float64), []

    runner = minimise(
        built(CoordinateDescent(block=2, order="random", tolerance=0.0), start),
        start,
        Answers(rosenbrock),
        max_rounds=150,
        on_round=lambda r: losses.append(float(rosenbrock(r.x))),
    )

    assert all(b <= a for a, b in zip([float(rosenbrock(start)), *losses], losses, strict=False))
    assert losses[-1] < 1e-2
    assert runner.loss == losses[-2]  # what the last round began with


@pytest.mark.parametrize("l1", [0.0, 0.1])
def test_float32_stops_where_float64_does(l1: float) -> None:
    x, y = lasso_problem()
    spec = CoordinateDescent(l1=l1, tolerance=1e-5)
    start = torch.zeros(10, dtype=torch.float64)

    def loss_in(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        a, b = x.to(dtype), y.to(dtype)
        return lambda w: ((a @ w - b) ** 2).mean() / 2 + 0.5 * w @ w

    runner, _ = solve(spec, loss_in(torch.float32), start.float())

    exact, _ = solve(spec, loss_in(torch.float64), start)
    assert runner.stop is not None
    assert runner.x.dtype == torch.float32
    assert abs(runner.rounds - exact.rounds) <= 1
    torch.testing.assert_close(runner.x.double(), exact.x, rtol=0, atol=1e-6)


def test_duplicate_parameters_in_a_block_are_solved_all_the_same() -> None:
    # H is [[2, 2], [2, 2]]: no curvature along (1, -1), and no gradient either.
    runner, _ = solve(
        CoordinateDescent(block=2), lambda x: (x.sum() - 3) ** 2, torch.zeros(2).double(), 1
    )

    assert float(runner.x.sum()) == pytest.approx(3, abs=1e-12)


def test_all_blocks_of_a_round_look_at_one_sample() -> None:
    answers = Answers(bowl(A, B))
    program = built(CoordinateDescent(batch=20, tolerance=0.0), START)

    minimise(program, START, answers, max_rounds=2)

    assert {(ask.on.name, ask.on.size) for _, ask in answers.asked} == {("block", 20)}


def test_a_program_that_is_resumed_on_other_slices_is_one_that_never_stopped() -> None:
    spec = CoordinateDescent(block=2, blocks_per_round=3, order="random", tolerance=0.0)
    f = Answers(lambda x: bowl(A, B)(x) + (x**4).sum())
    never = minimise(built(spec, START), START, f, max_rounds=7)
    first = minimise_in_slices(spec, START, f, sizes=[3, 4], max_rounds=3)
    cuts = (range(3), range(3, 7))
    state = gather_state(
        [(c, r.program.state_dict()) for c, r in zip(cuts, first.runners, strict=True)]
    )

    program = built(spec, first.x)
    program.load_state_dict(scatter_state(state, range(7)))
    resumed = Runner(program, first.x.clone(), rounds=3)

    while resumed.rounds < 7:
        resumed = go_on(resumed, f)
    assert torch.equal(resumed.x, never.x)


def go_on(runner: Runner, answers: Answers) -> Runner:
    runner.begin()
    while (request := runner.request) is not None:
        runner.answer(
            answers(request, runner.rounds) if isinstance(request, Ask) else request.values
        )
    return runner


@pytest.mark.parametrize("f", [lambda x: x.sum() * math.nan, lambda x: (1 + x @ x) / 0])
def test_a_loss_that_is_not_finite_at_the_start_ends_it(f: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CurvatureError, match=r"^the loss is (nan|inf)"):
        solve(CoordinateDescent(), f, START, 1)


@pytest.mark.parametrize("order", ["cyclic", "random"])
@pytest.mark.parametrize(("num", "block"), [(7, 1), (7, 3), (64, 64), (10, 20)])
def test_every_sweep_has_every_coordinate_once(num: int, block: int, order: str) -> None:
    blocks = BlockOrder(num, block, order, seed=5)  # type: ignore[arg-type]

    for sweep in range(3):
        turns = range(sweep * blocks.num_blocks, (sweep + 1) * blocks.num_blocks)
        assert sorted(i for t in turns for i in blocks.at(t)) == list(range(num))


def test_a_turn_depends_on_seed_and_count_alone() -> None:
    one, other = BlockOrder(50, 1, "random", 5), BlockOrder(50, 1, "random", 5)
    forwards = [one.at(i) for i in range(200)]

    backwards = [other.at(i) for i in reversed(range(200))]

    assert backwards[::-1] == forwards
    assert forwards[:50] != forwards[50:100]
    assert forwards[:50] != [BlockOrder(50, 1, "random", 6).at(i) for i in range(50)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, r"^block must be a whole number, 1 or more, got 0"),
        ({"blocks_per_round": 0}, r"^blocks_per_round must be a whole number"),
        ({"batch": 0}, r"^batch must be a whole number"),
        ({"order": "greedy"}, r"^order must be 'cyclic' or 'random', got 'greedy'"),
        ({"l1": -1.0}, r"^l1 must be 0 or more"),
        ({"lr": 0.0}, r"^lr must be above 0"),
        ({"tolerance": -1.0}, r"^tolerance must be 0 or more"),
        ({"seed": -1}, r"^seed must be 0 or more"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoordinateDescent(**settings)  # type: ignore[arg-type]
