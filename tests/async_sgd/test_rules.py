from __future__ import annotations

import pytest

from async_sgd.rules import (
    BSP,
    RULES,
    SSP,
    BoundedStaleness,
    FedBuff,
    KofN,
    NSoftsync,
    Rennala,
    Ringmaster,
    SyncSwitch,
)
from paramserver.errors import PluginError
from paramserver.rules import Accept, Drop, Push, Rule, RuleSpec, Verdict

NOBODY: frozenset[int] = frozenset()


def build(spec: RuleSpec, workers: int) -> Rule:
    """Build the rule with members 0, 1, … at clock 0."""
    rule = spec.build(workers)
    for worker in range(workers):
        rule.on_join(worker, clock=0)
    return rule


def push(rule: Rule, worker: int, *, staleness: int = 0, version: int = 10) -> Verdict:
    """Push a gradient of that staleness; clocks are the rule's own business."""
    return rule.on_push(Push(worker, clock=1, read_version=version - staleness, version=version))


def test_ssp_lets_a_worker_run_ahead_and_no_further() -> None:
    rule = build(SSP(bound=1), 3)
    push(rule, 0)
    assert rule.waits_for(0) == NOBODY
    push(rule, 0)
    assert rule.waits_for(0) == {1, 2}
    push(rule, 1)
    assert rule.waits_for(0) == {2}

    push(rule, 2)

    assert rule.waits_for(0) == NOBODY


def test_ssp_lets_nobody_wait_for_a_dead_worker() -> None:
    rule = build(SSP(bound=0), 2)
    push(rule, 0)
    assert rule.waits_for(0) == {1}

    rule.on_leave(1)

    assert rule.waits_for(0) == NOBODY


def test_ssp_starts_a_replacement_where_its_predecessor_was() -> None:
    rule = build(SSP(bound=1), 3)
    push(rule, 0)
    push(rule, 0)
    push(rule, 1)
    rule.on_leave(1)

    rule.on_join(1, clock=1)

    push(rule, 2)
    assert rule.waits_for(0) == NOBODY
    push(rule, 0)
    push(rule, 2)
    assert rule.waits_for(0) == {1}  # at 1, worker 0 at 3


def test_ssp_lifts_a_replacement_that_the_others_have_left_behind() -> None:
    rule = build(SSP(bound=1), 2)
    rule.on_leave(1)
    for _ in range(100):
        push(rule, 0)

    rule.on_join(1, clock=0)

    assert rule.waits_for(0) == NOBODY
    push(rule, 0)
    gap = rule.bounds(Push(0, clock=101, read_version=100, version=100))[0]
    assert (gap.value, gap.limit) == (1, 2)


def test_ssp_gives_a_place_that_was_left_no_second_time() -> None:
    rule = build(SSP(bound=0), 2)
    push(rule, 1)  # worker 0 computes all the while and may miss this one push
    rule.on_leave(1)

    rule.on_join(2, clock=0)

    assert rule.waits_for(2) == {0}


def test_ssp_holds_back_a_worker_that_joins_far_ahead() -> None:
    rule = build(SSP(bound=1), 1)

    rule.on_join(1, clock=50)

    assert rule.waits_for(1) == {0}
    push(rule, 0)
    assert rule.waits_for(1) == NOBODY  # it was put 2 ahead, not 50


def test_ssp_counts_on_when_everybody_was_gone() -> None:
    rule = build(SSP(bound=1), 2)
    for _ in range(2):
        push(rule, 0)
        push(rule, 1)
    rule.on_leave(0)
    rule.on_leave(1)

    rule.on_join(0, clock=2)
    rule.on_join(1, clock=2)

    assert rule.waits_for(0) == rule.waits_for(1) == NOBODY


def test_ssp_resumes_clocks_as_they_were_when_joined_lowest_first() -> None:
    rule = SSP(bound=1).build(3)
    for worker, clock in ((1, 5), (2, 6), (0, 7)):
        rule.on_join(worker, clock)

    assert [rule.waits_for(worker) for worker in range(3)] == [{1}, NOBODY, NOBODY]


def test_bsp_waits_for_the_missing_and_steps_with_the_last() -> None:
    rule = build(BSP(), 3)
    assert push(rule, 0) == Accept(step=False)
    assert rule.waits_for(0) == {1, 2}
    assert push(rule, 2) == Accept(step=False)
    assert rule.waits_for(0) == {1}

    assert push(rule, 1) == Accept(step=True)

    assert [rule.waits_for(worker) for worker in range(3)] == [NOBODY] * 3


def test_bsp_completes_a_round_when_the_last_missing_worker_leaves() -> None:
    rule = build(BSP(), 3)
    push(rule, 0)
    push(rule, 1)

    assert rule.on_leave(2)

    assert rule.waits_for(0) == NOBODY
    assert not rule.on_leave(1)  # the next round has no gradient yet


def test_bsp_keeps_the_gradient_of_a_worker_that_died_after_its_push() -> None:
    rule = build(BSP(), 2)
    push(rule, 0)
    rule.on_leave(0)

    assert push(rule, 1) == Accept(step=True)


