"""The oracles are torch's own classes, the formulas in numpy, and closed forms."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from async_sgd.compensation import DCASGD
from paramserver.averaging import AllIterates
from paramserver.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from paramserver.layout import Layout
from paramserver.messages import Action
from paramserver.optimizers import (
    DANA,
    DANARule,
    DANASlim,
    DelayedNesterov,
    LocalMomentum,
    Momentum,
    Nesterov,
    Optimizer,
)
from paramserver.schedules import Exponential
from tests.support.fleet import Fleet

LAYOUT = Layout.of(nn.Linear(11, 16))  # three blocks of 64 elements
NUMEL, WORKERS = LAYOUT.numel, 4
LR, MU = 0.05, 0.8
CURVATURE = torch.linspace(0.1, 1.0, NUMEL, dtype=torch.float64)
START = torch.linspace(-2.0, 1.0, NUMEL, dtype=torch.float64)

SPECS: list[Any] = [
    LocalMomentum(lr=LR, momentum=MU, weight_decay=0.1),
    DANA(lr=LR, momentum=MU, weight_decay=0.1),
    DANASlim(lr=LR, momentum=MU, weight_decay=0.1),
    DelayedNesterov(lr=LR, momentum=MU, every=3, weight_decay=0.1),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(NUMEL, generator=generator, dtype=torch.float64)


def gradient(read: Tensor, seed: int) -> Tensor:
    """Return a noisy gradient of a quadratic around 1."""
    return CURVATURE.to(read.dtype) * (read - 1) + noise(seed).to(read.dtype)


def arrivals(num: int, workers: int = WORKERS) -> list[int]:
    """Return whose pushes arrive, in order."""
    rng = random.Random(0)
    return [rng.randrange(workers) for _ in range(num)]


def fleet_of(optimizer: Optimizer, params: Tensor = START, **options: Any) -> Fleet:
    return Fleet(optimizer, params, gradient, **{"workers": WORKERS, **options})


def rule_of(fleet: Fleet) -> DANARule:
    rule = fleet.shards[0].rule
    assert isinstance(rule, DANARule)
    return rule


# closed forms


G = 0.5
T = 7


def constant(spec: Optimizer, pushes: int, workers: int = 1) -> tuple[float, float]:
    """Return where equal gradients lead from 0, workers taking turns, and what is shown there."""
    fleet = fleet_of(spec, torch.zeros(1, dtype=torch.float64), workers=workers)
    grad = torch.full((1,), G, dtype=torch.float64)
    for number in range(pushes):
        fleet.push(number % workers, grad)
    return float(fleet.params), float(fleet.seen[(pushes - 1) % workers])


def velocity(pushes: int) -> float:
    return G * (1 - MU**pushes) / (1 - MU)


@pytest.mark.parametrize("workers", [1, 3])
def test_local_velocities_grow_with_their_own_pushes_only(workers: int) -> None:
    found, shown = constant(LocalMomentum(lr=LR, momentum=MU), workers * T, workers)

    expected = -LR * workers * sum(velocity(t) for t in range(1, T + 1))
    assert found == shown == pytest.approx(expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_dana_goes_as_far_and_shows_where_the_velocities_will_lead(workers: int) -> None:
    found, shown = constant(DANA(lr=LR, momentum=MU), workers * T, workers)

    expected = -LR * workers * sum(velocity(t) for t in range(1, T + 1))
    assert found == pytest.approx(expected)
    assert shown == pytest.approx(expected - LR * MU * workers * velocity(T))


@pytest.mark.parametrize("workers", [1, 3])
def test_dana_slim_has_gone_there(workers: int) -> None:
    found, shown = constant(DANASlim(lr=LR, momentum=MU), workers * T, workers)

    expected = -LR * workers * sum(G + MU * velocity(t) for t in range(1, T + 1))
    assert found == shown == pytest.approx(expected)


def test_delayed_nesterov_moves_straight_between_its_momentum_steps() -> None:
    spec = DelayedNesterov(lr=LR, momentum=MU, every=3)
    found = [constant(spec, pushes)[0] for pushes in range(1, 10)]

    for pushes, w in enumerate(found, start=1):
        straight = pushes * G / 3
        assert w == pytest.approx(
            -LR * (straight + MU * sum(velocity(k) for k in range(1, pushes // 3 + 1)))
        )


# identities, to the bit


def closed_loop(spec: Optimizer, start: Tensor, steps: int = 30) -> list[Tensor]:
    """Return what one worker is shown from the start on, and last the parameters."""
    fleet = fleet_of(spec, start, workers=1)
    shown = [fleet.seen[0].clone()]
    for step in range(steps):
        fleet.push(0, gradient(fleet.seen[0], step))
        shown.append(fleet.seen[0].clone())
    return [*shown, fleet.params]


both_widths = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both_widths
@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        (LocalMomentum(lr=LR, momentum=MU), Momentum(lr=LR, momentum=MU)),
        (DANASlim(lr=LR, momentum=MU), Nesterov(lr=LR, momentum=MU)),
        (DANASlim(lr=LR, momentum=0), Momentum(lr=LR, momentum=0)),
        (DANA(lr=LR, momentum=0), Momentum(lr=LR, momentum=0)),
    ],
    ids=str,
)
def test_one_worker_is_one_velocity(spec: Optimizer, plain: Optimizer, dtype: torch.dtype) -> None:
    found = closed_loop(spec, START.to(dtype))

    expected = closed_loop(plain, START.to(dtype))
    assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))


@both_widths
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dana_with_one_worker_is_nesterov_with_the_gradient_ahead(
    dtype: torch.dtype, weight_decay: float
) -> None:
    spec = DANA(lr=LR, momentum=MU, weight_decay=weight_decay)

    *shown, found = closed_loop(spec, START.to(dtype))

    w = nn.Parameter(START.to(dtype))
    heavy_ball = torch.optim.SGD(
        [w], lr=LR, momentum=MU, weight_decay=weight_decay, fused=True
    )  # v <- mu v + g, w <- w - lr v
    ahead = w.detach().clone()
    for step, point in enumerate(shown[:-1]):
        assert torch.equal(point, ahead)
        w.grad = gradient(ahead, step)
        heavy_ball.step()
        v = heavy_ball.state[w]["momentum_buffer"]
        ahead = torch.add(w.detach(), v, alpha=-LR * MU)
    assert torch.equal(found, w.detach())


def test_dana_with_one_worker_is_nesterov_in_numpy() -> None:
    *_, found = closed_loop(DANA(lr=LR, momentum=MU), START)

    w, v = START.numpy().copy(), np.zeros(NUMEL)
    for step in range(30):
        v = MU * v + gradient(torch.from_numpy(w - LR * MU * v), step).numpy()
        w = w - LR * v
    np.testing.assert_allclose(found.numpy(), w, rtol=0, atol=1e-15)


def test_dana_slim_is_dana_seen_at_the_look_ahead() -> None:
    keys = {"lr": LR, "momentum": MU}
    dana, slim = fleet_of(DANA(**keys)), fleet_of(DANASlim(**keys))

    for step, worker in enumerate(arrivals(200)):
        for fleet in (dana, slim):
            fleet.push(worker, gradient(fleet.seen[worker], step))

        torch.testing.assert_close(dana.seen[worker], slim.params, rtol=0, atol=1e-13)
    assert (dana.params - slim.params).abs().max() > 1e-3


@both_widths
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_delayed_nesterov_with_every_push_is_torchs_nesterov_in_its_plain_kernel(
    dtype: torch.dtype, weight_decay: float
) -> None:
    spec = DelayedNesterov(lr=LR, momentum=MU, every=1, weight_decay=weight_decay)
    order = arrivals(50)

    found = fleet_of(spec, START.to(dtype)).train(order)

    w = nn.Parameter(START.to(dtype))
    plain = torch.optim.SGD(
        [w], lr=LR, momentum=MU, nesterov=True, weight_decay=weight_decay, fused=False
    )
    read = dict.fromkeys(range(WORKERS), w.detach().clone())
    for step, worker in enumerate(order):
        w.grad = gradient(read[worker], step)
        plain.step()
        read[worker] = w.detach().clone()
    assert torch.equal(found, w.detach())


def test_n_pushes_of_delayed_nesterov_are_one_nesterov_step_by_their_mean() -> None:
    grads = [noise(seed) for seed in range(12)]
    fleet = fleet_of(DelayedNesterov(lr=LR, momentum=MU, every=4))
    for number, grad in enumerate(grads):
        fleet.push(number % WORKERS, grad)

    whole = fleet_of(Nesterov(lr=LR, momentum=MU))
    for first in range(0, 12, 4):
        whole.push(0, torch.stack(grads[first : first + 4]).mean(0))

    torch.testing.assert_close(fleet.params, whole.params, rtol=0, atol=1e-15)


# the formulas in numpy

Array = NDArray[np.float64]


def formulas(spec: Any, order: Sequence[int], gamma: float, scales: Sequence[float]) -> Array:
    """Follow the module's table; the learning rate falls by ``gamma`` with each push."""
    w, lr, mu, decay = START.numpy().copy(), spec.lr, spec.momentum, spec.weight_decay
    v = np.zeros((WORKERS, NUMEL))
    m, gathered = np.zeros(NUMEL), np.zeros(NUMEL)
    read = np.stack([w] * WORKERS)
    for step, (i, scale) in enumerate(zip(order, scales, strict=True)):
        g = gradient(torch.from_numpy(read[i]), step).numpy() + decay * w
        v[i] = mu * v[i] + g
        match spec:
            case LocalMomentum() | DANA():
                move = v[i]
            case DANASlim():
                move = g + mu * v[i]
            case _:
                move, gathered = g / spec.every, gathered + g
                if (step + 1) % spec.every == 0:
                    m, gathered = mu * m + gathered / spec.every, np.zeros(NUMEL)
                    move = move + mu * m
        w = w - scale * lr * move
        lr = lr * gamma
        read[i] = w - lr * mu * v.sum(0) if isinstance(spec, DANA) else w
    return w


