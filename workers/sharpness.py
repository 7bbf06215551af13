"""How sharp a minimum is: how far the loss can rise in a small box around it.

    sharpness = 100 (max f(x + y) - f(x)) / (1 + f(x)),    |y_i| <= epsilon (|x_i| + 1)

Source: Keskar et al., "On Large-Batch Training for Deep Learning: Generalization Gap and Sharp
Minima", ICLR 2017, arXiv:1609.04836, metric 2.1 in the full space. They search by ten iterations of
L-BFGS-B; here it is conditional gradient ascent, whose every step goes towards the corner of the
box that the gradient points to (Frank & Wolfe, 1956), so nothing has to be projected. What either
finds is a lower bound of the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_HALVINGS = 6
"""Times a step is halved in search of one that goes up, before the ascent ends."""

LossAndGradient = Callable[[Tensor], tuple[float, Tensor]]
"""Of a point, shape ``(n,)``: the loss and its gradient there."""


def sharpness(
    function: LossAndGradient,
    x: Tensor,
    *,
    seed: int,
    epsilon: float = 1e-3,
    steps: int = 20,
    starts: int = 3,
) -> float:
    """Return by how many per cent of ``1 + f(x)`` the loss can rise around ``x``, 0 or more.

    Args:
        function: The loss and its gradient; not called with what it has returned before.
        x: The minimum, shape ``(n,)``; not changed.
        seed: Of the places the ascents begin at, drawn from the box.
        epsilon: Half the width of the box at a parameter that is 0, above 0.
        steps: Of each ascent, 1 or more; each takes one to seven values of ``function``.
        starts: Ascents; the highest counts.

    Raises:
        ValueError: A number out of range, or a loss that is not finite at ``x``.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if steps < 1 or starts < 1:
        raise ValueError(f"steps and starts must be 1 or more, got {steps} and {starts}")
    base, _ = function(x)
    if not math.isfinite(base):
        raise ValueError(f"the loss at the minimum must be finite, got {base}")
    box = epsilon * (x.abs() + 1)
    generator = torch.Generator().manual_seed(seed)
    highest = base
    for _ in range(starts):
        inside = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        highest = max(highest, _ascend(function, x, box * inside, box, steps))
    return 100 * (highest - base) / (1 + base)


def _ascend(function: LossAndGradient, x: Tensor, away: Tensor, box: Tensor, steps: int) -> float:
    """Return the highest value found from ``x + away`` on, inside the box."""
    value, gradient = function(x + away)
    for _ in range(steps):
        way = torch.copysign(box, gradient) - away
        step = 1.0
        for _ in range(_HALVINGS):
            there = away + step * way
            higher, slope = function(x + there)
            if higher > value:
                break
            step /= 2
        else:
            return value
        away, value, gradient = there, higher, slope
    return value