def test_bsp_lets_a_worker_that_joins_take_part_in_the_round() -> None:
    rule = build(BSP(), 2)
    push(rule, 0)

    rule.on_join(2, clock=0)

    assert rule.waits_for(2) == NOBODY
    assert rule.waits_for(0) == {1, 2}
    assert push(rule, 1) == Accept(step=False)
    assert push(rule, 2) == Accept(step=True)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_k_of_n_steps_with_the_kth_and_lets_the_taken_wait(mode: str) -> None:
    rule = build(RULES.parse(f"k-of-n:k=2,mode={mode}"), 3)
    assert push(rule, 0) == Accept(step=False)
    assert rule.waits_for(0) == {1, 2}

    assert push(rule, 1) == Accept(step=True)

    assert rule.waits_for(0) == NOBODY


def test_k_of_n_drops_a_late_gradient_and_lets_its_worker_go_on() -> None:
    rule = build(KofN(k=2), 3)
    push(rule, 0)
    push(rule, 1)
    push(rule, 0)

    assert push(rule, 2, staleness=1) == Drop("late")

    assert rule.waits_for(2) == NOBODY
    assert push(rule, 2) == Accept(step=True)


def test_k_of_n_steps_with_fewer_when_fewer_are_left() -> None:
    rule = build(KofN(k=3), 4)
    push(rule, 0)
    rule.on_leave(2)
    rule.on_leave(3)

    assert push(rule, 1) == Accept(step=True)


def test_batch_modes_take_several_gradients_of_one_worker() -> None:
    rule = build(KofN(k=3, mode="batch-sync"), 2)

    verdicts = [push(rule, 0) for _ in range(3)]

    assert verdicts == [Accept(step=False), Accept(step=False), Accept(step=True)]
    assert rule.waits_for(0) == NOBODY


def test_async_modes_take_gradients_of_any_version() -> None:
    rule = build(KofN(k=2, mode="async"), 2)

    assert push(rule, 0, staleness=7) == Accept(step=False)


def test_softsync_averages_the_whole_part_of_workers_over_n() -> None:
    rule = build(NSoftsync(n=3), 8)

    verdicts = [push(rule, 0, staleness=4) for _ in range(4)]

    assert verdicts == [Accept(step=False), Accept(step=True)] * 2


def test_softsync_keeps_the_size_of_an_update_when_workers_leave() -> None:
    rule = build(NSoftsync(n=1), 3)
    rule.on_leave(2)
    push(rule, 0)
    push(rule, 1)

    assert push(rule, 0) == Accept(step=True)


def test_bounded_staleness_drops_what_is_over_the_limit() -> None:
    rule = build(BoundedStaleness(limit=2), 1)

    assert push(rule, 0, staleness=2) == Accept()
    assert push(rule, 0, staleness=3) == Drop("stale")


def test_bounded_staleness_damps_what_is_over_the_limit() -> None:
    rule = build(BoundedStaleness(limit=2, action="damp"), 1)

    assert push(rule, 0, staleness=2) == Accept()
    assert push(rule, 0, staleness=5) == Accept(scale=0.5)


def test_ringmaster_drops_what_has_reached_the_threshold() -> None:
    rule = build(Ringmaster(limit=2), 1)

    assert push(rule, 0, staleness=1) == Accept()
    assert push(rule, 0, staleness=2) == Drop("stale")


def test_rennala_fills_a_batch_with_whoever_is_fast() -> None:
    rule = build(Rennala(batch=4), 2)

    verdicts = [push(rule, worker) for worker in (0, 0, 1, 0)]

    assert verdicts == [Accept(step=False)] * 3 + [Accept(step=True)]
    assert rule.waits_for(0) == rule.waits_for(1) == NOBODY


def test_rennala_ignores_gradients_of_older_versions() -> None:
    rule = build(Rennala(batch=2), 2)
    push(rule, 0)

    assert push(rule, 1, staleness=1) == Drop("late")

    assert push(rule, 0) == Accept(step=True)


def test_rennala_keeps_the_size_of_a_batch_when_workers_leave() -> None:
    rule = build(Rennala(batch=2), 2)
    push(rule, 0)

    assert not rule.on_leave(0)
    assert not rule.on_leave(1)

    rule.on_join(2, clock=0)
    assert push(rule, 2) == Accept(step=True)


def test_fedbuff_damps_each_gradient_in_its_buffer() -> None:
    rule = build(FedBuff(size=3), 3)

    verdicts = [push(rule, worker, staleness=t) for worker, t in ((0, 0), (1, 3), (2, 8))]

    assert verdicts == [
        Accept(scale=1, step=False),
        Accept(scale=1 / 2, step=False),
        Accept(scale=1 / 3, step=True),
    ]


def test_fedbuff_lets_a_worker_into_its_buffer_twice() -> None:
    rule = build(FedBuff(size=3), 3)

    verdicts = [push(rule, 0) for _ in range(3)]

    assert verdicts == [Accept(step=False), Accept(step=False), Accept(step=True)]
    assert rule.waits_for(0) == NOBODY


