"""The oracles are the paper's formula, written down again in whole numbers, and torch's own
schedulers."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts

from paramserver.optimizers import SGD, PushRule
from paramserver.schedules import (
    SCHEDULES,
    CosineOnce,
    CosineRestarts,
    Exponential,
    LinearWarmup,
    MultiStep,
    Schedule,
    Step,
)

SPECS: list[Schedule] = [
    CosineRestarts(t_0=3, t_mult=2, eta_min=0.01, eta_max=0.2),
    CosineOnce(updates=5, eta_min=0.01),
    Step(every=3),
    MultiStep(milestones=(2, 5)),
    Exponential(gamma=0.9),
    LinearWarmup(updates=4),
]

every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def make_rule(lr: float = 0.1) -> PushRule:
    return SGD(lr=lr).build([nn.Parameter(torch.zeros(64))])


def rates(spec: Schedule, updates: int, lr: float = 0.1) -> list[float]:
    """Return the rate of each of the first updates."""
    rule = make_rule(lr)
    scheduler = spec.build(rule)
    used = []
    for _ in range(updates):
        used.append(rule.param_groups[0]["lr"])
        rule.apply([torch.zeros(64)])
        scheduler.step()
    return used


def sgdr(eta_min: float, eta_max: float, t_0: int, t_mult: int, updates: int) -> list[float]:
    """Return the rates by the formula of the paper (Loshchilov & Hutter, 2017)."""
    out, t_cur, t_i = [], 0, t_0
    for _ in range(updates):
        out.append(eta_min + (eta_max - eta_min) / 2 * (1 + math.cos(math.pi * t_cur / t_i)))
        t_cur += 1
        if t_cur == t_i:
            t_cur, t_i = 0, t_i * t_mult
    return out


@pytest.mark.parametrize("t_mult", [1, 2, 3, 10])
def test_cosine_is_the_papers_formula(t_mult: int) -> None:
    # 500 updates go past those where torch's step(epoch) misses a restart: 121 for 3, 111 for 10.
    spec = CosineRestarts(t_0=1, t_mult=t_mult, eta_min=0.01)

    assert rates(spec, 500) == sgdr(0.01, 0.1, 1, t_mult, 500)


def test_cosine_is_torchs_scheduler() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(64))], lr=0.1)
    reference = CosineAnnealingWarmRestarts(optimizer, 10, 2, eta_min=0.01)
    expected = []
    for _ in range(400):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()

    assert rates(CosineRestarts(t_0=10, t_mult=2, eta_min=0.01), 400) == expected


def test_eta_max_takes_the_place_of_the_optimizers_rate() -> None:
    spec = CosineRestarts(t_0=10, eta_min=0.01, eta_max=0.5)

    assert rates(spec, 25, lr=0.1) == sgdr(0.01, 0.5, 10, 1, 25)


def test_cosine_once_falls_like_torchs_and_then_stays() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(64))], lr=0.1)
    reference = CosineAnnealingLR(optimizer, T_max=20, eta_min=0.01)
    expected = []
    for _ in range(21):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()

    found = rates(CosineOnce(updates=20, eta_min=0.01), 30)

    assert found[:21] == pytest.approx(expected, rel=1e-12)
    assert found[20:] == [0.01] * 10


def test_step_multiplies_every_so_many_updates() -> None:
    found = rates(Step(every=2, gamma=0.5), 6)

    assert found == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_multistep_multiplies_after_its_milestones() -> None:
    found = rates(MultiStep(milestones=(1, 4), gamma=0.5), 6)

    assert found == [0.1, 0.05, 0.05, 0.05, 0.025, 0.025]


def test_exponential_multiplies_after_every_update() -> None:
    assert rates(Exponential(gamma=0.9), 50) == pytest.approx([0.1 * 0.9**t for t in range(50)])


def test_linear_rises_in_equal_parts_and_then_stays() -> None:
    found = rates(LinearWarmup(updates=4, start=0.2), 7)

    assert found == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])


@every_spec
def test_a_scaled_step_does_not_change_the_schedule(spec: Schedule) -> None:
    rule = make_rule()
    scheduler = spec.build(rule)
    used = []
    for _ in range(12):
        used.append(rule.param_groups[0]["lr"])
        rule.apply([torch.zeros(64)], scale=1 / 3)
        scheduler.step()

    assert used == rates(spec, 12)


@every_spec
def test_a_schedule_goes_on_from_a_saved_state_as_if_it_had_never_stopped(spec: Schedule) -> None:
    rule = make_rule()
    scheduler = spec.build(rule)
    for _ in range(4):
        rule.apply([torch.zeros(64)])
        scheduler.step()

    resumed = make_rule()
    resumed_scheduler = spec.build(resumed)
    resumed.load_state_dict(rule.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    used = []
    for _ in range(8):
        used.append(resumed.param_groups[0]["lr"])
        resumed.apply([torch.zeros(64)])
        resumed_scheduler.step()

    assert used == rates(spec, 12)[4:]


@every_spec
def test_a_spec_is_what_it_was_after_a_trip_to_another_process(spec: Schedule) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_the_registry_names_the_schedules() -> None:
    assert [(entry.name, entry.factory) for entry in SCHEDULES] == [
        ("cosine", CosineRestarts),
        ("cosine-once", CosineOnce),
        ("step", Step),
        ("multistep", MultiStep),
        ("exponential", Exponential),
        ("linear", LinearWarmup),
    ]


@pytest.mark.parametrize(
    "spec", [CosineRestarts(t_0=10, eta_min=0.5), CosineOnce(updates=10, eta_min=0.5)]
)
def test_a_decay_does_not_rise(spec: Schedule) -> None:
    with pytest.raises(ValueError, match=r"^eta_min must be at most the optimizer's lr \(0\.1\), "):
        spec.build(make_rule(lr=0.1))


@pytest.mark.parametrize(
    ("spec", "keys", "message"),
    [
        (CosineRestarts, {"t_0": 0}, "t_0 must be a whole number of updates, 1 or more, got 0"),
        (CosineRestarts, {"t_0": 1.5}, "t_0 must be a whole number of updates, 1 or more, got 1.5"),
        (
            CosineRestarts,
            {"t_0": 1, "t_mult": 1.5},
            "t_mult must be a whole number, 1 or more, got 1.5",
        ),
        (CosineRestarts, {"t_0": 1, "eta_min": -1}, "eta_min must be 0 or more, got -1"),
        (CosineRestarts, {"t_0": 1, "eta_max": math.nan}, "eta_max must be 0 or more, got nan"),
        (
            CosineRestarts,
            {"t_0": 1, "eta_min": 0.2, "eta_max": 0.1},
            "eta_max must be eta_min (0.2) or more, got 0.1",
        ),
        (CosineOnce, {"updates": 0}, "updates must be a whole number of updates, 1 or more, got 0"),
        (CosineOnce, {"updates": 1, "eta_min": -1}, "eta_min must be 0 or more, got -1"),
        (Step, {"every": 0}, "every must be a whole number of updates, 1 or more, got 0"),
        (Step, {"every": 1, "gamma": 0}, "gamma must be above 0 and at most 1, got 0"),
        (MultiStep, {"milestones": ()}, "milestones must be one or more, rising, got ()"),
        (MultiStep, {"milestones": (2, 1)}, "milestones must be one or more, rising, got (2, 1)"),
        (MultiStep, {"milestones": (1, 1)}, "milestones must be one or more, rising, got (1, 1)"),
        (
            MultiStep,
            {"milestones": (0, 1)},
            "milestones must be a whole number of updates, 1 or more, got 0",
        ),
        (
            MultiStep,
            {"milestones": (1,), "gamma": 2},
            "gamma must be above 0 and at most 1, got 2",
        ),
        (Exponential, {"gamma": 1.1}, "gamma must be above 0 and at most 1, got 1.1"),
        (
            LinearWarmup,
            {"updates": 0},
            "updates must be a whole number of updates, 1 or more, got 0",
        ),
        (LinearWarmup, {"updates": 1, "start": 0}, "start must be above 0 and at most 1, got 0"),
    ],
)
def test_a_bad_value_is_refused(spec: type, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spec(**keys)