@every_spec
def test_four_workers_in_any_order_follow_the_formulas(spec: Any) -> None:
    order, rng = arrivals(300), random.Random(1)
    scales = [rng.choice([1.0, 0.5, 0.25]) for _ in order]
    fleet = fleet_of(spec, schedule=Exponential(gamma=0.995))

    for step, (worker, scale) in enumerate(zip(order, scales, strict=True)):
        fleet.push(worker, gradient(fleet.seen[worker], step), scale)

    expected = formulas(spec, order, 0.995, scales)
    np.testing.assert_allclose(fleet.params.numpy(), expected, rtol=0, atol=1e-12)


def test_what_rounding_has_left_in_the_sum_of_velocities_does_not_stay() -> None:
    fleet = fleet_of(DANA(lr=1e-3, momentum=0.9), START.float())
    for step, worker in enumerate(arrivals(40)):
        fleet.push(worker, 1e6 * noise(step).float())

    for worker in arrivals(1700):
        fleet.push(worker, torch.zeros(NUMEL))

    total = sum(fleet.saved().tensors.values())
    torch.testing.assert_close(rule_of(fleet)._sum, total, rtol=0, atol=1e-6)


def test_compensation_under_dana_is_measured_from_what_was_shown() -> None:
    strength, order = 2.0, arrivals(100)

    found = fleet_of(DANA(lr=LR, momentum=MU), compensation=DCASGD(strength=strength)).train(order)

    w, v = START.numpy().copy(), np.zeros((WORKERS, NUMEL))
    read = np.stack([w] * WORKERS)
    for step, i in enumerate(order):
        g = gradient(torch.from_numpy(read[i]), step).numpy()
        v[i] = MU * v[i] + g + strength * g * g * (w - read[i])
        w = w - LR * v[i]
        read[i] = w - LR * MU * v.sum(0)
    np.testing.assert_allclose(found.numpy(), w, rtol=0, atol=1e-12)