def test_sync_switch_lets_all_go_on_with_the_update_it_switches_at() -> None:
    rule = build(SyncSwitch(after=2), 2)
    assert push(rule, 0, version=0) == Accept(step=False)
    assert push(rule, 1, version=0) == Accept(step=True)
    assert push(rule, 0, version=1) == Accept(step=False)
    assert rule.waits_for(0) == {1}

    assert push(rule, 1, version=1) == Accept(step=True)

    assert rule.waits_for(0) == rule.waits_for(1) == NOBODY
    assert push(rule, 0, version=2) == Accept()
    assert rule.waits_for(0) == NOBODY
    assert push(rule, 0, version=3) == Accept()
    assert push(rule, 1, version=4, staleness=2) == Accept()


def test_sync_switch_switches_when_a_leave_completes_the_last_update() -> None:
    rule = build(SyncSwitch(after=1), 3)
    push(rule, 0, version=0)
    push(rule, 1, version=0)
    assert rule.waits_for(0) == {2}

    assert rule.on_leave(2)

    assert rule.waits_for(0) == NOBODY
    assert push(rule, 0, version=1) == Accept()
    assert rule.waits_for(0) == NOBODY


def test_sync_switch_lets_workers_come_and_go_after_the_switch() -> None:
    rule = build(SyncSwitch(after=1), 2)
    push(rule, 0, version=0)
    push(rule, 1, version=0)

    assert not rule.on_leave(1)
    rule.on_join(1, clock=1)
    rule.on_join(2, clock=1)

    assert push(rule, 2, version=1) == Accept()
    assert [rule.waits_for(worker) for worker in range(3)] == [NOBODY] * 3


def test_sync_switch_is_past_its_switch_when_a_resumed_run_is() -> None:
    rule = build(SyncSwitch(after=5), 2)

    assert push(rule, 0, version=5) == Accept()

    assert rule.waits_for(0) == NOBODY
    assert not rule.on_leave(1)


def test_sync_switch_is_before_its_switch_when_a_resumed_run_is() -> None:
    rule = build(SyncSwitch(after=6), 2)
    assert push(rule, 0, version=5) == Accept(step=False)
    assert rule.waits_for(0) == {1}

    assert rule.on_leave(1)

    assert push(rule, 0, version=6) == Accept()
    assert rule.waits_for(0) == NOBODY


def test_sync_switch_promises_no_staleness_up_to_its_last_update() -> None:
    rule = build(SyncSwitch(after=1), 1)
    last, next_one = (Push(0, clock=1, read_version=v, version=v) for v in (0, 1))

    rule.on_push(last)

    assert [(b.name, b.limit) for b in rule.bounds(last)] == [("staleness", 0)]
    assert rule.bounds(next_one) == ()


@pytest.mark.parametrize(
    ("text", "gathers"),
    [
        ("ringmaster:limit=1", False),
        ("rennala:batch=1", True),
        ("fedbuff", True),
        ("ringleader", True),
        ("sync-switch:after=1", True),
        ("sync-switch:after=0", False),
    ],
)
def test_a_rule_says_before_a_run_whether_it_averages(text: str, gathers: bool) -> None:
    assert RULES.parse(text).build(4).gathers == gathers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ringmaster:limit=0", "limit must be 1 update or more, got 0"),
        ("ringmaster", "needs limit"),
        ("rennala:batch=0", "batch must be 1 gradient or more, got 0"),
        ("rennala", "needs batch"),
        ("fedbuff:size=0", "size must be 1 gradient or more, got 0"),
        ("sync-switch:after=-1", "after must be 0 updates or more, got -1"),
        ("sync-switch", "needs after"),
        ("ssp:bound=-1", "bound must be 0 clocks or more, got -1"),
        ("bounded:limit=-1", "limit must be 0 updates or more, got -1"),
        ("bounded", "needs limit"),
        ("bounded:limit=1,action=ignore", "'ignore' is not one of drop, damp"),
        ("k-of-n:k=0", "k must be 1 gradient or more, got 0"),
        ("k-of-n:k=2,mode=both", "'both' is not one of sync, batch-sync, async, batch-async"),
        ("k-of-n:k=2,mode=async,cancel=true", "mode async takes gradients of older versions, so"),
        ("softsync:n=0", "n must be 1 update or more, got 0"),
    ],
)
def test_a_bad_setting_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        RULES.parse(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (KofN(k=4), r"^k must be at most the number of workers, 3, got 4; mode batch-sync takes"),
        (NSoftsync(n=4), r"^n must be at most the number of workers, 3, got 4$"),
    ],
)
def test_too_few_workers_are_refused(spec: RuleSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.build(3)


def test_batch_modes_need_no_k_workers() -> None:
    rule = build(KofN(k=4, mode="batch-async"), 1)

    assert [push(rule, 0) for _ in range(4)][-1] == Accept(step=True)
