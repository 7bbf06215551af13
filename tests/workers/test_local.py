"""Local steps: how many, and what each way of taking them pushes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from paramserver.errors import PluginError
from paramserver.optimizers import SGD, AdamW, Momentum
from workers.local import LOCALS, Downpour, Elastic, Local, LocalAdamW, LocalSGD, steps_of
from workers.own import Own

DOUBLE = torch.float64
CURVATURE = torch.tensor([1.0, 0.5, 0.1], dtype=DOUBLE)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def pushed(own: Own, read: Tensor, num_steps: int, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what ``own`` pushes, cut over two shards, after ``num_steps``."""
    x, out = torch.full_like(read, 9.0), torch.full_like(read, 9.0)
    own.begin(read.split(2), x.split(2))
    for _ in range(num_steps):
        own.step(gradient(x).split(2))
    own.end(out.split(2))
    return out


def bowl(x: Tensor) -> Tensor:
    return CURVATURE * x


def test_a_slow_worker_takes_as_many_steps_as_its_speed_allows() -> None:
    local = LocalSGD(steps=100, speeds=(10.0, 2.9, 0.001, 7.0))

    assert [local.num_steps(worker) for worker in range(4)] == [100, 29, 1, 70]
    assert LocalSGD(steps=7).num_steps(3) == 7


def test_the_steps_of_all_clocks_follow_one_another() -> None:
    local = LocalSGD(steps=4, speeds=(1.0, 0.5))

    assert list(steps_of(local, 0, 2)) == [8, 9, 10, 11]
    assert list(steps_of(local, 1, 2)) == [4, 5]
    assert list(steps_of(None, 1, 2)) == [2]


@pytest.mark.parametrize("outer", [0.3, 1.0, 1.7])
def test_gradient_descent_contracts_as_the_formula_says(outer: float) -> None:
    """w goes to (1 - a (1 - (1 - lr c)^H)) w, with the server's rate a and curvature c."""
    read = vector(1.0, -2.0, 3.0)

    delta = pushed(LocalSGD(steps=5, lr=0.4).build(), read, 5, bowl)

    factor = 1 - outer * (1 - (1 - 0.4 * CURVATURE) ** 5)
    torch.testing.assert_close(read - outer * delta, factor * read, rtol=1e-14, atol=0)


def test_a_step_no_longer_than_half_an_element_is_taken_back_exactly() -> None:
    """w - (w - x) is x to the last bit if x is between w/2 and 2w: Sterbenz's lemma."""
    read = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1
    x = read - 0.01 * (read - 1.0)

    delta = pushed(LocalSGD(steps=1, lr=0.01).build(), read, 1, lambda x: x - 1.0)

    applied = torch.nn.Parameter(read.clone(), requires_grad=False)
    SGD(lr=1.0).build([applied]).apply([delta])
    plain = torch.nn.Parameter(read.clone(), requires_grad=False)
    SGD(lr=0.01).build([plain]).apply([read - 1.0])
    assert torch.equal(applied, plain)
    torch.testing.assert_close(plain.data, x)


@pytest.mark.parametrize(
    ("local", "optimizer"),
    [
        (LocalSGD(lr=0.1, momentum=0.9), Momentum(lr=0.1, momentum=0.9)),
        (LocalSGD(lr=0.1, weight_decay=0.2), SGD(lr=0.1, weight_decay=0.2)),
        (LocalAdamW(lr=0.1, weight_decay=0.1), AdamW(lr=0.1, weight_decay=0.1)),
    ],
    ids=["momentum", "decay", "adamw"],
)
def test_what_an_optimizer_remembers_stays_from_push_to_push(
    local: Local, optimizer: Momentum | AdamW
) -> None:
    own, w = local.build(), vector(1.0, -2.0, 3.0)
    plain = torch.nn.Parameter(w.clone(), requires_grad=False)
    rule = optimizer.build([plain])

    for _ in range(3):
        w = w - pushed(own, w, 4, bowl)  # as SGD with lr=1 does

    for _ in range(12):
        rule.apply([bowl(plain.data)])
    torch.testing.assert_close(w, plain.data, rtol=1e-13, atol=1e-14)