# shards and checkpoints


@every_spec
def test_three_shards_have_the_bits_of_one(spec: Any) -> None:
    order, cuts = arrivals(100), LAYOUT.cuts(3)
    one, three = fleet_of(spec, START.float()), fleet_of(spec, START.float(), cuts=cuts)

    assert torch.equal(three.train(order), one.train(order))
    assert all(torch.equal(three.seen[w], one.seen[w]) for w in range(WORKERS))


@every_spec
def test_what_was_saved_goes_on_in_other_shards_to_the_bit(spec: Any, tmp_path: Path) -> None:
    fleet = fleet_of(spec, START.float(), cuts=LAYOUT.cuts(3))
    fleet.train(arrivals(30))
    saved = Checkpoint(LAYOUT, 30, fleet.params, {}, fleet.saved())
    save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(tmp_path)
    again = fleet_of(
        spec, loaded.params, cuts=LAYOUT.cuts(2), version=loaded.version, state=loaded.state
    )

    for step, worker in enumerate(arrivals(30)):
        grad = noise(step).float()
        fleet.push(worker, grad)
        again.push(worker, grad)

        assert torch.equal(again.params, fleet.params)
        torch.testing.assert_close(again.seen[worker], fleet.seen[worker], rtol=0, atol=1e-6)


