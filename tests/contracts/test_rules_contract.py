"""What holds for every rule, under every delay, with workers that crash and join."""

from __future__ import annotations

import numpy as np
import pytest

from async_sgd.rules import RULES
from paramserver.recount import recount
from paramserver.rules import Accept, Push
from tests.support.rule_driver import DELAYS, RuleDriver

EXAMPLES = {
    "asp": ["asp"],
    "ssp": ["ssp:bound=0", "ssp:bound=1", "ssp:bound=3"],
    "bsp": ["bsp"],
    "bounded": ["bounded:limit=0", "bounded:limit=3", "bounded:limit=3,action=damp"],
    "k-of-n": [
        "k-of-n:k=1",
        "k-of-n:k=3",
        "k-of-n:k=4",
        "k-of-n:k=3,mode=async",
        "k-of-n:k=3,mode=batch-sync",
        "k-of-n:k=6,mode=batch-async",
        "k-of-n:k=3,cancel=true",
        "k-of-n:k=3,mode=batch-sync,cancel=true",
    ],
    "softsync": ["softsync:n=1", "softsync:n=2", "softsync:n=4"],
    "ringmaster": ["ringmaster:limit=1", "ringmaster:limit=4", "ringmaster:limit=3,cancel=true"],
    "ringleader": ["ringleader"],
    "rennala": [
        "rennala:batch=1",
        "rennala:batch=4",
        "rennala:batch=6",
        "rennala:batch=4,cancel=true",
    ],
    "fedbuff": ["fedbuff:size=1", "fedbuff:size=4", "fedbuff:size=6"],
    "sync-switch": ["sync-switch:after=0", "sync-switch:after=10", "sync-switch:after=1000"],
}
"""A line for each rule; four workers use them."""

every_rule = pytest.mark.parametrize(
    "rule", [text for texts in EXAMPLES.values() for text in texts]
)


def test_every_registered_rule_is_held_to_the_contract() -> None:
    held_elsewhere = {"pieces"}  # it hands out requests: test_pieces, test_rounds_contract
    assert EXAMPLES.keys() | held_elsewhere == {entry.name for entry in RULES}


@every_rule
@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("crash_rate", [0.0, 0.1])
def test_the_run_goes_on_within_its_bounds(rule: str, delay: str, crash_rate: float) -> None:
    for seed in range(2):
        machine = RULES.parse(rule).build(4)
        driver = RuleDriver(
            machine, workers=4, seconds=DELAYS[delay], seed=seed, crash_rate=crash_rate
        )

        columns = driver.run(200)  # raises at a deadlock or a broken bound

        assert driver.conservation.holds
        assert recount(columns, gathers=machine.gathers) == []
        assert driver.version > 0


@every_rule
def test_the_same_calls_give_the_same_decisions(rule: str) -> None:
    first, second = (
        RuleDriver(RULES.parse(rule).build(4), workers=4, seed=5, crash_rate=0.1) for _ in range(2)
    )

    np.testing.assert_equal(first.run(200), second.run(200))


@every_rule
def test_a_worker_alone_goes_on_and_is_never_stale(rule: str) -> None:
    driver = RuleDriver(RULES.parse(rule).build(4), workers=1)

    columns = driver.run(24)

    assert not columns["staleness"].any()
    assert not columns["dropped"].any()
    assert driver.version >= 24 // 6


@every_rule
def test_strangers_may_leave_at_any_time(rule: str) -> None:
    machine = RULES.parse(rule).build(4)
    assert not machine.on_leave(7)
    machine.on_join(0, clock=0)
    machine.on_leave(0)

    assert not machine.on_leave(0)


@every_rule
def test_a_rule_is_rebuilt_from_what_a_record_stores(rule: str) -> None:
    spec = RULES.parse(rule)

    assert RULES.build(RULES.describe(spec)) == spec


@every_rule
def test_a_rule_is_named_as_it_is_registered(rule: str) -> None:
    spec = RULES.parse(rule)

    assert spec.build(4).name == RULES.name_of(spec)


@every_rule
def test_a_fresh_gradient_is_taken_in_full(rule: str) -> None:
    machine = RULES.parse(rule).build(4)
    for worker in range(4):
        machine.on_join(worker, clock=0)

    verdict = machine.on_push(Push(worker=0, clock=1, read_version=0, version=0))

    assert isinstance(verdict, Accept)
    assert verdict.scale == 1
