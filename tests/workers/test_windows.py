from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from workers.windows import TensorSeries, Windows


def numbers(num_steps: int, window: int = 5) -> TensorSeries:
    """Return a series whose steps are their own numbers, as small integers and as floats."""
    steps = torch.arange(num_steps)
    return TensorSeries(steps.to(torch.uint8), steps.double(), window=window)


def windows(num_steps: int, batch_size: int, **fields: Any) -> Windows:
    return Windows(
        num_steps, batch_size, **{"k1": 5, "k2": 5, "worker": 0, "num_workers": 1, **fields}
    )


def per_pass(of: Windows, k1: int) -> int:
    return -(-of.length // k1)


@pytest.mark.parametrize("k1", [1, 4, 7])
@pytest.mark.parametrize("k2", [1, 3, 4, 9, 100])
def test_the_counted_steps_of_all_workers_are_those_of_the_series_once(k1: int, k2: int) -> None:
    data, num_workers, batch_size = numbers(100, k1), 3, 2
    counted = []
    for worker in range(num_workers):
        of = windows(100, batch_size, k1=k1, k2=k2, worker=worker, num_workers=num_workers)
        for clock in range(per_pass(of, k1)):
            window = of.read(data, clock)
            counted += window.batch[0][:, -window.span.counted :].flatten().tolist()

    assert len(counted) == len(set(counted))
    if k2 >= k1:
        assert sorted(counted) == list(range(96))  # 6 streams of 16; 4 steps are left over


@pytest.mark.parametrize("k1", [1, 4, 7])
@pytest.mark.parametrize("k2", [1, 3, 4, 9, 100])
def test_a_window_begins_where_the_state_it_gets_was_made(k1: int, k2: int) -> None:
    of = windows(64, 2, k1=k1, k2=k2)

    spans = [of.span(clock) for clock in range(2 * per_pass(of, k1))]

    for before, after in itertools.pairwise(spans):
        assert after.start == (before.start + before.carried if before.carried else 0)
        assert before.carried <= before.steps
    for number, span in enumerate(spans[: len(spans) // 2]):
        stop = min((number + 1) * k1, of.length)
        assert span.start + span.steps == stop
        assert span.steps - span.silent == min(k2, stop)  # a gradient goes back k2 steps
        assert span.counted == min(k2, k1, stop - number * k1)


def test_once_k2_covers_a_stream_every_window_begins_with_it() -> None:
    of = windows(40, 2, k1=5, k2=20)

    spans = [of.span(clock) for clock in range(4)]

    assert [(span.start, span.steps, span.silent) for span in spans] == [
        (0, 5, 0), (0, 10, 0), (0, 15, 0), (0, 20, 0),
    ]  # fmt: skip


def test_a_worker_reads_its_streams_side_by_side() -> None:
    first, second = windows(20, 2, num_workers=2), windows(20, 2, num_workers=2, worker=1)

    (inputs, _), (others, _) = (of.read(numbers(20), 0).batch for of in (first, second))

    assert inputs.tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert others.tolist() == [[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]]


def test_a_window_depends_on_the_clock_alone_and_passes_repeat() -> None:
    of, data = windows(23, 1), numbers(23)
    in_order = [of.read(data, clock).batch[0].tolist() for clock in range(10)]

    assert in_order[4] == [[18, 19, 20, 21, 22]]  # it goes back k2 steps, and counts three
    assert of.span(4).counted == 3
    assert in_order[5:] == in_order[:5]
    assert windows(23, 1).read(data, 7).batch[0].tolist() == in_order[7]
    assert of.read(data, 7, version=99).batch[0].tolist() == in_order[7]


def test_small_integers_become_int64_and_floats_stay() -> None:
    inputs, targets = numbers(20).read(torch.tensor([3]), 2)

    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.float64)


def test_examples_are_whole_windows_one_after_the_other() -> None:
    data = numbers(23)

    assert len(data) == 4
    assert data.batch(torch.tensor([3, 0]))[0].tolist() == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]]


def test_a_part_of_a_series_is_a_series() -> None:
    part = numbers(23).part(range(5, 16))

    assert (len(part), part.num_steps, part.window) == (2, 11, 5)
    assert part.batch(torch.tensor([1]))[0].tolist() == [[10, 11, 12, 13, 14]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 stream or more, got 0"),
        ({"worker": 3, "num_workers": 3}, "worker must be 0 to 2, got 3"),
        ({"num_workers": 11}, "11 workers with 2 streams each would have 4 of 100 steps in a"),
    ],
)
def test_what_no_streams_can_be_cut_from_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        windows(100, **{"batch_size": 2, **change})


def test_a_series_needs_tensors_of_one_length_and_a_window() -> None:
    with pytest.raises(ValueError, match=r"^tensors must be one or more of one length, got \[2, 3"):
        TensorSeries(torch.zeros(2), torch.zeros(3), window=1)
    with pytest.raises(ValueError, match=r"^window must be 1 step or more, got 0"):
        TensorSeries(torch.zeros(2), window=0)
    with pytest.raises(ValueError, match=r"^clock must be 0 or more, got -1"):
        windows(100, 2).span(-1)
