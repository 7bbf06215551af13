from __future__ import annotations

import math
from typing import Any

import pytest

from async_sgd.damping import DynSGD
from async_sgd.rules import BSP, SSP, Asynchronous, BoundedStaleness, KofN, Ringmaster
from async_sgd.rules.asynchronous import AsynchronousRule
from paramserver.errors import (
    InvariantError,
    NonFiniteGradientError,
    ProtocolError,
    StragglerTimeoutError,
)
from paramserver.messages import Action, Kind, Message
from paramserver.progress import Budget
from paramserver.rules import Bound, Push, RuleSpec
from paramserver.sequencer import Sequencer

Ordered = list[tuple[Action, int, int]]


def sequencer(rule: RuleSpec | None = None, *, workers: int = 2, **settings: Any) -> Sequencer:
    machine = (rule or Asynchronous()).build(workers)
    s = Sequencer(machine, **settings)
    for worker in range(workers):
        s.on_join(worker, 1, 0.0)
    return s


def a_push(s: Sequencer, worker: int, **of: Any) -> Message:
    read = s.conservation.read_version(worker)
    m = Message(
        Kind.PUSH, worker=worker, incarnation=1, seq=s.seq(worker) + 1,
        read_version=-1 if read is None else read, samples=2, norm=1.0,
    )  # fmt: skip
    return m._replace(**of)


def push(s: Sequencer, worker: int, now: float = 0.0, **of: Any) -> list[Message]:
    m = a_push(s, worker, **of)
    assert not s.is_duplicate(m)
    return s.on_push(m, now)


def told(orders: list[Message]) -> Ordered:
    return [(Action(o.action), o.worker, o.version) for o in orders]


def test_a_push_is_taken_at_the_next_version_and_its_worker_reads_that() -> None:
    s = sequencer()

    assert told(push(s, 0)) == [(Action.TAKE, 0, 1), (Action.READ, 0, 1)]
    assert told(push(s, 1)) == [(Action.TAKE, 1, 2), (Action.READ, 1, 2)]
    assert s.ledger.columns()["staleness"].tolist() == [0, 1]


def test_a_push_that_was_decided_about_is_a_duplicate() -> None:
    s = sequencer()
    m = a_push(s, 0)
    assert not s.is_duplicate(m)

    s.on_push(m, 0.0)

    assert s.is_duplicate(m)
    assert s.version == 1


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"worker": 7}, "worker 7, incarnation 1, does not take part"),
        ({"incarnation": 2}, "worker 0, incarnation 2, does not take part"),
        ({"seq": 2}, "worker 0 sent push 2; 1 was expected"),
        ({"read_version": 3}, "says it read version 3; it was granted 0"),
        ({"norm": -2.0}, "a gradient of norm -2.0"),
    ],
)
def test_a_push_out_of_order_is_refused(of: dict[str, Any], message: str) -> None:
    s = sequencer()

    with pytest.raises(ProtocolError, match=message):
        s.is_duplicate(a_push(s, 0)._replace(**of))

    assert len(s.ledger) == 0


def test_who_waits_may_not_push() -> None:
    s = sequencer(SSP(bound=0))
    push(s, 0)

    with pytest.raises(ProtocolError, match="it was granted none"):
        s.is_duplicate(a_push(s, 0))


def test_a_worker_that_left_may_not_push() -> None:
    s = sequencer()
    s.on_leave(0, 0.0)

    with pytest.raises(ProtocolError, match="does not take part"):
        s.is_duplicate(a_push(s, 0))


@pytest.mark.parametrize("incarnation", [0, 1])
def test_an_incarnation_that_is_not_newer_may_not_join(incarnation: int) -> None:
    s = sequencer()

    with pytest.raises(ProtocolError, match="after 1: it has been replaced"):
        s.on_join(0, incarnation, 0.0)

    assert s.is_live(0, 1)


def test_a_new_incarnation_ends_the_old_one_and_keeps_its_clock() -> None:
    s = sequencer()
    push(s, 0)

    orders = s.on_join(0, 5, 0.0)

    assert told(orders) == [(Action.LEAVE, 0, 1), (Action.READ, 0, 1)]
    assert (s.seq(0), s.clock(0), s.is_live(0, 1), s.is_live(0, 5)) == (0, 1, False, True)


@pytest.mark.parametrize("of", [{"norm": math.nan}, {"norm": math.inf}, {"loss": math.nan}])
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(of: dict[str, Any]) -> None:
    s = sequencer(on_nan="drop")

    orders = push(s, 0, **of)

    assert told(orders) == [(Action.DISCARD, 0, 0), (Action.READ, 0, 0)]
    assert s.ledger.drop_reasons() == {"nonfinite": 1}
    assert (s.ended, s.gradients) == (None, 0)


