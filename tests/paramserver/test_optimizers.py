"""The oracles are torch's own classes and test configurations, keras' published numbers, and what
the formulas give in closed form under a constant gradient."""

from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from paramserver.layout import Layout
from paramserver.optimizers import (
    DANA,
    OPTIMIZERS,
    SGD,
    AdaDelta,
    AdaDeltaRule,
    AdaGrad,
    AdaGradRule,
    Adam,
    AdamRule,
    AdamW,
    AdamWRule,
    DANASlim,
    DelayedNesterov,
    LocalMomentum,
    Momentum,
    Nesterov,
    Optimizer,
    PushRule,
    RMSProp,
    SGDRule,
    TorchOptimizer,
)

LAYOUT = Layout.of(nn.Sequential(nn.Linear(20, 13), nn.Linear(13, 3)))
WHOLE = (range(LAYOUT.numel),)
CUTS = {"one vector": WHOLE, "three shards": LAYOUT.cuts(3)}

RULES = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamWRule,
    torch.optim.Adagrad: AdaGradRule,
    torch.optim.Adadelta: AdaDeltaRule,
}


def upstream_database() -> list[Any]:
    """Return the list that torch's own optimizer tests run through.

    Its module sets up torch's test run as it is imported, for all tests of this one too: hypothesis
    would try ten examples, and torch.backends would refuse assignments. Both are undone.
    """
    profile = hypothesis.settings.get_current_profile_name()
    database: list[Any] = importlib.import_module(
        "torch.testing._internal.common_optimizers"
    ).optim_db
    hypothesis.settings.load_profile(profile)
    vars_of = torch.backends.flags_frozen.__globals__  # the module itself is a stand-in
    vars_of["__allow_nonbracketed_mutation_flag"] = True
    return database


UPSTREAM = [
    pytest.param(info.optim_cls, {**case.kwargs, **kernel}, id=f"{info.name}-{case.desc}-{kernel}")
    for info in upstream_database()
    if info.optim_cls in RULES
    for case in info.optim_inputs_func(device="cpu")
    for kernel in ({}, {"fused": True})
    if not kernel or "fused" in info.supported_impls
]

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)

