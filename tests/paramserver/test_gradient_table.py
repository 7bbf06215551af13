from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from async_sgd.rules import Ringleader
from paramserver.gradient_table import GradientTable
from paramserver.rules import Accept, Push
from tests.support.clusters import MemoryCluster

N = 64
DOUBLE = torch.float64


def vector(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Plain:
    """The rule and the table written plainly, in lists, for workers that stay."""

    def __init__(self, workers: Sequence[int]) -> None:
        self.now: dict[int, list[Tensor]] = {w: [] for w in workers}
        self.later: dict[int, list[Tensor]] = {w: [] for w in workers}
        self.is_second, self.due = False, set(workers)

    def push(self, worker: int, grad: Tensor) -> Tensor | None:
        if not self.is_second:
            self.now[worker].append(grad)
            if not all(self.now.values()):
                return None
            self.is_second, self.due = True, set(self.now)
        elif worker in self.due:
            self.now[worker].append(grad)
        else:
            self.later[worker].append(grad)
            return None
        self.due.remove(worker)
        means = [torch.stack(grads).mean(0) for grads in self.now.values()]
        direction = torch.stack(means).mean(0)
        if not self.due:
            self.is_second = False
            self.now, self.later = self.later, {w: [] for w in self.later}
        return direction


@pytest.mark.parametrize("seed", range(5))
def test_rule_and_table_are_the_algorithm_written_plainly(seed: int) -> None:
    num_workers = 4
    draw = torch.Generator().manual_seed(seed)
    rule, table = Ringleader().build(num_workers), GradientTable(torch.zeros(N, dtype=DOUBLE))
    plain = Plain(range(num_workers))
    for worker in range(num_workers):
        rule.on_join(worker, 0)
    num_updates = 0

    for step in range(200):
        speeds = torch.tensor([8.0, 4.0, 2.0, 1.0])
        worker = int(torch.multinomial(speeds, 1, generator=draw))
        verdict = rule.on_push(Push(worker, step, 0, 0))
        assert isinstance(verdict, Accept)
        direction = table.add(worker, vector(step), step=verdict.step)
        expected = plain.push(worker, vector(step))

        assert (direction is None) == (expected is None)
        if direction is not None and expected is not None:
            torch.testing.assert_close(direction, expected, rtol=1e-12, atol=1e-13)
            num_updates += 1

    assert num_updates > 20


def test_one_worker_is_plain_sgd() -> None:
    table = GradientTable(torch.zeros(N))

    for step in range(5):
        grad = torch.full((N,), float(step))
        found = table.add(0, grad, step=True)

        assert found is not None
        assert torch.equal(found, grad)


@pytest.mark.parametrize("is_second", [False, True], ids=["first part", "second part"])
def test_who_leaves_takes_its_gradients_along(is_second: bool) -> None:
    table = GradientTable(torch.zeros(N, dtype=DOUBLE))
    for worker in range(3):
        table.add(worker, vector(worker), step=is_second and worker == 2)

    table.forget(0)
    direction = table.add(1, vector(9), step=True)

    assert direction is not None
    mean = ((vector(1) + vector(9)) / 2 + vector(2)) / 2
    torch.testing.assert_close(direction, mean, rtol=1e-12, atol=1e-13)


def test_the_leave_of_the_last_one_due_ends_the_round() -> None:
    table = GradientTable(torch.zeros(N, dtype=DOUBLE))
    table.add(0, vector(0), step=False)
    table.add(1, vector(1), step=True)
    table.add(1, vector(2), step=False)  # for the next round

    table.forget(0)
    direction = table.add(1, vector(3), step=True)

    assert direction is not None
    torch.testing.assert_close(direction, (vector(2) + vector(3)) / 2, rtol=1e-12, atol=1e-13)


def test_shards_follow_the_rule_through_a_server() -> None:
    rule = Ringleader().build(2)
    with MemoryCluster(torch.zeros(128), shards=2, rule=rule) as cluster:
        clients = [cluster.join(worker) for worker in range(2)]
        for client in clients:
            client.first_read()

        for worker, value in ((0, 2.0), (0, 4.0), (1, 7.0), (1, 100.0), (0, 0.0), (0, 5.0)):
            for slot in clients[worker].slots:
                slot.fill_(value)
            clients[worker].push(norm=1.0)

        # ((2 + 4) / 2 + 7) / 2 = 5, then ((2 + 4 + 0) / 3 + 7) / 2 = 4.5; 100 is for the next
        # round, whose first part 5 ends: (100 + 5) / 2.
        assert cluster.column("version") == [1, 1, 1, 2, 2, 3]
        assert torch.equal(cluster.params(), torch.full((128,), -5.0 - 4.5 - 52.5))