def test_a_run_of_which_nothing_finite_comes_any_more_ends_and_says_so() -> None:
    s = sequencer(on_nan="drop")
    for _ in range(99):
        push(s, 0, loss=math.nan)
    push(s, 1)  # there was hope
    for _ in range(99):
        push(s, 0, loss=math.nan)
    assert s.ended is None

    orders = push(s, 1, norm=math.inf)

    assert told(orders) == [(Action.DISCARD, 1, 1)]
    assert s.ended == ("the parameters have diverged: none of the last 100 gradients was finite")
    assert s.error is None


def test_a_gradient_that_is_not_finite_stops_the_run_by_name() -> None:
    s = sequencer()
    push(s, 1)
    push(s, 1)

    orders = push(s, 1, norm=math.nan, text="layer.2.weight")

    assert told(orders) == [(Action.DISCARD, 1, 2)]
    error = s.error
    assert isinstance(error, NonFiniteGradientError)
    assert (error.worker, error.clock, error.layer) == (1, 3, "layer.2.weight")
    assert "the gradient of 'layer.2.weight' is not finite" in str(error)


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [(math.nan, 1.0, "the gradient of 'loss' is"), (1.0, math.nan, "the gradient is not finite")],
)
def test_what_a_worker_does_not_name_is_not_made_up(loss: float, norm: float, what: str) -> None:
    s = sequencer()

    push(s, 1, loss=loss, norm=norm)

    assert what in str(s.error)


def test_damping_scales_by_staleness() -> None:
    s = sequencer(damping=DynSGD())

    scales = [push(s, worker)[0].scale for worker in (0, 0, 0, 1)]

    assert scales == [1.0, 1.0, 1.0, 1 / 4]
    assert s.ledger.columns()["scale"].tolist() == scales


def test_damping_multiplies_what_the_rule_says() -> None:
    s = sequencer(BoundedStaleness(limit=0, action="damp"), damping=DynSGD())
    push(s, 0)

    assert push(s, 1)[0].scale == 1 / 4


def test_the_run_ends_with_its_budget_of_updates() -> None:
    s = sequencer(budget=Budget(updates=2))
    push(s, 0)

    assert told(push(s, 0)) == [(Action.TAKE, 0, 2)]
    assert s.ended == "2 updates"
    assert told(push(s, 1)) == [(Action.DISCARD, 1, 2)]
    assert s.ledger.drop_reasons() == {"ended": 1}


def test_the_run_ends_with_its_budget_of_samples() -> None:
    s = sequencer(budget=Budget(samples=3))
    push(s, 0)
    push(s, 0)

    assert s.ended == "4 samples"


def test_a_run_resumed_at_its_budget_does_nothing_more() -> None:
    done = sequencer(budget=Budget(updates=1))
    push(done, 0)

    again = Sequencer(Asynchronous().build(2), budget=Budget(updates=1), progress=done.progress())

    assert again.ended == "1 updates"
    assert again.on_join(0, 2, 0.0) == []


def test_a_run_resumed_past_its_budget_says_so() -> None:
    done = sequencer(budget=Budget(updates=3))
    for _ in range(3):
        push(done, 0)

    again = Sequencer(Asynchronous().build(2), budget=Budget(updates=2), progress=done.progress())

    assert again.ended == "3 updates, past the 2 asked for"


def test_a_resumed_run_recognises_whom_it_knew() -> None:
    before = sequencer()
    push(before, 0)
    push(before, 1)

    after = Sequencer(Asynchronous().build(2), progress=before.progress())

    assert (after.version, after.gradients, after.samples, after.live()) == (2, 2, 4, [])
    with pytest.raises(ProtocolError, match="it has been replaced"):
        after.on_join(0, 1, 0.0)
    assert told(after.on_join(0, 2, 0.0)) == [(Action.READ, 0, 2)]
    assert after.clock(0) == 1


def test_a_departure_completes_a_round() -> None:
    s = sequencer(BSP(), workers=3)
    assert told(push(s, 0)) == [(Action.TAKE, 0, 0)]
    assert told(push(s, 1)) == [(Action.TAKE, 1, 0)]

    orders = s.on_leave(2, 5.0)

    assert told(orders) == [
        (Action.LEAVE, 2, 0),
        (Action.STEP, 2, 1),
        (Action.READ, 0, 1),
        (Action.READ, 1, 1),
    ]
    assert s.conservation.holds
    assert s.ledger.columns()["version"].tolist() == [1, 1]


def test_leaving_twice_is_leaving_once() -> None:
    s = sequencer()
    s.on_leave(0, 0.0)

    assert s.on_leave(0, 1.0) == s.on_leave(9, 1.0) == []


