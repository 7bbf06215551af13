from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paramserver.layout import Layout
from workers.gradients import BoundModel


class Tied(nn.Module):
    """An embedding that is the output layer as well, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 13)
        self.hidden = nn.Linear(13, 13)
        self.unused = nn.Parameter(torch.ones(70))
        self.out = nn.Linear(13, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.out(torch.tanh(self.hidden(self.embed(tokens))))
        return hidden


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 7))


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Tied):
        tokens = torch.randint(0, 11, (9,), generator=generator)
        return nn.functional.cross_entropy(model(tokens), tokens.roll(1))
    inputs = torch.randn(5, 20, generator=generator)
    loss: Tensor = model(inputs).square().mean()
    return loss


class Bound:
    """A model bound to vectors of its own parameters, cut into shards."""

    def __init__(self, model: nn.Module, shards: int = 1) -> None:
        self.layout = Layout.of(model)
        self.cuts = self.layout.cuts(shards)
        self.flat = self.layout.flatten(model)
        self.slots = [torch.full((len(cut),), math.pi) for cut in self.cuts]
        self.bound = BoundModel(model, self.layout, self.cuts)
        self.bound.write_gradients_to(self.slots)
        self.bound.read(self.vectors())

    def vectors(self) -> list[Tensor]:
        return [self.flat[cut.start : cut.stop].clone() for cut in self.cuts]

    def gradients(self) -> list[Tensor]:
        """Return each parameter's gradient as it lies in the slots."""
        return self.layout.views(torch.cat(self.slots))


def ordinary(model: nn.Module, seed: int = 1) -> list[Tensor]:
    loss_of(model, seed).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("make", [mlp, tied])
@pytest.mark.parametrize("shards", [1, 3, 7])
def test_gradients_are_those_of_ordinary_autograd_wherever_the_cuts_are(
    make: type[nn.Module], shards: int
) -> None:
    expected = ordinary(make())
    shards = min(shards, Layout.of(make()).numel // 64)
    model = make()
    bound = Bound(model, shards)

    norm = bound.bound.backward(loss_of(model))

    for name, mine, theirs in zip(dict(model.named_parameters()), bound.gradients(), expected,
                                  strict=True):  # fmt: skip
        assert torch.equal(mine, theirs), name
    whole = [nn.Parameter(torch.zeros_like(g)) for g in expected]
    for parameter, grad in zip(whole, expected, strict=True):
        parameter.grad = grad.clone()
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(whole, 1.0)), rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shards", [1, 3])
def test_the_parameters_are_those_that_were_read(shards: int) -> None:
    model = mlp()
    bound = Bound(model, shards)
    bound.flat = torch.randn(bound.flat.shape)

    bound.bound.read(bound.vectors())

    for parameter, view in zip(model.parameters(), bound.layout.views(bound.flat), strict=True):
        assert torch.equal(parameter, view)


def test_reading_copies_no_parameter_that_no_cut_goes_through() -> None:
    model = mlp()
    bound = Bound(model)
    (vector,) = bound.vectors()

    bound.bound.read([vector])

    assert next(model.parameters()).data_ptr() == vector.data_ptr()


def test_a_second_backward_overwrites_the_first() -> None:
    model = mlp()
    bound = Bound(model, shards=3)
    bound.bound.backward(loss_of(model, seed=5))

    bound.bound.backward(loss_of(model, seed=1))

    for mine, theirs in zip(bound.gradients(), ordinary(mlp()), strict=True):
        assert torch.equal(mine, theirs)


def test_a_parameter_whose_gradient_comes_in_parts_gets_their_sum() -> None:
    def loss_of_parts(model: nn.Module) -> Tensor:
        inputs = torch.linspace(-1, 1, 80).reshape(4, 20).requires_grad_()
        parts = [checkpoint(model, inputs * i, use_reentrant=True) for i in (1, 2)]
        return torch.stack(parts).square().sum()

    plain, model = mlp(), mlp()
    loss_of_parts(plain).backward()
    bound = Bound(model, shards=3)

    bound.bound.backward(loss_of_parts(model))

    for mine, parameter in zip(bound.gradients(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_layer_that_is_not_finite_is_named(bad: float) -> None:
    model = mlp()
    bound = Bound(model, shards=3)
    bias = dict(model.named_parameters())["2.bias"]

    norm = bound.bound.backward((bias * bad).sum())

    assert not math.isfinite(norm)
    assert bound.bound.nonfinite_layer() == "2.bias"


def test_a_norm_too_large_for_float32_is_exact_and_its_gradient_is_fine() -> None:
    model = mlp()
    bound = Bound(model, shards=3)
    bias = dict(model.named_parameters())["2.bias"]

    norm = bound.bound.backward((bias * 1e30).sum())

    assert norm == pytest.approx(1e30 * math.sqrt(7))
    assert bound.bound.nonfinite_layer() == ""


def test_a_gradient_of_zero_has_norm_zero() -> None:
    model = mlp()
    bound = Bound(model)

    norm = bound.bound.backward(sum((p.sum() * 0 for p in model.parameters()), torch.zeros(())))

    assert norm == 0.0
    assert not any(grad.any() for grad in bound.gradients())
