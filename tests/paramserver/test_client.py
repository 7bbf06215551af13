"""The client against shards that say what a test wants them to say."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paramserver.client import Client, Ended, Reading
from paramserver.errors import ProtocolError, ServerTimeoutError
from paramserver.messages import Kind, Message, failure


class Scripted:
    """A connection whose answers were written before."""

    def __init__(self, *answers: Message) -> None:
        self.slot = torch.zeros(64)
        self.buffers: Sequence[Tensor] = [torch.full((64,), float(i)) for i in range(4)]
        self.sent: list[Message] = []
        self.num_closed = 0
        self._answers = deque(answers)

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def receive(self, timeout_s: float) -> Message:
        if not self._answers:
            raise ServerTimeoutError(0, "waiting for an answer", timeout_s)
        return self._answers.popleft()

    def poll(self) -> Message | None:
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        self.num_closed += 1


def grant(seq: int, version: int, buffer: int = 0) -> Message:
    return Message(Kind.GRANT, seq=seq, version=version, buffer=buffer)


def held(seq: int) -> Message:
    return Message(Kind.HELD, seq=seq)


def client(*connections: Scripted, worker: int = 0, clock: int = 0) -> Client:
    return Client(connections, worker=worker, incarnation=3, clock=clock)


def test_a_push_says_who_and_on_what() -> None:
    leader = Scripted(grant(0, 5), grant(1, 6))
    c = client(leader, clock=10)
    c.first_read()

    c.push(loss=0.5, norm=2.0, samples=32, layer="")

    (push,) = leader.sent
    assert push == Message(
        Kind.PUSH, worker=0, incarnation=3, seq=1, clock=11, read_version=5, samples=32, loss=0.5,
        norm=2.0,
    )  # fmt: skip
    assert c.clock == 11


def test_slices_go_first_and_the_leaders_is_the_commit() -> None:
    follower = Scripted()
    leader = Scripted(grant(0, 0))
    c = client(leader, follower)

    with pytest.raises(ServerTimeoutError):
        c.push()

    assert [m.kind for m in follower.sent] == [Kind.PUSH]
    assert leader.sent == []


def test_a_reading_has_each_shards_own_buffer() -> None:
    leader, follower = Scripted(grant(0, 7, buffer=2)), Scripted(grant(0, 7, buffer=1))

    reading = client(leader, follower).first_read()

    assert isinstance(reading, Reading)
    assert [p[0].item() for p in reading.params] == [2.0, 1.0]
    assert reading.version == 7


def test_answers_to_earlier_sends_are_passed_over() -> None:
    leader = Scripted(grant(0, 0), grant(1, 1), grant(1, 1), grant(2, 2, buffer=3))
    follower = Scripted(
        grant(0, 0), held(1), grant(1, 1), held(1), grant(1, 1), held(2), grant(2, 2, buffer=3)
    )
    c = client(leader, follower)
    c.first_read()
    c.push()

    reading = c.push()

    assert isinstance(reading, Reading)
    assert (reading.version, reading.params[1][0].item()) == (2, 3.0)


def test_a_reader_passes_over_the_answer_to_a_read_that_timed_out() -> None:
    leader = Scripted()
    c = client(leader, worker=-1)
    with pytest.raises(ServerTimeoutError):
        c.read()
    leader._answers.extend([grant(1, 4), grant(2, 9, buffer=1)])

    assert c.read().version == 9


def test_a_torn_read_is_an_error() -> None:
    leader, follower = Scripted(grant(0, 7)), Scripted(grant(0, 8))

    with pytest.raises(ProtocolError, match="granted version 7, another shard 8"):
        client(leader, follower).first_read()


def test_a_retry_repeats_the_push_and_counts_its_clock_once() -> None:
    leader = Scripted(grant(0, 0))
    c = client(leader)
    c.first_read()
    with pytest.raises(ServerTimeoutError):
        c.push(norm=1.0)
    assert c.clock == 0
    leader._answers.append(grant(1, 1))

    c.retry()

    assert leader.sent[0] == leader.sent[1]
    assert c.clock == 1


def test_the_end_and_failures_are_told() -> None:
    leader = Scripted(Message(Kind.END, text="done"), failure(ProtocolError("no")))
    c = client(leader)

    assert c.first_read() == Ended("done")
    with pytest.raises(ProtocolError, match=r"^no$"):
        c.push()


def test_leaving_the_block_closes_every_connection() -> None:
    leader, follower = Scripted(), Scripted()

    with client(leader, follower):
        pass

    assert (leader.num_closed, follower.num_closed) == (1, 1)
