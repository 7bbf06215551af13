from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramserver.rounds import Sample
from workers.samples import Piece, indices, num_pieces, piece_seed

examples = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)


def whole(
    sample: Sample, num_examples: int, *, of: int = 1, number: int = 0, seed: int = 0
) -> tuple[torch.Tensor, list[int]]:
    pieces = [indices(Piece(sample, number, i, of), num_examples, seed) for i in range(of)]
    return torch.cat(pieces), [len(piece) for piece in pieces]


@given(examples, st.integers(1, 80), st.integers(0, 9), seeds)
def test_pieces_of_everything_are_every_sample_once_in_order(
    num_examples: int, of: int, number: int, seed: int
) -> None:
    read, sizes = whole(Sample("all"), num_examples, of=of, number=number, seed=seed)

    assert read.tolist() == list(range(num_examples))
    assert read.dtype == torch.int64
    assert max(sizes) - min(sizes) <= 1


@given(examples, st.data(), seeds)
def test_pieces_are_the_same_sample_into_however_many_it_is_cut(
    num_examples: int, data: st.DataObject, seed: int
) -> None:
    size = data.draw(st.integers(1, num_examples))
    of = data.draw(st.integers(1, 80))
    sample = Sample("gradient", size)

    read, sizes = whole(sample, num_examples, of=of, number=3, seed=seed)

    assert read.equal(whole(sample, num_examples, number=3, seed=seed)[0])
    assert len(set(read.tolist())) == size
    assert set(read.tolist()) <= set(range(num_examples))
    assert max(sizes) - min(sizes) <= 1


def test_a_sample_is_drawn_anew_for_each_round_name_and_seed() -> None:
    def read(name: str, number: int, seed: int) -> tuple[int, ...]:
        return tuple(whole(Sample(name, 50), 1000, number=number, seed=seed)[0].tolist())

    drawn = {
        read(name, number, seed) for name in ("a", "b", "") for number in (0, 1) for seed in (0, 1)
    }

    assert len(drawn) == 12
    assert read("a", 0, 0) in drawn


def test_every_sample_is_drawn_equally_often() -> None:
    rounds, num_examples, size = 2000, 20, 7

    read = torch.cat([whole(Sample("g", size), num_examples, number=r)[0] for r in range(rounds)])

    share = size / num_examples
    deviation = (rounds * share * (1 - share)) ** 0.5
    counts = read.bincount(minlength=num_examples)
    assert (counts - rounds * share).abs().max() < 4.5 * deviation


@given(examples, st.integers(1, 70), st.data())
def test_pieces_are_as_few_as_their_size_allows(
    num_examples: int, piece_size: int, data: st.DataObject
) -> None:
    size = data.draw(st.none() | st.integers(1, num_examples))
    sample = Sample("g", size)

    of = num_pieces(sample, num_examples, piece_size)

    assert max(whole(sample, num_examples, of=of)[1]) <= piece_size
    assert (of - 1) * piece_size < (size or num_examples) <= of * piece_size


def test_what_is_random_in_a_piece_depends_on_all_that_names_it() -> None:
    pieces = [
        Piece(Sample(name, size), number, i, 3)
        for name in ("a", "b") for size in (None, 9) for number in (0, 1) for i in (0, 1)
    ]  # fmt: skip

    drawn = {piece_seed(s, p, what) for s in (0, 1) for p in pieces for what in ("step", "labels")}

    assert len(drawn) == 32  # the size is no part of it
    assert all(0 <= seed < 2**63 for seed in drawn)
    assert piece_seed(0, pieces[0]) == piece_seed(0, Piece(Sample("a"), 0, 0, 5))


def test_the_samples_of_a_name_never_change() -> None:
    piece = Piece(Sample("curvature", 5), 2, 0, 1)

    assert indices(piece, 100, seed=7).tolist() == [60, 85, 39, 51, 66]
    assert piece_seed(7, piece) == 4569232658789372029


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_sample_that_cannot_be_drawn_is_refused(size: int) -> None:
    message = rf"^the size of sample 'g' must be 1 to 10, .* got {size}$"

    with pytest.raises(ValueError, match=message):
        indices(Piece(Sample("g", size), 0, 0, 1), 10, seed=0)
    with pytest.raises(ValueError, match=message):
        num_pieces(Sample("g", size), 10, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 0, 1), "^round must be 0 or more, got -1"),
        ((0, 2, 2), "^number must be 0 to 1 of 2, got 2"),
        ((0, -1, 2), "^number must be 0 to 1 of 2, got -1"),
    ],
)
def test_a_piece_that_does_not_exist_is_refused(values: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Piece(Sample("g"), *values)


def test_values_below_their_least_are_refused() -> None:
    piece = Piece(Sample("g", 1), 0, 0, 1)

    with pytest.raises(ValueError, match=r"^seed must be 0 or more"):
        indices(piece, 10, seed=-1)
    with pytest.raises(ValueError, match=r"^seed must be 0 or more"):
        piece_seed(-1, piece)
    with pytest.raises(ValueError, match=r"^num_examples must be 1 or more"):
        indices(piece, 0, seed=0)
    with pytest.raises(ValueError, match=r"^piece_size must be 1 sample or more"):
        num_pieces(Sample("g"), 10, 0)