# A spec of each kind, and how one writes it with torch; RMSProp has no counterpart there.
TORCH: list[tuple[Optimizer, type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD(lr=0.1, weight_decay=0.1), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (
        Momentum(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    ),
    (
        Nesterov(lr=0.1, momentum=0.8, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    *(
        # Of one worker that looks at the parameters: DANA's look-ahead is not in a push.
        (
            placed(lr=0.1, momentum=0.8, weight_decay=0.1),
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.8, "nesterov": placed is DANASlim, "weight_decay": 0.1},
        )
        for placed in (LocalMomentum, DANA, DANASlim)
    ),
    (
        AdaGrad(lr=0.1, initial=0.2, eps=1e-3, weight_decay=0.1),
        torch.optim.Adagrad,
        {"lr": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3, "weight_decay": 0.1},
    ),
    (
        AdaDelta(lr=0.5, rho=0.8, eps=1e-3, weight_decay=0.1),
        torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1},
    ),
    (
        RMSProp(lr=0.1, alpha=0.8, eps=1e-3, eps_inside=False),
        torch.optim.RMSprop,
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-3},
    ),
    (
        Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    ),
    (
        AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
        torch.optim.AdamW,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    ),
    (TorchOptimizer(algorithm="Adamax", lr=0.1), torch.optim.Adamax, {"lr": 0.1}),
    (TorchOptimizer(algorithm="NAdam", lr=0.1), torch.optim.NAdam, {"lr": 0.1}),
    (TorchOptimizer(algorithm="RAdam", lr=0.1), torch.optim.RAdam, {"lr": 0.1}),
]
SPECS = [
    *(spec for spec, _, _ in TORCH),
    RMSProp(lr=0.1, eps=1e-3),
    DelayedNesterov(lr=0.1, momentum=0.8, every=3, weight_decay=0.1),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores a kernel waits for its threads thirty times as long as 512 elements take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def random_run(steps: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Return a start and a gradient for each step, always the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(steps + 1, LAYOUT.numel, generator=generator).to(dtype)
    return drawn[0], list(drawn[1:])


def run_torch(
    reference: type, kwargs: dict[str, Any], start: Tensor, grads: list[Tensor]
) -> Tensor:
    """Step torch's class as everybody does."""
    p = nn.Parameter(start.clone())
    optimizer = reference([p], **kwargs)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def run_rules(
    build: Callable[[Sequence[nn.Parameter]], PushRule],
    start: Tensor,
    grads: list[Tensor],
    cuts: Sequence[range] = WHOLE,
) -> Tensor:
    """Step one rule for each cut, and join the parts."""
    shards = [nn.Parameter(start[cut.start : cut.stop].clone()) for cut in cuts]
    for p, cut in zip(shards, cuts, strict=True):
        rule = build([p])
        for grad in grads:
            rule.apply([grad[cut.start : cut.stop]])
    return torch.cat([p.detach() for p in shards])


# torch's classes


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("reference", "kwargs"), UPSTREAM)
def test_a_rule_has_the_bits_of_torchs_class(
    reference: type, kwargs: dict[str, Any], cuts: Sequence[range]
) -> None:
    start, grads = random_run()

    found = run_rules(lambda params: RULES[reference](params, **kwargs), start, grads, cuts)

    assert torch.equal(found, run_torch(reference, kwargs, start, grads))


@pytest.mark.parametrize(
    ("dtype", "spec", "reference", "kwargs"),
    [
        (dtype, *case)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        for case in TORCH
        if dtype != torch.float16 or not isinstance(case[0], TorchOptimizer)  # their eps is 0 there
    ],
    ids=str,
)
def test_a_spec_has_the_bits_of_torchs_class_and_arguments(
    spec: Optimizer, reference: type, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    start, grads = random_run(dtype=dtype)

    found = run_rules(spec.build, start, grads)

    # In 16 bits fused SGD leaves most elements where they are: pytorch/pytorch#191763.
    kernel = {"fused": True} if reference in FUSED and dtype.itemsize > 2 else {}
    assert torch.equal(found, run_torch(reference, {**kwargs, **kernel}, start, grads))


@every_spec
def test_three_shards_have_the_bits_of_one_vector(spec: Optimizer) -> None:
    start, grads = random_run()

    found = run_rules(spec.build, start, grads, LAYOUT.cuts(3))

    assert torch.equal(found, run_rules(spec.build, start, grads))


@pytest.mark.parametrize(
    "spec",
    [
        *(SGD(), Momentum(), Nesterov(), AdaGrad(), Adam(), AdamW()),
        *(LocalMomentum(), DANA(), DANASlim()),
    ],
)
def test_fused_kernels_are_used_where_torch_has_them(spec: Optimizer) -> None:
    rule = spec.build([nn.Parameter(torch.zeros(64))])

    assert rule.param_groups[0]["fused"] is True


# published numbers and closed forms

G = torch.tensor([3.0, -0.5, 1e-2, 1e-4], dtype=torch.float64)
T = 7


def constant_gradient(spec: Optimizer, steps: int = T) -> Tensor:
    """Where ``steps`` steps on gradient `G` lead from 1."""
    return run_rules(spec.build, torch.ones_like(G), [G] * steps, [range(len(G))])


def test_rmsprop_takes_the_step_keras_publishes() -> None:
    start, grad = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 6.0, 7.0, 2.0])

    found = run_rules(RMSProp(lr=0.5, eps=1e-7).build, start, [grad], [range(4)])

    expected = torch.tensor([-0.5811, 0.4189, 1.4189, 2.4189])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_rmsprop_has_eps_inside_the_root(eps: float) -> None:
    found = constant_gradient(RMSProp(lr=0.1, alpha=0.9, eps=eps))

    roots = [((1 - 0.9**t) * G * G + eps).sqrt() for t in range(1, T + 1)]
    torch.testing.assert_close(found, 1 - 0.1 * sum(G / root for root in roots))


def test_sgd_goes_straight() -> None:
    torch.testing.assert_close(constant_gradient(SGD(lr=0.1)), 1 - 0.1 * T * G)


def test_weight_decay_shrinks_towards_the_optimum_of_the_penalty() -> None:
    found = constant_gradient(SGD(lr=0.1, weight_decay=0.5))

    optimum = -G / 0.5
    torch.testing.assert_close(found, optimum + (1 - 0.1 * 0.5) ** T * (1 - optimum))


def test_momentum_sums_a_geometric_series() -> None:
    found = constant_gradient(Momentum(lr=0.1, momentum=0.9))

    velocities = sum((1 - 0.9**t) / (1 - 0.9) for t in range(1, T + 1))
    torch.testing.assert_close(found, 1 - 0.1 * velocities * G)


def test_dampening_acts_from_the_second_step_on() -> None:
    found = constant_gradient(Momentum(lr=0.1, momentum=0.5, dampening=0.9), steps=2)

    torch.testing.assert_close(found, 1 - 0.1 * (1 + (0.5 + 0.1)) * G)


def test_nesterov_steps_to_the_look_ahead_point() -> None:
    found = constant_gradient(Nesterov(lr=0.1, momentum=0.9))

    ahead = sum(1 + 0.9 * (1 - 0.9**t) / (1 - 0.9) for t in range(1, T + 1))
    torch.testing.assert_close(found, 1 - 0.1 * ahead * G)


def test_adagrad_steps_shrink_with_the_root_of_their_number() -> None:
    found = constant_gradient(AdaGrad(lr=0.1, eps=1e-15))

    torch.testing.assert_close(found, 1 - 0.1 * G.sign() * sum(t**-0.5 for t in range(1, T + 1)))


def test_adadelta_starts_with_steps_of_root_eps() -> None:
    found = constant_gradient(AdaDelta(rho=0.9, eps=1e-6), steps=1)

    torch.testing.assert_close(found, 1 - 1e-3 / (0.1 * G * G + 1e-6).sqrt() * G)


def test_adam_takes_steps_of_the_learning_rate() -> None:
    found = constant_gradient(Adam(lr=0.1, eps=1e-3))

    torch.testing.assert_close(found, 1 - T * 0.1 * G / (G.abs() + 1e-3))


def test_adamw_decays_the_parameters_beside_adams_step() -> None:
    found = constant_gradient(AdamW(lr=0.1, eps=1e-3, weight_decay=0.5))

    optimum = -G / (G.abs() + 1e-3) / 0.5
    torch.testing.assert_close(found, optimum + (1 - 0.1 * 0.5) ** T * (1 - optimum))


# apply


@every_spec
def test_scale_scales_the_step_and_leaves_the_moments_alone(spec: Optimizer) -> None:
    _, grads = random_run()
    full, short = (nn.Parameter(torch.zeros(LAYOUT.numel)) for _ in range(2))
    full_rule, short_rule = spec.build([full]), spec.build([short])
    for rule, p in ((full_rule, full), (short_rule, short)):
        for grad in grads:
            rule.apply([grad])
        p.data.zero_()  # so that the next step is what the parameter holds

    full_rule.apply([grads[0]], scale=1.0)
    short_rule.apply([grads[0]], scale=0.25)

    assert full.abs().max() > 0
    torch.testing.assert_close(short, 0.25 * full)
    assert_same_state(short_rule, full_rule)


@every_spec
def test_apply_leaves_gradients_and_settings_as_they_were(spec: Optimizer) -> None:
    start, grads = random_run(steps=2)
    p = nn.Parameter(start)
    rule = spec.build([p])
    settings = copy.deepcopy(rule.state_dict()["param_groups"])
    given = [grad.clone() for grad in grads]

    for grad in given:
        rule.apply([grad], scale=1 / 3)

    assert p.grad is None
    assert rule.state_dict()["param_groups"] == settings
    assert all(torch.equal(a, b) for a, b in zip(given, grads, strict=True))


@every_spec
def test_parameters_may_move_between_calls(spec: Optimizer) -> None:
    start, grads = random_run()
    p = nn.Parameter(start.clone())
    rule = spec.build([p])

    for grad in grads:
        p.data = p.data.clone()
        rule.apply([grad])

    assert torch.equal(p.detach(), run_rules(spec.build, start, grads))


@every_spec
def test_elements_without_gradient_stay_where_they_are(spec: Optimizer) -> None:
    start, grad = torch.zeros(LAYOUT.numel), torch.ones(LAYOUT.numel)
    grad[64:] = 0

    found = run_rules(spec.build, start, [grad] * 3)

    assert (found[:64] < 0).all()
    assert torch.equal(found[64:], start[64:])


@every_spec
def test_a_rule_goes_on_from_a_saved_state_as_if_it_had_never_stopped(spec: Optimizer) -> None:
    start, grads = random_run()
    p = nn.Parameter(start.clone())
    rule = spec.build([p])
    for grad in grads[:5]:
        rule.apply([grad])
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)

    resumed = nn.Parameter(p.detach().clone())
    resumed_rule = spec.build([resumed])
    resumed_rule.apply([grads[0]])  # what it did before is forgotten
    resumed.data.copy_(p.detach())
    resumed_rule.load_state_dict(torch.load(file))
    for grad in grads[5:]:
        resumed_rule.apply([grad])

    assert torch.equal(resumed.detach(), run_rules(spec.build, start, grads))


