"""Who is let into a group on one machine, and what it leaves behind."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from paramserver.errors import PeerLostError, ResourceError
from paramserver.layout import Layout
from sync import shared
from tests.support.ranks import TOKEN, group, results

LAYOUT = Layout.of(nn.Linear(40, 30))
OTHER = Layout.of(nn.Linear(30, 40))


@pytest.fixture
def host() -> Iterator[shared.Host]:
    host = shared.Host()
    yield host
    host.close()


def form(host: shared.Host, timeout_s: float = 0.3) -> BaseException:
    """Wait in vain for a second rank."""
    with pytest.raises(PeerLostError) as caught:
        host.form(LAYOUT, 2, TOKEN, timeout_s)
    return caught.value


def open_files() -> int:
    gc.collect()  # a tensor that shows the memory keeps it open
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("layout", "world", "token"),
    [(LAYOUT, 2, "another token"), (OTHER, 2, TOKEN), (LAYOUT, 3, TOKEN)],
    ids=["token", "model", "number of ranks"],
)
def test_who_is_of_another_group_is_refused(
    host: shared.Host,
    layout: Layout,
    world: int,
    token: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raised: list[BaseException] = []

    def intrude() -> None:
        try:
            shared.join(host.address, 1, layout, world, token, 5.0)
        except PeerLostError as error:
            raised.append(error)

    intruder = threading.Thread(target=intrude)
    with caplog.at_level(logging.WARNING):
        intruder.start()
        missed = form(host)
        intruder.join()

    assert isinstance(missed, PeerLostError)
    assert missed.peers == (1,)
    assert "another token, model or number of ranks" in caplog.text
    assert [error.args[1] for error in raised] == [(0,)]


def test_noise_at_the_door_is_ignored(host: shared.Host, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0paramserver/sync/{host.address}")
        stranger.send(b"GET / HTTP/1.1")

        form(host)

    assert "14 bytes instead of a hello" in caplog.text


def test_a_rank_gets_in_once(host: shared.Host, caplog: pytest.LogCaptureFixture) -> None:
    def twice() -> None:
        for _ in range(2):
            with pytest.raises(PeerLostError):
                shared.join(host.address, 1, LAYOUT, 3, TOKEN, 0.2)

    knocking = threading.Thread(target=twice)
    knocking.start()
    with pytest.raises(PeerLostError) as caught:
        host.form(LAYOUT, 3, TOKEN, 0.6)
    knocking.join()

    assert caught.value.peers == (2,)
    assert "no place for rank 1" in caplog.text


def test_without_a_host_rank_0_is_missed_at_once() -> None:
    with pytest.raises(PeerLostError) as caught:
        shared.join("nobody", 1, LAYOUT, 2, TOKEN, 5.0)

    assert caught.value.peers == (0,)
    assert caught.value.waited_s < 1


def test_too_little_memory_is_said_before_anything_starts(
    host: shared.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_memory(needed: int) -> None:
        raise ResourceError(f"{needed} bytes")

    monkeypatch.setattr(shared, "check_memory", check_memory)

    with pytest.raises(ResourceError, match=f"^{3 * LAYOUT.num_bytes} bytes"):
        host.form(LAYOUT, 2, TOKEN, 5.0)


def test_too_little_memory_for_a_second_vector_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_memory(needed: int) -> None:
        if needed == LAYOUT.num_bytes:
            raise ResourceError(f"{needed} bytes")

    monkeypatch.setattr(shared, "check_memory", check_memory)

    came_out = group("shared_memory", LAYOUT, 2, lambda c: c.vector)

    assert all(isinstance(error, ResourceError) for error in came_out)


@pytest.mark.parametrize("use", [lambda c: None, lambda c: c.vector.fill_(1.0)])
def test_a_group_leaves_no_open_file(use: Callable[[Any], object]) -> None:
    before = open_files()

    def body(collective: Any) -> None:
        use(collective)
        collective.exchange(1, ())

    results(group("shared_memory", LAYOUT, 3, body))

    assert open_files() == before


def test_all_ranks_see_one_copy_of_the_parameters() -> None:
    written = threading.Event()

    def body(collective: Any) -> bool:
        if collective.rank == 0:
            collective.params.fill_(7.0)
            written.set()
        assert written.wait(5)
        collective.exchange(1, ())
        return bool((collective.params == 7.0).all())

    assert results(group("shared_memory", LAYOUT, 2, body)) == [True, True]


def test_parameters_stay_readable_after_the_group_is_left() -> None:
    kept: list[torch.Tensor] = []
    keep: Callable[[Any], None] = lambda collective: kept.append(collective.params)  # noqa: E731

    results(group("shared_memory", LAYOUT, 2, keep))

    assert all(not params.any() for params in kept)
