"""The oracles are closed forms, the KL divergence of the models themselves, and invariances."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor

from paramserver.errors import CurvatureError, LayoutError
from paramserver.optimizers.natural_gradient import NaturalGradient
from paramserver.optimizers.newton import Newton
from paramserver.rounds import Answer, Ask, Runner, Sum, minimise
from tests.support.programs import Answers, built, minimise_in_slices, requests_of

EXACT: dict[str, Any] = {"damping": 0.0, "cg_tolerance": 1e-14, "cg_iterations": 200}


def iris() -> tuple[Tensor, Tensor]:
    """Return standardised features with a constant, shape (150, 5), and labels 0 to 2."""
    data = load_iris()
    features = torch.tensor(data.data, dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0)
    return torch.cat([features, torch.ones(150, 1, dtype=torch.float64)], 1), torch.tensor(
        data.target
    )


FEATURES, LABELS = iris()


def log_probabilities(weights: Tensor, features: Tensor = FEATURES) -> Tensor:
    """Return the softmax regression's log-probabilities, 3 a sample."""
    return torch.log_softmax(features @ weights.view(3, 5).T, dim=1)


def cross_entropy(weights: Tensor) -> Tensor:
    return torch.nn.functional.nll_loss(log_probabilities(weights), LABELS)


def sampled(ask: Ask, round_: int) -> Callable[[Tensor], Tensor]:
    """Return the cross-entropy on the samples that a request names."""
    seed = round_ * 100 + len(ask.on.name)
    rows = torch.randperm(150, generator=torch.Generator().manual_seed(seed))[: ask.on.size]

    def f(weights: Tensor) -> Tensor:
        chosen = log_probabilities(weights, FEATURES[rows])
        return torch.nn.functional.nll_loss(chosen, LABELS[rows])

    return f


