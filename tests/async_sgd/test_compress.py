"""Compressed runs: simulated, replayed, and what they cannot be combined with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from async_sgd import Simulator
from async_sgd.compensation import COMPENSATIONS
from async_sgd.delays import Constant, Gamma
from async_sgd.network import Network
from async_sgd.replay import Replay
from async_sgd.rules import RULES
from async_sgd.simulation import Change
from paramserver.checkpoint import load_checkpoint
from paramserver.compression import COMPRESSIONS, wire_bytes
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS, Adam
from paramserver.record import Result
from workers.config import RunConfig
from workers.local import LOCALS
from workers.task import build_model
from workers.tasks import task

DIGITS = task("digits:hidden=8")
LAYOUT = Layout.of(build_model(DIGITS, 0))


def simulated(
    out: Path, push: str | None = None, pull: str | None = None, **options: Any
) -> Result:
    """Simulate three workers on digits."""
    fields = {
        "workers": 3,
        "updates": 20,
        "evaluate_every_s": 0,
        "out": out,
        "compress": push and COMPRESSIONS.parse(push),
        "compress_pull": pull and COMPRESSIONS.parse(pull),
    }
    names = {name: options.pop(name) for name in RunConfig.__dataclass_fields__ if name in options}
    options = {"delay": Gamma(cv=0.5), **options}
    optimizer = options.pop("optimizer", Adam(lr=0.01))
    return Simulator(DIGITS, optimizer, RunConfig(**{**fields, **names}), **options).fit()


def params(out: Path) -> torch.Tensor:
    return load_checkpoint(out / "checkpoint").params


CHANGES = [Change.parse(c) for c in ("crash:1@3", "join:1@6", "leave:0@9")]


@pytest.mark.parametrize(
    ("push", "pull", "options"),
    [
        ("bf16", "fp16", {}),
        ("int8", "int8", {"changes": CHANGES}),
        ("top-k:share=0.05", None, {"rule": RULES.parse("bsp")}),
        ("random-k:share=0.1", "sign", {"rule": RULES.parse("ssp:bound=1")}),
        ("sign", "qsgd", {"changes": CHANGES, "rule": RULES.parse("bounded:limit=1")}),
        ("qsgd:levels=7", None, {"compensation": COMPENSATIONS.parse("dc-asgd")}),
        ("powersgd", "powersgd", {"local": LOCALS.parse("sgd:steps=3")}),
        ("int8", "int8", {"local": LOCALS.parse("downpour:push=2,fetch=4")}),
        ("qsgd", "bf16", {"rule": RULES.parse("ringmaster:limit=1,cancel=true")}),
    ],
    ids=str,
)
def test_a_compressed_run_replays_to_the_same_bits(
    tmp_path: Path, push: str, pull: str | None, options: dict[str, Any]
) -> None:
    if "compensation" in options:
        options = {**options, "optimizer": OPTIMIZERS.parse("sgd:lr=0.1")}
    result = simulated(tmp_path / "run", push, pull, **options)

    replayed = Replay(tmp_path / "run").run()

    assert replayed.distance == 0.0
    assert replayed.metrics == result.metrics


def test_the_record_tells_the_bytes_both_ways(tmp_path: Path) -> None:
    simulated(tmp_path / "run", "top-k:share=0.05", "bf16")

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    push, pull = record["traffic"]["push"], record["traffic"]["pull"]
    one_push = wire_bytes(LAYOUT, LAYOUT.cuts(1), COMPRESSIONS.parse("top-k:share=0.05"))
    assert push["count"] == 20  # as many as updates: nothing is dropped here
    assert push["bytes"] == push["count"] * one_push
    assert push["plain_bytes"] == push["count"] * LAYOUT.num_bytes
    assert pull["bytes"] == pull["count"] * wire_bytes(
        LAYOUT, LAYOUT.cuts(1), COMPRESSIONS.parse("bf16")
    )
    assert record["config"]["compress"] == {"name": "top-k", "share": 0.05, "feedback": True}


def test_a_run_without_compression_tells_no_bytes(tmp_path: Path) -> None:
    assert "traffic" not in simulated(tmp_path / "run").record


def test_compressed_messages_take_less_time_on_a_narrow_link(tmp_path: Path) -> None:
    seconds = {}
    for name in ("none", "bf16"):
        compression = None if name == "none" else name
        result = simulated(
            tmp_path / name,
            compression,
            compression,
            delay=Constant(time=1e-6),
            network=Network(bandwidth=1e4),
        )
        seconds[name] = result.record["seconds"]

    cuts = LAYOUT.cuts(1)
    wanted = wire_bytes(LAYOUT, cuts, COMPRESSIONS.parse("bf16")) / LAYOUT.num_bytes
    assert seconds["bf16"] / seconds["none"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("local", [None, "sgd:steps=3"])
def test_jobs_in_batches_are_compressed_as_one_by_one(tmp_path: Path, local: str | None) -> None:
    """Sums made in another order are rounded to 16 bits the same, but for a few."""
    options = {} if local is None else {"local": LOCALS.parse(local)}
    results = [
        simulated(tmp_path / f"{batched}", "bf16", "bf16", batched=batched, **options)
        for batched in (False, True)
    ]

    pushed = [result.record["traffic"]["push"] for result in results]
    assert pushed[0] == pushed[1]
    torch.testing.assert_close(
        params(tmp_path / "False"), params(tmp_path / "True"), rtol=0, atol=0.02
    )


@pytest.mark.parametrize(
    ("push", "pull", "options", "message"),
    [
        (
            "top-k",
            None,
            {"rule": RULES.parse("ringmaster:limit=2,cancel=true")},
            r"^compress top-k remembers what was sent, and a rule with cancel=true throws it away",
        ),
        (
            None,
            "int8",
            {"rule": RULES.parse("ringmaster:limit=2,cancel=true")},
            r"^compress_pull int8 remembers what was sent",
        ),
        (
            "powersgd:feedback=false",
            None,
            {"rule": RULES.parse("ringmaster:limit=2,cancel=true")},
            r"^compress powersgd remembers what was sent",
        ),
        (
            "sign",
            None,
            {"rule": RULES.parse("ringleader")},
            r"^compress sign has feedback: what is pushed is of several gradients, and rule ringl",
        ),
        (
            "int8",
            None,
            {"compensation": COMPENSATIONS.parse("dc-asgd")},
            r"^compress int8 has feedback: what is pushed is of gradients at several points, and c",
        ),
        (
            None,
            "bf16",
            {"compensation": COMPENSATIONS.parse("dc-asgd")},
            r"^with compress_pull workers compute at what came through, and compensation is of",
        ),
        (
            None,
            "bf16",
            {"measure": ("gap",)},
            r"^with compress_pull workers compute at what came through, and measure gap is of",
        ),
        (
            "bf16",
            None,
            {"local": LOCALS.parse("elastic"), "optimizer": OPTIMIZERS.parse("sgd:lr=1")},
            r"^local elastic draws a worker and the server together by the same force, and com",
        ),
        (
            "bf16",
            None,
            {"optimizer": OPTIMIZERS.parse("lbfgs")},
            r"^lbfgs needs more than gradients, each exact and at the point it names: compress and",
        ),
        (None, "top-k:feedback=false", {}, r"^compress_pull top-k without feedback would show"),
    ],
)
def test_what_compression_cannot_be_combined_with_is_one_clear_error(
    tmp_path: Path, push: str | None, pull: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulated(tmp_path / "run", push, pull, **options)
