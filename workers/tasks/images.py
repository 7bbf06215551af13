"""MNIST and Fashion-MNIST: 70,000 images of 28x28 pixels in ten classes each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from workers.datafiles import DataSet
from workers.datasets import FASHION_MNIST, MNIST, read_images
from workers.task import Batch, Data, Task, TensorExamples
from workers.tasks.classification import accuracy, cross_entropy, mlp, sample_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask:
    """What the image tasks share; not a task by itself."""

    net: Literal["mlp", "convnet"] = "mlp"
    """``mlp``: linear layers with ReLU. ``convnet``: the small one of Ray's parameter-server
    example, 1,960 parameters."""

    hidden: tuple[int, ...] = (128,)
    """Widths of the hidden layers of ``mlp``, written ``4096/4096``."""

    data_dir: str | None = None
    """Folder that holds the data; it is looked for elsewhere too."""

    download: bool = False
    """Whether data that is nowhere is fetched."""

    def __post_init__(self) -> None:
        if self.net not in ("mlp", "convnet"):
            raise ValueError(f"net must be 'mlp' or 'convnet', got {self.net!r}")
        if not all(width >= 1 for width in self.hidden):
            raise ValueError(f"hidden must be 1 unit or more in every layer, got {self.hidden}")

    def _build(self, data: DataSet, *, mean: float, std: float) -> Task:
        net = partial(mlp, 28 * 28, self.hidden, 10) if self.net == "mlp" else convnet
        return Task(
            name=data.name,
            model=net,
            data=partial(_load, data, self.data_dir, self.download, mean, std),
            loss=cross_entropy,
            metrics=accuracy,
            sample_targets=sample_classes,
            batch_size=64,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mnist(ImageTask):
    """Handwritten digits of 28x28 pixels."""

    def build(self) -> Task:
        """Return the task."""
        return self._build(MNIST, mean=0.1307, std=0.3081)


@dataclass(frozen=True, slots=True, kw_only=True)
class FashionMnist(ImageTask):
    """Pictures of clothes, 28x28 pixels; harder than the digits, so differences show."""

    def build(self) -> Task:
        """Return the task."""
        return self._build(FASHION_MNIST, mean=0.2860, std=0.3530)


def convnet() -> nn.Module:
    """Return the small convolutional net of Ray's parameter-server example.

    Its last layer gives log-probabilities; cross-entropy of those is their negative likelihood.
    """
    return nn.Sequential(
        nn.Conv2d(1, 3, kernel_size=3),
        nn.MaxPool2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 10),
        nn.LogSoftmax(dim=1),
    )


def _load(data: DataSet, data_dir: str | None, download: bool, mean: float, std: float) -> Data:
    tensors = read_images(data, data_dir=data_dir, download=download)
    normalise = partial(_normalise, mean, std)
    return Data(
        train=TensorExamples(*tensors[:2], transform=normalise),
        test=TensorExamples(*tensors[2:], transform=normalise),
    )


def _normalise(mean: float, std: float, batch: Batch) -> Batch:
    """Turn bytes into float32 of mean 0 and deviation 1, with a channel: ``(n, 1, 28, 28)``."""
    images, classes = batch
    return images.unsqueeze(1).float().div_(255).sub_(mean).div_(std), classes.long()
