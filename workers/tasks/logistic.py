"""Logistic regression on Adult: a convex loss on real, sparse data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.datasets import ADULT_FEATURES, read_adult
from workers.task import Batch, Data, Task, TensorExamples


@dataclass(frozen=True, slots=True, kw_only=True)
class Logistic:
    """Logistic regression on UCI Adult: who earns over 50,000 a year, from 123 binary features.

    The loss is the mean of log(1 + exp(-y (w^T x + b))), y = ±1, over a batch; training starts at
    w = 0, b = 0.
    """

    data_dir: str | None = None
    """Folder that holds the data; it is looked for elsewhere too."""

    download: bool = False
    """Whether data that is nowhere is fetched."""

    def build(self) -> Task:
        """Return the task."""
        return Task(
            name="logistic",
            model=_linear,
            data=partial(_load, self.data_dir, self.download),
            loss=logistic_loss,
            metrics=sign_accuracy,
            sample_targets=sample_signs,
        )


def logistic_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean of log(1 + exp(-y z)) for the model's outputs z, labels y = ±1."""
    features, labels = batch
    return functional.softplus(-labels * model(features).squeeze(1)).mean()


def sign_accuracy(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the share of samples whose label, ±1, has the sign of the model's output."""
    features, labels = batch
    return {"accuracy": ((model(features).squeeze(1) > 0) == (labels > 0)).double().mean().item()}


def sample_signs(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label ±1 for each output z, shape ``(n, 1)``; +1 with chance 1 / (1 + exp(-z))."""
    chances = outputs.squeeze(1).sigmoid()
    return torch.bernoulli(chances, generator=generator) * 2 - 1


def _linear() -> nn.Module:
    model = nn.Linear(ADULT_FEATURES, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def _load(data_dir: str | None, download: bool) -> Data:
    train_x, train_y, test_x, test_y = read_adult(data_dir=data_dir, download=download)
    return Data(train=TensorExamples(train_x, train_y), test=TensorExamples(test_x, test_y))
