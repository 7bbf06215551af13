from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import TaskError
from paramserver.layout import Layout
from workers.diagnostics import Diagnosis, Diagnostics, Layer, Units, noise_scale, warnings_of
from workers.examiner import Examiner, Looks
from workers.examples import Batch, Data, TensorExamples
from workers.task import Task


def diagnostics(
    model: nn.Module,
    inputs: Tensor,
    loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: model(batch[0]).mean(),
    batch_size: int = 8,
) -> Diagnostics:
    """Look at ``model`` as it is, on ``inputs``."""
    examples = TensorExamples(inputs)
    task = Task(
        name="inspected",
        model=lambda: model,
        data=lambda: Data(examples, examples),
        loss=loss,
        headline="loss",
        batch_size=batch_size,
    )
    return Diagnostics(task, model, Layout.of(model), examples, seed=0)


def look(model: nn.Module, inputs: Tensor) -> Diagnosis:
    return diagnostics(model, inputs).look(1)


def chain(*links: nn.Module, weight: float = 1.0) -> nn.Module:
    """Return scalar layers of one weight and no bias, each followed by its own of ``links``."""
    layers = []
    for link in links:
        linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(linear.weight, weight)
        layers += [linear, link]
    return nn.Sequential(*layers)


def test_sparse_gradients_are_looked_at_as_dense_ones() -> None:
    words = torch.randint(5, (32,), generator=torch.Generator().manual_seed(0))
    layers = []
    for sparse in (False, True):
        torch.manual_seed(1)
        layers.append(look(nn.Embedding(5, 3, sparse=sparse), words).layers)

    assert layers[0] == layers[1]
    assert layers[0]["weight"].gradient > 0


def test_gradients_are_the_means_over_all_samples() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs = torch.randn(32, 3, dtype=torch.float64)
    loss = model(inputs).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    layers = look(model, inputs).layers

    names = [name for name, _ in model.named_parameters()]
    assert list(layers) == names
    assert [layers[name].gradient for name in names] == pytest.approx(
        [float(g.norm()) for g in gradients]
    )
    assert layers["2.weight"].weight == pytest.approx(float(model[2].weight.detach().norm()))


@pytest.mark.parametrize(("scale", "depth"), [(0.5, 6), (2.0, 6)])
def test_in_a_deep_linear_net_the_singular_values_multiply(scale: float, depth: int) -> None:
    """u.W_L ... W_1 x with W = s Q, Q orthogonal: the gradient of W_1 has norm s^(L-1)|u||x|."""
    layers = [nn.Linear(4, 4, bias=False).double() for _ in range(depth)]
    for layer in layers:
        layer.weight.data = scale * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    sample = torch.randn(1, 4, dtype=torch.float64)

    found = look(nn.Sequential(*layers), sample).layers["0.weight"]

    u = torch.full((4,), 0.25)  # the mean of four outputs
    assert found.gradient == pytest.approx(
        scale ** (depth - 1) * float(u.norm()) * float(sample.norm())
    )


def test_a_chain_of_sigmoids_lets_no_more_than_a_quarter_pass_each() -> None:
    """The slope of a sigmoid is 1/4 at most: n of them after a weight let (1/4)^n through."""
    depth = 10

    diagnosis = look(chain(*(nn.Sigmoid() for _ in range(depth))), torch.zeros(8, 1) + 1.0)

    gradients = [layer.gradient for layer in diagnosis.layers.values()]
    for behind, gradient in enumerate(reversed(gradients), start=1):
        assert 0 < gradient <= 0.25**behind
    assert any("0.weight vanishes" in warning for warning in diagnosis.warnings.values())
    assert "vanishing 18.weight" not in diagnosis.warnings


def test_an_exploding_gradient_names_the_layer_where_it_is_largest() -> None:
    diagnosis = look(chain(*(nn.Identity() for _ in range(8)), weight=10.0), torch.ones(8, 1))

    (warning,) = diagnosis.warnings.values()
    assert warning.startswith("the gradient explodes: its norm is 2.8e+07")  # 10^7 √8
    assert "that of the parameters 28" in warning  # 10 √8


def test_a_gradient_that_is_not_finite_is_all_there_is_to_say() -> None:
    layers = {"a": Layer(1.0, 1.0, None), "b": Layer(math.inf, 1.0, None)}

    found = warnings_of(layers, {"a": 1, "b": 1}, {"tanh": Units("saturated", 1.0)})

    assert list(found.values()) == ["the gradient of b is not finite"]


def test_a_parameter_that_nothing_depends_on_does_not_vanish() -> None:
    model = nn.ParameterDict({"used": torch.ones(()), "unused": torch.ones(())})

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, nn.ParameterDict)
        return (model["used"] * batch[0]).mean()

    diagnosis = diagnostics(model, torch.ones(8), loss).look(0)

    assert diagnosis.layers["unused"].gradient == 0
    assert not diagnosis.warnings


def test_dead_units_are_those_that_no_sample_wakes() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [0.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0, -1.0]))
    both_signs = torch.tensor([1.0, -1.0] * 4)[:, None]

    assert look(model, both_signs).units == {"layer 1 (relu)": Units("dead", 0.5)}
    assert look(model, both_signs.abs()).units == {"layer 1 (relu)": Units("dead", 0.75)}


def test_dead_units_of_images_are_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None])
        model[0].bias.zero_()

    diagnosis = look(model, torch.rand(8, 1, 3, 5) + 0.1)

    assert diagnosis.units == {"layer 1 (relu)": Units("dead", 0.5)}


