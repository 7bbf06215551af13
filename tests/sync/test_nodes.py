"""What several nodes change; the contract itself is `test_collective`'s."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from paramserver.layout import Layout
from sync.collective import Collective
from sync.crew import carrier
from sync.nodes import _carrier
from tests.support.ranks import NODES, group, results

LAYOUT = Layout.of(nn.Linear(40, 30))


@pytest.mark.parametrize(
    ("nodes", "kind"),
    [
        ((0,), "shared_memory"),
        ((0, 0, 0), "shared_memory"),
        ((0, 1, 2), "gloo"),
        ((0, 0, 1), "nodes"),
        ((0, 1, 1, 0), "nodes"),
    ],
)
def test_where_ranks_are_says_what_carries_gradients(nodes: tuple[int, ...], kind: str) -> None:
    assert carrier(nodes) == kind


def test_compressed_gradients_go_from_rank_to_rank() -> None:
    assert carrier((0, 0, 1), compressed=True) == "gloo"
    assert carrier((0, 0), compressed=True) == "shared_memory"


@pytest.mark.parametrize("nodes", [NODES, (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 2, 2, 2)])
def test_each_slice_goes_to_each_other_node_once_and_the_work_is_shared(
    nodes: tuple[int, ...],
) -> None:
    numbers = sorted(set(nodes))

    carriers = {
        (rank, node): _carrier(rank, node, nodes)
        for rank, node in itertools.product(range(len(nodes)), numbers)
    }

    for (rank, node), one in carriers.items():
        assert (one is None) == (nodes[rank] == node)
        assert one is None or nodes[one] == node
    for node in numbers:
        here = [rank for rank, its_node in enumerate(nodes) if its_node == node]
        work = [sum(one == rank for one in carriers.values()) for rank in here]
        assert max(work) - min(work) <= 1


def test_ranks_of_a_node_have_one_copy_of_the_parameters() -> None:
    def body(collective: Collective) -> int:
        collective.exchange(1, ())
        if collective.rank == 0:
            collective.params[0] = 7.0
        collective.exchange(2, ())
        seen = float(collective.params[0])
        collective.exchange(3, ())
        return int(seen)

    seen = results(group("nodes", LAYOUT, 5, body))

    assert seen == [7 if node == NODES[0] else 0 for node in NODES]


def test_slices_are_sent_as_sums_of_a_node() -> None:
    def body(collective: Collective) -> tuple[int, int]:
        sums, copies = collective._sums, collective._copies  # type: ignore[attr-defined]
        return sums.numel(), copies.numel()

    sizes = results(group("nodes", LAYOUT, 5, body))

    sent, received = (sum(size) for size in zip(*sizes, strict=True))
    # Two nodes: every slice is sent to the other one, once.
    assert sent == received == LAYOUT.numel


def test_a_sum_has_the_same_bits_every_time() -> None:
    def body(collective: Collective) -> list[float]:
        own = torch.Generator().manual_seed(collective.rank)
        collective.grad.copy_(torch.randn(LAYOUT.numel, generator=own))
        collective.exchange(1, ())
        total: list[float] = collective.reduce([0.3, 0.1, 0.7, 0.9, 0.2]).tolist()
        collective.publish()
        return total

    once, again = (results(group("nodes", LAYOUT, 5, body)) for _ in range(2))

    assert once == again
