from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import LayoutError, TaskError
from paramserver.layout import Layout
from tests.support.small_tasks import (
    BACKWARD_MODELS,
    DOUBLE,
    MODELS,
    Attentive,
    LastOfLSTM,
    Small,
    dropout,
    mlp,
    norms,
)
from workers.batches import seed_step
from workers.forward import (
    FORWARD_LIMIT,
    ForwardGradient,
    directional_derivative,
    exact_gradient,
    random_gradient,
)
from workers.functional import PureLoss, differentiable, push_forward
from workers.gradients import BoundModel
from workers.tasks import task

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

MakeModel = Callable[[], nn.Module]
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
STEP = {"seed": 3, "worker": 1, "clock": 7}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def pure_of(small: Small) -> PureLoss:
    return PureLoss(small.task, small.model, small.layout)


class Forward:
    """A model bound to shards' vectors as the training loops do it, and its forward gradient."""

    def __init__(self, small: Small, shards: int = 1, directions: int | None = 1) -> None:
        self.small, self.cuts = small, small.layout.cuts(shards)
        self.slots = [torch.full((len(cut),), 7.0, dtype=small.layout.dtype) for cut in self.cuts]
        self.bound = BoundModel(small.model, small.layout, self.cuts)
        self.bound.read([small.point[cut.start : cut.stop].clone() for cut in self.cuts])
        self.bound.write_gradients_to(self.slots)
        self.forward = ForwardGradient(
            small.task, small.model, small.layout, self.cuts, directions=directions
        )
        self.forward.write_gradients_to(self.slots)

    def gradient(self, **step: int) -> tuple[float, float, Tensor]:
        loss, norm = self.forward.gradient(self.small.everything(), **{**STEP, **step})
        return loss, norm, torch.cat(self.slots)

    def backward(self) -> tuple[float, float, Tensor]:
        seed_step(*STEP.values())
        loss = self.small.task.loss(self.small.model, self.small.everything())
        norm = self.bound.backward(loss)
        return loss.item(), norm, torch.cat(self.slots)


# One direction


@each_model
def test_a_directional_derivative_is_the_gradient_along_it(make: MakeModel) -> None:
    small = Small(make)
    pure, v = pure_of(small), small.direction()

    loss, slope = directional_derivative(
        pure, pure.split(small.point), pure.split(v), small.everything(), 0
    )

    close(slope, small.by_autograd() @ v)
    close(loss, small.task.loss(small.at_point(), small.everything()).detach())


def test_a_directional_derivative_is_that_of_torchs_other_implementation() -> None:
    small = Small(mlp)
    pure, v = pure_of(small), small.direction()
    params, along = pure.split(small.point), pure.split(v)

    loss, slope = directional_derivative(pure, params, along, small.everything(), 0)

    expected = torch.autograd.functional.jvp(
        lambda *p: pure.loss(p, small.everything(), 0), params, along
    )
    close(torch.stack([loss, slope]), torch.stack(expected))


@pytest.mark.parametrize("make", [mlp, Attentive], ids=["mlp", "transformer"])
def test_forward_and_reverse_mode_pass_torchs_gradient_check(make: MakeModel) -> None:
    small = Small(make)
    pure, batch = pure_of(small), small.everything()
    params = tuple(part.clone().requires_grad_() for part in pure.split(small.point))

    with differentiable(small.model):
        assert torch.autograd.gradcheck(
            lambda *p: pure.loss(p, batch, 0), params, check_forward_ad=True, fast_mode=True
        )


@each_model
def test_forward_and_reverse_mode_are_adjoint(make: MakeModel) -> None:
    small = Small(make)
    pure, batch, v = pure_of(small), small.everything(), small.direction()
    params = pure.split(small.point)
    u = torch.randn(len(batch[0]), 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))

    with differentiable(small.model):
        z, jv = push_forward(lambda p: pure.outputs(p, batch, 0), params, pure.split(v))

    assert z.shape == u.shape
    model = small.at_point()
    (model(batch[0]) * u).sum().backward()
    named = dict(model.named_parameters())
    pulled = pure.join([named[s.name].grad for s in small.layout.slots], torch.zeros_like(v))
    close((u * jv).sum(), pulled @ v, 1e-11)


# The exact gradient


@each_model
@pytest.mark.parametrize("shards", [1, 2])
def test_all_unit_vectors_give_what_backward_gives(make: MakeModel, shards: int) -> None:
    run = Forward(Small(make), shards, directions=None)

    loss, norm, gradient = run.gradient()

    close(gradient, run.small.by_autograd())
    expected = run.backward()
    close(gradient, expected[2])
    assert (loss, norm) == pytest.approx(expected[:2], rel=1e-12)


def test_dropout_is_that_of_the_same_step_by_backward() -> None:
    run = Forward(Small(dropout), directions=None)

    _, norm, gradient = run.gradient()

    expected = run.backward()
    close(gradient, expected[2])
    assert norm == pytest.approx(expected[1], rel=1e-12)
    assert not gradient.allclose(run.gradient(clock=8)[2])


@pytest.mark.parametrize("make", [LastOfLSTM, Attentive, norms], ids=["LSTM", "attention", "norms"])
def test_float32_models_have_forward_gradients(make: MakeModel) -> None:
    small = Small(make, torch.float32)
    pure = pure_of(small)

    _, gradient = exact_gradient(pure, pure.split(small.point), small.everything(), 0)

    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, small.by_autograd(), rtol=1e-4, atol=1e-5)


