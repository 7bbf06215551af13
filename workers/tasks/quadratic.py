"""A quadratic whose optimum, curvature and noise are known: what theory speaks about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from workers.task import Batch, Data, Task, TensorExamples

OPTIMUM = 1.0
"""Every coordinate of the optimum; training starts at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """A noisy quadratic with known optimum: mean over points b of (x - b)^T A (x - b) / 2.

    A is diagonal, its entries fall geometrically from 1 to 1/condition. The points lie around the
    optimum x* = (1, …, 1), which is their mean, and training starts at x = 0. Gradient descent of
    rate lr leaves ``1 - x = (1 - lr A)^k`` after k steps. With noise 0 all points are x*, and the
    gradient of any batch is exact.
    """

    dim: int = 64
    """Coordinates of x."""

    condition: float = 10.0
    """Largest entry of A over its smallest, 1 or more."""

    noise: float = 0.1
    """Standard deviation of the points around the optimum, in every coordinate."""

    num_points: int = 1000
    """Points in the data; training and test data are the same."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be 1 or more, got {self.dim}")
        if not 1 <= self.condition < math.inf:
            raise ValueError(f"condition must be 1 or more and finite, got {self.condition}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be 0 or more and finite, got {self.noise}")
        if self.num_points < 1:
            raise ValueError(f"num_points must be 1 or more, got {self.num_points}")

    def build(self) -> Task:
        """Return the task; its metric ``distance`` is the 2-norm of x - x*."""
        return Task(
            name="quadratic",
            model=partial(_Bowl, self.dim, self.condition),
            data=partial(_points, self.num_points, self.dim, self.noise),
            loss=_mean_loss,
            metrics=_distance,
            headline="distance",
            sample_targets=partial(_points_around, self.condition),
        )


class _Bowl(nn.Module):
    """Predicts x for every point, x starting at 0; holds the diagonal of A."""

    curvature: Tensor

    def __init__(self, dim: int, condition: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dim))
        self.register_buffer("curvature", _curvature(dim, condition))

    def forward(self, points: Tensor) -> Tensor:
        return self.x.expand(len(points), -1)


def _curvature(dim: int, condition: float) -> Tensor:
    """Return the diagonal of A, float32."""
    return torch.logspace(0.0, -math.log10(condition), dim, dtype=torch.float64).float()


def _points(num_points: int, dim: int, noise: float) -> Data:
    """Draw the points, always the same ones, and move them so that their mean is the optimum."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(num_points, dim, generator=generator, dtype=torch.float64)
    offsets -= offsets.mean(dim=0)
    points = TensorExamples((OPTIMUM + noise * offsets).float())
    return Data(train=points, test=points)


def _mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over points b of (x - b)^T A (x - b) / 2.

    It is the negative logarithm of the normal density of mean x and covariance A^-1.
    """
    (points,) = batch
    losses: Tensor = (model(points) - points).square() @ model.curvature / 2
    return losses.mean()


def _points_around(condition: float, predicted: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a point for each x in ``predicted``, shape ``(n, dim)``, from that density."""
    noise = torch.randn(predicted.shape, generator=generator, dtype=predicted.dtype)
    return predicted + noise / _curvature(predicted.shape[1], condition).to(predicted.dtype).sqrt()


def _distance(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the 2-norm of x - x*, which is the same for every batch."""
    x = torch.nn.utils.parameters_to_vector(model.parameters())
    return {"distance": (x - OPTIMUM).norm().item()}
