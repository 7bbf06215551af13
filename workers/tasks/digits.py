"""Handwritten digits, 8x8: real data that comes with scikit-learn, for first runs and tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from workers.task import Data, Task, TensorExamples
from workers.tasks.classification import accuracy, cross_entropy, mlp, sample_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels; a small perceptron passes 97 % in seconds."""

    hidden: int = 256
    """Width of the hidden layer."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be 1 unit or more, got {self.hidden}")

    def build(self) -> Task:
        """Return the task; four fifths of the digits are for training."""
        return Task(
            name="digits",
            model=partial(mlp, 64, (self.hidden,), 10),
            data=_digits,
            loss=cross_entropy,
            metrics=accuracy,
            sample_targets=sample_classes,
        )


def _digits() -> Data:
    """Load the digits, pixels of mean 0 and deviation 1, and split them; always the same split."""
    # Imported here because it takes 2 s and 80 MB, which workers on other tasks need not pay.
    from sklearn.datasets import load_digits  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images, classes, test_size=0.2, stratify=classes, random_state=0)
    train_images, test_images, train_classes, test_classes = map(torch.from_numpy, parts)
    return Data(
        train=TensorExamples(_normalise(train_images), train_classes),
        test=TensorExamples(_normalise(test_images), test_classes),
    )


def _normalise(images: Tensor) -> Tensor:
    """Turn pixels 0 to 16 into float32 of mean 0 and deviation 1, as the digits have them."""
    return (images.float() / 16 - 0.3053) / 0.3760
