from __future__ import annotations

from typing import Any

import torch

from paramserver.companion_state import has_companion, with_companion, without_companion
from paramserver.reshard import gather_state

RULE: dict[str, Any] = {
    "state": {0: {"exp_avg": torch.ones(4), "step": 3}},
    "param_groups": [{"lr": 0.1, "params": [0]}],
}
FRESH: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def test_companions_come_apart_as_they_were_whichever_is_first() -> None:
    mine, other = {"sum": torch.zeros(4), "count": 2}, {"sum": torch.full((4,), 7.0)}
    both = with_companion(with_companion(RULE, "average", mine), "compensation", other)

    rest, average = without_companion(both, "average")
    rule, compensation = without_companion(rest, "compensation")

    torch.testing.assert_close(average, mine, rtol=0, atol=0)
    torch.testing.assert_close(compensation, other, rtol=0, atol=0)
    assert rule["state"][0].keys() == {"exp_avg", "step"}


def test_an_optimizer_without_state_has_none_again_without_its_companion() -> None:
    assert without_companion(with_companion(FRESH, "average", {"count": 1}), "average") == (
        FRESH,
        {"count": 1},
    )


def test_a_companion_without_state_leaves_no_trace() -> None:
    assert with_companion(FRESH, "compensation", {}) == FRESH


def test_what_was_given_is_not_changed() -> None:
    with_companion(RULE, "average", {"sum": torch.zeros(4)})

    assert RULE["state"][0].keys() == {"exp_avg", "step"}


def test_a_companion_is_found_by_its_vectors() -> None:
    state = gather_state([(range(4), with_companion(RULE, "average", {"sum": torch.zeros(4)}))])

    assert has_companion(state, "average")
    assert not has_companion(state, "compensation")
    assert not has_companion(state, "ave")
