"""A net whose units are at rest, and what a run of it must say, in whichever mode it was made."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from paramserver.checkpoint import load_checkpoint
from paramserver.record import Result
from workers.examples import Data, TensorExamples
from workers.task import Task


def saturated() -> Task:
    """Return a task whose tanh is at its limits from the start, and stays there."""
    inputs = torch.linspace(1, 2, 64)[:, None]

    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        nn.init.constant_(model[0].weight, 50.0)
        return model

    examples = TensorExamples(inputs, inputs)
    return Task(
        name="saturated",
        model=net,
        data=lambda: Data(examples, examples),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        headline="loss",
        batch_size=8,
    )


def check_that_the_net_was_looked_at(result: Result) -> None:
    """See that the last version's norms are right, and that the warning is given once."""
    lines = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    line = [line for line in lines if line["kind"] == "diagnostics"][-1]
    kept = load_checkpoint(result.path / "checkpoint")
    assert line["version"] == kept.version
    named = {
        slot.name: kept.params[slot.offset : slot.offset + slot.numel] for slot in kept.layout.slots
    }
    assert line["weight"] == pytest.approx({name: float(p.norm()) for name, p in named.items()})
    assert line["units"] == {"layer 1 (tanh)": {"saturated": 1.0}}
    about = [w for w in result.record["warnings"] if "saturated" in w]
    assert about == [
        f"version {kept.version:,}: 100 % of the outputs of layer 1 (tanh) are saturated"
    ]
