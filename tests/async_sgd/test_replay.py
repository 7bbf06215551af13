"""Records of runs made again: the same bits, or an error that says where they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS, DynSGD
from async_sgd.delays import DELAYS
from async_sgd.replay import Replay, WhatIf
from async_sgd.rules import RULES
from async_sgd.simulation import Change
from async_sgd.simulator import Simulator
from paramserver.clipping import ClipNorm
from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.measures import MEASURES
from paramserver.optimizers import OPTIMIZERS
from workers.config import RunConfig
from workers.tasks import task


def recorded(out: Path, **options: Any) -> Path:
    """Simulate a run of digits on three workers, and return its folder."""
    optimizer = OPTIMIZERS.parse(options.pop("optimizer", "momentum:lr=0.05"))
    what = task(options.pop("task", "digits:hidden=8"))
    config = {"workers": 3, "updates": 40, "out": out, "evaluate_every_s": 0, "seed": 3}
    names = {name: options.pop(name) for name in RunConfig.__dataclass_fields__ if name in options}
    delay = DELAYS.parse("gamma:cv=0.5,factors=1/1/3")
    Simulator(what, optimizer, RunConfig(**{**config, **names}), delay=delay, **options).fit()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": RULES.parse("bsp")},
        {"rule": RULES.parse("ssp:bound=1"), "damping": DynSGD()},
        {"rule": RULES.parse("k-of-n:k=2")},
        {"rule": RULES.parse("bounded:limit=1")},
        {"rule": RULES.parse("ringmaster:limit=1,cancel=true")},
        {
            "rule": RULES.parse("ringleader"),
            "measure": MEASURES,
            "changes": [Change.parse(c) for c in ("crash:1@3", "join:1@6", "leave:0@9")],
        },
        {
            "rule": RULES.parse("k-of-n:k=2,cancel=true"),
            "changes": [Change.parse(c) for c in ("crash:1@3", "join:1@6", "leave:0@9")],
        },
        {"changes": [Change.parse(c) for c in ("crash:1@3", "join:1@6", "leave:0@9")]},
        {"rule": RULES.parse("bsp"), "changes": [Change.parse("crash:2@3")]},
        {"changes": [Change.parse("join:2@4")]},
        {"compensation": COMPENSATIONS.parse("dc-asgd-adaptive:strength=0.1")},
        {"optimizer": "adam:lr=0.01", "clip": ClipNorm(max_norm=0.5), "until": "accuracy=0.3"},
        {"gradient": "random", "epochs": 0.5, "updates": None},
        {"measure": MEASURES, "optimizer": "dana:lr=0.05"},
        {"measure": ("gap", "step"), "rule": RULES.parse("bsp")},
    ],
    ids=str,
)
def test_a_record_replays_to_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = recorded(tmp_path / "run", **options)

    replayed = Replay(folder).run()

    result = json.loads((folder / "result.json").read_text())
    assert replayed.distance == 0.0
    assert replayed.version == result["updates"]
    assert replayed.metrics == result["final"]
    assert replayed.measures == result.get("measures", {})


def test_a_measure_that_differs_in_one_bit_is_named(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run", measure=("gap",))
    ledger = Ledger.load(folder / "updates.npz")
    gap = ledger._measures["gap"]
    gap[7] = np.nextafter(gap[7], 1.0)
    ledger.save(folder / "updates.npz")

    with pytest.raises(RecordError, match=r"run: the gap of push 7 is another one now: .* then an"):
        Replay(folder).run()


def test_another_policy_from_the_beginning_is_the_run_that_had_it(tmp_path: Path) -> None:
    """Delays do not depend on the damping, so the run that has it has the same order of pushes."""
    plain = recorded(tmp_path / "plain")
    damped = Replay(recorded(tmp_path / "damped", damping=DynSGD())).run()

    what_if = Replay(plain, what_if=WhatIf(damping=DynSGD())).run()

    assert torch.equal(what_if.params, damped.params)
    assert what_if.distance != 0.0


def test_another_policy_counts_from_its_version_on(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run")
    damping = DAMPINGS.parse("inverse")

    ends = {
        at: Replay(folder, what_if=WhatIf(at=at, damping=damping)).run().params
        for at in (0, 20, 40)
    }

    assert torch.equal(ends[40], Replay(folder).run().params)
    assert not torch.equal(ends[20], ends[40])
    assert not torch.equal(ends[20], ends[0])


def test_a_compensation_may_come_on_the_way(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run")
    none = COMPENSATIONS.parse("dc-asgd:strength=0")

    unchanged = Replay(folder, what_if=WhatIf(at=7, compensation=none)).run()
    changed = Replay(folder, what_if=WhatIf(at=7, compensation=COMPENSATIONS.parse("adag"))).run()

    assert unchanged.distance == 0.0
    assert changed.distance != 0.0


def altered(folder: Path, **columns: Any) -> None:
    path = folder / "updates.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    for name, change in columns.items():
        if change is None:
            del arrays[name]
        else:
            arrays[name] = change(arrays[name])
    np.savez(path, **arrays)


def test_the_first_push_that_differs_is_named(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run")

    def nudged(loss: np.ndarray) -> np.ndarray:
        loss[5] = np.nextafter(loss[5], 10)
        return loss

    altered(folder, loss=nudged)

    with pytest.raises(RecordError, match=r"push 5 of worker \d is another one now: loss "):
        Replay(folder).run()


def test_pushes_that_cannot_have_come_so_are_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run", rule=RULES.parse("bsp"))
    altered(folder, worker=np.zeros_like)

    with pytest.raises(RecordError, match=r"push \d+ is number .* of worker 0, which waits then"):
        Replay(folder).run()


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run")
    altered(folder, moves=None)

    with pytest.raises(RecordError, match="as a ledger: 'moves is not a file in the archive'"):
        Replay(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "sync"}, "is a sync run: only asynchronous ones have an order"),
        ({"task": "mine"}, "does not say how its task 'mine' is made: give it"),
        ({"optimizer": {"name": "lbfgs"}, "rule": {"name": "pieces"}}, "lbfgs, a round program"),
        ({"seed": None}, "was written by another version of this library: it has no 'seed'"),
    ],
)
def test_what_cannot_be_replayed_is_said(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = recorded(tmp_path / "run", updates=2)
    config = json.loads((folder / "config.json").read_text())
    config |= change
    if config["seed"] is None:
        del config["seed"]
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(RecordError, match=message):
        Replay(folder)


def test_a_run_without_pushes_recorded_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run", updates=2)
    (folder / "updates.npz").unlink()

    with pytest.raises(RecordError, match=r"has no updates\.npz"):
        Replay(folder)


def test_what_if_needs_a_change() -> None:
    with pytest.raises(ValueError, match="needs another damping or another compensation"):
        WhatIf(at=3)
    with pytest.raises(ValueError, match="at must be version 0 or later"):
        WhatIf(at=-1, damping=DynSGD())
