"""What tasks with classes share: the loss, the accuracy, labels and a multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.task import Batch


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of ``(inputs, class numbers)`` under the model's logits."""
    inputs, classes = batch
    return functional.cross_entropy(model(inputs), classes)


def accuracy(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the share of ``(inputs, class numbers)`` whose class has the largest logit."""
    inputs, classes = batch
    return {"accuracy": (model(inputs).argmax(dim=1) == classes).double().mean().item()}


def sample_classes(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class number for each row of ``logits``, shape ``(n, classes)``, from its softmax."""
    chances = logits.double().softmax(dim=1)
    return torch.multinomial(chances, 1, generator=generator).squeeze(1)


def mlp(num_inputs: int, hidden: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return linear layers of these widths with ReLU between them; inputs are flattened."""
    widths = (num_inputs, *hidden, num_outputs)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