def test_waits_are_counted_by_who_made_whom_wait() -> None:
    s = sequencer(SSP(bound=0))
    push(s, 0, now=1.0)
    assert s.waiting(2.5) == {0: (frozenset({1}), 1.5)}

    orders = push(s, 1, now=4.0)

    assert told(orders)[1:] == [(Action.READ, 0, 2), (Action.READ, 1, 2)]
    wait = s.waits["worker 0 for worker 1"]
    assert (wait.count, wait.seconds) == (1, 3.0)
    assert s.waiting(4.0) == {}


def test_who_waits_too_long_ends_the_run() -> None:
    s = sequencer(SSP(bound=0), wait_timeout_s=10.0)
    push(s, 0, now=1.0)
    s.on_tick(11.0)
    assert s.error is None

    s.on_tick(11.5)

    error: object = s.error
    assert isinstance(error, StragglerTimeoutError)
    assert (error.worker, error.clock, error.waits_for, error.waited_s) == (0, 1, {1: 0}, 10.5)


class Boastful(AsynchronousRule):
    """Promises that nothing is ever stale, and applies whatever comes."""

    name = "boastful"

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        return (Bound("staleness", 0, push.staleness, push.worker),)


def test_a_rule_that_breaks_its_promise_stops_the_run() -> None:
    s = Sequencer(Boastful())
    for worker in (0, 1):
        s.on_join(worker, 1, 0.0)
    push(s, 0)
    assert s.error is None

    orders = push(s, 1)

    assert told(orders) == [(Action.TAKE, 1, 2)]
    error: object = s.error
    assert isinstance(error, InvariantError)
    assert vars(error) == {
        "rule": "boastful", "invariant": "staleness", "bound": 0, "value": 1, "worker": 1,
        "version": 2,
    }  # fmt: skip
    assert s.worst == {"staleness": (1, 0)}


def test_the_first_error_is_kept() -> None:
    s = sequencer()
    first = ProtocolError("first")
    s.fail(first)

    s.fail(ProtocolError("second"))

    assert s.error is first
    assert s.ended == "first"


def test_nobody_is_granted_a_read_after_the_end() -> None:
    s = sequencer(SSP(bound=0))
    push(s, 0)
    s.stop("enough")

    assert told(push(s, 1)) == [(Action.DISCARD, 1, 1)]
    assert s.on_join(2, 1, 0.0) == []
    assert s.waiting(1.0) == {}


# ---------------------------------------------------------------- cancellation


def test_whoever_reaches_the_age_reads_anew_before_the_pusher_does() -> None:
    s = sequencer(Ringmaster(limit=2, cancel=True), workers=3)
    push(s, 0)

    orders = push(s, 1)

    assert told(orders) == [(Action.TAKE, 1, 2), (Action.READ, 2, 2), (Action.READ, 1, 2)]
    assert [o.step for o in orders[1:]] == [1, 0]
    assert s.conservation.read_version(2) == 2
    assert s.conservation.report()["abandoned"] == 2


def test_a_leave_that_completes_an_update_cancels_as_well() -> None:
    s = sequencer(KofN(k=3, cancel=True), workers=4)
    for worker in (0, 1):
        push(s, worker)
    s.on_leave(2, 0.0)
    s.on_join(4, 1, 0.0)
    assert s.version == 0

    orders = push(s, 4)

    assert (Action.READ, 3, 1) in told(orders)
    assert s.num_cancelled == 1


def test_a_cancelled_push_counts_once_in_the_law_and_never_as_a_gradient() -> None:
    s = sequencer(Ringmaster(limit=1, cancel=True))
    late = a_push(s, 1)
    push(s, 0)
    assert not s.is_duplicate(late)

    orders = s.on_push(late._replace(norm=math.inf), 0.0)

    assert told(orders) == [(Action.DISCARD, 1, 1), (Action.READ, 1, 1)]
    assert s.is_duplicate(late)
    assert (s.gradients, s.error, s.ledger.drop_reasons()) == (1, None, {"cancelled": 1})
    assert s.conservation.report() == {
        "left": 1, "right": 1, "holds": True, "arrived": 0, "in_flight": 0, "abandoned": 1,
    }  # fmt: skip


def test_a_push_of_another_read_than_the_cancelled_one_is_refused() -> None:
    s = sequencer(Ringmaster(limit=1, cancel=True))
    late = a_push(s, 1)
    push(s, 0)
    s.on_push(late, 0.0)

    with pytest.raises(ProtocolError, match="says it read version 0; it was granted 1"):
        s.is_duplicate(late._replace(seq=2))


def test_nothing_is_cancelled_when_the_run_ends() -> None:
    s = sequencer(Ringmaster(limit=1, cancel=True), budget=Budget(updates=1))

    push(s, 0)

    assert s.num_cancelled == 0
    assert s.conservation.read_version(1) == 0
