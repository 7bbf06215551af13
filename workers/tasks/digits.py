"""Handwritten digits, 8x8: real data that comes with scikit-learn, for first runs and tests."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.task import Data, Task, TensorExamples
from workers.tasks.classification import accuracy, cross_entropy, mlp, sample_classes

PIXELS = 64
"""Of an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels; a small perceptron passes 97 % in seconds."""

    hidden: int = 256
    """Width of the hidden layer."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be 1 unit or more, got {self.hidden}")

    def build(self) -> Task:
        """Return the task; a fifth of each class is for testing."""
        return Task(
            name="digits",
            model=partial(mlp, PIXELS, (self.hidden,), 10),
            data=read_digits,
            loss=cross_entropy,
            metrics=accuracy,
            sample_targets=sample_classes,
        )


def read_digits() -> Data:
    """Load the digits, pixels of mean 0 and deviation 1, and split them; always the same split."""
    table = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.int64))
    images, classes = table[:, :-1], table[:, -1]
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    of_classes = [order[classes[order] == c] for c in range(10)]
    sizes = [round(len(of_class) / 5) for of_class in of_classes]
    test = torch.cat([rows[:size] for rows, size in zip(of_classes, sizes, strict=True)])
    train = torch.cat([rows[size:] for rows, size in zip(of_classes, sizes, strict=True)])
    return Data(
        train=TensorExamples(_normalise(images[train]), classes[train]),
        test=TensorExamples(_normalise(images[test]), classes[test]),
    )


def _file() -> Path:
    """Return where scikit-learn has the digits: importing it takes a second in every process."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn, which is not installed")
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _normalise(images: Tensor) -> Tensor:
    """Turn pixels 0 to 16 into float32 of mean 0 and deviation 1, as the digits have them."""
    return (images.float() / 16 - 0.3053) / 0.3760