def test_one_worker_goes_on_at_the_point_it_would_have_been_shown() -> None:
    spec = DANA(lr=LR, momentum=MU)
    fleet = fleet_of(spec, START.float(), workers=1)
    fleet.train([0] * 10)
    again = fleet_of(spec, fleet.params, workers=1, version=10, state=fleet.saved())

    assert torch.equal(again.seen[0], fleet.seen[0])
    assert torch.equal(again.train([0] * 10, seed=10), fleet.train([0] * 10, seed=10))


def test_a_velocity_is_kept_for_each_worker_that_has_pushed() -> None:
    fleet = fleet_of(LocalMomentum(lr=LR), workers=6)

    fleet.train([4, 1, 4])

    assert sorted(fleet.saved().tensors) == ["velocity.1", "velocity.4"]


# who sees what


@pytest.mark.parametrize("average", [None, AllIterates(start=1000)])
def test_workers_see_the_look_ahead_and_readers_the_parameters(average: Any) -> None:
    fleet = fleet_of(DANA(lr=LR, momentum=MU), average=average)
    fleet.train(arrivals(20))
    fleet.order(Action.SAVE, -1)

    seen, evaluated = fleet.read(0), fleet.read(-1)

    saved = fleet.shards[0].saved
    assert saved is not None
    total = sum(t for name, t in fleet.saved().tensors.items() if name.startswith("velocity"))
    torch.testing.assert_close(seen, fleet.params - LR * MU * total)
    assert torch.equal(evaluated, fleet.params)
    assert torch.equal(saved.params, fleet.params)


def test_what_a_worker_was_shown_stays_until_it_has_pushed() -> None:
    fleet = fleet_of(DANA(lr=LR, momentum=MU), workers=2)
    fleet.train([0, 1])
    (lease,) = fleet.order(Action.READ, 1)
    shown = fleet._buffers[0][lease.buffer]
    before = shown.clone()

    fleet.train([0] * 10)

    assert torch.equal(shown, before)


# workers that come and go


def test_who_leaves_is_not_counted_until_another_comes_in_its_place() -> None:
    fleet = fleet_of(DANA(lr=LR, momentum=MU), workers=2)
    fleet.train([0, 1, 0, 1])
    first, second = (fleet.saved().tensors[f"velocity.{worker}"] for worker in (0, 1))

    fleet.order(Action.LEAVE, 1)
    alone = fleet.read(0)
    fleet.read(1)
    together = fleet.read(0)

    torch.testing.assert_close(alone, fleet.params - LR * MU * first)
    torch.testing.assert_close(together, fleet.params - LR * MU * (first + second))


@pytest.mark.parametrize("spec", [LocalMomentum(lr=LR), DANA(lr=LR), DANASlim(lr=LR)])
def test_a_worker_in_the_place_of_another_goes_on_with_its_velocity(spec: Optimizer) -> None:
    undisturbed, disturbed = fleet_of(spec, workers=2), fleet_of(spec, workers=2)
    for fleet in (undisturbed, disturbed):
        fleet.train([0, 1, 0, 1])
    disturbed.order(Action.LEAVE, 1)
    disturbed.read(1)

    for fleet in (undisturbed, disturbed):
        fleet.push(1, noise(9))

    assert torch.equal(disturbed.params, undisturbed.params)


