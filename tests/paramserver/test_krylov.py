"""The oracles are quadratics with known eigenvalues, Rosenbrock's minimum and numpy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.errors import CurvatureError
from paramserver.optimizers.krylov import (
    KrylovSubspaceDescent,
    Subspace,
    positive_inverse,
)
from paramserver.rounds import Answer, Ask, Request, Runner, Sample, Sum, minimise
from tests.support.programs import (
    Answers,
    built,
    minimise_in_slices,
    quadratic,
    requests_of,
    rosenbrock,
)

THREE_EIGENVALUES = [1.0] * 4 + [3.0] * 3 + [10.0] * 5


def bowl(eigenvalues: list[float]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a quadratic with these eigenvalues and where its minimum is."""
    a, b = quadratic(eigenvalues)
    return lambda x: 0.5 * x @ a @ x - b @ x, torch.linalg.solve(a, b)


def noisy_rosenbrock(ask: Ask, round_: int) -> Callable[[Tensor], Tensor]:
    """Return Rosenbrock's function shifted a little, by the sample."""
    seed = round_ * 100 + len(ask.on.name)
    shift = 1e-2 * torch.randn(
        6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return lambda x: rosenbrock(x - shift)


def start(n: int = 6) -> Tensor:
    return torch.linspace(0.5, 1.6, n, dtype=torch.float64)


@pytest.mark.parametrize(("vectors", "error"), [(1, 0.1), (2, 0.01), (3, None)])
def test_as_many_vectors_as_distinct_eigenvalues_solve_a_quadratic_in_one_round(
    vectors: int, error: float | None
) -> None:
    f, minimum = bowl(THREE_EIGENVALUES)
    x = torch.zeros(12, dtype=torch.float64)

    ended = minimise(built(KrylovSubspaceDescent(vectors=vectors), x), x, Answers(f), max_rounds=1)

    distance = float((ended.x - minimum).norm())
    if error is None:
        assert distance < 1e-11
    else:
        assert distance > error


def test_the_basis_ends_where_the_krylov_space_ends() -> None:
    f, _ = bowl(THREE_EIGENVALUES)
    x = torch.zeros(12, dtype=torch.float64)
    answers = Answers(f)

    minimise(
        built(KrylovSubspaceDescent(vectors=10, curvature="hessian"), x), x, answers, max_rounds=1
    )

    assert answers.count["hvp"] == 3


def test_a_small_basis_and_the_previous_step_are_conjugate_gradients() -> None:
    f, minimum = bowl([1.0, 2.0, 5.0, 11.0, 30.0])
    x = torch.zeros(5, dtype=torch.float64)
    spec = KrylovSubspaceDescent(vectors=1, tolerance=0)

    ended = minimise(built(spec, x), x, Answers(f), max_rounds=5)

    torch.testing.assert_close(ended.x, minimum, rtol=1e-10, atol=1e-10)
    four = minimise(built(spec, x), x, Answers(f), max_rounds=4)
    assert float((four.x - minimum).norm()) > 1e-4


@pytest.mark.parametrize("precondition", [False, True])
def test_it_reaches_rosenbrocks_minimum(precondition: bool) -> None:
    x = start()
    spec = KrylovSubspaceDescent(vectors=3, precondition=precondition, tolerance=1e-8)
    answers = Answers(rosenbrock)

    def diagonal(ask: Ask, round_: int) -> Answer:
        answer = answers(ask, round_)
        if ask.kind == "fisher_diagonal":
            answer.rows.abs_()  # Rosenbrock's second derivatives may be negative
        return answer

    ended = minimise(built(spec, x), x, diagonal, max_rounds=200)

    assert ended.stop is not None
    torch.testing.assert_close(ended.x, torch.ones_like(x), rtol=0, atol=1e-7)
    assert (answers.count["fisher_diagonal"] > 0) is precondition


def test_the_diagonal_takes_the_units_out_of_a_quadratic() -> None:
    units = torch.logspace(-2, 2, 8, dtype=torch.float64)
    x = torch.ones(8, dtype=torch.float64)

    ended = minimise(
        built(KrylovSubspaceDescent(vectors=1, precondition=True, floor=1e-9), x),
        x,
        Answers(lambda v: 0.5 * (units * v.square()).sum()),
        max_rounds=1,
    )

    torch.testing.assert_close(ended.x, torch.zeros_like(x), rtol=0, atol=1e-10)


def test_it_leaves_a_saddle() -> None:
    x = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    f = lambda v: v[0] ** 2 - v[1] ** 2 + 0.25 * v[1] ** 4  # noqa: E731

    ended = minimise(built(KrylovSubspaceDescent(), x), x, Answers(f), max_rounds=50)

    torch.testing.assert_close(
        ended.x, torch.tensor([0.0, 2**0.5], dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_the_three_samples_are_asked_for_by_name() -> None:
    x = start()
    answers = Answers(of=noisy_rosenbrock)
    spec = KrylovSubspaceDescent(
        vectors=2, curvature="hessian", batch=90, curvature_batch=20, search_batch=30
    )

    minimise(built(spec, x), x, answers, max_rounds=2)

    assert {(ask.kind, ask.on.name, ask.on.size) for _, ask in answers.asked} >= {
        ("gradient", "gradient", 90),
        ("hvp", "curvature", 20),
        ("gradient", "search", 30),
    }
    assert {ask.on.size for _, ask in answers.asked if ask.on.name == "search"} == {30}


def test_gauss_newton_products_take_the_hessians_place() -> None:
    x = start()
    answers = Answers(rosenbrock)

    minimise(
        built(KrylovSubspaceDescent(vectors=2, curvature="gauss-newton"), x),
        x,
        answers,
        max_rounds=1,
    )

    assert answers.count["hvp"] == 0
    assert answers.count["ggnvp"] == 2


def test_three_slices_go_where_one_vector_goes() -> None:
    x = start()
    spec = KrylovSubspaceDescent(vectors=3, precondition=False, batch=9)
    one = minimise(built(spec, x), x, Answers(of=noisy_rosenbrock), max_rounds=5)

    three = minimise_in_slices(spec, x, Answers(of=noisy_rosenbrock), sizes=[2, 1, 3], max_rounds=5)

    torch.testing.assert_close(three.x, one.x, rtol=1e-8, atol=1e-8)
    assert float((one.x - x).norm()) > 0.1


def test_the_floor_of_the_diagonal_does_not_depend_on_the_cut() -> None:
    units = torch.tensor([0.0, 1e-3, 1.0, 5.0, 3.0, 0.5], dtype=torch.float64)
    f = lambda v: 0.5 * (units * v.square()).sum() + (units * v).cosh().sum()  # noqa: E731
    x = start()
    spec = KrylovSubspaceDescent(vectors=2, precondition=True, floor=0.1)
    one = minimise(built(spec, x), x, Answers(f), max_rounds=2)

    three = minimise_in_slices(spec, x, Answers(f), sizes=[2, 1, 3], max_rounds=2)

    torch.testing.assert_close(three.x, one.x, rtol=1e-8, atol=1e-8)


def test_padding_stays_where_it_is() -> None:
    f, minimum = bowl(THREE_EIGENVALUES)
    x = torch.zeros(64, dtype=torch.float64)

    ended = minimise(
        built(KrylovSubspaceDescent(vectors=3), x), x, Answers(lambda v: f(v[:12])), max_rounds=1
    )

    assert torch.equal(ended.x[12:], torch.zeros(52, dtype=torch.float64))
    torch.testing.assert_close(ended.x[:12], minimum, rtol=1e-10, atol=1e-10)


def test_state_and_parameters_are_those_of_the_last_round_at_every_request() -> None:
    x = start()
    program = built(KrylovSubspaceDescent(vectors=2), x)
    began: dict[int, tuple[Tensor, Any]] = {}

    def unchanged(runner: Runner) -> None:
        state = program.state_dict()["state"]
        before = began.setdefault(runner.rounds, (runner.x.clone(), copy.deepcopy(state)))
        assert torch.equal(runner.x, before[0])
        assert str(state) == str(before[1])

    requests_of(program, x, Answers(rosenbrock), max_rounds=3, on_request=unchanged)

    assert began.keys() == {0, 1, 2}
    assert began[0][1] == {0: {}}
    assert "step" in began[1][1][0]


def test_a_resumed_run_is_the_run_that_never_stopped() -> None:
    x = start()
    spec = KrylovSubspaceDescent(vectors=2, batch=9)
    whole = minimise(built(spec, x), x, Answers(of=noisy_rosenbrock), max_rounds=4)
    first = minimise(built(spec, x), x, Answers(of=noisy_rosenbrock), max_rounds=2)
    file = io.BytesIO()
    torch.save(first.program.state_dict(), file)
    file.seek(0)
    program = built(spec, x)
    program.load_state_dict(torch.load(file))

    resumed = go_on(Runner(program, first.x, rounds=2), Answers(of=noisy_rosenbrock), rounds=4)

    assert torch.equal(resumed.x, whole.x)
    forgetful = go_on(
        Runner(built(spec, x), first.x, rounds=2), Answers(of=noisy_rosenbrock), rounds=4
    )
    assert not torch.equal(forgetful.x, whole.x)


def go_on(runner: Runner, answers: Answers, *, rounds: int) -> Runner:
    """Run until ``rounds`` rounds have ended."""
    while runner.rounds < rounds:
        runner.begin()
        while (request := runner.request) is not None:
            runner.answer(
                request.values if isinstance(request, Sum) else answers(request, runner.rounds)
            )
    return runner


@pytest.mark.parametrize("kind", ["ggnvp", "fisher_diagonal", "gradient"])
def test_numbers_that_are_not_finite_are_refused(kind: str) -> None:
    x = start()
    answers = Answers(rosenbrock)
    program = built(KrylovSubspaceDescent(precondition=True), x)

    def broken(ask: Ask, round_: int) -> Answer:
        answer = answers(ask, round_)
        if ask.kind == kind:
            answer.rows[0, 3] = float("nan")
        return answer

    with pytest.raises(CurvatureError, match=r"is nan: the round was not applied"):
        minimise(program, x, broken, max_rounds=1)

    assert program.memory == {}


def test_a_loss_that_cannot_fall_ends_the_run() -> None:
    x = torch.ones(4, dtype=torch.float64)
    answers = Answers(lambda v: v.square().sum())

    def uphill(ask: Ask, round_: int) -> Answer:
        answer = answers(ask, round_)
        return Answer(
            answer.samples, answer.loss, -answer.rows if ask.kind == "gradient" else answer.rows
        )

    ended = minimise(built(KrylovSubspaceDescent(), x), x, uphill, max_rounds=9)

    assert ended.stop is not None
    assert ended.rounds == 1
    assert torch.equal(ended.x, x)


def test_the_basis_is_orthonormal_and_holds_the_projected_hessian() -> None:
    a, b = quadratic([float(i * i) for i in range(1, 31)])
    space, on = Subspace(), Sample("curvature")
    answers = Answers(lambda x: 0.5 * x @ a @ x)
    vector: Tensor | None = b
    for _ in range(20):
        assert vector is not None
        vector = drive(space.extend(vector, lambda v: Ask("hvp", v, on, v)), answers)

    V = torch.stack(space.basis, 1)
    torch.testing.assert_close(V.T @ V, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(space.curvature(), V.T @ a @ V, rtol=0, atol=1e-9)


def drive(going: Generator[Request, Any, Any], answers: Answers) -> Any:
    """Run a part of a program, which owns the whole vector, and return what it returns."""
    reply: Any = None
    while True:
        try:
            request = going.send(reply)
        except StopIteration as ended:
            return ended.value
        reply = request.values if isinstance(request, Sum) else answers(request, 0)


def test_negative_and_tiny_eigenvalues_are_made_positive() -> None:
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    h = q @ torch.diag(torch.tensor([-4.0, 2.0, 1e-9], dtype=torch.float64)) @ q.T

    inverse = positive_inverse(h, floor=0.01)

    want = q @ torch.diag(torch.tensor([1 / 4, 1 / 2, 1 / 0.04], dtype=torch.float64)) @ q.T
    torch.testing.assert_close(inverse, want)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0.0}, r"^lr must be above 0"),
        ({"vectors": 0}, r"^vectors must be 1 or more, got 0"),
        ({"curvature": "fisher"}, r"^curvature must be hessian or gauss-newton, got 'fisher'"),
        ({"floor": 0.0}, r"^floor must be above 0 and at most 1, got 0.0"),
        ({"search_steps": 0}, r"^search_steps must be 1 or more"),
        ({"batch": 0}, r"^batch must be 1"),
        ({"curvature_batch": 0}, r"^curvature_batch must be 1"),
        ({"search_batch": 0}, r"^search_batch must be 1"),
        ({"tolerance": -1.0}, r"^tolerance must be 0 or more"),
    ],
)
def test_bad_settings_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KrylovSubspaceDescent(**keys)
