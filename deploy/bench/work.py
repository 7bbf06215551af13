"""What all contenders do: the optimizer, the models, the data, and how gradients are counted."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor, nn

from paramserver.errors import DataError
from paramserver.optimizers import Momentum
from workers.batches import Batches
from workers.datasets import MNIST, read_images
from workers.task import Data, Task, TensorExamples, build_data, build_model
from workers.tasks.classification import cross_entropy, mlp
from workers.tasks.images import convnet

OPTIMIZER = Momentum(lr=0.01, momentum=0.9)
"""Momentum SGD, everywhere."""

GRADIENT_SEED = 7
SEED = 0
_NUM_EXAMPLES = 10_000


def momentum_sgd(parameters: list[nn.Parameter], *, fused: bool = True) -> torch.optim.SGD:
    """Return torch's optimizer with the settings of `OPTIMIZER`."""
    return torch.optim.SGD(parameters, lr=OPTIMIZER.lr, momentum=OPTIMIZER.momentum, fused=fused)


def synthetic_gradient(shape: tuple[int, ...]) -> Tensor:
    """Return the same gradient in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(GRADIENT_SEED))


def has_mnist() -> bool:
    """Whether MNIST's files are on this machine."""
    try:
        read_images(MNIST)
    except DataError:
        return False
    return True


def tasks(*, mnist: bool, quick: bool) -> dict[str, Task]:
    """Return the nets that are trained, by the name of their row.

    Args:
        mnist: Train on MNIST's first images; otherwise on random ones of the same shape.
        quick: Small nets.
    """
    data = partial(_data, mnist, 400 if quick else _NUM_EXAMPLES)
    hidden = (32, 32) if quick else (4096, 4096)
    make = partial(Task, data=data, loss=cross_entropy, headline="loss")
    return {
        "ConvNet, batch 128": make(name="bench-convnet", model=convnet, batch_size=128),
        f"MLP 784-{hidden[0]}-{hidden[1]}-10, batch 8": make(
            name="bench-mlp", model=partial(mlp, 784, hidden, 10), batch_size=8
        ),
    }


def _data(mnist: bool, num_examples: int) -> Data:
    """Return images as the nets take them, so that no contender spends time on making them so."""
    if mnist:
        train_images, train_classes, _, _ = read_images(MNIST)
        images = (
            train_images[:num_examples].unsqueeze(1).float().div_(255).sub_(0.1307).div_(0.3081)
        )
        classes = train_classes[:num_examples].long()
    else:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(num_examples, 1, 28, 28, generator=generator)
        classes = torch.randint(10, (num_examples,), generator=generator)
    examples = TensorExamples(images, classes)
    return Data(train=examples, test=examples)


class Trainee:
    """A model and its batches, for contenders that have no loop of their own."""

    def __init__(self, task: Task, worker: int = 0, num_workers: int = 1) -> None:
        torch.set_num_threads(1)
        self.task = task
        self.model = build_model(task, SEED).train()
        self._examples = build_data(task).train
        self._batches = Batches(
            len(self._examples), task.batch_size, seed=SEED, worker=worker, num_workers=num_workers
        )
        self._clock = 0

    def batch(self) -> tuple[Tensor, ...]:
        """Return the next batch."""
        batch = self._examples.batch(self._batches.indices(self._clock))
        self._clock += 1
        return batch

    def backward(self, model: nn.Module | None = None) -> None:
        """Compute the next batch's gradient into ``.grad``; old gradients must be gone."""
        loss = self.task.loss(model or self.model, self.batch())
        loss.backward()
        loss.item()  # every loop looks at its loss


class Meter:
    """Counts gradients over a fixed time after a warm-up, which begins with the first one."""

    def __init__(self, warm_s: float, measure_s: float) -> None:
        self._warm_s, self._measure_s = warm_s, measure_s
        self._first = self._from = self._to = 0.0
        self._counted = 0

    def count(self, gradients: int = 1) -> bool:
        """Count ``gradients`` more; return whether to go on."""
        now = time.perf_counter()
        if not self._first:
            self._first = now
        if not self._from:
            if now - self._first >= self._warm_s:
                self._from = now
            return True
        self._counted += gradients
        self._to = now
        return now - self._from < self._measure_s

    def rate(self) -> float:
        """Return gradients a second; 0 if the time was too short for any."""
        return self._counted / (self._to - self._from) if self._counted else 0.0
