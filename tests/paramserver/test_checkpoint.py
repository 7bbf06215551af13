from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paramserver.checkpoint import (
    Checkpoint,
    OptimizerState,
    load_checkpoint,
    save_checkpoint,
    scatter_state,
)
from paramserver.errors import CheckpointError, LayoutError
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS
from paramserver.schedules import MultiStep

LAYOUT = Layout.of(nn.Linear(30, 17))


def checkpoint(version: int, **changes: Any) -> Checkpoint:
    """Return a checkpoint whose every number follows from ``version``."""
    noise = torch.Generator().manual_seed(version)
    plain = {
        "layout": LAYOUT,
        "version": version,
        "params": torch.randn(LAYOUT.numel, generator=noise),
        "optimizer": OPTIMIZERS.describe(OPTIMIZERS.parse("adam:betas=0.8/0.9")),
        "state": OptimizerState(
            tensors={"exp_avg": torch.randn(LAYOUT.numel, generator=noise)},
            scalars={"step": torch.tensor(float(version)), "rounds": version, "eta": 0.1},
            groups={"lr": 1e-3, "betas": (0.8, 0.9), "fused": True, "foreach": None},
            schedule={"last_epoch": version, "milestones": {30: 1}},
        ),
        "workers": {"0": {"incarnation": 1, "seq": version, "clock": version}},
        "extra": {"mode": "async", "seed": 7, "best": {"accuracy": 0.1 + version}},
    }
    return Checkpoint(**{**plain, **changes})


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert torch.equal(one.params, other.params)
    assert one.state is not None
    assert other.state is not None
    torch.testing.assert_close(one.state.tensors, other.state.tensors, rtol=0, atol=0)
    torch.testing.assert_close(one.state.scalars, other.state.scalars, rtol=0, atol=0)
    assert one.state.groups == other.state.groups
    assert one.state.schedule == other.state.schedule
    for name in ("layout", "version", "optimizer", "workers", "extra"):
        assert getattr(one, name) == getattr(other, name)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", checkpoint(120))

    assert_same(load_checkpoint(tmp_path / "checkpoint", LAYOUT), checkpoint(120))


def test_a_fresh_checkpoint_has_no_optimizer_state(tmp_path: Path) -> None:
    fresh = Checkpoint.fresh(LAYOUT, torch.ones(LAYOUT.numel), {"name": "sgd"})

    save_checkpoint(tmp_path, fresh)

    loaded = load_checkpoint(tmp_path)
    assert (loaded.version, loaded.state) == (0, None)
    assert torch.equal(loaded.params, fresh.params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    layout = Layout.of(nn.Linear(30, 17, dtype=dtype))
    params = torch.randn(layout.numel, dtype=dtype)

    save_checkpoint(tmp_path, Checkpoint.fresh(layout, params, {"name": "sgd"}))

    assert torch.equal(load_checkpoint(tmp_path, layout).params, params)


def test_figures_that_are_not_finite_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1, extra={"loss": math.inf, "best": math.nan}))

    extra = load_checkpoint(tmp_path).extra
    assert extra["loss"] == math.inf
    assert math.isnan(extra["best"])


def test_a_schedule_goes_on_after_a_save(tmp_path: Path) -> None:
    spec = MultiStep(milestones=(2, 4))

    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        rule = OPTIMIZERS.parse("sgd:lr=1").build([nn.Parameter(torch.zeros(64))])
        return rule, spec.build(rule)

    def advance(rule: Any, scheduler: Any, updates: int) -> list[float]:
        rates = []
        for _ in range(updates):
            rule.apply([torch.zeros(64)])
            scheduler.step()
            rates.append(rule.param_groups[0]["lr"])
        return rates

    rule, scheduler = build()
    advance(rule, scheduler, 1)
    group = rule.state_dict()["param_groups"][0]
    state = OptimizerState({}, {}, group, scheduler.state_dict())
    save_checkpoint(tmp_path, checkpoint(1, state=state))

    loaded = load_checkpoint(tmp_path).state
    assert loaded is not None
    resumed, resumed_scheduler = build()
    resumed.load_state_dict(scatter_state(loaded, range(64)))
    resumed_scheduler.load_state_dict(loaded.schedule or {})

    assert advance(resumed, resumed_scheduler, 4) == advance(rule, scheduler, 4)


