"""Caches without a server, against plain loops and the mean they follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from async_sgd.caches import Caches
from paramserver.optimizers import SGD, Adam, LocalMomentum, Momentum
from paramserver.optimizers.base import Optimizer

WORKERS = 3
START = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def slopes(points: Tensor, iteration: int) -> Tensor:
    """Return gradients that differ from worker to worker and from iteration to iteration."""
    worker = torch.arange(points.shape[1]).view(1, -1, 1)
    return points * (1 + 0.1 * worker) + 0.01 * iteration


def caches(optimizer: Optimizer, most: int) -> Caches:
    return Caches(START, optimizer, slopes, num_workers=WORKERS, most=most, seeds=[0, 1])


def test_without_lateness_updates_are_summed_and_all_caches_are_one_bit_for_bit() -> None:
    made = caches(SGD(lr=0.1), most=0)
    plain = START.clone()

    for iteration in range(20):
        made.step()
        grads = slopes(plain.unsqueeze(1).repeat(1, WORKERS, 1), iteration)
        total = torch.zeros_like(plain)
        for worker in range(WORKERS):
            total += -0.1 * grads[:, worker]
        plain += total

    for worker in range(WORKERS):
        assert torch.equal(made.caches[:, worker], plain)


def test_each_worker_has_an_adam_of_its_own() -> None:
    made = caches(Adam(lr=0.1), most=0)
    plain = START.clone()
    points = [plain.clone().requires_grad_() for _ in range(WORKERS)]
    adams = [torch.optim.Adam([point], lr=0.1) for point in points]

    for iteration in range(5):
        made.step()
        grads = slopes(plain.unsqueeze(1).repeat(1, WORKERS, 1), iteration)
        moved = torch.zeros_like(plain)
        for worker, (point, adam) in enumerate(zip(points, adams, strict=True)):
            before = point.detach().clone()
            point.grad = grads[:, worker].clone()
            adam.step()
            moved += point.detach() - before
        plain += moved

    torch.testing.assert_close(made.caches[:, 0], plain)


def test_an_update_reaches_every_cache_once_and_at_most_s_iterations_late() -> None:
    late, replicas = 4, 400
    start = torch.zeros(replicas, 1)

    def once(points: Tensor, iteration: int) -> Tensor:
        return torch.full_like(points, float(iteration == 0))

    made = Caches(
        start, SGD(lr=1.0), once, num_workers=WORKERS, most=late, seeds=list(range(replicas))
    )
    arrived = []
    for _ in range(late + 3):
        made.step()
        arrived.append(-made.caches.mean().item() / WORKERS)

    expected = np.minimum(np.arange(1, late + 4) / (late + 1), 1)
    np.testing.assert_allclose(arrived[:late], expected[:late], atol=0.03)  # 5 standard errors
    assert torch.equal(made.caches, torch.full_like(made.caches, -float(WORKERS)))
    assert arrived[late:] == [1.0] * 3


def test_the_mean_of_caches_follows_its_recursion() -> None:
    late, replicas, step = 3, 3000, 0.05
    start = torch.ones(replicas, 1, dtype=torch.float64)
    made = Caches(
        start,
        SGD(lr=step),
        lambda points, iteration: points,
        num_workers=WORKERS,
        most=late,
        seeds=list(range(replicas)),
    )
    mean = [1.0]
    for _ in range(15):
        made.step()
        mean.append(mean[-1] - step * WORKERS / (late + 1) * sum(mean[-late - 1 :]))

    of_replicas = made.caches.mean(dim=(1, 2))
    error = float(of_replicas.std()) / replicas**0.5
    assert 0 < error < 0.01
    assert abs(float(of_replicas.mean()) - mean[-1]) < 4 * error


def test_the_same_seeds_give_the_same_bits() -> None:
    first, second = (caches(Momentum(lr=0.05), most=5) for _ in range(2))

    for made in (first, second):
        for _ in range(12):
            made.step()

    assert torch.equal(first.caches, second.caches)
    assert not torch.equal(first.caches[:, 0], first.caches[:, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_workers": 0}, r"^num_workers must be 1 or more, got 0$"),
        ({"most": -1}, r"^most must be 0 iterations or more, got -1$"),
        ({"seeds": [0]}, r"^seeds must be one for each of 2 replicas, got 1$"),
        ({"optimizer": LocalMomentum(lr=0.1)}, r"^each worker has an optimizer of its own, whose"),
        ({"optimizer": SGD(lr=0.1, weight_decay=0.1)}, r"use one without weight decay"),
    ],
)
def test_what_cannot_be_kept_in_caches_is_refused(changed: dict[str, object], message: str) -> None:
    given = {"optimizer": SGD(lr=0.1), "num_workers": 2, "most": 1, "seeds": [0, 1], **changed}
    optimizer = given.pop("optimizer")

    with pytest.raises(ValueError, match=message):
        Caches(START, optimizer, slopes, **given)  # type: ignore[arg-type]
