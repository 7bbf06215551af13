"""Gradients of many nets side by side, against one net at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploy.experiment.mixture import Nets, mixture, table
from paramserver.layout import Layout
from workers.task import Task, build_data, build_model

SEEDS, WORKERS = [3, 4], 2


@pytest.mark.parametrize("task", [mixture(0), mixture(4), table()], ids=lambda task: task.name)
def test_gradients_are_those_of_one_net_on_its_own_batch(task: Task) -> None:
    nets = Nets(task, WORKERS, SEEDS)
    points = nets.start.unsqueeze(1).repeat(1, WORKERS, 1)

    found = nets.gradients(points, 0)

    train, model = build_data(task).train, build_model(task, 0)
    layout = Layout.of(model)
    for replica, seed in enumerate(SEEDS):
        drawn = np.random.default_rng([seed, WORKERS]).integers(
            len(train), size=(WORKERS, task.batch_size)
        )
        for worker in range(WORKERS):
            layout.load(model, layout.flatten(build_model(task, seed)))
            loss = task.loss(model, train.batch(torch.from_numpy(drawn[worker])))
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            expected = torch.cat([slope.flatten() for slope in slopes])
            got = torch.cat([part.flatten() for part in layout.views(found[replica, worker])])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_replica_begins_where_its_seed_says_and_is_judged_on_the_test_data() -> None:
    task = mixture(1)
    nets = Nets(task, WORKERS, SEEDS)

    judged = nets.judged(nets.start[1])

    model, (inputs, classes) = build_model(task, SEEDS[1]), _test(task)
    assert judged == pytest.approx((model(inputs).argmax(1) == classes).float().mean().item())


def _test(task: Task) -> tuple[torch.Tensor, ...]:
    test = build_data(task).test
    return tuple(test.batch(torch.arange(len(test))))
