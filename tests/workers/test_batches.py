from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.batches import Batches, step_seed

shapes = st.integers(1, 6).flatmap(
    lambda num_workers: st.tuples(
        st.integers(num_workers, 40), st.integers(1, 12), st.just(num_workers)
    )
)
seeds = st.integers(0, 2**63)


@given(shapes, seeds)
@settings(deadline=None)
def test_the_workers_parts_are_every_sample_once(shape: tuple[int, int, int], seed: int) -> None:
    num_examples, batch_size, num_workers = shape

    parts = [
        Batches(num_examples, batch_size, seed=seed, worker=w, num_workers=num_workers).part
        for w in range(num_workers)
    ]

    assert torch.cat(parts).sort().values.tolist() == list(range(num_examples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(shapes, seeds)
@settings(deadline=None)
def test_each_pass_reads_the_whole_part_once(shape: tuple[int, int, int], seed: int) -> None:
    num_examples, batch_size, num_workers = shape
    batches = Batches(num_examples, batch_size, seed=seed, worker=0, num_workers=num_workers)
    size, passes = len(batches.part), 3

    clocks = -(-passes * size // batch_size)
    stream = torch.cat([batches.indices(clock) for clock in range(clocks)])

    for read in stream[: passes * size].split(size):
        assert read.sort().values.equal(batches.part.sort().values)


@given(shapes, seeds, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_any_clock_in_any_order_gives_what_going_on_gives(
    shape: tuple[int, int, int], seed: int, random: Random
) -> None:
    num_examples, batch_size, num_workers = shape
    worker = num_workers - 1
    kind = {"seed": seed, "worker": worker, "num_workers": num_workers}
    batches = Batches(num_examples, batch_size, **kind)
    in_order = [batches.indices(clock) for clock in range(12)]
    clocks = list(range(12))
    random.shuffle(clocks)

    jumping = Batches(num_examples, batch_size, **kind)

    assert all(jumping.indices(clock).equal(in_order[clock]) for clock in clocks)


@given(st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_another_seed_gives_another_order(seed: int, other: int) -> None:
    first, second = (
        Batches(1000, 50, seed=s, worker=0, num_workers=1).indices(0) for s in (seed, other)
    )

    assert first.equal(second) == (seed == other)


def test_passes_are_shuffled_afresh() -> None:
    batches = Batches(100, 100, seed=0, worker=0, num_workers=1)

    assert not batches.indices(0).equal(batches.indices(1))


def test_indices_are_int64_and_the_callers_own() -> None:
    batches = Batches(10, 4, seed=0, worker=0, num_workers=1)
    before = batches.indices(0)

    batches.indices(0).fill_(-1)

    assert before.dtype == torch.int64
    assert batches.indices(0).equal(before)


def test_a_worker_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^worker 3 of 4 would own no sample of 3"):
        Batches(3, 1, seed=0, worker=3, num_workers=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "^batch_size must be 1 sample"),
        ({"worker": 2}, "^worker must be 0 to 1, got 2"),
        ({"seed": -1}, "^seed must be 0 or more, got -1"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, int], message: str) -> None:
    good = {"num_examples": 9, "batch_size": 2, "seed": 0, "worker": 0, "num_workers": 2}

    with pytest.raises(ValueError, match=message):
        Batches(**{**good, **change})


def test_step_seeds_differ_by_seed_worker_and_clock_and_suit_torch() -> None:
    seeds = {step_seed(s, w, c) for s in range(5) for w in range(5) for c in range(5)}

    assert len(seeds) == 125
    assert all(torch.Generator().manual_seed(s).initial_seed() == s for s in seeds)
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


def test_a_smaller_batch_is_the_first_part_of_the_largest_whatever_others_were_like() -> None:
    whole, cut = (Batches(40, 7, seed=1, worker=0, num_workers=2) for _ in range(2))

    for clock, size in enumerate([7, 1, 3, 5, 2, 7]):
        assert torch.equal(cut.indices(clock, size=size), whole.indices(clock)[:size])


@pytest.mark.parametrize("size", [0, 8])
def test_a_batch_is_not_larger_than_the_largest(size: int) -> None:
    batches = Batches(40, 7, seed=1, worker=0, num_workers=2)

    with pytest.raises(ValueError, match=f"^size must be 1 to 7 samples, got {size}"):
        batches.indices(0, size=size)
