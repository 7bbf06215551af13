"""A worker's end of the wire: feedback over pulls, pulls that follow, bytes, chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paramserver.compression import (
    COMPRESSIONS,
    QSGD,
    BFloat16,
    Int8,
    RandomK,
    TopK,
    Wire,
    check_pull,
    wire_bytes,
)
from paramserver.compression.base import Compression
from paramserver.layout import Layout

LAYOUT = Layout.of(nn.Linear(40, 16))
CUTS = LAYOUT.cuts(2)


def wire(
    push: Compression | None = None, pull: Compression | None = None, *, worker: int = 0
) -> Wire:
    return Wire(LAYOUT, CUTS, push, pull, seed=3, worker=worker)


def vectors(seed: int) -> list[Tensor]:
    drawn = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed))
    drawn[LAYOUT.slots[-1].end :] = 0  # padding
    return [drawn[cut.start : cut.stop].clone() for cut in CUTS]


def whole(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def test_what_was_not_sent_survives_pulls() -> None:
    """With or without pulls in between, and whatever they bring, the same is pushed."""
    quiet, reading = wire(TopK(share=0.1)), wire(TopK(share=0.1), Int8())
    pushed: dict[Wire, list[Tensor]] = {quiet: [], reading: []}

    for step in range(5):
        for one in (quiet, reading):
            slots = vectors(step)
            for again in range(step if one is reading else 0):
                one.read(vectors(100 + again), step)
            one.push_(slots, step)
            pushed[one].append(whole(slots))

    assert all(map(torch.equal, pushed[quiet], pushed[reading]))


def test_with_feedback_everything_arrives_in_the_end() -> None:
    """Whole numbers add up without rounding: after n / k pushes of 0 nothing is left."""
    one = wire(TopK(share=0.25))
    slots = [torch.round(100 * vector) for vector in vectors(0)]
    wanted, arrived = whole(slots).clone(), torch.zeros(LAYOUT.numel)

    for step in range(4):
        one.push_(slots, step)
        arrived += whole(slots)
        for slot in slots:
            slot.zero_()

    assert torch.equal(arrived, wanted)


@pytest.mark.parametrize(
    "name", ["int8", "top-k:share=0.1", "random-k:share=0.2,feedback=true", "sign", "powersgd"]
)
def test_what_a_worker_sees_gets_to_parameters_that_stay(name: str) -> None:
    one, start, end = wire(None, COMPRESSIONS.parse(name)), vectors(0), vectors(1)
    first = [vector.clone() for vector in one.read(start, 0)]
    distance = [float((whole(end) - whole(start)).norm())]

    for step in range(1, 31):
        seen = one.read(end, step)
        distance.append(float((whole(end) - whole(list(seen))).norm()))

    assert all(map(torch.equal, first, start))  # sent as they are
    assert distance[-1] < 0.1 * distance[0]


@pytest.mark.parametrize("compression", [BFloat16(), QSGD(), Int8(feedback=False)])
def test_without_feedback_each_pull_stands_for_itself(compression: Compression) -> None:
    used, fresh = wire(None, compression), wire(None, compression)
    for step in range(3):
        used.read(vectors(step), step)

    seen = used.read(vectors(9), 9)

    assert all(map(torch.equal, seen, fresh.read(vectors(9), 9)))
    assert not torch.equal(whole(list(seen)), whole(vectors(9)))


def test_what_the_shard_shows_is_never_written() -> None:
    params = vectors(0)
    for pull in (None, BFloat16(), Int8(), TopK()):
        one = wire(None, pull)
        one.read(params, 0)
        one.read(params, 1)

    assert all(map(torch.equal, params, vectors(0)))


def test_chance_follows_from_seed_worker_clock_and_shard_alone() -> None:
    def pushed(worker: int, step: int) -> Tensor:
        slots = [torch.ones(len(cut)) for cut in CUTS]
        wire(RandomK(share=0.1), worker=worker).push_(slots, step)
        return whole(slots)

    assert torch.equal(pushed(1, 7), pushed(1, 7))
    assert not torch.equal(pushed(1, 7), pushed(2, 7))
    assert not torch.equal(pushed(1, 7), pushed(1, 8))
    first, second = (pushed(1, 7)[cut.start : cut.stop] for cut in CUTS)
    assert not torch.equal(first[:320], second[:320])


def test_bytes_are_those_of_what_was_serialised() -> None:
    one = wire(TopK(share=0.1), BFloat16())

    payloads = [one.push_(vectors(step), step) for step in range(3)]
    for step in range(2):
        one.read(vectors(step), step)

    figures = one.traffic.figures()
    pushed = sum(len(p.to_bytes()) for each in payloads for p in each)
    assert pushed == 3 * wire_bytes(LAYOUT, CUTS, TopK(share=0.1))
    assert figures["push"] == {"count": 3, "bytes": pushed, "plain_bytes": 3 * LAYOUT.num_bytes}
    assert figures["pull"]["bytes"] == 2 * wire_bytes(LAYOUT, CUTS, BFloat16())


def test_a_way_that_is_not_compressed_is_counted_as_it_is() -> None:
    one, slots = wire(None, BFloat16()), vectors(0)

    payloads = one.push_(slots, 0)

    assert payloads == []
    assert all(map(torch.equal, slots, vectors(0)))
    assert one.traffic.push.num_bytes == one.traffic.push.plain_bytes == LAYOUT.num_bytes
    assert wire_bytes(LAYOUT, CUTS, None) == LAYOUT.num_bytes


@pytest.mark.parametrize(
    "name", ["top-k:feedback=false", "random-k", "sign:feedback=false", "powersgd:feedback=false"]
)
def test_a_pull_that_would_show_wrong_parameters_is_refused_by_name(name: str) -> None:
    known = name.partition(":")[0]

    with pytest.raises(ValueError, match=rf"^compress_pull {known} without feedback would show"):
        check_pull(COMPRESSIONS.parse(name))