def some_weights(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(15, generator=generator, dtype=torch.float64)


def after(spec: Any, x: Tensor, f: Callable[[Tensor], Tensor], rounds: int = 1) -> Tensor:
    return minimise(built(spec, x), x, Answers(f), max_rounds=rounds).x


def divergence(before: Tensor, then: Tensor) -> float:
    """Return the mean KL(before || then) of two softmax regressions, in nats."""
    p, q = log_probabilities(before), log_probabilities(then)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("metric", ["cg", "dense"])
@pytest.mark.parametrize(
    ("delta", "share"), [(1e-1, 0.1), (1e-2, 0.04), (1e-3, 0.012), (1e-4, 0.004), (1e-6, 0.0004)]
)
def test_a_step_moves_the_model_by_the_kl_divergence_asked_for(
    metric: str, delta: float, share: float
) -> None:
    x = some_weights()

    moved = after(NaturalGradient(kl=delta, metric=metric, **EXACT), x, cross_entropy)  # type: ignore[arg-type]

    assert divergence(x, moved) == pytest.approx(delta, rel=share)


def test_the_learning_rate_scales_the_step_of_constant_divergence() -> None:
    x = some_weights()
    whole = after(NaturalGradient(kl=1e-3, **EXACT), x, cross_entropy)

    half = after(NaturalGradient(kl=1e-3, lr=0.5, **EXACT), x, cross_entropy)

    torch.testing.assert_close(half - x, (whole - x) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", ["cg", "dense"])
@pytest.mark.parametrize("kl", [None, 1e-2])
def test_a_step_is_the_same_whatever_the_parameters_are_called(
    metric: Any, kl: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    M = torch.eye(15, dtype=torch.float64) + 0.1 * torch.randn(
        15, 15, generator=generator, dtype=torch.float64
    )
    x = some_weights()
    phi = torch.linalg.solve(M, x)
    spec = NaturalGradient(kl=kl, metric=metric, **EXACT)

    moved = after(spec, x, cross_entropy)
    moved_phi = after(spec, phi, lambda p: cross_entropy(M @ p))

    difference = log_probabilities(moved) - log_probabilities(M @ moved_phi)
    assert float(difference.abs().max()) < 1e-10
    assert float((log_probabilities(moved) - log_probabilities(x)).abs().max()) > 0.1


def test_the_diagonal_metric_is_invariant_to_the_units_of_each_parameter() -> None:
    units = torch.logspace(-3, 3, 15, dtype=torch.float64)
    x = some_weights()
    spec = NaturalGradient(metric="diagonal", damping=0.0)

    moved = after(spec, x, cross_entropy)
    moved_scaled = after(spec, x / units, lambda p: cross_entropy(units * p))

    torch.testing.assert_close(units * moved_scaled, moved, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", ["cg", "diagonal", "dense"])
def test_a_unit_step_for_a_gaussian_mean_lands_on_the_sample_mean(metric: Any) -> None:
    data = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    spec = NaturalGradient(kl=None, metric=metric, damping=0.0)

    mean = after(
        spec,
        torch.full((6,), 9.0, dtype=torch.float64),
        lambda m: 0.5 * (data - m).square().sum(1).mean(),
    )

    torch.testing.assert_close(mean, data.mean(0), rtol=1e-13, atol=1e-13)


def test_for_softmax_regression_it_is_newtons_method() -> None:
    x = some_weights()
    natural = NaturalGradient(kl=None, metric="dense", damping=1e-3)

    ours = after(natural, x, cross_entropy)

    g = torch.func.grad(cross_entropy)(x)
    h = torch.autograd.functional.hessian(cross_entropy, x)
    newtons = x - torch.linalg.solve(h + 1e-3 * torch.eye(15, dtype=torch.float64), g)
    torch.testing.assert_close(ours, newtons, rtol=1e-9, atol=1e-9)
    plain = Newton(plain=True, damping=1e-3)
    torch.testing.assert_close(ours, after(plain, x, cross_entropy), rtol=1e-9, atol=1e-9)


def test_products_and_the_whole_matrix_give_the_same_step() -> None:
    x = some_weights()
    exact = {**EXACT, "damping": 1e-3}

    by_products = after(NaturalGradient(metric="cg", **exact), x, cross_entropy)

    whole = after(NaturalGradient(metric="dense", **exact), x, cross_entropy)
    torch.testing.assert_close(by_products, whole, rtol=1e-8, atol=1e-8)


def test_the_metric_may_use_samples_of_its_own() -> None:
    answers = Answers(of=sampled)
    x = some_weights()

    minimise(built(NaturalGradient(batch=60, curvature_batch=20), x), x, answers, max_rounds=1)

    sizes = {(ask.kind, ask.on.name, ask.on.size) for _, ask in answers.asked}
    assert sizes == {("gradient", "gradient", 60), ("ggnvp", "curvature", 20)}


def test_it_ends_where_the_gradient_vanishes() -> None:
    x = some_weights()
    spec = NaturalGradient(kl=None, metric="dense", damping=1e-3, tolerance=1e-4)

    ended = minimise(
        built(spec, x),
        x,
        Answers(lambda w: cross_entropy(w) + 0.01 * w.square().sum()),
        max_rounds=99,
    )

    assert ended.rounds < 20
    assert ended.stop is not None
    assert ended.stop.startswith("the gradient's norm is ")


@pytest.mark.parametrize("metric", ["cg", "diagonal"])
def test_three_slices_go_where_one_vector_goes(metric: Any) -> None:
    x = some_weights()
    spec = NaturalGradient(metric=metric, damping=1e-2, batch=100, curvature_batch=50)
    one = minimise(built(spec, x), x, Answers(of=sampled), max_rounds=5)

    three = minimise_in_slices(spec, x, Answers(of=sampled), sizes=[4, 1, 10], max_rounds=5)

    torch.testing.assert_close(three.x, one.x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("metric", ["cg", "diagonal", "dense"])
def test_nothing_is_left_in_the_state_before_a_round_has_ended(metric: Any) -> None:
    x = some_weights()
    program = built(NaturalGradient(metric=metric), x)
    seen: list[int] = []

    def unchanged(runner: Runner) -> None:
        seen.append(runner.rounds)
        assert program.state_dict()["state"] == {}

    requests_of(program, x, Answers(cross_entropy), max_rounds=3, on_request=unchanged)

    assert set(seen) == {0, 1, 2}


@pytest.mark.parametrize("metric", ["cg", "diagonal", "dense"])
def test_a_resumed_run_is_the_run_that_never_stopped(metric: Any) -> None:
    x = some_weights()
    spec = NaturalGradient(metric=metric, batch=100, curvature_batch=50)
    whole = minimise(built(spec, x), x, Answers(of=sampled), max_rounds=4)

    first = minimise(built(spec, x), x, Answers(of=sampled), max_rounds=2)
    file = io.BytesIO()
    torch.save(first.program.state_dict(), file)
    file.seek(0)
    program = built(spec, x)
    program.load_state_dict(torch.load(file))
    rest = go_on(Runner(program, first.x, rounds=2), Answers(of=sampled), rounds=4)

    assert torch.equal(rest.x, whole.x)


def go_on(runner: Runner, answers: Answers, *, rounds: int) -> Runner:
    """Run until ``rounds`` rounds have ended."""
    while runner.rounds < rounds:
        runner.begin()
        while (request := runner.request) is not None:
            runner.answer(
                request.values if isinstance(request, Sum) else answers(request, runner.rounds)
            )
    return runner


@pytest.mark.parametrize("metric", ["cg", "diagonal", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused(metric: Any, bad: float) -> None:
    x = some_weights()
    answers = Answers(cross_entropy)

    def broken(ask: Ask, round_: int) -> Answer:
        answer = answers(ask, round_)
        if ask.kind != "gradient":
            answer.rows[0, 3] = bad
        return answer

    with pytest.raises(CurvatureError, match=r"the round was not applied"):
        minimise(built(NaturalGradient(metric=metric), x), x, broken, max_rounds=1)


def test_a_model_too_large_for_the_whole_matrix_is_told_what_to_use() -> None:
    x = torch.zeros(2001)

    with pytest.raises(
        LayoutError, match=r"2,001 parameters, and its limit is 2,000: use natural$"
    ):
        built(NaturalGradient(metric="dense"), x)

    assert not built(NaturalGradient(metric="cg"), x).whole
    assert built(NaturalGradient(metric="dense", limit=2001), x).whole


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0.0}, r"^lr must be above 0"),
        ({"kl": -1.0}, r"^kl must be above 0"),
        ({"metric": "kfac"}, r"^metric must be cg, diagonal, dense, got 'kfac'"),
        ({"damping": -1.0}, r"^damping must be 0 or more"),
        ({"batch": 0}, r"^batch must be"),
        ({"curvature_batch": 0}, r"^curvature_batch must be"),
        ({"cg_iterations": 0}, r"^cg_iterations must be"),
        ({"cg_tolerance": 0.0}, r"^cg_tolerance must be"),
        ({"tolerance": -1.0}, r"^tolerance must be"),
    ],
)
def test_bad_settings_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NaturalGradient(**keys)
