"""How difficult each training sample is: what a curriculum goes by.

Source: Hacohen & Weinshall, "On The Power of Curriculum Learning in Training Deep Networks", ICML
2019, arXiv:1904.03626: the score may be a model's own loss after a first training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam

from paramserver.errors import TaskError
from paramserver.registry import Registry
from workers.batches import Batches, seed_step
from workers.curriculum import Order
from workers.task import Data, Task, build_model, user_code
from workers.threads import torch_threads

_AT_ONCE = 1000
"""Samples that are read together."""

_SHUFFLED = 4
"""First word of the stream's key of no order; `workers.batches` and others have others."""


class Difficulty(Protocol):
    """Scores samples."""

    def scores(self, task: Task, data: Data, seed: int) -> Tensor:
        """Return a score of every training sample, the higher the harder, shape ``(num_train,)``.

        Raises:
            TaskError: The task does not have what it takes.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The scores that the task's data bring with them."""

    def scores(self, task: Task, data: Data, seed: int) -> Tensor:
        """Return them."""
        if data.difficulty is None:
            raise TaskError(
                f"the data of task {task.name!r} hold no difficulty: return Data(train, test, "
                "difficulty=…), or let difficulty be loss or length"
            )
        if data.difficulty.shape != (len(data.train),):
            raise TaskError(
                f"the difficulty of task {task.name!r} must have a score for each of the "
                f"{len(data.train)} training samples, got shape {tuple(data.difficulty.shape)}"
            )
        return data.difficulty


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How long a sample is: the entries of its first tensor that are not padding."""

    padding: int = 0
    """The entry that fills up short samples."""

    def scores(self, task: Task, data: Data, seed: int) -> Tensor:
        """Count them."""
        counts = []
        for indices in torch.arange(len(data.train)).split(_AT_ONCE):
            first = data.train.batch(indices)[0]
            counts.append((first.reshape(len(indices), -1) != self.padding).sum(1))
        return torch.cat(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The loss of a sample under the task's own model, trained for a little while beforehand.

    The run's driver trains it alone, by Adam, without a curriculum.
    """

    epochs: float = 1.0
    """Passes through the training data, above 0."""

    lr: float = 1e-3
    """Adam's learning rate, above 0."""

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def scores(self, task: Task, data: Data, seed: int) -> Tensor:
        """Train, and compute the loss of one sample after the other."""
        model, num_train = build_model(task, seed), len(data.train)
        batches = Batches(num_train, task.batch_size, seed=seed, worker=0, num_workers=1)
        optimizer = Adam((p for p in model.parameters() if p.requires_grad), lr=self.lr)
        with torch_threads(1), user_code(f"the loss of task {task.name!r}"):  # for the same bits
            model.train()
            for clock in range(math.ceil(self.epochs * num_train / task.batch_size)):
                seed_step(seed, 0, clock)
                optimizer.zero_grad()
                task.loss(model, data.train.batch(batches.indices(clock))).backward()
                optimizer.step()
            model.eval()
            with torch.inference_mode():
                samples = torch.arange(num_train).split(1)
                return torch.stack([task.loss(model, data.train.batch(one)) for one in samples])


DIFFICULTIES: Registry[Difficulty] = Registry("difficulty")
DIFFICULTIES.register("given", Given)
DIFFICULTIES.register("length", Length, source="Platanios et al. 2019, arXiv:1903.09848")
DIFFICULTIES.register("loss", Loss, source="Hacohen & Weinshall 2019, arXiv:1904.03626")


def places(difficulty: Difficulty, task: Task, data: Data, order: Order, seed: int) -> Tensor:
    """Return the place of each training sample in a curriculum, first to last, int64.

    Samples of one score stand in the order of the data.

    Raises:
        TaskError: There is no score, or one that is not a number.
    """
    if order == "none":
        stream = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_SHUFFLED,)))
        shuffled = np.random.Generator(stream).permutation(len(data.train))
        return torch.from_numpy(shuffled.astype(np.int64))
    scores = difficulty.scores(task, data, seed).to(torch.float64)
    bad = int(torch.isnan(scores).sum())
    if bad:
        raise TaskError(
            f"{bad} of {len(scores)} training samples of task {task.name!r} have no difficulty: "
            "their score is not a number"
        )
    by_score = torch.argsort(scores, stable=True, descending=order == "hard")
    found = torch.empty_like(by_score)
    found[by_score] = torch.arange(len(scores))
    return found
