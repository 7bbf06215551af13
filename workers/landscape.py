"""Slices through the space of a model's parameters, to look at the loss on: a point and directions.

    filter_normalised   random directions, in each filter as long as the parameters' own filter
    between             from one set of parameters to another, and aside to a third
    principal           the directions a path is spread out in most

A slice has one direction or two, and its points are the origin and a combination of them. A path is
drawn where its points are when they are projected onto the slice, and is nearest to there.

Sources: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913
(filters, and principal directions); Goodfellow et al., ICLR 2015, arXiv:1412.6544 (lines between).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paramserver.layout import Layout

_FLAT = 1e-6
"""A direction's share of a path, or of another direction's length, that is no direction at all."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """A line or a plane."""

    origin: Tensor
    """Shape ``(n,)``."""
    directions: Tensor
    """A row each, one or two, none of length 0 and not parallel; shape ``(k, n)``."""

    def at(self, coordinates: Tensor) -> Tensor:
        """Return the points at ``coordinates``, shape ``(m, k)``, as rows of shape ``(m, n)``."""
        points: Tensor = self.origin + coordinates.to(self.origin.dtype) @ self.directions
        return points

    def project(self, points: Tensor) -> Tensor:
        """Return the coordinates of what is nearest to each row of ``points``, float64."""
        directions = self.directions.double()
        products = (points.double() - self.origin.double()) @ directions.T
        coordinates: Tensor = torch.linalg.solve(directions @ directions.T, products.T).T
        return coordinates

    def inside(self, points: Tensor) -> float:
        """Return how much of the way from the origin to ``points`` lies in the slice: 0 to 1.

        That is the share of the squared distances, summed over all points.
        """
        ways = points.double() - self.origin.double()
        seen = self.project(points) @ self.directions.double()
        whole = float(ways.square().sum())
        return float(seen.square().sum()) / whole if whole else 1.0


def filter_normalised(layout: Layout, origin: Tensor, number: int, *, seed: int) -> Slice:
    """Return ``number`` random directions around ``origin``, a vector of ``layout``.

    A filter is what leads to one output: a row of a matrix, a kernel of a convolution. Vectors,
    such as biases, stay as they are; a model that has no others has each of them for a filter.

    Raises:
        ValueError: All parameters that a direction would have are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    has_filters = any(len(slot.shape) > 1 for slot in layout.slots)
    directions = torch.zeros(number, layout.numel, dtype=layout.dtype)
    for direction in directions:
        both = zip(layout.views(direction), layout.views(origin), strict=True)
        for drawn, own in both:
            noise = torch.randn(own.shape, generator=generator, dtype=torch.float64)
            if own.dim() > 1 or not has_filters:
                filters = noise.flatten(1) if own.dim() > 1 else noise.view(1, -1)
                norms = own.double().reshape(filters.shape).norm(dim=1, keepdim=True)
                scaled = filters * (norms / filters.norm(dim=1, keepdim=True))
                drawn.copy_(scaled.view(own.shape))
    if not bool(directions.any()):
        raise ValueError(
            "a random direction is as long as the parameters it starts from, and these are all 0: "
            "look between sets of parameters, or along the path"
        )
    return Slice(origin, directions)


def between(first: Tensor, second: Tensor, third: Tensor | None = None) -> Slice:
    """Return the line from ``first``, at 0, to ``second``, at 1; or the plane through ``third``.

    The plane's other direction is perpendicular, and as long.

    Raises:
        ValueError: Two of them are the same, or all three lie on a line.
    """
    along = second.double() - first.double()
    length = float(along.norm())
    if length == 0:
        raise ValueError("the two sets of parameters are the same: there is no line between them")
    if third is None:
        return Slice(first, along[None].to(first.dtype))
    way = third.double() - first.double()
    aside = way - along * (way @ along / length**2)
    if float(aside.norm()) <= _FLAT * max(float(way.norm()), length):
        raise ValueError("the three sets of parameters lie on a line: look along one direction")
    aside *= length / aside.norm()
    return Slice(first, torch.stack([along, aside]).to(first.dtype))


def principal(points: Tensor, origin: Tensor, number: int) -> tuple[Slice, tuple[float, ...]]:
    """Return the directions that ``points`` are spread out in most, and each one's share of it.

    Directions have length 1 and are perpendicular; the first point's coordinates are 0 or less than
    those of the mean.

    Args:
        points: A path, a row each, shape ``(m, n)``.
        origin: What the coordinates are counted from, shape ``(n,)``.
        number: Directions, 1 or 2.

    Raises:
        ValueError: The points are not spread out in so many directions.
    """
    mean = points.double().mean(dim=0)
    ways = points.double() - mean
    squares, rows = torch.linalg.eigh(ways @ ways.T)  # m by m: there are fewer points than elements
    squares, rows = squares.flip(0)[:number].clamp(min=0), rows.flip(1)[:, :number]
    total = float(ways.square().sum())
    if len(squares) < number or total == 0 or float(squares[-1]) <= _FLAT**2 * total:
        raise ValueError(
            f"a path of {len(points)} points is not spread out in {number} "
            f"direction{'s' if number > 1 else ''}: look along fewer, or train for longer"
        )
    directions = (rows.T @ ways) / squares.sqrt()[:, None]
    signs = torch.where(directions @ ways[0] > 0, -1.0, 1.0)
    found = (directions * signs[:, None]).to(origin.dtype)
    return Slice(origin, found), tuple((squares / total).tolist())


def grid(bounds: Sequence[tuple[float, float]], num_points: int) -> list[Tensor]:
    """Return the values along each direction, from one bound to the other, float64."""
    parts = torch.arange(num_points, dtype=torch.float64) / (num_points - 1)
    return [low + (high - low) * parts for low, high in bounds]


def around(coordinates: Tensor, margin: float) -> list[tuple[float, float]]:
    """Return bounds that leave room around ``coordinates``, shape ``(m, k)``.

    ``margin`` is in parts of the largest extent, so that a path that is thin is not drawn thick.
    """
    low, high = coordinates.min(dim=0).values, coordinates.max(dim=0).values
    room = margin * float((high - low).max())
    if not math.isfinite(room):
        raise ValueError("a path that is not finite has no bounds")
    return [(float(a) - room, float(b) + room) for a, b in zip(low, high, strict=True)]
