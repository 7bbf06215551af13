from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from workers.sharpness import LossAndGradient, sharpness

DOUBLE = torch.float64


def quadratic(hessian: Tensor, slope: Tensor, base: float = 0.0) -> LossAndGradient:
    """Return f(x) = base + <slope, x> + <x, H x> / 2."""

    def function(x: Tensor) -> tuple[float, Tensor]:
        return float(base + slope @ x + x @ hessian @ x / 2), slope + hessian @ x

    return function


def test_a_slope_is_highest_in_its_corner() -> None:
    slope = torch.tensor([3.0, -1.0, 0.5], dtype=DOUBLE)
    x = torch.tensor([0.0, 2.0, -1.0], dtype=DOUBLE)
    function = quadratic(torch.zeros(3, 3, dtype=DOUBLE), slope, base=4.0)

    found = sharpness(function, x, seed=0, epsilon=0.1)

    box = 0.1 * (x.abs() + 1)
    base = float(4.0 + slope @ x)
    assert found == pytest.approx(100 * float(box @ slope.abs()) / (1 + base), rel=1e-12)


def test_a_bowl_is_highest_in_every_corner() -> None:
    curvature = torch.tensor([1.0, 10.0, 100.0], dtype=DOUBLE)
    function = quadratic(torch.diag(curvature), torch.zeros(3, dtype=DOUBLE))

    found = sharpness(function, torch.zeros(3, dtype=DOUBLE), seed=0, epsilon=0.01)

    assert found == pytest.approx(100 * float(curvature.sum()) * 0.01**2 / 2, rel=1e-12)


def test_it_is_as_high_as_a_bounded_quasi_newton_search_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(12, 12, generator=generator, dtype=DOUBLE)
    function = quadratic(half @ half.T, torch.randn(12, generator=generator, dtype=DOUBLE))
    x = torch.randn(12, generator=generator, dtype=DOUBLE)

    found = sharpness(function, x, seed=0, epsilon=0.5, steps=50, starts=20)

    base, box = function(x)[0], 0.5 * (x.abs() + 1)
    best = base
    for start in range(20):
        away = np.random.default_rng(start).uniform(-1, 1, 12) * box.numpy()
        search = minimize(
            lambda y: tuple(-part for part in _plain(function, x + torch.from_numpy(y))),
            away,
            jac=True,
            method="L-BFGS-B",
            bounds=[(-width, width) for width in box.tolist()],
        )
        best = max(best, -search.fun)
    assert found >= 100 * (best - base) / (1 + base) * (1 - 1e-9)


def _plain(function: LossAndGradient, x: Tensor) -> tuple[float, np.ndarray]:
    value, gradient = function(x)
    return value, gradient.numpy()


def test_no_point_outside_the_box_is_looked_at() -> None:
    x = torch.tensor([1.0, -3.0])
    box = 0.25 * (x.abs() + 1)

    def watched(point: Tensor) -> tuple[float, Tensor]:
        assert bool(((point - x).abs() <= box * (1 + 1e-6)).all())
        return float(point.square().sum()), 2 * point

    assert sharpness(watched, x, seed=1, epsilon=0.25) > 0


def test_a_flat_loss_has_none() -> None:
    assert sharpness(lambda x: (2.0, torch.zeros_like(x)), torch.ones(4), seed=0) == 0.0


def test_impossible_values_are_refused() -> None:
    flat: LossAndGradient = lambda x: (2.0, torch.zeros_like(x))  # noqa: E731
    with pytest.raises(ValueError, match=r"^epsilon must be above 0, got 0$"):
        sharpness(flat, torch.ones(2), seed=0, epsilon=0)
    with pytest.raises(ValueError, match=r"^steps and starts must be 1 or more, got 0 and 3$"):
        sharpness(flat, torch.ones(2), seed=0, steps=0)
    with pytest.raises(ValueError, match=r"^the loss at the minimum must be finite, got nan$"):
        sharpness(lambda x: (math.nan, x), torch.ones(2), seed=0)