def test_a_worker_that_is_gone_for_good_leads_nobody_away() -> None:
    fleet = fleet_of(DANA(lr=LR, momentum=MU), workers=2)
    for worker in (0, 1, 0, 1):
        fleet.push(worker, CURVATURE * (fleet.seen[worker] - 1))
    assert fleet.saved().tensors["velocity.1"].abs().max() > 0.1

    fleet.order(Action.LEAVE, 1)
    for _ in range(3000):
        fleet.push(0, CURVATURE * (fleet.seen[0] - 1))

    torch.testing.assert_close(fleet.params, torch.ones_like(START), rtol=0, atol=1e-9)


EVENTS = st.tuples(st.sampled_from(["push", "drop", "leave", "read"]), st.integers(-1, WORKERS - 1))


@given(st.lists(EVENTS, max_size=60))
def test_one_buffer_a_reader_and_one_more_are_always_enough(events: list[tuple[str, int]]) -> None:
    fleet = fleet_of(DANA(lr=LR))  # as many as four workers and an evaluator need

    for what, reader in events:
        if what == "push" and reader in fleet.seen and reader >= 0:
            fleet.push(reader, noise(0))
        elif what == "drop":
            fleet.order(Action.DISCARD, reader)
        elif what == "leave" and reader >= 0:
            fleet.order(Action.LEAVE, reader)
        else:
            fleet.read(reader)


# by itself, and specs


def test_a_rule_alone_with_a_model_shows_the_look_ahead_to_whoever_asks() -> None:
    p = nn.Parameter(torch.ones(8))
    rule = DANA(lr=0.1, momentum=0.5).build([p])
    out = torch.empty(8)
    rule.show(out)

    rule.apply([torch.ones(8)])
    rule.show(out)

    torch.testing.assert_close(p.detach(), torch.full((8,), 0.9))
    torch.testing.assert_close(out, torch.full((8,), 0.9 - 0.1 * 0.5))


def test_a_rule_that_is_given_another_state_shows_where_that_leads() -> None:
    one, other = (nn.Parameter(torch.ones(8)) for _ in range(2))
    first, second = DANA().build([one]), DANA().build([other])
    out, expected = torch.empty(8), torch.empty(8)
    for rule, size in ((first, 1.0), (second, 2.0)):
        rule.show(out)
        rule.apply([torch.full((8,), size)])
    second.show(expected)

    first.load_state_dict(second.state_dict())
    one.data.copy_(other)
    first.show(out)

    assert torch.equal(out, expected)


def test_a_step_that_fails_loses_no_velocity() -> None:
    p = nn.Parameter(torch.ones(8, dtype=torch.float64))
    rule = LocalMomentum(lr=0.1).build([p])
    rule.apply([torch.ones(8, dtype=torch.float64)])

    with pytest.raises(RuntimeError):
        rule.apply([torch.ones(9, dtype=torch.float64)])

    assert list(rule.state_dict()["state"][0]) == ["velocity.0"]


def test_only_danas_rule_shows_something_else() -> None:
    shows = [spec for spec in SPECS if spec.build([nn.Parameter(torch.zeros(4))]).shows]

    assert shows == [SPECS[1]]
    assert isinstance(SPECS[1].build([nn.Parameter(torch.zeros(4))]), DANARule)


@pytest.mark.parametrize("spec", [LocalMomentum, DANA, DANASlim, DelayedNesterov])
@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_is_0_to_below_1(spec: Any, momentum: float) -> None:
    with pytest.raises(ValueError, match=r"^momentum must be 0 or more and below 1, got"):
        spec(momentum=momentum)


def test_momentum_comes_with_every_push_or_in_several() -> None:
    with pytest.raises(ValueError, match=r"^every must be 1 push or more, got 0$"):
        DelayedNesterov(every=0)
