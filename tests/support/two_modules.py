"""A small task of several modules, and what plain torch makes of it with its parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from paramserver.groups import Group
from paramserver.optimizers import SGD, Adam, AdamW, Momentum, Optimizer
from paramserver.schedules import Step
from workers.batches import Batches
from workers.task import Batch, Data, Task, TensorExamples, build_data, build_model

SEED, BATCH, UPDATES = 3, 8, 23

GROUPS = (
    Group(name="encoder", lr_factor=0.25),
    Group(name="head", lr_factor=2.0, schedule=Step(every=5, gamma=0.5)),
)
"""Between them lies a module that is in none of them."""

FROZEN = Group(name="middle", frozen=True)


class TwoModules(nn.Module):
    """Sixteen outputs through an encoder, a middle and a head; every size is a multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.middle(self.encoder(inputs)).relu())
        return outputs


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error."""
    inputs, targets = batch
    return functional.mse_loss(model(inputs), targets)


def data() -> Data:
    """Return 50 points."""
    inputs = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    examples = TensorExamples(inputs, inputs.sin().flip(1))
    return Data(examples, examples)


TASK = Task(
    name="two-modules",
    model=TwoModules,
    data=data,
    loss=squares,
    headline="loss",
    batch_size=BATCH,
)


def grouped_task(*groups: Group) -> Task:
    """Return the task with ``groups``."""
    return replace(TASK, groups=groups)


@dataclass(frozen=True)
class Torchs:
    """One of our optimizers, and torch's."""

    ours: Optimizer
    make: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer]


OPTIMIZERS = {
    "sgd": Torchs(SGD(lr=0.125), lambda groups: torch.optim.SGD(groups, fused=True)),
    "momentum": Torchs(
        Momentum(lr=0.125, momentum=0.9),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, fused=True),
    ),
    "adam": Torchs(Adam(lr=0.0078125), lambda groups: torch.optim.Adam(groups, fused=True)),
    "adamw": Torchs(
        AdamW(lr=0.0078125, weight_decay=0.125),
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.125, fused=True),
    ),
}
"""Rates that are powers of 2, so that factors on them are exact."""


def by_torch(torchs: Torchs, *, is_frozen: bool = False, updates: int = UPDATES) -> nn.Module:
    """Train one process with `GROUPS` as torch has groups; ``middle`` may be frozen."""
    model = build_model(TASK, SEED)
    lr = torchs.ours.lr
    groups: list[dict[str, Any]] = [
        {"params": list(model.encoder.parameters()), "lr": lr * 0.25},
        {"params": list(model.head.parameters()), "lr": lr * 2.0},
    ]
    rates: list[Callable[[int], float]] = [lambda done: 1.0, lambda done: 0.5 ** (done // 5)]
    if is_frozen:
        model.middle.requires_grad_(False)
    else:
        groups.append({"params": list(model.middle.parameters()), "lr": lr})
        rates.append(lambda done: 1.0)
    optimizer = torchs.make(groups)
    scheduler = LambdaLR(optimizer, rates)
    examples = build_data(TASK).train
    batches = Batches(len(examples), BATCH, seed=SEED, worker=0, num_workers=1)
    for clock in range(updates):
        optimizer.zero_grad()
        squares(model, examples.batch(batches.indices(clock))).backward()
        optimizer.step()
        scheduler.step()
    return model


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of ``model`` by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
