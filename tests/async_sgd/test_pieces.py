"""Pieces of a request: each counts once, stragglers' are copied, late ones are dropped."""

from __future__ import annotations

import random

import pytest

from async_sgd.rules import Pieces
from paramserver.rules import Accept, Drop, PieceRule, Push


def rule(workers: int = 2, **keys: float) -> PieceRule:
    built = Pieces(**keys).build(workers)  # type: ignore[arg-type]
    for worker in range(workers):
        built.on_join(worker, 0)
    return built


def push(worker: int, read: int = 0, version: int = 0) -> Push:
    return Push(worker, 1, read, version)


def lets_go(pieces: PieceRule, worker: int) -> bool:
    return pieces.waits_for(worker) == frozenset()


def test_every_worker_waits_for_the_server_until_a_request_is_open() -> None:
    pieces = rule()

    assert pieces.waits_for(0) == frozenset({-1})


def test_a_worker_that_may_go_on_has_a_piece_and_keeps_it() -> None:
    pieces = rule()
    pieces.open(range(3))

    assert lets_go(pieces, 0)
    assert lets_go(pieces, 1)

    assert (pieces.piece(0), pieces.piece(1)) == (0, 1)
    assert lets_go(pieces, 0)
    assert pieces.piece(0) == 0


def test_the_last_piece_answers_the_request() -> None:
    pieces = rule()
    pieces.open(range(2))
    assert lets_go(pieces, 0)
    assert lets_go(pieces, 1)

    verdicts = [pieces.on_push(push(1)), pieces.on_push(push(0))]

    assert verdicts == [Accept(step=False), Accept(step=True)]
    assert pieces.answered_by() == (0, 1)
    assert pieces.waits_for(0) == frozenset({-1})


def test_an_idle_worker_waits_for_one_that_is_as_fast() -> None:
    pieces = rule()
    pieces.open(range(2))
    assert lets_go(pieces, 0)
    assert lets_go(pieces, 1)
    pieces.on_push(push(0))

    assert pieces.waits_for(0) == frozenset({1})


def test_an_idle_worker_copies_the_piece_of_one_that_is_slow() -> None:
    pieces = rule(patience=2)
    pieces.open(range(3))
    for worker in (1, 0):
        assert lets_go(pieces, worker)
    pieces.on_push(push(0))
    assert lets_go(pieces, 0)
    pieces.on_push(push(0))

    assert lets_go(pieces, 0)

    assert pieces.piece(0) == pieces.piece(1) == 0


def test_a_copy_that_comes_first_answers_and_the_straggler_is_late() -> None:
    pieces = rule(patience=1)
    pieces.open(range(2))
    assert lets_go(pieces, 1)
    assert lets_go(pieces, 0)
    pieces.on_push(push(0))
    assert lets_go(pieces, 0)

    verdicts = [pieces.on_push(push(0)), pieces.on_push(push(1))]

    assert verdicts == [Accept(step=True), Drop("late")]


def test_a_second_copy_within_an_open_request_is_dropped() -> None:
    pieces = rule(workers=3, patience=1)
    pieces.open(range(3))
    for worker in (0, 1, 2):
        assert lets_go(pieces, worker)
    pieces.on_push(push(2))
    assert lets_go(pieces, 2)  # a copy of 0, the slowest's
    pieces.on_push(push(2))

    verdict = pieces.on_push(push(0))

    assert verdict == Drop("copy")


def test_the_piece_of_a_worker_that_left_goes_to_another() -> None:
    pieces = rule()
    pieces.open(range(2))
    assert lets_go(pieces, 0)
    assert lets_go(pieces, 1)
    pieces.on_push(push(0))

    completes = pieces.on_leave(1)

    assert not completes
    assert lets_go(pieces, 0)
    assert pieces.piece(0) == 1


def test_a_quorum_answers_without_the_rest() -> None:
    pieces = rule(quorum=0.5)
    pieces.open(range(4))
    assert lets_go(pieces, 0)
    assert lets_go(pieces, 1)
    pieces.on_push(push(0))
    assert lets_go(pieces, 0)

    verdict = pieces.on_push(push(0))

    assert verdict == Accept(step=True)
    assert pieces.answered_by() == (0, 2)
    assert pieces.on_push(push(1)) == Drop("late")


@pytest.mark.parametrize("seed", range(20))
def test_each_piece_counts_exactly_once_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    pieces = rule(workers=4, patience=1)
    working: set[int] = set()
    joined = set(range(4))
    for _ in range(30):
        number = chance.randint(1, 9)
        pieces.open(range(number))
        taken: list[int] = []
        answered = False
        while not answered:
            working |= {w for w in joined if lets_go(pieces, w)}
            assert working, "somebody always has a piece while one is missing"
            worker = chance.choice(sorted(working))
            working.discard(worker)
            if chance.random() < 0.1 and len(joined) > 1:
                joined.discard(worker)
                pieces.on_leave(worker)
                fresh = max(joined | {worker}) + 1
                joined.add(fresh)
                pieces.on_join(fresh, 0)
                continue
            piece = pieces.piece(worker)
            verdict = pieces.on_push(push(worker))
            if isinstance(verdict, Accept):
                taken.append(piece)
                answered = verdict.step
        assert sorted(taken) == list(range(number)) == list(pieces.answered_by())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quorum": 0.0}, "^quorum must be above 0 and at most 1, got 0.0"),
        ({"quorum": 1.1}, "^quorum must be above 0"),
        ({"patience": 0}, "^patience must be 1 piece or more, got 0"),
    ],
)
def test_values_out_of_range_are_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pieces(**keys)  # type: ignore[arg-type]
