"""Leader and follower alone, told of each message by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from async_sgd.rules import SSP, Asynchronous
from paramserver.errors import ProtocolError
from paramserver.messages import Kind, Message, raise_failure
from paramserver.optimizers import SGD
from paramserver.progress import Budget
from paramserver.rules import RuleSpec
from paramserver.sequencer import Sequencer
from paramserver.server import Follower, Leader
from paramserver.shard import Shard


class Side:
    """A server with its memory; what it sends to a connection is kept by the connection's name."""

    def __init__(self, rule: RuleSpec | None = None, **sequencer: Any) -> None:
        self.buffers: Sequence[torch.Tensor] = [torch.zeros(64) for _ in range(6)]
        self.sent: dict[object, list[Message]] = {}
        self._slots: dict[object, torch.Tensor] = {}
        self.shard = Shard(torch.zeros(64), SGD(lr=1.0), self.buffers)
        machine = (rule or Asynchronous()).build(2)
        keys = {"token": "t", "fingerprint": "f"}
        self.follower = Follower(self.shard, self, self.send, **keys)
        self.leader = Leader(
            self.shard, self, self.send, Sequencer(machine, **sequencer), followers=["f"], **keys
        )

    def slot(self, conn: object) -> torch.Tensor:
        return self._slots.setdefault(conn, torch.ones(64))

    def send(self, conn: object, message: Message) -> None:
        self.sent.setdefault(conn, []).append(message)

    def kinds(self, conn: object) -> list[Kind]:
        """Return what ``conn`` was sent since the last call."""
        return [Kind(m.kind) for m in self.sent.pop(conn, [])]


def hello(worker: int, incarnation: int = 1, text: str = "t f") -> Message:
    return Message(Kind.HELLO, worker=worker, incarnation=incarnation, text=text)


def a_push(worker: int, seq: int = 1, read_version: int = 0, incarnation: int = 1) -> Message:
    return Message(
        Kind.PUSH,
        worker=worker,
        incarnation=incarnation,
        seq=seq,
        read_version=read_version,
        norm=1,
    )


def test_who_joins_is_welcomed_and_granted_a_read() -> None:
    side = Side()

    side.leader.on_message("a", hello(0), 0.0)

    assert side.kinds("a") == [Kind.WELCOME, Kind.GRANT]
    assert side.kinds("f") == [Kind.ORDER]


def test_the_follower_gets_an_order_before_the_leader_grants() -> None:
    side = Side()
    sent: list[tuple[object, Kind]] = []
    side.leader._send = lambda conn, m: sent.append((conn, Kind(m.kind)))

    side.leader.on_message("a", hello(0), 0.0)

    assert sent == [("a", Kind.WELCOME), ("f", Kind.ORDER), ("a", Kind.GRANT)]


def test_a_retry_while_waiting_is_answered_once_when_the_wait_ends() -> None:
    side = Side(SSP(bound=0))
    side.leader.on_message("a", hello(0), 0.0)
    side.leader.on_message("b", hello(1), 0.0)
    side.leader.on_message("a", a_push(0), 0.0)
    side.sent.clear()

    side.leader.on_message("a", a_push(0), 0.0)
    assert side.kinds("a") == []
    side.leader.on_message("b", a_push(1), 0.0)

    assert side.kinds("a") == [Kind.GRANT]
    assert side.leader.sequencer.version == 2


def test_the_end_reaches_those_that_wait_at_once_and_those_that_compute_at_their_push() -> None:
    side = Side(SSP(bound=0))
    side.leader.on_message("a", hello(0), 0.0)
    side.leader.on_message("b", hello(1), 0.0)
    side.leader.on_message("a", a_push(0), 0.0)
    side.sent.clear()

    side.leader.stop("enough")

    assert side.kinds("a") == [Kind.END]
    assert side.kinds("b") == []
    side.leader.on_message("b", a_push(1), 0.0)
    assert side.kinds("b") == [Kind.END]
    side.leader.on_message("b", a_push(1), 0.0)
    assert side.kinds("b") == [Kind.END]
    side.leader.on_tick(1.0)
    assert side.kinds("a") == side.kinds("b") == []


def test_the_push_that_spends_the_budget_ends_the_run_for_its_worker() -> None:
    side = Side(budget=Budget(updates=1))
    side.leader.on_message("a", hello(0), 0.0)
    side.sent.clear()

    side.leader.on_message("a", a_push(0), 0.0)

    assert side.kinds("a") == [Kind.END]
    assert torch.equal(side.shard.snapshots.params, -torch.ones(64))


