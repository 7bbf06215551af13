"""A rule for each group in a shard: torch's parameter groups, cut, saved, averaged, compensated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from async_sgd.compensation import ADAG, COMPENSATIONS
from paramserver.averaging import AllIterates
from paramserver.clipping import ClipNorm
from paramserver.groups import Group
from paramserver.layout import Layout
from paramserver.optimizers import (
    DANA,
    OPTIMIZERS,
    SGD,
    Adam,
    DANASlim,
    Nesterov,
    Optimizer,
    RMSProp,
    Subgradient,
)
from paramserver.optimizers.grouped import check_groups, grouped
from paramserver.schedules import CosineOnce, CosineRestarts, Schedule, Step
from paramserver.shard import Shard
from tests.support import fleet, two_modules
from tests.support.two_modules import GROUPS, TwoModules

LAYOUT = Layout.of(TwoModules(), GROUPS)
START = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(1))
PUSH_RULES = [
    entry.factory()
    for entry in OPTIMIZERS
    if entry.facts.get("kind") == "push rule" and entry.name != "torch"
]


def gradient(seen: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 0.1 * seen + torch.randn(LAYOUT.numel, generator=generator)


class Fleet(fleet.Fleet):
    """Shards that each have the rules of all groups."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_shards: int = 1,
        *,
        workers: int = 1,
        groups: tuple[Group, ...] = GROUPS,
        params: Tensor = START,
        **options: Any,
    ) -> None:
        self._groups, self._layout = groups, Layout.of(TwoModules(), groups)
        cuts = self._layout.cuts(num_shards)
        super().__init__(optimizer, params, gradient, cuts=cuts, workers=workers, **options)

    def make(
        self,
        optimizer: Optimizer,
        cut: range,
        params: Tensor,
        buffers: Sequence[Tensor],
        version: int,
        options: dict[str, Any],
    ) -> Shard:
        run = options.get("schedule")
        ours, its = grouped(optimizer, run, self._groups, self._layout, cut)
        return Shard(params, ours, buffers, version=version, **{**options, "schedule": its})


def part(flat: Tensor, group: str) -> Tensor:
    own = LAYOUT.group_ranges[group]
    return flat[own.start : own.stop]


@pytest.mark.parametrize("name", two_modules.OPTIMIZERS)
def test_a_shard_trains_as_torch_with_parameter_groups(name: str) -> None:
    torchs = two_modules.OPTIMIZERS[name]
    params = [nn.Parameter(part(START, g).clone()) for g in ("encoder", "", "head")]
    lr = torchs.ours.lr
    theirs = torchs.make(
        [{"params": p, "lr": lr * f} for p, f in zip(params, (0.25, 1.0, 2.0), strict=True)]
    )
    one = Fleet(torchs.ours)

    for step in range(20):
        grad = gradient(one.seen[0], step)
        for p, group in zip(params, ("encoder", "", "head"), strict=True):
            p.grad = part(grad, group)
        theirs.step()
        if step % 5 == 4:
            theirs.param_groups[2]["lr"] /= 2
        one.push(0, grad)

    assert torch.equal(one.params, torch.cat([p.detach() for p in params]))


@pytest.mark.parametrize("optimizer", PUSH_RULES, ids=OPTIMIZERS.name_of)
@pytest.mark.parametrize("num_shards", [3, 5])
def test_any_number_of_shards_has_the_bits_of_one(optimizer: Optimizer, num_shards: int) -> None:
    order = [0, 1, 2, 1, 0, 0, 2, 1] * 3
    schedule = CosineOnce(updates=50)

    many = Fleet(optimizer, num_shards, workers=3, schedule=schedule)
    one = Fleet(optimizer, workers=3, schedule=schedule)

    assert torch.equal(many.train(order), one.train(order))
    assert not torch.equal(one.params, START)