def test_a_copied_rule_goes_on_with_its_own_parameters() -> None:
    start, grads = random_run()
    rule = RMSProp().build([nn.Parameter(start.clone())])
    rule.apply([grads[0]])

    twin = copy.deepcopy(rule)
    for grad in grads[1:]:
        twin.apply([grad])

    found = twin.param_groups[0]["params"][0].detach()
    assert torch.equal(found, run_rules(RMSProp().build, start, grads))


def test_every_group_is_stepped_and_scaled() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    rule = SGDRule([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 1.0}])

    rule.apply([torch.ones(2), torch.ones(3)], scale=0.5)

    torch.testing.assert_close(a.detach(), torch.full((2,), -0.05))
    torch.testing.assert_close(b.detach(), torch.full((3,), -0.5))
    assert [group["lr"] for group in rule.param_groups] == [0.1, 1.0]


def test_a_wrong_number_of_gradients_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    rule = SGD(lr=0.1).build([p])

    with pytest.raises(ValueError, match=r"^expected 1 gradients, got 2$"):
        rule.apply([torch.ones(2), torch.ones(2)])

    assert torch.equal(p.detach(), torch.ones(2))


def test_a_failed_step_leaves_no_gradient_and_the_old_rate() -> None:
    class Failing(SGDRule):
        def step(self, closure: None = None) -> None:
            assert self.param_groups[0]["lr"] == 0.1 * 0.7
            raise RuntimeError("out of memory")

    p = nn.Parameter(torch.ones(2))
    rule = Failing([p], lr=0.1)

    with pytest.raises(RuntimeError, match="out of memory"):
        rule.apply([torch.ones(2)], scale=0.7)

    assert rule.param_groups[0]["lr"] == 0.1
    assert p.grad is None


