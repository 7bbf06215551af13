from __future__ import annotations

import threading

import pytest
import torch

from sync.desk import Desk, Part, Position, Snapshot


def part(number: int) -> Part:
    return Part(number, Position(), range(64), torch.zeros(64), {}, None)


def test_an_answer_to_an_earlier_save_is_not_taken_for_the_next() -> None:
    desk = Desk()
    desk.lay(part(1))

    with pytest.raises(TimeoutError, match=r"^the rank did not give its state within 0.0 s"):
        desk.part(2, timeout_s=0)


def test_whoever_waits_gets_what_is_laid() -> None:
    desk = Desk()
    seen: list[Snapshot | None] = []
    waits = threading.Thread(target=lambda: seen.append(desk.snapshot(timeout_s=5)))
    waits.start()
    assert desk.show.wait(5)

    desk.lay(Snapshot(3, torch.zeros(64)))
    waits.join()

    assert [s and s.version for s in seen] == [3]


def test_a_snapshot_is_always_a_new_one() -> None:
    desk = Desk()
    desk.lay(Snapshot(3, torch.zeros(64)))

    with pytest.raises(TimeoutError, match="a snapshot"):
        desk.snapshot(timeout_s=0)


def test_nobody_waits_for_a_loop_that_has_ended() -> None:
    desk = Desk()
    desk.lay(part(1))

    desk.close()

    assert desk.snapshot(timeout_s=5) is None
    assert desk.part(2, timeout_s=5) is None
    assert desk.part(1, timeout_s=5) is not None
