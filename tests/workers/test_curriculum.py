from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from workers.batches import Batches
from workers.config import RunConfig
from workers.curriculum import PACINGS, Course, Linear, Pacing, Root, Steps
from workers.difficulty import Length

NUM, BATCH = 40, 5
HARDNESS = torch.randperm(NUM, generator=torch.Generator().manual_seed(1))


def batches(pacing: Pacing | None, worker: int = 1, num_workers: int = 2) -> Batches:
    course = None if pacing is None else Course(pacing, HARDNESS)
    return Batches(NUM, BATCH, seed=7, worker=worker, num_workers=num_workers, course=course)


@pytest.mark.parametrize("name", [entry.name for entry in PACINGS])
def test_a_pace_of_one_is_uniform_sampling_bit_for_bit(name: str) -> None:
    plain, paced = batches(None), batches(PACINGS.parse(f"{name}:start=1"))
    late = batches(PACINGS.parse(f"{name}:start=0.1,over=50"))

    for clock in range(30):
        assert torch.equal(plain.indices(clock), paced.indices(clock, version=0))
        assert torch.equal(plain.indices(clock), late.indices(clock, version=50))


def test_the_easiest_are_drawn_and_all_of_them_equally_often() -> None:
    paced = batches(Linear(start=0.25))
    easiest = sorted(paced.part.tolist(), key=lambda index: int(HARDNESS[index]))[:5]

    drawn = Counter(index for clock in range(4) for index in paced.indices(clock).tolist())

    assert drawn == dict.fromkeys(easiest, 4)  # a pass of the worker's 20 samples


def test_hard_samples_come_in_as_the_version_grows() -> None:
    paced = batches(Linear(start=0.2, over=10))

    hardest = [
        max(int(HARDNESS[i]) for c in range(4) for i in paced.indices(c, version).tolist())
        for version in (0, 5, 10)
    ]

    assert hardest == sorted(hardest)
    assert hardest[-1] == int(HARDNESS[paced.part].max())


def test_a_batch_is_a_function_of_clock_and_version_alone() -> None:
    there, again = batches(Root(over=20)), batches(Root(over=20))
    asked = [(clock, version) for clock in range(6) for version in (0, 7, 30)]

    drawn = {each: there.indices(*each) for each in asked}

    for each in reversed(asked):
        assert torch.equal(again.indices(*each), drawn[each])


def test_workers_draw_from_what_they_own() -> None:
    both = [batches(Steps(), worker) for worker in (0, 1)]

    for one in both:
        for clock in range(10):
            assert set(one.indices(clock).tolist()) <= set(one.part.tolist())


@pytest.mark.parametrize(
    ("pacing", "version", "share"),
    [
        (Linear(start=0.2, over=100), 0, 0.2),
        (Linear(start=0.2, over=100), 50, 0.6),
        (Linear(start=0.2, over=100), 100, 1.0),
        (Linear(start=0.2, over=100), 10**6, 1.0),
        (Root(start=0.6, over=100), 0, 0.6),
        (Root(start=0.6, over=100), 50, math.sqrt(0.68)),
        (Root(start=0.6, over=100), 100, 1.0),
        (Steps(start=0.25, over=100, factor=2), 0, 0.25),
        (Steps(start=0.25, over=100, factor=2), 49, 0.25),
        (Steps(start=0.25, over=100, factor=2), 50, 0.5),
        (Steps(start=0.25, over=100, factor=2), 99, 0.5),
        (Steps(start=0.25, over=100, factor=2), 100, 1.0),
    ],
)
def test_paces_are_those_of_their_sources(pacing: Pacing, version: int, share: float) -> None:
    assert pacing.share(version) == pytest.approx(share)


@pytest.mark.parametrize("kind", [Linear, Root, Steps])
def test_impossible_pacings_are_refused(kind: type[Linear]) -> None:
    for start in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^start must be above 0 and at most 1, got "):
            kind(start=start)
    with pytest.raises(ValueError, match=r"^over must be 1 update or more, got 0$"):
        kind(over=0)
    with pytest.raises(ValueError, match=r"^order must be easy, hard, none, got 'other'$"):
        kind(order="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^factor must be above 1, got 1$"):
        Steps(factor=1)


def test_a_difficulty_without_a_curriculum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^difficulty orders the samples of a curriculum"):
        RunConfig(difficulty=Length())