def test_a_refused_hello_takes_nothing_from_the_worker_that_is_there() -> None:
    side = Side()
    side.leader.on_message("a", hello(0, incarnation=2), 0.0)
    for text, incarnation in (("t f", 1), ("t f", 2), ("t x", 3), ("x f", 3)):
        side.leader.on_message("evil", hello(0, incarnation, text), 0.0)
    assert side.kinds("evil") == [Kind.FAIL] * 4
    side.sent.clear()

    side.leader.on_message("a", a_push(0, incarnation=2), 0.0)

    assert side.kinds("a") == [Kind.GRANT]
    assert side.kinds("evil") == []


def test_the_end_of_an_old_connection_does_not_end_its_successor() -> None:
    side = Side()
    side.leader.on_message("old", hello(0, incarnation=1), 0.0)
    side.leader.on_message("new", hello(0, incarnation=2), 0.0)

    side.leader.on_gone("old", 0.0)

    assert side.leader.sequencer.is_live(0, 2)
    assert side.shard.snapshots.num_leases == 1


def test_the_end_of_an_old_readers_connection_keeps_its_successors_lease() -> None:
    side = Side()
    for conn, incarnation in (("old", 0), ("new", 1)):
        side.leader.on_message(conn, hello(-1, incarnation), 0.0)
        read = Message(Kind.READ, worker=-1, incarnation=incarnation)
        side.leader.on_message(conn, read, 0.0)

    side.leader.on_gone("old", 0.0)
    assert side.shard.snapshots.num_leases == 1
    side.leader.on_gone("new", 0.0)

    assert side.shard.snapshots.num_leases == 0


def test_a_dead_workers_lease_ends() -> None:
    side = Side()
    side.leader.on_message("a", hello(0), 0.0)

    side.leader.on_gone("a", 0.0)

    assert side.shard.snapshots.num_leases == 0
    assert side.leader.sequencer.live() == []


def test_strangers_ends_are_ignored() -> None:
    side = Side()
    side.leader.on_gone("nobody", 0.0)
    side.follower.on_gone("nobody", 0.0)

    assert side.sent == {}


def test_a_follower_obeys_one_leader_with_the_runs_token() -> None:
    side = Side()
    order = Message(Kind.ORDER, 4, 0)
    for conn, text in (("evil", "x f"), ("f", "t f"), ("late", "t f")):
        side.follower.on_message(conn, Message(Kind.LEAD, text=text), 0.0)
        side.follower.on_message(conn, order, 0.0)

    assert side.kinds("evil") == [Kind.FAIL, Kind.FAIL]
    assert side.kinds("f") == [Kind.WELCOME]
    assert side.kinds("late") == [Kind.FAIL, Kind.FAIL]
    assert side.shard.snapshots.num_leases == 1


def test_a_follower_that_cannot_obey_tells_everybody_once_and_does_nothing_more() -> None:
    side = Side()
    side.follower.on_message("f", Message(Kind.LEAD, text="t f"), 0.0)
    side.follower.on_message("a", hello(0), 0.0)
    side.sent.clear()

    for version in (5, 6):
        side.follower.on_message("f", Message(Kind.ORDER, 4, 0, version=version), 0.0)

    (told,) = side.sent.pop("a")
    with pytest.raises(ProtocolError, match="an order for version 5 came at 0"):
        raise_failure(told)
    assert side.sent == {}
    side.follower.on_message("b", hello(1), 0.0)
    assert side.kinds("b") == [Kind.FAIL]


def test_every_shard_saves_itself_at_the_version_that_is_returned() -> None:
    side = Side()
    side.leader.on_message("a", hello(0), 0.0)
    side.leader.on_message("a", a_push(0), 0.0)
    side.sent.clear()

    assert side.leader.save() == 1
    assert side.shard.saved is not None
    assert side.shard.saved.version == 1
    assert [(m.kind, m.action, m.version) for m in side.sent["f"]] == [(Kind.ORDER, 7, 1)]


def test_every_incarnation_that_joins_after_the_end_is_told() -> None:
    side = Side()
    side.leader.stop("enough")
    side.leader.on_message("a", hello(0, incarnation=1), 0.0)
    side.leader.on_gone("a", 0.0)

    side.leader.on_message("b", hello(0, incarnation=2), 0.0)

    assert side.kinds("a") == side.kinds("b") == [Kind.WELCOME, Kind.END]