@pytest.mark.parametrize("optimizer", PUSH_RULES, ids=OPTIMIZERS.name_of)
def test_what_three_shards_saved_goes_on_on_five_as_if_never_stopped(optimizer: Optimizer) -> None:
    options: dict[str, Any] = {
        "schedule": Step(every=3),
        "average": AllIterates(),
        "compensation": COMPENSATIONS.parse("gap-aware"),
    }
    straight = Fleet(optimizer, 3, **options)
    straight.train([0] * 11)
    expected = straight.train([0] * 9, seed=11)

    before = Fleet(optimizer, 3, **options)
    before.train([0] * 11)
    after = Fleet(optimizer, 5, params=before.params, version=11, state=before.saved(), **options)
    after.train([0] * 9, seed=11)

    assert torch.equal(after.params, expected)
    assert torch.equal(after.read(-1), straight.read(-1))  # the averages


def test_a_run_that_has_not_begun_is_saved_and_goes_on() -> None:
    fresh = Fleet(Adam(lr=0.01), 2, schedule=Step(every=3))

    other = Fleet(Adam(lr=0.01), state=fresh.saved(), schedule=Step(every=3))

    assert torch.equal(other.train([0] * 4), fresh.train([0] * 4))


def test_groups_have_rates_and_schedules_of_their_own() -> None:
    one = Fleet(SGD(lr=1.0), schedule=Step(every=2, gamma=0.1))

    rates = []
    for _ in range(6):
        rates.append([float(part(one.shards[0].rule.rate, g)[-1]) for g in LAYOUT.group_ranges])
        one.push(0, torch.zeros(LAYOUT.numel))

    torch.testing.assert_close(
        torch.tensor(rates).T,
        torch.tensor(
            [
                [0.25, 0.25, 0.025, 0.025, 0.0025, 0.0025],  # the run's, a quarter of it
                [1.0, 1.0, 0.1, 0.1, 0.01, 0.01],
                [2.0, 2.0, 2.0, 2.0, 2.0, 1.0],  # its own: half after five
            ]
        ),
    )


def test_a_group_has_a_weight_decay_of_its_own() -> None:
    groups = (Group(name="*.bias", weight_decay=0.0),)
    one = Fleet(SGD(lr=0.5, weight_decay=0.5), groups=groups, params=torch.ones(LAYOUT.numel))

    one.push(0, torch.zeros(LAYOUT.numel))

    bias = Layout.of(TwoModules(), groups).group_ranges["*.bias"]
    assert one.params[: bias.start].eq(0.75).all()
    assert one.params[bias.start :].eq(1.0).all()


def test_damping_shortens_the_steps_of_all_groups_alike() -> None:
    whole, damped = Fleet(Adam(lr=0.125), groups=GROUPS), Fleet(Adam(lr=0.125), groups=GROUPS)
    grad = gradient(START, 0)

    whole.push(0, grad)
    damped.push(0, grad, scale=0.5)

    torch.testing.assert_close(damped.params - START, (whole.params - START) / 2)


def test_clipping_is_by_the_norm_of_the_whole_gradient() -> None:
    grad = gradient(START, 0)
    shard = Fleet(SGD(lr=1.0), clip=ClipNorm(max_norm=1.0, where="reduced")).shards[0]

    shard._apply(grad.clone(), 0.0, float(grad.norm()), 1.0, 1)

    steps = START - shard.snapshots.params
    for name, factor in (("encoder", 0.25), ("", 1.0), ("head", 2.0)):
        expected = factor * part(grad, name) / grad.norm()
        torch.testing.assert_close(part(steps, name), expected, rtol=1e-4, atol=1e-6)