def test_a_downpour_is_the_sum_of_the_gradients_on_the_way() -> None:
    read, seen = vector(1.0, -2.0, 3.0), []

    def gradient(x: Tensor) -> Tensor:
        seen.append(bowl(x))
        return seen[-1]

    total = pushed(Downpour(push=3, lr=0.5).build(), read, 3, gradient)

    assert torch.equal(total, seen[0] + seen[1] + seen[2])
    torch.testing.assert_close(
        read - 0.5 * total, (1 - 0.5 * CURVATURE) ** 3 * read, rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_one_elastic_worker_is_the_papers_algorithm(num_steps: int, momentum: float) -> None:
    """Algorithms 1 and 2 of the paper, whose worker exchanges at every ``num_steps``-th step."""
    lr, alpha, start = 0.3, 0.4, vector(1.0, -2.0, 3.0)
    x, v, centre = start.clone(), torch.zeros(3, dtype=DOUBLE), start.clone()
    own = Elastic(steps=num_steps, lr=lr, alpha=alpha, momentum=momentum).build()
    ours = start.clone()

    for _ in range(8):
        ours = ours - pushed(own, ours, num_steps, bowl)

    for t in range(8 * num_steps):
        before = x.clone()
        if t % num_steps == 0:
            force = alpha * (before - centre)
            x, centre = x - force, centre + force
        v = momentum * v - lr * bowl(before + momentum * v)
        x = x + v
    torch.testing.assert_close(ours, centre, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("lr", [0.1, 0.5, 1.0, 1.5, 1.9])
@pytest.mark.parametrize("share", [0.98, 1.02])
def test_one_elastic_worker_is_stable_where_the_paper_says(lr: float, share: float) -> None:
    """Stable for alpha up to (4 - 2 lr) / (4 - lr), and the bound is tight for one worker."""
    alpha = share * (4 - 2 * lr) / (4 - lr)
    own, centre = Elastic(steps=1, lr=lr, alpha=alpha).build(), vector(1.0, 1.0)
    sizes = []

    for _ in range(1000):
        centre = centre - pushed(own, centre, 1, lambda x: x)
        sizes.append(float(centre.abs().max()))

    growth = np.log(max(sizes[-50:]) / max(sizes[500:550]))
    assert (growth < 0) == (share < 1)


def test_an_elastic_worker_goes_on_from_where_it_was() -> None:
    own = Elastic(steps=1, lr=0.5, alpha=0.1).build()
    pushed(own, vector(1.0, 1.0), 1, lambda x: x)  # leaves it at 0.5

    assert torch.equal(
        pushed(own, vector(3.0, 3.0), 1, lambda x: x),
        vector(0.25, 0.25),  # -0.1 (0.5 - 3)
    )


@pytest.mark.parametrize("name", ["sgd:momentum=0.5", "adamw", "downpour", "elastic"])
def test_a_gradient_that_stopped_a_worker_leaves_nothing_behind(name: str) -> None:
    """A run that drops such a push goes on, from a new read."""
    local = LOCALS.parse(name)
    stopped, other, read = local.build(), local.build(), vector(1.0, -2.0, 3.0)

    stopped.begin(read.split(2), torch.empty(3, dtype=DOUBLE).split(2))

    assert torch.equal(pushed(stopped, read, 2, bowl), pushed(other, read, 2, bowl))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sgd:steps=0", "steps must be 1 or more, got 0"),
        ("sgd:speeds=1/0", "the speed of worker 1 must be above 0, got 0"),
        ("sgd:lr=0", "lr must be above 0"),
        ("sgd:momentum=1", "momentum must be 0 or more and below 1"),
        ("sgd:weight_decay=-1", "weight_decay must be 0 or more"),
        ("adamw:betas=0.9/1", r"betas\[1\] must be 0 or more and below 1"),
        ("adamw:steps=-1", "steps must be 1 or more"),
        ("downpour:lr=-1", "lr must be above 0"),
        ("downpour:fetch=3", "fetch must be a multiple of push, 10, got 3: a worker fetches"),
        ("downpour:push=0", "push must be 1 step or more, got 0"),
        ("elastic:alpha=0", "alpha must be above 0"),
        ("elastic:alpha=1.5", "alpha must be 0 or more and below 1"),
        ("elastic:momentum=1", "momentum must be 0 or more and below 1"),
        ("elastic:lr=0", "lr must be above 0"),
        ("elastc", "did you mean 'elastic'"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        LOCALS.parse(text)


def test_speeds_are_one_a_worker() -> None:
    local = LOCALS.parse("adamw:steps=4,speeds=1/2/4")

    local.check(3)
    with pytest.raises(ValueError, match=r"^speeds must be one for each of the 4 workers, got 3"):
        local.check(4)
    assert LOCALS.build(LOCALS.describe(local)) == local


def test_what_is_kept_is_counted() -> None:
    names = ("sgd", "sgd:momentum=0.9", "adamw", "downpour", "elastic", "elastic:momentum=0.9")

    assert [LOCALS.parse(name).num_kept for name in names] == [0, 1, 2, 0, 1, 2]
    assert LOCALS.parse("downpour:push=2,fetch=4").num_kept == 1
    assert LOCALS.parse("downpour:push=2,fetch=2").num_kept == 0


def test_a_downpour_goes_on_where_it_is_until_it_fetches() -> None:
    own, lr = Downpour(push=2, fetch=6, lr=0.5).build(), 0.5
    x = vector(1.0, -2.0, 3.0)

    for push in range(6):
        read = vector(10.0, 20.0, float(push))  # is looked at by pushes 0 and 3
        if push % 3 == 0:
            x = read.clone()
        total = pushed(own, read, 2, bowl)

        grads = []
        for _ in range(2):
            grads.append(bowl(x))
            x = x - lr * grads[-1]
        assert torch.equal(total, grads[0] + grads[1])
        assert own.keeps == (push % 3 != 2)


def test_a_downpour_fetches_after_a_gradient_that_was_not_finite() -> None:
    own, read = Downpour(push=1, fetch=3, lr=0.5).build(), vector(1.0, -2.0, 3.0)
    pushed(own, read, 1, bowl)
    own.begin(read.split(2), torch.empty(3, dtype=DOUBLE).split(2))  # and no end follows

    again = pushed(own, read, 1, bowl)

    assert torch.equal(again, bowl(read))
