"""The contract of `sync.collective.Collective`, over every implementation."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import PeerLostError, ProtocolError
from paramserver.layout import Layout
from sync.collective import (
    CHUNK,
    MAX_VALUES,
    Collective,
    Table,
    add_up,
    fair_cuts,
    weighted_sum_,
)
from tests.support.ranks import KINDS, Kind, group, results

LAYOUT = Layout.of(nn.Linear(40, 30))  # 1200 + 30 parameters in 20 blocks
LARGE = Layout.of(nn.Linear(CHUNK, 3))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


def gradient(rank: int, layout: Layout = LAYOUT) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_hears_what_every_rank_says(kind: Kind, world: int) -> None:
    def body(collective: Collective) -> list[Table]:
        return [collective.exchange(n, (collective.rank, n / 3)) for n in range(5)]

    heard = results(group(kind, LAYOUT, world, body))

    expected = [[(float(rank), n / 3) for rank in range(world)] for n in range(5)]
    assert heard == [expected] * world


def test_an_exchange_can_be_silent(kind: Kind) -> None:
    heard = results(group(kind, LAYOUT, 2, lambda c: c.exchange(1, ())))

    assert heard == [[(), ()]] * 2


def test_nobody_leaves_an_exchange_before_all_have_come(kind: Kind) -> None:
    late = threading.Event()

    def body(collective: Collective) -> bool:
        if collective.rank == 1:
            while not collective_0_waits.is_set():
                time.sleep(1e-3)
            late.set()
        else:
            collective_0_waits.set()
        collective.exchange(1, ())
        return late.is_set()

    collective_0_waits = threading.Event()

    assert results(group(kind, LAYOUT, 2, body)) == [True, True]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "several chunks"])
def test_slices_are_weighted_sums_and_together_the_whole(
    kind: Kind, layout: Layout, world: int
) -> None:
    weights = [0.5 + rank for rank in range(world)]

    def body(collective: Collective) -> tuple[range, Tensor]:
        collective.grad.copy_(gradient(collective.rank, layout))
        collective.exchange(1, ())
        own = collective.reduce(weights).clone()
        collective.publish()
        return collective.cut, own

    slices = results(group(kind, layout, world, body))

    expected = sum(
        w * gradient(rank, layout).double() for rank, w in enumerate(weights)
    ) + torch.zeros(layout.numel, dtype=torch.float64)
    whole = torch.cat([own for _, own in slices])
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-6)
    assert [i for cut, _ in slices for i in (cut.start, cut.stop)][0::2] == [
        sum(len(own) for _, own in slices[:rank]) for rank in range(world)
    ]
    assert all(cut.start % 64 == 0 for cut, _ in slices)


def test_a_reduction_has_the_same_bits_every_time(kind: Kind) -> None:
    def body(collective: Collective) -> Tensor:
        collective.grad.copy_(gradient(collective.rank))
        collective.exchange(1, ())
        return collective.reduce([0.3, 0.3, 0.4]).clone()

    once = results(group(kind, LAYOUT, 3, body))
    again = results(group(kind, LAYOUT, 3, body))

    assert all(map(torch.equal, once, again))


def test_published_slices_are_seen_by_all(kind: Kind) -> None:
    def body(collective: Collective) -> Tensor:
        collective.exchange(1, ())
        cut = collective.cut
        collective.params[cut.start : cut.stop] = gradient(7)[cut.start : cut.stop]
        collective.publish()
        return collective.params.clone()

    seen = results(group(kind, LAYOUT, 3, body))

    assert all(torch.equal(params, gradient(7)) for params in seen)


@pytest.mark.parametrize("world", [1, 3])
def test_a_second_vector_is_shared_beside_parameters_and_gradients(kind: Kind, world: int) -> None:
    def body(collective: Collective) -> list[Tensor]:
        seen = []
        cut = collective.cut
        for turn in range(3):
            collective.exchange(turn, ())
            seen.append(collective.vector.clone())
            collective.exchange(turn, ())
            collective.params[cut.start : cut.stop] = gradient(turn)[cut.start : cut.stop]
            collective.vector[cut.start : cut.stop] = gradient(10 + turn)[cut.start : cut.stop]
            collective.publish(vector=True)
            seen += [collective.vector.clone(), collective.params.clone()]
            collective.grad.fill_(1.0)
            collective.exchange(turn, ())
            seen.append(collective.reduce([1.0] * world).clone())
        return seen

    came_out = results(group(kind, LAYOUT, world, body))

    for seen in came_out:
        before = torch.zeros(LAYOUT.numel)
        for turn in range(3):
            was, vector, params, reduced = seen[4 * turn : 4 * turn + 4]
            assert torch.equal(was, before)
            assert torch.equal(vector, gradient(10 + turn))
            assert torch.equal(params, gradient(turn))
            assert (reduced == world).all()
            before = vector


def test_a_second_vector_is_made_late_and_by_whoever_needs_it_first(kind: Kind) -> None:
    def body(collective: Collective) -> Tensor:
        cut = collective.cut
        if collective.rank == 1:
            assert not collective.vector.any()
        collective.exchange(1, ())
        collective.publish()  # others need not have it yet
        collective.exchange(2, ())
        collective.vector[cut.start : cut.stop] = gradient(7)[cut.start : cut.stop]
        collective.publish(vector=True)
        return collective.vector.clone()

    seen = results(group(kind, LAYOUT, 3, body))

    assert all(torch.equal(vector, gradient(7)) for vector in seen)


def test_rows_are_reduced_one_at_a_time(kind: Kind) -> None:
    def body(collective: Collective) -> Tensor:
        rows = []
        for row in range(4):
            collective.grad.copy_(gradient(10 * row + collective.rank))
            collective.exchange(1, ())
            rows.append(collective.reduce([1.0, 2.0, 3.0]).clone())
            collective.publish()
        return torch.stack(rows)

    slices = results(group(kind, LAYOUT, 3, body))

    for row in range(4):
        expected = sum((1 + r) * gradient(10 * row + r).double() for r in range(3))
        whole = torch.cat([rows[row] for rows in slices]).double()
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)


def test_sums_have_the_bits_of_an_addition_in_the_order_of_the_ranks(kind: Kind) -> None:
    def values(rank: int) -> Tensor:  # more than one exchange carries
        generator = torch.Generator().manual_seed(rank)
        return 10.0 ** (8 * rank) * torch.randn(90, 101, generator=generator, dtype=torch.float64)

    sums = results(group(kind, LAYOUT, 3, lambda c: add_up(c, 1, values(c.rank))))

    expected = (values(0) + values(1)) + values(2)
    assert values(0).numel() > MAX_VALUES
    assert all(torch.equal(total, expected) for total in sums)


def test_ranks_of_a_tiny_model_may_own_nothing(kind: Kind) -> None:
    tiny = Layout.of(nn.Linear(2, 1))

    def body(collective: Collective) -> tuple[int, Tensor]:
        collective.grad.fill_(1.0)
        collective.exchange(1, ())
        own = collective.reduce([1.0] * 4)
        cut = collective.cut
        collective.params[cut.start : cut.stop] = own
        collective.publish()
        return len(cut), collective.params.clone()

    seen = results(group(kind, tiny, 4, body))

    assert sorted(size for size, _ in seen) == [0, 0, 64, 64]
    assert all(torch.equal(params, torch.full((128,), 4.0)) for _, params in seen)


def test_ranks_at_different_steps_are_refused(kind: Kind) -> None:
    came_out = group(kind, LAYOUT, 2, lambda c: c.exchange(c.rank, ()), timeout_s=5.0)

    assert isinstance(came_out[0], ProtocolError)
    assert "step" in str(came_out[0])
    assert isinstance(came_out[1], ProtocolError | PeerLostError)


def test_a_rank_that_leaves_is_named_at_once(kind: Kind) -> None:
    def body(collective: Collective) -> Table | None:
        if collective.rank == 1:
            return None
        return collective.exchange(8, (1.0,))

    came_out = group(kind, LAYOUT, 3, body, timeout_s=20.0)

    for rank in (0, 2):
        error = came_out[rank]
        assert isinstance(error, PeerLostError)
        assert (error.rank, error.peers, error.step) == (rank, (1,), 8)
        assert error.waited_s < 15


def test_a_silent_rank_is_named_after_the_deadline(kind: Kind) -> None:
    ended = threading.Semaphore(0)

    def body(collective: Collective) -> Table | None:
        if collective.rank == 2:
            for _ in range(2):
                assert ended.acquire(timeout=10)
            return None
        try:
            return collective.exchange(8, (1.0,))
        finally:
            ended.release()

    came_out = group(kind, LAYOUT, 3, body, timeout_s=3.0)

    for rank in (0, 1):
        error = came_out[rank]
        assert isinstance(error, PeerLostError)
        assert (error.rank, error.peers, error.step) == (rank, (2,), 8)
        assert 2.5 < error.waited_s < 15  # whom rank 0 tells of it has come later, maybe


def test_whoever_waits_says_for_whom(kind: Kind) -> None:
    seen = threading.Event()
    waiting: list[Collective] = []

    def body(collective: Collective) -> Table:
        if collective.rank == 0:
            waiting.append(collective)
        else:
            while not (waiting and waiting[0].waits[0]):
                time.sleep(1e-3)
            assert waiting[0].waits[0] == (1,)
            assert waiting[0].waits[1] <= time.monotonic()
            seen.set()
        return collective.exchange(1, ())

    results(group(kind, LAYOUT, 2, body))

    assert seen.is_set()
    assert waiting[0].waits == ((), 0.0)


def test_the_last_owners_of_a_tiny_model_get_nothing() -> None:
    cuts = fair_cuts(Layout.of(nn.Linear(2, 1)), 4)

    assert cuts == (range(64), range(64, 128), range(128, 128), range(128, 128))


def test_a_weighted_sum_starts_with_its_own_term() -> None:
    own, other = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])

    weighted_sum_(own, 0.5, [(other, 0.1), (other, 1.0)])

    assert own.tolist() == [11.5, 23.0]