def test_a_compensation_hears_each_groups_own_rate() -> None:
    params, read = START, START - 1
    one = Fleet(SGD(lr=0.5), compensation=ADAG(), workers=2)
    compensator = one.shards[0].compensator
    assert compensator is not None
    grad = torch.ones(LAYOUT.numel)

    compensator.correct_(grad, params, read, worker=0, staleness=1, lr=one.shards[0].rule.rate)

    for name, lr in (("encoder", 0.125), ("", 0.5), ("head", 1.0)):
        torch.testing.assert_close(
            part(grad, name), torch.full_like(part(grad, name), 1 / (1 / lr + 1)), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("name", ["adag", "dc-asgd", "fasgd"])
def test_a_stale_gradient_is_corrected_alike_on_any_number_of_shards(name: str) -> None:
    options: dict[str, Any] = {"compensation": COMPENSATIONS.parse(name), "workers": 3}

    one, many = Fleet(SGD(lr=0.1), **options), Fleet(SGD(lr=0.1), 4, **options)

    order = [0, 1, 2, 2, 0, 1] * 2
    assert torch.equal(one.train(order), many.train(order))


def test_dana_shows_each_group_ahead_by_its_own_rate() -> None:
    one = Fleet(DANA(lr=0.5, momentum=0.5))
    grad = gradient(START, 0)

    one.push(0, grad)

    for name, lr in (("encoder", 0.125), ("", 0.5), ("head", 1.0)):
        ahead = part(one.params, name) - 0.5 * lr * part(grad, name)
        torch.testing.assert_close(part(one.seen[0], name), ahead, rtol=1e-5, atol=1e-6)


def test_dana_with_one_worker_has_the_points_of_dana_slim() -> None:
    groups = (Group(name="encoder", lr_factor=0.25), Group(name="head", lr_factor=2.0))
    shown = Fleet(DANA(lr=0.05), 3, groups=groups)
    kept = Fleet(DANASlim(lr=0.05), 3, groups=groups)

    shown.train([0] * 12)
    kept.train([0] * 12)

    torch.testing.assert_close(shown.seen[0], kept.params, rtol=1e-4, atol=1e-5)


def test_polyaks_step_is_told_the_norm_of_the_whole_gradient() -> None:
    shard = Fleet(Subgradient(lr=1.0, step="polyak", optimum=0.0)).shards[0]
    grad = gradient(START, 0)
    norm = float(grad.norm())

    shard._apply(grad, 2.0, norm, 1.0, 1)

    steps = START - shard.snapshots.params
    torch.testing.assert_close(part(steps, "head"), 2.0 * (2.0 / norm**2) * part(grad, "head"))


def test_without_groups_nothing_is_wrapped() -> None:
    layout, rule, schedule = Layout.of(TwoModules()), Nesterov(), Step(every=3)

    assert grouped(rule, schedule, [], layout, range(64)) == (rule, schedule)
    frozen = [Group(name="head", frozen=True), Group(name="middle")]
    assert grouped(rule, schedule, frozen, layout, range(64)) == (rule, schedule)


def test_one_group_alone_has_the_bits_of_the_optimizer_at_its_rate() -> None:
    whole = (Group(name="*", lr_factor=0.5),)

    grouped_run, plain = Fleet(Adam(lr=0.5), groups=whole), Fleet(Adam(lr=0.25), groups=())

    assert torch.equal(grouped_run.train([0] * 9), plain.train([0] * 9))


@pytest.mark.parametrize(
    ("optimizer", "schedule", "group", "message"),
    [
        (
            RMSProp(),
            None,
            Group(name="head", weight_decay=0.1),
            r"^group head has weight_decay 0\.1, and optimizer RMSProp has none",
        ),
        (
            SGD(lr=1.0),
            CosineRestarts(t_0=5, eta_max=0.5),
            Group(name="head", lr_factor=0.1),
            r"^group head has lr_factor 0\.1, and its schedule starts from 0\.5",
        ),
        (
            SGD(lr=1.0),
            CosineOnce(updates=5, eta_min=0.2),
            Group(name="head", lr_factor=0.1),
            r"^eta_min must be at most the optimizer's lr \(0\.1\), got 0\.2",
        ),
    ],
)
def test_what_a_group_cannot_have_is_refused(
    optimizer: Optimizer, schedule: Schedule | None, group: Group, message: str
) -> None:
    layout = Layout.of(TwoModules(), [group])

    with pytest.raises(ValueError, match=message):
        check_groups(optimizer, schedule, [group], layout)