def assert_same_state(rule: PushRule, other: PushRule) -> None:
    state, expected = rule.state_dict()["state"], other.state_dict()["state"]
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


# specs


@every_spec
def test_a_spec_is_what_it_was_after_a_trip_to_another_process(spec: Optimizer) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec


@every_spec
def test_rules_are_elementwise_and_take_the_learning_rate(spec: Optimizer) -> None:
    rule = spec.build([nn.Parameter(torch.zeros(64))])

    assert rule.elementwise
    assert rule.param_groups[0]["lr"] == spec.lr


def test_the_registry_names_the_optimizers() -> None:
    names = {entry.name for entry in OPTIMIZERS}

    assert names == {
        *("sgd", "momentum", "nesterov", "adagrad", "adadelta", "rmsprop", "adam", "adamw"),
        *("torch", "subgradient", "coordinate", "cg", "bfgs", "lbfgs", "newton", "newton-cg"),
        *("saddle-free", "ksd", "natural", "local-momentum", "dana", "dana-slim"),
        "delayed-nesterov",
    }
    assert all({"kind", "asynchronous", "memory"} <= entry.facts.keys() for entry in OPTIMIZERS)
    assert all(entry.source for entry in OPTIMIZERS)


@pytest.mark.parametrize("lr", [-1, 0, math.nan, math.inf])
@pytest.mark.parametrize("spec", [entry.factory for entry in OPTIMIZERS])
def test_a_learning_rate_is_above_0(spec: Any, lr: float) -> None:
    keys = {"algorithm": "NAdam"} if spec is TorchOptimizer else {}

    with pytest.raises(ValueError, match=rf"^lr must be above 0, got {lr}$"):
        spec(lr=lr, **keys)