def test_a_save_leaves_one_manifest_and_one_data_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "v0-dead.safetensors.tmp").touch()
    (tmp_path / "notes.txt").touch()

    save_checkpoint(tmp_path, checkpoint(2))

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["manifest.json", "notes.txt", data_file(tmp_path).name]
    assert data_file(tmp_path).name.startswith("v2-")


class Crash(BaseException):
    """The process dies here: nothing catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Die just before the ``nth`` call that changes the disk, counted from 0."""
    calls = 0

    def dies(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > nth:
                raise Crash
            return original(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "open"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, dies(getattr(owner, name)))


@pytest.mark.parametrize("old_version", [1, 2])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_version: int
) -> None:
    old = checkpoint(old_version, extra={"seconds": 1.0})
    new = checkpoint(2, extra={"seconds": 2.0})  # version 2 twice: the same data, another manifest
    survivors = []
    for nth in range(100):
        folder = tmp_path / str(nth)
        save_checkpoint(folder, old)
        with monkeypatch.context() as patched:
            crash_at(patched, nth)
            try:
                save_checkpoint(folder, new)
            except Crash:
                finished = False
            else:
                finished = True
        survivor = load_checkpoint(folder, LAYOUT)
        survivors.append(survivor.extra["seconds"])
        assert_same(survivor, old if survivor.extra["seconds"] == 1.0 else new)
        if finished:
            break
        save_checkpoint(folder, new)
        assert len(list(folder.iterdir())) == 2, "what the crash left behind was not cleared"

    assert survivors == sorted(survivors)
    assert set(survivors) == {1.0, 2.0}
    assert len(survivors) >= 8, "the crashes did not reach every step"


def test_a_crash_in_the_first_save_leaves_nothing_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        crash_at(patched, 4)
        with pytest.raises(Crash):
            save_checkpoint(tmp_path, checkpoint(1))

    with pytest.raises(CheckpointError, match=r"^there is no checkpoint in "):
        load_checkpoint(tmp_path)


def test_a_full_disk_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, checkpoint(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device; make room"):
            save_checkpoint(tmp_path, checkpoint(2))

    assert_same(load_checkpoint(tmp_path), checkpoint(1))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    message = r"^there is no checkpoint in .*: it has no manifest.json; name the folder of a run"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_data_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = data_file(tmp_path)
    size = path.stat().st_size
    os.truncate(path, size - 1)

    with pytest.raises(CheckpointError, match=rf"is cut short: {size - 1} of {size} bytes; copy"):
        load_checkpoint(tmp_path)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = data_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"was altered: its sha256 is .{13}, not .*; copy"):
        load_checkpoint(tmp_path)


def test_data_that_is_gone_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    data_file(tmp_path).unlink()

    with pytest.raises(CheckpointError, match=r"^cannot read .*safetensors: .*; copy the folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", '{"format": 1', "[1]", "\x00"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"manifest.json (is damaged|has format None)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "key", ["version", "data", "layout", "optimizer", "state", "workers", "extra"]
)
def test_a_manifest_with_a_piece_missing_is_refused(tmp_path: Path, key: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))

    with pytest.raises(CheckpointError, match=rf"is damaged \(KeyError\('{key}'\)\); use another"):
        load_checkpoint(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    edit_manifest(tmp_path, format=2)

    message = r"has format 2 and this version of paramserver reads format 1; load it with"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_another_model_is_refused_before_its_data_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    data_file(tmp_path).unlink()
    other = Layout.of(nn.Linear(31, 17))

    message = r"another model \(weight: \(17, 30\) instead of \(17, 31\)\); go on with the task"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, other)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))

    message = r"holds torch.float32 parameters and the model has torch.float64; give the model"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path, replace(LAYOUT, dtype=torch.float64))


def test_vectors_that_do_not_fit_the_layout_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"^params must have shape \(576,\), got \(64,\)"):
        checkpoint(1, params=torch.zeros(64))
    with pytest.raises(LayoutError, match=r"^params must be torch.float32, got torch.float64"):
        checkpoint(1, params=torch.zeros(LAYOUT.numel, dtype=torch.float64))
    with pytest.raises(LayoutError, match=r"^exp_avg must have shape"):
        checkpoint(1, state=OptimizerState({"exp_avg": torch.zeros(64)}, {}, {}))
