"""The oracles are closed forms, Newton's own numbers for √2, and scikit-learn's optimum."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from paramserver.errors import CurvatureError, LayoutError
from paramserver.optimizers.newton import Newton, NewtonCG, SaddleFreeNewton
from paramserver.optimizers.newton_steps import newton_step
from paramserver.rounds import Answer, Ask, Runner, Sum, minimise
from tests.support.programs import (
    Answers,
    built,
    minimise_in_slices,
    quadratic,
    requests_of,
    rosenbrock,
)

DENSE = [Newton(), SaddleFreeNewton()]
ALL = [*DENSE, NewtonCG(), NewtonCG(curvature="gauss-newton")]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bowl(eigenvalues: list[float]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a quadratic with these eigenvalues and where its minimum is."""
    a, b = quadratic(eigenvalues)
    return lambda x: 0.5 * x @ a @ x - b @ x, torch.linalg.solve(a, b)


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2


def path(spec: Any, x: Tensor, f: Callable[[Tensor], Tensor], rounds: int) -> list[Tensor]:
    """Return the points after each round."""
    points: list[Tensor] = []
    minimise(
        built(spec, x), x, Answers(f), max_rounds=rounds, on_round=lambda r: points.append(r.x)
    )
    return points


@pytest.mark.parametrize("spec", [*DENSE, Newton(plain=True)], ids=str)
def test_one_step_solves_a_quadratic(spec: Any) -> None:
    f, minimum = bowl([1.0, 2.0, 30.0, 400.0])

    (x,) = path(spec, torch.zeros(4, dtype=torch.float64), f, 1)

    torch.testing.assert_close(x, minimum, rtol=1e-11, atol=1e-12)


