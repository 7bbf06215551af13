from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from paramserver.errors import LayoutError, TaskError
from paramserver.layout import Layout
from paramserver.rounds import Kind, Sample
from tests.support.small_tasks import (
    BACKWARD_MODELS,
    DOUBLE,
    MODELS,
    NUM_CLASSES,
    NUM_EXAMPLES,
    Attentive,
    LastOfLSTM,
    Small,
    dropout,
    mlp,
    mse,
    norms,
)
from workers.oracles import DENSE_LIMIT, Oracle
from workers.samples import Piece
from workers.task import Task, TensorExamples
from workers.tasks import cross_entropy, task
from workers.tasks.logistic import Logistic, logistic_loss, sign_accuracy

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

ALL_MODELS = MODELS | BACKWARD_MODELS
each_model = pytest.mark.parametrize("make", ALL_MODELS.values(), ids=ALL_MODELS)
forward_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
MakeModel = Callable[[], nn.Module]


def linear() -> nn.Module:
    return nn.Linear(8, NUM_CLASSES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def written_out(small: Small) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the mlp's outputs as a formula of its parameters, and these at the point."""
    inputs, _ = small.everything()

    def outputs(w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.tanh(inputs @ w.T + b) @ w2.T + b2

    return outputs, tuple(view.clone() for view in small.layout.views(small.point))


def flat_rows(small: Small, parts: tuple[Tensor, ...], num_rows: int) -> Tensor:
    rows = torch.zeros(num_rows, small.layout.numel, dtype=DOUBLE)
    for slot, part in zip(small.layout.slots, parts, strict=True):
        rows[:, slot.offset : slot.end] = part.reshape(num_rows, -1)
    return rows


# Gradients and products


@each_model
def test_loss_and_gradient_are_those_of_the_model_at_the_point(make: MakeModel) -> None:
    small = Small(make)
    piece = Piece(Sample("all"), 0, 0, 1)

    n, loss, rows = small.oracle.answer("gradient", small.point, piece, None)

    assert n == NUM_EXAMPLES
    expected = small.task.loss(small.at_point(), small.everything()).item()
    assert loss == pytest.approx(expected, rel=1e-14)
    close(rows, small.by_autograd()[None])
    assert small.oracle.answer("loss", small.point, piece, None)[:2] == (n, pytest.approx(loss))


@each_model
def test_hessian_products_are_those_of_reverse_mode_twice(make: MakeModel) -> None:
    small = Small(make)
    v = small.direction()

    rows = small.ask("hvp", v)

    close(rows, small.by_autograd(v)[None])


def test_hessian_products_are_those_of_the_formula() -> None:
    small = Small(mlp)
    outputs, params = written_out(small)
    v = small.direction()

    rows = small.ask("hvp", v)

    _, expected = torch.autograd.functional.hvp(
        lambda *p: functional.cross_entropy(outputs(*p), small.everything()[1]),
        params,
        tuple(small.layout.views(v)),
    )
    close(rows, flat_rows(small, expected, 1))


@each_model
@pytest.mark.parametrize("kind", ["hvp", "ggnvp"])
def test_products_are_symmetric(make: MakeModel, kind: str) -> None:
    small = Small(make)
    u, v = small.direction(3), small.direction(4)

    hu, hv = small.ask(kind, u)[0], small.ask(kind, v)[0]

    close(v @ hu, u @ hv, 1e-11)


@each_model
def test_gauss_newton_products_are_never_negative(make: MakeModel) -> None:
    small = Small(make)

    squares = [v @ small.ask("ggnvp", v)[0] for v in map(small.direction, range(5))]

    assert min(squares) > 0


def test_a_gauss_newton_product_is_the_jacobian_around_the_softmaxs_hessian() -> None:
    small = Small(mlp)
    outputs, params = written_out(small)
    v = small.direction()

    rows = small.ask("ggnvp", v)

    jacobian = torch.autograd.functional.jacobian(outputs, params)
    flat = flat_rows(small, tuple(j.flatten(0, 1) for j in jacobian), NUM_EXAMPLES * NUM_CLASSES)
    p = outputs(*params).softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    ggn = flat.T @ torch.block_diag(*blocks) @ flat / NUM_EXAMPLES
    close(rows, (ggn @ v)[None])
    close(small.ask("fisher"), ggn)


def test_the_gauss_newton_matrix_of_squared_errors_is_twice_that_of_the_jacobian() -> None:
    small = Small(mlp, loss=mse)
    outputs, params = written_out(small)

    rows = small.ask("fisher")

    jacobian = torch.autograd.functional.jacobian(outputs, params)
    flat = flat_rows(small, tuple(j.flatten(0, 1) for j in jacobian), NUM_EXAMPLES * NUM_CLASSES)
    close(rows, 2 * flat.T @ flat / (NUM_EXAMPLES * NUM_CLASSES))


@pytest.mark.parametrize("make", BACKWARD_MODELS.values(), ids=BACKWARD_MODELS)
def test_gauss_newton_products_by_reverse_mode_are_those_of_the_written_out_model(
    make: MakeModel,
) -> None:
    small = Small(make)
    inputs, _ = small.everything()
    w, b, w2, b2 = small.layout.views(small.point)
    checkpointed = make is BACKWARD_MODELS["checkpointed"]

    def outputs(w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = inputs @ w.T + b
        return (hidden.tanh() @ w2.T + b2).sin() if checkpointed else hidden**2 @ w2.T + b2

    v = small.direction()

    rows = small.ask("ggnvp", v)

    params = (w, b, w2, b2)
    z, jv = torch.autograd.functional.jvp(outputs, params, tuple(small.layout.views(v)))
    p = z.softmax(1)
    hjv = p * jv - p * (p * jv).sum(1, keepdim=True)
    _, expected = torch.autograd.functional.vjp(outputs, params, hjv / NUM_EXAMPLES)
    close(rows, flat_rows(small, expected, 1))


def test_products_are_linear_in_the_vector_and_blind_to_its_padding() -> None:
    small = Small(mlp)
    v = small.direction()
    dirty = torch.where(small.masked(torch.ones_like(v)) == 0, 7.0, 2 * v)

    rows = small.ask("hvp", dirty)

    close(rows, 2 * small.ask("hvp", v))


@pytest.mark.parametrize("make", [LastOfLSTM, Attentive, norms], ids=["LSTM", "attention", "norms"])
@pytest.mark.parametrize("kind", ["hvp", "ggnvp"])
def test_float32_models_agree_with_float64(make: MakeModel, kind: str) -> None:
    single, double = Small(make, torch.float32), Small(make)
    double.point.copy_(single.point)
    double.data = TensorExamples(single.everything()[0].double(), single.everything()[1])
    double.oracle = Oracle(double.task, double.model, double.layout, double.data, seed=0)
    v = single.direction()

    rows = single.ask(kind, v)

    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), double.ask(kind, v.double()), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["gradient", "hvp", "ggnvp", "fisher_diagonal"])
def test_a_transformer_in_eval_mode_is_differentiated_as_well(kind: str) -> None:
    training, evaluating = Small(Attentive), Small(lambda: Attentive(dropout=0.5))
    evaluating.model.eval()
    v = training.direction() if kind in ("hvp", "ggnvp") else None

    rows = evaluating.ask(kind, v)

    close(rows, training.ask(kind, v))  # which has no dropout


# Matrices


@forward_model
def test_the_rows_of_a_matrix_are_its_products(make: MakeModel) -> None:
    small = Small(make)
    v = small.direction()

    hessian, fisher = small.ask("hessian"), small.ask("fisher")

    assert hessian.shape == fisher.shape == (small.layout.numel, small.layout.numel)
    close((hessian @ v)[None], small.ask("hvp", v))
    close((fisher @ v)[None], small.ask("ggnvp", v))
    padding = small.masked(torch.ones_like(v)) == 0
    assert not hessian[padding].any()
    assert not fisher[:, padding].any()


@pytest.mark.parametrize("make", BACKWARD_MODELS.values(), ids=BACKWARD_MODELS)
def test_matrices_of_models_that_are_not_vectorised_are_their_products(make: MakeModel) -> None:
    small = Small(make)
    v = small.direction()

    hessian, fisher = small.ask("hessian"), small.ask("fisher")

    close((hessian @ v)[None], small.by_autograd(v)[None])
    close((fisher @ v)[None], small.ask("ggnvp", v))


@pytest.mark.parametrize("loss", [functional.mse_loss, functional.huber_loss])
def test_losses_without_a_forward_derivative_have_matrices(loss: Callable[..., Tensor]) -> None:
    def of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return loss(model(batch[0]), batch[0][:, :NUM_CLASSES])

    small = Small(mlp, loss=of)
    v = small.direction()

    hessian, fisher = small.ask("hessian"), small.ask("fisher")

    close((hessian @ v)[None], small.by_autograd(v)[None])
    close((fisher @ v)[None], small.ask("ggnvp", v))


def test_the_hessian_is_that_of_the_formula() -> None:
    small = Small(mlp)
    outputs, params = written_out(small)

    rows = small.ask("hessian")

    blocks = torch.autograd.functional.hessian(
        lambda *p: functional.cross_entropy(outputs(*p), small.everything()[1]), params
    )
    sizes = [p.numel() for p in params]
    for slot, size, row in zip(small.layout.slots, sizes, blocks, strict=True):
        expected = flat_rows(small, tuple(b.reshape(size, -1) for b in row), size)
        close(rows[slot.offset : slot.end], expected)


def test_the_fisher_matrix_of_softmax_regression_is_its_hessian() -> None:
    small = Small(linear)

    fisher, hessian = small.ask("fisher"), small.ask("hessian")

    close(fisher, hessian)
    assert fisher.abs().max() > 0.1


# The Fisher matrix's diagonal


class Pieced:
    """Means and standard errors of a diagonal over rounds, which draw other labels."""

    def __init__(self, small: Small, rounds: int) -> None:
        drawn = [
            small.ask("fisher_diagonal", piece=Piece(Sample("all"), r, 0, 1))[0]
            for r in range(rounds)
        ]
        stacked = torch.stack(drawn)
        self.mean, self.error = stacked.mean(0), stacked.std(0) / rounds**0.5


@pytest.mark.parametrize("make", [linear, mlp, LastOfLSTM], ids=["linear", "mlp", "LSTM"])
def test_the_sampled_diagonal_tends_to_that_of_the_fisher_matrix(make: MakeModel) -> None:
    few = TensorExamples(*(tensor[:8] for tensor in Small(make).everything()))
    small = Small(make, data=few)

    sampled = Pieced(small, 25 if make is LastOfLSTM else 150)

    expected = small.ask("fisher").diag()
    assert ((sampled.mean - expected).abs() <= 5 * sampled.error + 1e-14).all()
    assert sampled.error.max() < 0.3 * expected.max()


def test_the_diagonal_never_sees_the_datas_labels() -> None:
    small = Small(mlp)
    inputs, classes = small.everything()
    other = Small(mlp, data=TensorExamples(inputs, (classes + 1) % NUM_CLASSES))

    rows = small.ask("fisher_diagonal")

    assert rows.equal(other.ask("fisher_diagonal"))
    assert not small.ask("gradient").allclose(other.ask("gradient"))


@forward_model
def test_the_diagonal_is_the_mean_of_squared_gradients_for_the_labels_drawn(
    make: MakeModel,
) -> None:
    drawn: list[Tensor] = []

    def sample(outputs: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(torch.randint(NUM_CLASSES, (len(outputs),), generator=generator))
        return drawn[-1]

    small = Small(make, sample_targets=sample)
    if make is norms:
        small.model.eval()

    rows = small.ask("fisher_diagonal")

    inputs, _ = small.everything()
    squares = torch.zeros_like(rows[0])
    for one, label in zip(inputs, torch.cat(drawn), strict=True):
        small.data = TensorExamples(one[None], label[None])
        squares += small.by_autograd() ** 2
    close(rows[0], squares / NUM_EXAMPLES)


def test_labels_and_gradients_come_from_the_same_network_under_dropout() -> None:
    class Recorded(nn.Module):
        seen: list[Tensor]

        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = dropout(), []

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.net(inputs)
            return logits

    predicted: list[Tensor] = []

    def certain(outputs: Tensor, generator: torch.Generator) -> Tensor:
        predicted.append(outputs)
        return outputs

    def squared(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    inputs, _ = Small(dropout).everything()
    small = Small(
        Recorded, data=TensorExamples(inputs, torch.ones(NUM_EXAMPLES, NUM_CLASSES, dtype=DOUBLE)),
        sample_targets=certain, loss=squared,
    )  # fmt: skip

    rows = small.ask("fisher_diagonal")

    assert not rows.any()  # the error is exactly 0 only where both have the same units dropped
    assert predicted[0].std(0).min() > 0.01


# Pieces


def answers(small: Small, kind: Kind, of: int, vector: Tensor | None) -> tuple[int, float, Tensor]:
    """Return the weighted sums of the answers for ``of`` pieces."""
    samples, loss, total = 0, 0.0, torch.zeros(1, dtype=DOUBLE)
    for number in range(of):
        piece = Piece(Sample("gradient", 19), 4, number, of)
        n, mean, rows = small.oracle.answer(kind, small.point, piece, vector)
        samples, loss, total = samples + n, loss + n * mean, total + n * rows
    return samples, loss, total


@pytest.mark.parametrize("kind", ["loss", "gradient", "hvp", "ggnvp", "hessian", "fisher"])
@pytest.mark.parametrize("of", [2, 5, 19, 30])
def test_pieces_add_up_to_the_sample(kind: Kind, of: int) -> None:
    small = Small(mlp if kind != "fisher" else linear)
    v = small.direction() if kind in ("hvp", "ggnvp") else None

    samples, loss, rows = answers(small, kind, of, v)

    whole_samples, whole_loss, whole_rows = answers(small, kind, 1, v)
    assert samples == whole_samples == 19
    assert loss == pytest.approx(whole_loss, rel=1e-12, nan_ok=True)
    assert math.isnan(loss) == (kind not in ("loss", "gradient"))
    close(rows, whole_rows)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_piece_without_samples_has_zeros_in_the_usual_shape(kind: Kind) -> None:
    small = Small(linear)
    v = small.direction() if kind in ("hvp", "ggnvp") else None
    empty = Piece(Sample("g", 1), 0, 0, 2)

    samples, _, rows = small.oracle.answer(kind, small.point, empty, v)

    assert samples == 0
    assert rows.shape == small.ask(kind, v).shape
    assert not rows.any()


@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_answer_can_be_given_again(kind: Kind) -> None:
    small = Small(dropout)
    v = small.direction() if kind in ("hvp", "ggnvp") else None
    piece = Piece(Sample("g", 9), 1, 1, 2)

    first = small.ask(kind, v, piece)
    torch.rand(7)

    assert small.ask(kind, v, piece).equal(first)
    if kind != "loss":
        assert not small.ask(kind, v, Piece(Sample("g", 9), 1, 0, 2)).equal(first)


def test_all_requests_on_a_piece_meet_the_same_dropout() -> None:
    small = Small(dropout)
    v, t = small.direction(), 1e-5
    piece = Piece(Sample("g"), 3, 0, 1)

    product = small.ask("hvp", v, piece)

    ahead, behind = (
        small.oracle.answer("gradient", small.point + s * v, piece, None)[2] for s in (t, -t)
    )
    torch.testing.assert_close(product, (ahead - behind) / (2 * t), rtol=1e-6, atol=1e-8)
    ahead, behind = (
        torch.tensor(small.oracle.answer("loss", small.point + s * v, piece, None)[1])
        for s in (t, -t)
    )
    slope = (small.ask("gradient", None, piece)[0] @ v).float()
    torch.testing.assert_close((ahead - behind).div(2 * t).float(), slope, rtol=0.05, atol=0.02)


@each_model
def test_the_users_model_and_torchs_random_state_stay_as_they_are(make: MakeModel) -> None:
    small = Small(make)
    before = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    parameters = list(small.model.parameters())
    point, random_state = small.point.clone(), torch.get_rng_state()
    v = small.direction()

    for kind in ("loss", "gradient", "hvp", "ggnvp", "hessian", "fisher"):
        small.ask(kind, v if kind in ("hvp", "ggnvp") else None)

    after = small.model.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(a is b for a, b in zip(small.model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in parameters)
    assert all(getattr(m, "track_running_stats", True) for m in small.model.modules())
    assert small.model.training
    assert small.point.equal(point)
    assert torch.get_rng_state().equal(random_state)
    assert torch.backends.mkldnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()


# Tasks that come with the package


def shipped(of: Task, data: Any = None) -> tuple[Oracle, Layout, Tensor]:
    model = of.model()
    layout = Layout.of(model)
    noise = torch.Generator().manual_seed(0)
    point = layout.flatten(model)
    for view in layout.views(point):
        view.add_(0.1 * torch.randn(view.shape, generator=noise))
    return Oracle(of, model, layout, data or of.data().train, seed=0), layout, point


ALL = Piece(Sample("all"), 0, 0, 1)


def test_the_quadratics_curvature_is_a_however_it_is_asked_for() -> None:
    oracle, _, point = shipped(task("quadratic:dim=64,condition=10"))
    a = torch.logspace(0, -1, 64)
    v = torch.linspace(-1, 1, 64)

    for kind in ("hvp", "ggnvp"):
        torch.testing.assert_close(oracle.answer(kind, point, ALL, v)[2][0], a * v)  # type: ignore[arg-type]
    for kind in ("hessian", "fisher"):
        torch.testing.assert_close(oracle.answer(kind, point, ALL, None)[2], a.diag())  # type: ignore[arg-type]
    diagonal = oracle.answer("fisher_diagonal", point, ALL, None)[2][0]
    assert ((diagonal / a - 1).abs() < 5 * (2 / 1000) ** 0.5).all()  # of 1,000 squared normals


def test_logistic_regressions_fisher_matrix_is_its_hessian() -> None:
    described = Logistic().build()
    assert described.sample_targets is not None
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=noise)
    labels = torch.randint(0, 2, (400,), generator=noise).float() * 2 - 1
    small = Task(
        name="small", model=lambda: nn.Linear(6, 1), data=lambda: None,  # type: ignore[arg-type,return-value]
        loss=logistic_loss, metrics=sign_accuracy, sample_targets=described.sample_targets,
    )  # fmt: skip
    oracle, layout, point = shipped(small, TensorExamples(features, labels))

    fisher = oracle.answer("fisher", point, ALL, None)[2]

    torch.testing.assert_close(fisher, oracle.answer("hessian", point, ALL, None)[2])
    weight, bias = layout.views(point)
    p = (features @ weight[0] + bias).sigmoid()
    squares = torch.cat([features, torch.ones(400, 1)], 1) ** 2
    expected = (squares * (p * (1 - p))[:, None]).mean(0)
    elements = torch.cat([torch.arange(s.offset, s.end) for s in layout.slots])
    torch.testing.assert_close(fisher.diag()[elements], expected)
    rounds = [
        oracle.answer("fisher_diagonal", point, Piece(Sample("d"), r, 0, 1), None)[2][0][elements]
        for r in range(30)
    ]
    error = torch.stack(rounds).std(0) / 30**0.5
    assert ((torch.stack(rounds).mean(0) - expected).abs() < 5 * error).all()


def test_the_digits_answer_every_kind_of_request_that_fits() -> None:
    noise = torch.Generator().manual_seed(1)
    images = torch.randn(50, 64, generator=noise)
    classes = torch.randint(10, (50,), generator=noise)
    oracle, layout, point = shipped(task("digits:hidden=8"), TensorExamples(images, classes))
    v = torch.ones(layout.numel)

    for kind in get_args(Kind):
        piece = Piece(Sample("g", 40), 0, 0, 1)
        samples, _, rows = oracle.answer(kind, point, piece, v if kind.endswith("vp") else None)
        assert samples == 40
        assert rows.dtype == torch.float32
        assert bool(rows.isfinite().all())


# Refusals


def twice(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model, batch) + cross_entropy(model, batch)


def penalised(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model, batch) + sum(p.square().sum() for p in model.parameters())


def by_part(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model, batch) + model[0].weight.square().sum()  # type: ignore[index]


def reads_weight(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model, batch) + model.weight.square().sum()  # type: ignore[operator,union-attr]


class Two(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs), inputs


def first_of_two(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.cross_entropy(model(batch[0])[0], batch[1])


@pytest.mark.parametrize(
    ("make", "loss", "message"),
    [
        (mlp, twice, "calls the model 2 times"),
        (linear, lambda m, b: b[0].sum(), "calls the model 0 times"),
        (mlp, penalised, "reads parameters or parts of the model"),
        (linear, reads_weight, "reads parameters or parts of the model"),
        (Two, first_of_two, "gives its loss tuple"),
    ],
)
@pytest.mark.parametrize("kind", ["ggnvp", "fisher"])
def test_a_loss_that_has_no_gauss_newton_matrix_is_refused(
    make: MakeModel, loss: Any, message: str, kind: str
) -> None:
    small = Small(make, loss=loss)

    with pytest.raises(TaskError, match=rf"task 'small' .*{message}"):
        small.ask(kind, small.direction() if kind == "ggnvp" else None)


@pytest.mark.parametrize("loss", [twice, penalised, by_part])
def test_hessians_take_any_loss(loss: Any) -> None:
    small = Small(mlp, loss=loss)
    v = small.direction()

    rows = small.ask("hvp", v)

    close(rows, small.by_autograd(v)[None])


def test_a_loss_may_read_the_models_buffers_and_settings() -> None:
    class Weighted(nn.Linear):
        weights: Tensor
        factor = 3.0

        def __init__(self) -> None:
            super().__init__(8, NUM_CLASSES)
            self.register_buffer("weights", torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE))

    def weighted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        z = model(batch[0])
        return model.factor * functional.cross_entropy(z, batch[1], weight=model.weights)  # type: ignore[operator,arg-type]

    small = Small(Weighted, loss=weighted)

    fisher = small.ask("fisher")

    close(fisher, small.ask("hessian"))  # the model is linear


def test_the_diagonal_takes_a_task_that_draws_targets() -> None:
    small = Small(mlp, sample_targets=None)

    with pytest.raises(TaskError, match=r"set Task\.sample_targets, such as workers\.tasks\."):
        small.ask("fisher_diagonal")


def test_targets_of_another_shape_are_refused() -> None:
    small = Small(mlp, sample_targets=lambda outputs, generator: outputs)

    with pytest.raises(TaskError, match=r"must return the shape .*\(23,\), got \(23, 3\)"):
        small.ask("fisher_diagonal")


def test_batch_norm_in_training_has_no_gradient_of_a_sample() -> None:
    small = Small(norms)

    with pytest.raises(TaskError, match=r"^layer '1' normalises by its batch"):
        small.ask("fisher_diagonal")
    small.model.eval()
    assert small.ask("fisher_diagonal").any()


@pytest.mark.parametrize(
    ("kind", "instead"), [("hessian", "hvp"), ("fisher", "ggnvp or fisher_diagonal")]
)
def test_a_matrix_that_is_too_large_is_refused(kind: str, instead: str) -> None:
    small = Small(lambda: nn.Sequential(nn.Linear(8, 700), nn.Linear(700, NUM_CLASSES)))

    with pytest.raises(LayoutError, match=rf"^{kind} .* its limit is 8,192: use {instead}$"):
        small.ask(kind)
    assert small.layout.numel > DENSE_LIMIT


def test_vectors_that_do_not_fit_are_refused() -> None:
    small = Small(mlp)

    with pytest.raises(ValueError, match=r"^hvp takes a vector$"):
        small.ask("hvp")
    with pytest.raises(LayoutError, match=r"^expected a vector of"):
        small.ask("hvp", torch.zeros(3, dtype=DOUBLE))
    with pytest.raises(LayoutError, match=r"^expected a vector of"):
        small.oracle.answer("loss", small.point.float(), ALL, None)


def test_what_the_loss_raises_is_the_cause() -> None:
    def broken(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        raise RuntimeError("no such thing")

    small = Small(mlp, loss=broken)

    with pytest.raises(TaskError, match=r"^hvp of the loss of task 'small' failed: .*no such"):
        small.ask("hvp", small.direction())