@pytest.mark.parametrize(
    ("activation", "at_rest", "awake"),
    [(nn.Sigmoid(), 3.9, 3.8), (nn.Tanh(), 1.95, 1.9)],  # within 0.02 of 0 or 1, 0.04 of -1 or 1
)
def test_saturated_outputs_are_those_near_a_limit(
    activation: nn.Module, at_rest: float, awake: float
) -> None:
    inputs = torch.tensor([at_rest, -at_rest, awake, -awake, 0.0, 1.0, 9.0, -9.0])[:, None]

    diagnosis = look(chain(activation), inputs)

    (units,) = diagnosis.units.values()
    assert units == Units("saturated", 0.5)


class Functional(nn.Module):
    """Activations called as functions, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        once = torch.relu(self.inner(inputs))
        twice = nn.functional.relu(once)
        return twice.tanh() + torch.sigmoid(once)


def test_functions_are_seen_as_modules_are_and_each_call_once() -> None:
    model = nn.ModuleDict({"first": Functional(), "second": nn.ReLU()})

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, nn.ModuleDict)
        return model["second"](model["first"](batch[0])).mean()

    units = diagnostics(model, torch.randn(8, 2), loss).look(0).units

    assert sorted(units) == [
        "layer first (relu 2)",
        "layer first (relu)",
        "layer first (sigmoid)",
        "layer first (tanh)",
        "layer second (relu)",
    ]


def test_most_units_at_rest_are_warned_of() -> None:
    units = {"layer 1 (relu)": Units("dead", 0.51), "layer 3 (tanh)": Units("saturated", 0.5)}

    found = warnings_of({"a": Layer(1.0, 1.0, None)}, {"a": 1}, units)

    assert list(found.values()) == ["51 % of the units of layer 1 (relu) are dead"]


def test_the_step_of_plain_sgd_is_its_rate_times_the_gradient() -> None:
    """y = w x on x = 1: the gradient is 1 and five updates of rate 0.01 move w from 1 to 0.95."""
    model = chain(nn.Identity())
    watch = diagnostics(model, torch.ones(8, 1))

    first = watch.look(3).layers["0.weight"].step
    with torch.no_grad():
        for _ in range(5):
            model[0].weight.sub_(0.01)
    second = watch.look(8).layers["0.weight"].step
    same = watch.look(8).layers["0.weight"].step

    assert first is None
    assert second == pytest.approx(0.01 / 0.95, rel=1e-5)
    assert same is None


def test_the_noise_scale_is_the_spread_of_batches_over_the_mean() -> None:
    """Of K batches of b: tr S = b Σ|g - m|²/(K-1), |G|² = |m|² - tr S / (bK)."""
    batches = torch.randn(6, 20, dtype=torch.float64) + 1.0
    b, k = 32, len(batches)
    mean = batches.mean(0)
    noise = b * (batches - mean).square().sum() / (k - 1)
    signal = mean.square().sum() - noise / (b * k)

    scale = noise_scale([[batch[:5], batch[5:]] for batch in batches], [b] * k)

    assert scale == pytest.approx(float(noise / signal))


def test_the_noise_scale_of_known_noise_is_found() -> None:
    """x ~ N(m, s² I) and loss (w - x)²/2 have tr S = d s² and G = w - m."""
    dimension, spread = 50, 3.0
    generator = torch.Generator().manual_seed(1)
    inputs = spread * torch.randn(4096, dimension, generator=generator) + 2.0
    model = nn.ParameterList([torch.zeros(dimension)])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, nn.ParameterList)
        return (model[0] - batch[0]).square().sum(1).mean() / 2

    scale = diagnostics(model, inputs, loss, batch_size=1024).look(0).noise_scale

    assert scale == pytest.approx(spread**2 / 2.0**2, rel=0.2)  # 150 degrees of freedom: 12 %


def test_where_noise_hides_the_gradient_there_is_no_noise_scale() -> None:
    opposite = [[torch.tensor([1.0])], [torch.tensor([-1.0])]]

    assert math.isnan(noise_scale(opposite, [4, 4]))
    assert math.isnan(noise_scale(opposite[:1], [4]))


def test_looking_leaves_modes_statistics_gradients_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.ReLU())
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    first, second = (look(model, torch.ones(8, 2)) for _ in range(2))

    assert first == second  # no dropout
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model)


def test_a_loss_without_a_gradient_names_the_task_and_the_way_out() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return torch.zeros(())

    with pytest.raises(TaskError, match=r"'inspected' \(or set diagnostics=false\)"):
        diagnostics(chain(nn.Identity()), torch.ones(8, 1), loss).look(0)


def test_looking_takes_a_twentieth_of_the_time() -> None:
    """A look takes 1 s of this clock: the next comes 20 s later, whatever is examined between."""
    times = iter([0.0, 1.0, 5.0, 20.9, 21.1, 22.1, 23.0])
    model = chain(nn.Identity())
    examples = TensorExamples(torch.ones(8, 1))
    task = Task(
        name="inspected",
        model=lambda: model,
        data=lambda: Data(examples, examples),
        loss=lambda model, batch: model(batch[0]).mean(),
        headline="loss",
    )
    layout = Layout.of(model)
    examiner = Examiner(
        task,
        model,
        task.data(),
        layout,
        [range(layout.numel)],
        seed=0,
        looks=Looks(inside=True),
        clock=lambda: next(times),
    )

    looked = [examiner.examine(n, [torch.ones(layout.numel)]).diagnosis for n in range(5)]

    assert [diagnosis is not None for diagnosis in looked] == [True, False, False, True, False]