def test_half_the_learning_rate_goes_half_the_way() -> None:
    f, minimum = bowl([1.0, 2.0, 30.0, 400.0])

    (x,) = path(Newton(lr=0.5), torch.zeros(4, dtype=torch.float64), f, 1)

    torch.testing.assert_close(x, minimum / 2, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
def test_the_root_of_2_comes_out_as_newton_had_it(plain: bool) -> None:
    points = path(
        Newton(plain=plain, tolerance=0), vector(1.0), lambda x: x[0] ** 3 / 3 - 2 * x[0], 5
    )

    want = [1.5, 17 / 12, 577 / 408, 665857 / 470832]  # x - (x² - 2) / 2x, from 1
    assert [float(p) for p in points[:4]] == pytest.approx(want, rel=1e-14)
    assert float(points[4]) == pytest.approx(math.sqrt(2), rel=1e-15)


@pytest.mark.parametrize(
    ("spec", "order"), [(Newton(tolerance=0), 2.0), (NewtonCG(tolerance=0), 1.5)], ids=str
)
def test_each_step_multiplies_the_digits_by_the_order_of_convergence(
    spec: Any, order: float
) -> None:
    a, _ = quadratic([1.0, 2.0, 5.0])

    def f(x: Tensor) -> Tensor:
        return ((a @ x).exp() - a @ x).sum()

    points = path(spec, vector(0.3, -0.2, 0.2), f, 12)

    norms = [float(torch.func.grad(f)(p).norm()) for p in points]
    orders = [
        math.log(after) / math.log(before)
        for before, after in itertools.pairwise(norms)
        if before < 1e-2 and after > 1e-14
    ]
    assert min(norms) < 1e-13
    assert len(orders) >= 2
    assert min(orders) > 0.9 * order


def test_plain_newton_jumps_onto_the_saddle() -> None:
    (x,) = path(Newton(plain=True), vector(1.0, 0.5), saddle, 1)

    assert torch.equal(x, vector(0.0, 0.0))


@pytest.mark.parametrize("spec", [Newton(), SaddleFreeNewton(), NewtonCG()], ids=str)
def test_the_others_leave_the_saddle_for_a_minimum(spec: Any) -> None:
    points = path(spec, vector(1.0, 1e-3), lambda x: saddle(x) + 0.25 * x[1] ** 4, 40)

    torch.testing.assert_close(points[-1].abs(), vector(0.0, math.sqrt(2)), rtol=0, atol=1e-5)


def test_saddle_free_newton_doubles_its_distance_from_a_saddle() -> None:
    points = path(SaddleFreeNewton(), vector(1.0, 1e-3), saddle, 8)

    assert [float(p[1]) for p in points] == pytest.approx([1e-3 * 2**k for k in range(1, 9)])
    assert [float(p[0]) for p in points] == pytest.approx([0.0] * 8, abs=1e-12)


@pytest.mark.parametrize("spec", [Newton(), SaddleFreeNewton(), NewtonCG()], ids=str)
def test_rosenbrocks_minimum_is_reached(spec: Any) -> None:
    x = vector(-1.2, 1.0)
    answers = Answers(rosenbrock)

    ended = minimise(built(spec, x), x, answers, max_rounds=100)

    assert ended.stop is not None
    assert ended.stop.startswith("the gradient's norm is ")
    torch.testing.assert_close(ended.x, torch.ones_like(x), rtol=0, atol=1e-5)


def test_newton_cg_reaches_the_minimum_of_a_long_rosenbrock_chain() -> None:
    x = torch.linspace(0.5, 1.6, 100, dtype=torch.float64)

    ended = minimise(built(NewtonCG(), x), x, Answers(rosenbrock), max_rounds=300)

    assert ended.stop is not None
    torch.testing.assert_close(ended.x, torch.ones_like(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_logistic_regression_ends_where_scikit_learn_does(spec: Any) -> None:
    data = load_iris()
    features = torch.tensor(data.data, dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0)
    labels = torch.tensor(data.target)

    def f(w: Tensor) -> Tensor:
        scores = features @ w.view(3, 4).T
        return torch.nn.functional.cross_entropy(scores, labels) + w.square().sum() / 300

    oracle = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-12, max_iter=10_000)
    oracle.fit(features.numpy(), data.target)
    x = torch.zeros(12, dtype=torch.float64)

    ended = minimise(built(spec, x), x, Answers(f, samples=150), max_rounds=40)

    assert ended.stop is not None
    torch.testing.assert_close(ended.x.view(3, 4), torch.tensor(oracle.coef_), rtol=0, atol=1e-3)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_padding_stays_where_it_is(spec: Any) -> None:
    f, minimum = bowl([1.0, 2.0, 30.0, 400.0])
    x = torch.zeros(64, dtype=torch.float64)

    points = path(spec, x, lambda v: f(v[:4]), 20)

    assert torch.equal(points[-1][4:], torch.zeros(60, dtype=torch.float64))
    torch.testing.assert_close(points[-1][:4], minimum, rtol=0, atol=1e-5)


def test_damping_grows_until_the_matrix_is_positive_definite() -> None:
    h, g = torch.diag(vector(2.0, -3.0)), vector(1.0, 1.0)

    d = newton_step(h, g, damping=1.0, least=1e-15)

    torch.testing.assert_close(d, vector(-1 / 12, -1 / 7))  # λ = 10: 1 does not do


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_numbers_that_are_not_finite_are_refused(spec: Any) -> None:
    x = torch.full((4,), 0.5, dtype=torch.float64)
    answers = Answers(rosenbrock)

    def broken(ask: Ask, round_: int) -> Answer:
        answer = answers(ask, round_)
        if ask.kind in ("hessian", "hvp", "ggnvp"):
            answer.rows[0, 1] = float("nan")
        return answer

    with pytest.raises(CurvatureError, match=r"is nan: the round was not applied"):
        minimise(built(spec, x), x, broken, max_rounds=1)


def test_plain_newton_refuses_a_singular_hessian() -> None:
    x = vector(1.0, 1.0)

    with pytest.raises(CurvatureError, match=r"the Hessian's determinant is 0\.0"):
        path(Newton(plain=True), x, lambda v: (v[0] + v[1]) ** 2, 1)


@pytest.mark.parametrize("spec", DENSE, ids=str)
def test_a_model_too_large_for_its_hessian_is_told_to_use_newton_cg(spec: Any) -> None:
    with pytest.raises(
        LayoutError, match=r"2,001 x 2,001 matrix .* its limit is 2,000: use newton-cg"
    ):
        built(spec, torch.zeros(2001))

    assert built(spec, torch.zeros(4)).whole
    assert not built(NewtonCG(), torch.zeros(2001)).whole


def test_three_slices_go_where_one_vector_goes() -> None:
    x = torch.linspace(-0.5, 1.6, 6, dtype=torch.float64)
    one = minimise(built(NewtonCG(), x), x, Answers(rosenbrock), max_rounds=8)

    three = minimise_in_slices(NewtonCG(), x, Answers(rosenbrock), sizes=[2, 1, 3], max_rounds=8)

    torch.testing.assert_close(three.x, one.x, rtol=1e-8, atol=1e-8)
    assert float((one.x - x).norm()) > 0.1


def noisy(ask: Ask, round_: int) -> Callable[[Tensor], Tensor]:
    """Return Rosenbrock's function shifted a little, by the sample."""
    seed = round_ * 100 + len(ask.on.name)
    shift = 1e-2 * torch.randn(4, generator=torch.Generator().manual_seed(seed)).double()
    return lambda x: rosenbrock(x - shift)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_state_and_parameters_are_those_of_the_last_round_at_every_request(spec: Any) -> None:
    x = vector(0.5, 0.8, 1.4, 0.9)
    program = built(spec, x)
    began: dict[int, tuple[Tensor, str]] = {}

    def unchanged(runner: Runner) -> None:
        state = str(program.state_dict()["state"])
        before = began.setdefault(runner.rounds, (runner.x.clone(), state))
        assert torch.equal(runner.x, before[0])
        assert state == before[1]

    requests_of(program, x, Answers(rosenbrock), max_rounds=3, on_request=unchanged)

    assert began.keys() == {0, 1, 2}
    assert len({state for _, state in began.values()}) == 3


@pytest.mark.parametrize("spec", ALL, ids=str)
@pytest.mark.parametrize("batch", [None, 7])
def test_a_resumed_run_is_the_run_that_never_stopped(spec: Any, batch: int | None) -> None:
    spec = dataclasses.replace(spec, batch=batch, curvature_batch=5)
    x = vector(0.5, 0.8, 1.4, 0.9)
    answers = Answers(rosenbrock) if batch is None else Answers(of=noisy)
    whole = minimise(built(spec, x), x, answers, max_rounds=4)
    first = minimise(built(spec, x), x, answers, max_rounds=2)
    file = io.BytesIO()
    torch.save(first.program.state_dict(), file)
    file.seek(0)
    program = built(spec, x)
    program.load_state_dict(torch.load(file))
    answers.count.clear()

    resumed = go_on(Runner(program, first.x, rounds=2), answers, rounds=4)

    assert torch.equal(resumed.x, whole.x)
    assert not torch.equal(first.x, whole.x)


def go_on(runner: Runner, answers: Answers, *, rounds: int) -> Runner:
    """Run until ``rounds`` rounds have ended."""
    while runner.rounds < rounds:
        runner.begin()
        while (request := runner.request) is not None:
            runner.answer(
                request.values if isinstance(request, Sum) else answers(request, runner.rounds)
            )
    return runner


def test_a_loss_that_cannot_fall_ends_the_run_unless_the_sample_changes() -> None:
    x = vector(1.0, 2.0)
    answers = Answers(lambda v: v.square().sum())

    def uphill(ask: Ask, round_: int) -> Answer:
        answer = answers(ask, round_)
        rows = -answer.rows if ask.kind == "gradient" else answer.rows
        return Answer(answer.samples, answer.loss, rows)

    ended = minimise(built(Newton(), x), x, uphill, max_rounds=3)
    goes_on = minimise(built(Newton(batch=3), x), x, uphill, max_rounds=3)

    assert ended.stop is not None
    assert ended.stop.startswith("along Newton's direction, no lower loss")
    assert (ended.rounds, goes_on.rounds, goes_on.stop) == (1, 3, None)
    assert torch.equal(goes_on.x, x)


def test_newton_cg_takes_gauss_newton_products_on_a_sample_of_their_own() -> None:
    x = vector(0.5, 0.8, 1.4, 0.9)
    answers = Answers(of=noisy)

    minimise(
        built(NewtonCG(curvature="gauss-newton", batch=70, curvature_batch=20), x),
        x,
        answers,
        max_rounds=2,
    )

    assert {(ask.kind, ask.on.name, ask.on.size) for _, ask in answers.asked} == {
        ("gradient", "gradient", 70),
        ("ggnvp", "curvature", 20),
    }


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        (Newton, {"lr": 0.0}, r"^lr must be above 0"),
        (Newton, {"damping": -1.0}, r"^damping must be 0 or more"),
        (Newton, {"limit": 0}, r"^limit must be 1 or more"),
        (Newton, {"curvature_batch": 0}, r"^curvature_batch must be 1 or more"),
        (SaddleFreeNewton, {"floor": 2.0}, r"^floor must be above 0 and at most 1, got 2.0"),
        (SaddleFreeNewton, {"damping": -1.0}, r"^damping must be 0 or more"),
        (NewtonCG, {"curvature": "fisher"}, r"^curvature must be hessian or gauss-newton"),
        (NewtonCG, {"cg_iterations": 0}, r"^cg_iterations must be 1 or more"),
        (NewtonCG, {"batch": 0}, r"^batch must be 1 sample or more"),
    ],
)
def test_bad_settings_are_refused(spec: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**keys)
