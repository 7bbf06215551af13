"""Rules of push forms, against closed forms: what they do with pushes, however old those are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import CurvatureError, LayoutError
from paramserver.messages import Action, Kind, Message
from paramserver.optimizers import (
    BFGS,
    LBFGS,
    CoordinateDescent,
    NaturalGradient,
    Newton,
    SaddleFreeNewton,
)
from paramserver.optimizers.coordinate import pushed_turn
from paramserver.optimizers.push_form import Place, PushedRule, PushForm
from paramserver.shard import Shard

DOUBLE = torch.float64


def build(form: PushForm, x: Tensor, place: Place | None = None) -> PushedRule:
    return replace(form, place=place).build([nn.Parameter(x, requires_grad=False)])


def positive(n: int, seed: int) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=noise, dtype=DOUBLE)
    return a @ a.T + torch.eye(n, dtype=DOUBLE)


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("spec", [Newton(), Newton(plain=True), SaddleFreeNewton(floor=1e-12)])
@pytest.mark.parametrize("seed", range(5))
def test_newton_is_exact_on_quadratics_once_every_worker_has_pushed_however_old_it_is(
    spec: Newton | SaddleFreeNewton, seed: int
) -> None:
    n, samples = 6, [3, 5, 9]
    hs, cs = [positive(n, i) for i in range(3)], [vector(n, 10 + i) for i in range(3)]
    weights = torch.tensor(samples, dtype=DOUBLE) / sum(samples)
    h = sum(w * a for w, a in zip(weights, hs, strict=True))
    hc = sum(w * a @ c for w, a, c in zip(weights, hs, cs, strict=True))
    best = torch.linalg.solve(h, hc)
    x = vector(n, 99)
    rule = build(spec.pushes(), x, Place(range(n), n, 3))
    shuffle, seen = random.Random(seed), [x.clone()]
    pushed: set[int] = set()

    for clock in range(1, 20):
        worker = shuffle.randrange(3)
        read = shuffle.choice(seen)  # any version there ever was
        gradient = hs[worker] @ (read - cs[worker])
        rule.came_from(worker, clock, samples[worker])
        rule.apply([torch.cat([hs[worker], gradient[None], read[None]]).flatten()])
        seen.append(x.clone())
        pushed.add(worker)
        if len(pushed) == 3:
            torch.testing.assert_close(x, best, rtol=0, atol=1e-10)

    assert pushed == {0, 1, 2}


def hessian_push(rule: PushedRule, worker: int, seed: int) -> None:
    n = rule.place.numel
    rows = [positive(n, seed), vector(n, seed)[None], vector(n, seed + 1)[None]]
    rule.came_from(worker, 1, 1)
    rule.apply([torch.cat(rows).flatten()])


def test_the_memory_of_workers_goes_into_a_checkpoint() -> None:
    x, place = vector(4, 0), Place(range(4), 4, 2)
    rule = build(Newton().pushes(), x, place)
    hessian_push(rule, 0, 1)
    hessian_push(rule, 1, 2)

    y = x.clone()
    other = build(Newton().pushes(), y, place)
    other.load_state_dict(rule.state_dict())
    hessian_push(rule, 0, 3)
    hessian_push(other, 0, 3)

    assert torch.equal(x, y)


def test_a_checkpoint_of_more_workers_does_not_weigh_on_fewer() -> None:
    of_two = build(Newton().pushes(), vector(4, 0), Place(range(4), 4, 2))
    hessian_push(of_two, 0, 1)
    hessian_push(of_two, 1, 2)
    x, y = vector(4, 9), vector(4, 9)
    resumed, fresh = (build(Newton().pushes(), z, Place(range(4), 4, 1)) for z in (x, y))
    resumed.load_state_dict(of_two.state_dict())

    hessian_push(resumed, 0, 3)
    hessian_push(fresh, 0, 3)

    assert torch.equal(x, y)


def test_a_step_that_cannot_be_made_leaves_the_memory_as_it_was() -> None:
    rule = build(Newton(plain=True).pushes(), torch.zeros(2, dtype=DOUBLE))
    rule.came_from(0, 1, 1)

    with pytest.raises(CurvatureError):
        rule.apply([torch.tensor([1, 1, 1, 1, 1, 0, 0, 0], dtype=DOUBLE)])  # H is singular

    assert not rule.memory


def inverse_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray[Any, Any]:
    """BFGS's inverse, dense and as the formula has it, from the last pair's scaling."""
    s, y = (v.numpy() for v in pairs[-1])
    inverse = (s @ y) / (y @ y) * np.eye(len(s))
    for s, y in ((a.numpy(), b.numpy()) for a, b in pairs):
        rho = 1 / (s @ y)
        left = np.eye(len(s)) - rho * np.outer(s, y)
        inverse = left @ inverse @ left.T + rho * np.outer(s, s)
    return inverse


def test_lbfgs_steps_by_the_pairs_that_it_was_pushed() -> None:
    n, h = 8, positive(8, 3)
    pairs = [(s, h @ s) for s in (vector(n, i) for i in range(5))]
    x = vector(n, 50)
    rule = build(LBFGS(history=3, lr=0.5).pushes(), x)
    for s, y in pairs:
        rule.apply([torch.stack([torch.zeros(n, dtype=DOUBLE), s, y]).flatten()])
    g, before = vector(n, 60), x.clone()

    rule.apply([torch.cat([g, torch.zeros(2 * n, dtype=DOUBLE)])])

    step = -0.5 * inverse_of(pairs[-3:]) @ g.numpy()
    np.testing.assert_allclose((x - before).numpy(), step, rtol=1e-9)


@pytest.mark.parametrize("spec", [LBFGS(), BFGS()])
def test_the_first_step_is_along_the_gradient_and_short(spec: LBFGS | BFGS) -> None:
    x, g = torch.zeros(4, dtype=DOUBLE), torch.tensor([30.0, 0, 40, 0], dtype=DOUBLE)
    rule = build(spec.pushes(), x)

    rule.apply([torch.cat([g, torch.zeros(8, dtype=DOUBLE)])])

    torch.testing.assert_close(x, -g / 50)


@pytest.mark.parametrize("spec", [LBFGS(), BFGS()])
def test_a_pair_without_curvature_is_left_out(spec: LBFGS | BFGS) -> None:
    s = vector(4, 1)
    rule = build(spec.pushes(), torch.zeros(4, dtype=DOUBLE))

    rule.apply([torch.stack([s, s, -s]).flatten()])

    assert not rule.memory


def test_bfgs_has_the_inverse_after_n_conjugate_pairs_on_a_quadratic() -> None:
    n, h = 5, positive(5, 4)
    _, directions = torch.linalg.eigh(h)  # conjugate to each other
    rule = build(BFGS().pushes(), torch.zeros(n, dtype=DOUBLE))

    for s in directions.T:
        rule.apply([torch.stack([torch.zeros_like(s), s, h @ s]).flatten()])

    torch.testing.assert_close(rule.memory["inverse"], torch.linalg.inv(h), rtol=0, atol=1e-10)


JACOBI = torch.tensor([[1, 0.7, 0.7], [0.7, 1, 0.7], [0.7, 0.7, 1]], dtype=DOUBLE)


def sweep(
    rule: PushedRule, x: Tensor, clock: int, *, is_stale: bool, scale: float = 1.0
) -> list[int]:
    """Let each of three workers move its coordinate of x'Ax/2, all from one old point or not.

    Returns whose turn it was.
    """
    old, turns = x.clone(), []
    for worker in range(3):
        turns.append(turn := pushed_turn(clock - 1, worker, 3, 3) % 3)
        v = old if is_stale else x.clone()
        z = v - JACOBI @ v  # the diagonal is 1
        rows = torch.full((2, 3), torch.nan, dtype=DOUBLE)  # what is no block's is not looked at
        rows[:, turn] = torch.stack([z, v])[:, turn]
        rule.came_from(worker, clock, 1)
        rule.apply([rows.flatten()], scale)
    return turns


def test_coordinates_in_turn_are_gauss_seidel() -> None:
    x = torch.ones(3, dtype=DOUBLE)
    rule = build(CoordinateDescent().pushes(), x, Place(range(3), 3, 3))
    expected = x.clone()

    for clock in range(1, 30):
        for i in sweep(rule, x, clock, is_stale=False):
            expected[i] -= JACOBI[i] @ expected
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)

    assert x.norm() < 1e-6


def test_coordinates_from_one_old_point_are_jacobi_which_damping_makes_converge() -> None:
    """The spectral radius of I - A is 1.4: chaotic relaxation diverges at that rate."""
    x, damped = torch.ones(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    place = Place(range(3), 3, 3)
    rule = build(CoordinateDescent().pushes(), x, place)
    halved = build(CoordinateDescent().pushes(), damped, place)

    for clock in range(1, 11):
        before = x.norm()
        sweep(rule, x, clock, is_stale=True)
        assert x.norm() / before == pytest.approx(1.4)
        sweep(halved, damped, clock, is_stale=True, scale=0.5)

    assert damped.norm() < 0.02


def test_a_shard_without_the_block_is_not_touched() -> None:
    spec, numel = CoordinateDescent(block=4), 12
    x = torch.zeros(6, dtype=DOUBLE)
    rule = build(spec.pushes(), x, Place(range(6, 12), numel, 1))
    touched = []

    for clock in (1, 2, 3):  # blocks 0 to 3, 4 to 7, 8 to 11
        rule.came_from(0, clock, 1)
        touched.append(rule.touches())
        rule.apply([torch.cat([torch.full((6,), float(clock)), torch.zeros(6)]).double()])

    assert touched == [False, True, True]
    assert x.tolist() == [2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize(("num_workers", "num_blocks"), [(2, 30), (3, 7), (4, 6), (1, 5)])
def test_every_worker_goes_round_all_blocks_and_no_two_have_one(
    num_workers: int, num_blocks: int
) -> None:
    def blocks(worker: int) -> list[int]:
        turns = (pushed_turn(clock, worker, num_workers, num_blocks) for clock in range(num_blocks))
        return [turn % num_blocks for turn in turns]

    rounds = [blocks(worker) for worker in range(num_workers)]

    assert all(sorted(own) == list(range(num_blocks)) for own in rounds)
    assert all(len(set(at_once)) == num_workers for at_once in zip(*rounds, strict=True))


def test_a_zero_of_the_penalty_is_an_exact_zero() -> None:
    x = torch.tensor([0.1], dtype=DOUBLE)
    rule = build(CoordinateDescent(l1=1.0).pushes(), x)
    rule.came_from(0, 1, 1)

    rule.apply([torch.tensor([0.0, 0.1], dtype=DOUBLE)])

    assert x.item() == 0.0


def test_a_natural_step_has_the_divergence_that_was_asked_for_in_the_running_metric() -> None:
    n, kl = 5, 0.02
    x = torch.zeros(n, dtype=DOUBLE)
    rule = build(NaturalGradient(metric="dense", kl=kl, damping=0, decay=0.9).pushes(), x)
    metrics = [positive(n, i) for i in range(4)]
    for f in metrics:
        before, g = x.clone(), vector(n, 20)
        rule.apply([torch.cat([g[None], f]).flatten()])

    weights = torch.tensor([0.9**3, 0.9**2, 0.9, 1.0], dtype=DOUBLE)
    mean = sum(w * f for w, f in zip(weights / weights.sum(), metrics, strict=True))
    d = x - before
    assert float(d @ mean @ d) / 2 == pytest.approx(kl, rel=1e-9)
    torch.testing.assert_close(mean @ d / (mean @ d).norm(), -g / g.norm())


def test_a_diagonal_metric_divides_each_element_by_its_own_mean() -> None:
    x = torch.zeros(3, dtype=DOUBLE)
    rule = build(
        NaturalGradient(metric="diagonal", kl=None, lr=0.5, damping=0, decay=0.5).pushes(), x
    )
    g = torch.tensor([1.0, 2, 3], dtype=DOUBLE)

    rule.apply([torch.stack([g, torch.tensor([1.0, 4, 0]).double()]).flatten()])
    rule.apply([torch.stack([g, torch.tensor([4.0, 1, 0]).double()]).flatten()])

    first = torch.tensor([1.0, 0.5, torch.inf], dtype=DOUBLE)
    second = g / ((torch.tensor([1.0, 4, 0]) + 2 * torch.tensor([4.0, 1, 0])) / 3)
    expected = -0.5 * (first + second)
    torch.testing.assert_close(x[:2], expected[:2])
    assert x[2] == -0.0  # the model does not depend on it


def test_a_metric_that_is_0_along_the_gradient_is_refused_and_nothing_changes() -> None:
    x = torch.zeros(2, dtype=DOUBLE)
    rule = build(NaturalGradient(metric="diagonal", damping=0).pushes(), x)

    with pytest.raises(CurvatureError, match="squared length in the metric"):
        rule.apply([torch.tensor([1.0, 1, 0, 0], dtype=DOUBLE)])

    assert x.tolist() == [0, 0]
    assert not rule.memory


def test_a_form_refuses_what_its_optimizer_cannot_hold() -> None:
    with pytest.raises(LayoutError, match="its limit is 10: use newton-cg"):
        build(Newton(limit=10).pushes(), torch.zeros(11))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LBFGS(c1=0.01), r"^lbfgs: c1=0.01 is for rounds"),
        (BFGS(tolerance=0), r"^bfgs: tolerance=0 is for rounds"),
        (Newton(curvature_batch=8), r"^newton: curvature_batch=8 is for rounds"),
        (CoordinateDescent(blocks_per_round=8), r"^coordinate: blocks_per_round=8 is for rounds"),
        (NaturalGradient(), r"^natural: a server can keep a metric, diagonal or dense"),
    ],
)
def test_keys_that_only_rounds_have_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.pushes()


def test_a_shard_whose_rule_cannot_step_still_is_at_the_version_it_was_ordered_to() -> None:
    form = NaturalGradient(metric="diagonal", damping=0).pushes()
    shard = Shard(torch.zeros(2), form, [torch.zeros(2) for _ in range(3)], num_rows=2)
    shard.hold(0, 1, 1, torch.tensor([1.0, 1, 0, 0]))
    take = Message(
        Kind.ORDER, Action.TAKE, 0, 1, 1, clock=1, version=1, samples=1, step=1, scale=1.0
    )

    with pytest.raises(CurvatureError):
        shard.execute(take)

    lease = shard.execute(Message(Kind.ORDER, Action.READ, -1, version=1))
    assert lease is not None
    assert lease.version == 1
    assert shard.snapshots.params.tolist() == [0, 0]