@pytest.mark.parametrize(
    "spec",
    [
        *(SGD, Momentum, Nesterov, AdaGrad, AdaDelta, Adam, AdamW),
        *(LocalMomentum, DANA, DANASlim, DelayedNesterov),
    ],
)
def test_weight_decay_is_0_or_more(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^weight_decay must be 0 or more, got -0\.1$"):
        spec(weight_decay=-0.1)


@pytest.mark.parametrize("spec", [AdaGrad, AdaDelta, RMSProp, Adam, AdamW])
def test_eps_is_above_0(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^eps must be above 0, got 0$"):
        spec(eps=0)


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        (Momentum, {"momentum": 1.0}, "momentum must be 0 or more and below 1, got 1.0"),
        (Momentum, {"dampening": 1.5}, "dampening must be 0 to 1, got 1.5"),
        (Nesterov, {"momentum": 0.0}, "momentum must be above 0 and below 1, got 0.0"),
        (AdaGrad, {"initial": -1}, "initial must be 0 or more, got -1"),
        (AdaDelta, {"rho": 1}, "rho must be 0 or more and below 1, got 1"),
        (RMSProp, {"alpha": -0.1}, "alpha must be 0 or more and below 1, got -0.1"),
        (Adam, {"betas": (1.0, 0.9)}, "betas[0] must be 0 or more and below 1, got 1.0"),
        (Adam, {"betas": (0.9, 1.0)}, "betas[1] must be 0 or more and below 1, got 1.0"),
        (AdamW, {"betas": (1.0, 0.9)}, "betas[0] must be 0 or more and below 1, got 1.0"),
        (AdamW, {"betas": (0.9, 1.0)}, "betas[1] must be 0 or more and below 1, got 1.0"),
        (
            TorchOptimizer,
            {"algorithm": "LBFGS", "lr": 1.0},
            "algorithm must be one of Adamax, NAdam, RAdam, got 'LBFGS': it needs line searches "
            "and dot products over the whole vector, which shards cut",
        ),
        (
            TorchOptimizer,
            {"algorithm": "Newton", "lr": 1.0},
            "algorithm must be one of Adamax, NAdam, RAdam, got 'Newton'",
        ),
    ],
)
def test_a_bad_value_is_refused(spec: type, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spec(**keys)


def test_every_optimizer_of_torch_is_offered_or_refused_with_a_reason() -> None:
    offered, refused = {"Adamax", "NAdam", "RAdam"}, {}
    for name, found in vars(torch.optim).items():
        if isinstance(found, type) and found is not torch.optim.Optimizer and name not in offered:
            with pytest.raises(ValueError, match=rf"^algorithm must .*, got '{name}'") as error:
                TorchOptimizer(algorithm=name, lr=0.1)
            refused[name] = str(error.value)

    assert all(": it" in message for message in refused.values()), refused


@pytest.mark.parametrize(
    "spec",
    [
        *(AdaGrad(), AdaDelta(eps=1e-8), RMSProp(), Adam(), AdamW()),
        *(TorchOptimizer(algorithm=name, lr=0.1) for name in ("Adamax", "NAdam", "RAdam")),
    ],
    ids=str,
)
def test_an_eps_that_is_zero_in_the_parameters_dtype_is_refused(spec: Optimizer) -> None:
    with pytest.raises(ValueError, match=r"^eps must be 6\.1e-05 or more for float16, got 1e-"):
        spec.build([nn.Parameter(torch.zeros(64, dtype=torch.float16))])