def test_the_exact_gradient_of_a_large_model_is_refused() -> None:
    small = Small(lambda: nn.Linear(8, FORWARD_LIMIT // 8))
    pure = pure_of(small)
    message = r"takes a pass for each of 22,500 parameters, and its limit is 20,000: use random"

    with pytest.raises(LayoutError, match=message):
        ForwardGradient(
            small.task, small.model, small.layout, small.layout.cuts(1), directions=None
        )
    with pytest.raises(LayoutError, match=message):
        exact_gradient(pure, pure.split(small.point), small.everything(), 0)


# Random directions


def estimates(small: Small, number: int, directions: int) -> Tensor:
    pure = pure_of(small)
    params, batch = pure.split(small.point), small.everything()
    noise = torch.Generator().manual_seed(11)
    return torch.stack(
        [
            random_gradient(pure, params, batch, 0, directions=directions, generator=noise)[1]
            for _ in range(number)
        ]
    )


def test_random_gradients_are_the_gradient_on_average() -> None:
    small = Small(mlp)
    expected, number = small.by_autograd(), 500

    drawn = estimates(small, number, directions=1)

    error = drawn.std(0) / number**0.5
    assert ((drawn.mean(0) - expected).abs() <= 5 * error).all()
    assert error.max() < 0.35 * expected.abs().max()


@pytest.mark.parametrize("directions", [1, 4])
def test_random_gradients_vary_as_theory_says(directions: int) -> None:
    small = Small(mlp)
    number, P = 400 // directions, small.layout.num_parameters

    squares = estimates(small, number, directions).square().sum(1)

    # E|g|² = |∇f|² (1 + (P + 1) / K)
    expected = small.by_autograd().square().sum() * (1 + (P + 1) / directions)
    assert (squares.mean() - expected).abs() < 5 * squares.std() / number**0.5


def test_a_random_gradient_is_its_direction_times_the_slope() -> None:
    run = Forward(Small(mlp))

    loss, norm, gradient = run.gradient()

    slope = run.small.by_autograd() @ gradient  # = (∇f·v)² for g = (∇f·v) v
    direction = gradient / slope.sqrt()
    close(run.small.by_autograd() @ direction * direction, gradient, 1e-10)
    elements = run.small.masked(torch.ones_like(gradient)) == 1
    assert 0.7 < direction[elements].std() < 1.3
    assert not gradient[~elements].any()
    assert loss == pytest.approx(run.backward()[0], rel=1e-12)
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-12)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("directions", [1, 3])
def test_a_step_made_again_is_the_same_wherever_the_cuts_are(shards: int, directions: int) -> None:
    first = Forward(Small(dropout), directions=directions).gradient()
    run = Forward(Small(dropout), shards, directions)
    torch.rand(5)

    again = run.gradient()

    assert again[:2] == first[:2]
    assert again[2].equal(first[2])


@pytest.mark.parametrize("change", [{"seed": 4}, {"worker": 2}, {"clock": 8}])
def test_other_steps_take_other_directions(change: dict[str, int]) -> None:
    run = Forward(Small(mlp))
    _, _, gradient = run.gradient()
    first = gradient.clone()

    _, _, other = run.gradient(**change)

    cosine = torch.nn.functional.cosine_similarity(first, other, dim=0)
    assert cosine.abs() < 0.7


def test_a_quadratic_is_solved_by_random_gradients() -> None:
    bowl = task("quadratic:dim=4,condition=2,noise=0")
    model, examples = bowl.model(), bowl.data().train
    layout = Layout.of(model)
    gradient = torch.zeros(layout.numel)
    forward = ForwardGradient(bowl, model, layout, layout.cuts(1))
    forward.write_gradients_to([gradient])
    batch = examples.batch(torch.tensor([0]))

    for clock in range(250):
        forward.gradient(batch, seed=0, worker=0, clock=clock)
        with torch.no_grad():
            for p, view in zip(model.parameters(), layout.views(gradient), strict=True):
                p.sub_(view, alpha=0.12)

    (x,) = model.parameters()
    assert (x - 1).norm() < 1e-3


# What is left as it was, and what is refused


@each_model
@pytest.mark.parametrize("directions", [1, None])
def test_the_model_and_torchs_random_state_stay_as_they_are(
    make: MakeModel, directions: int | None
) -> None:
    run = Forward(Small(make), directions=directions)
    before = {name: tensor.clone() for name, tensor in run.small.model.state_dict().items()}
    random_state = torch.get_rng_state()

    run.gradient()

    after = run.small.model.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in run.small.model.parameters())
    assert all(getattr(m, "track_running_stats", True) for m in run.small.model.modules())
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize(("scale", "layer"), [(1e30, ""), (float("nan"), "0.weight")])
def test_norms_are_those_of_backward_also_where_squares_overflow(scale: float, layer: str) -> None:
    def scaled(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        loss: Tensor = model(batch[0]).square().mean() * scale
        return loss

    run = Forward(Small(mlp, torch.float32, loss=scaled), directions=None)

    _, norm, _ = run.gradient()

    assert run.bound.nonfinite_layer() == layer
    assert norm == pytest.approx(run.backward()[1], rel=1e-5, nan_ok=True)


def test_a_model_without_a_forward_derivative_is_refused() -> None:
    run = Forward(Small(BACKWARD_MODELS["own function"]))

    message = r"^the forward derivative of the loss of task 'small' failed: .*jvp"
    with pytest.raises(TaskError, match=message):
        run.gradient()


def test_no_direction_is_refused() -> None:
    small = Small(mlp)

    with pytest.raises(ValueError, match=r"^directions must be 1 or more, or None for all, got 0"):
        ForwardGradient(small.task, small.model, small.layout, small.layout.cuts(1), directions=0)
