"""The ends of a symmetric matrix's spectrum, from products with it alone: Lanczos' method.

After k products with vectors of a Krylov space the eigenvalues of a k x k matrix, the Ritz values,
are near those of the whole one, the outermost first. What is certain of them:

    some eigenvalue lies within a Ritz value's residual of it
    the i-th smallest eigenvalue is at most the i-th smallest Ritz value (Cauchy's interlacing), so
        there are at least as many negative eigenvalues as negative Ritz values

In floating point the vectors lose their orthogonality as soon as a Ritz value converges, and ghosts
of it appear; each new vector is therefore made orthogonal to all before, twice. Where the space is
exhausted, at an invariant subspace, it goes on with a random vector orthogonal to it, so that
eigenvalues of several dimensions are counted as often as they are there.

Sources: Lanczos, J. Res. Natl. Bur. Stand. 45, 1950; Parlett, "The Symmetric Eigenvalue Problem",
SIAM 1998, sections 10.1, 11.4 and 13.8; Giraud et al., "The loss of orthogonality in the
Gram-Schmidt orthogonalization process", 2005, on twice being enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["minimum", "maximum", "saddle", "degenerate"]

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector, both of shape ``(n,)``."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of the eigenvalues."""

    ritz: Tensor
    """Ritz values in ascending order, float64, shape ``(k,)``."""
    residuals: Tensor
    """How far an eigenvalue is from each at most, shape ``(k,)``."""
    lowest: Tensor
    """Unit vector that the smallest Ritz value belongs to, float64, shape ``(n,)``."""
    is_whole: bool
    """Whether these are all the eigenvalues there are."""
    noise: float
    """What cannot be told from 0, by the precision that products are computed in."""

    @property
    def smallest(self) -> float:
        """The smallest Ritz value: the smallest eigenvalue is no larger."""
        return float(self.ritz[0])

    @property
    def largest(self) -> float:
        """The largest Ritz value: the largest eigenvalue is no smaller."""
        return float(self.ritz[-1])

    @property
    def num_negative(self) -> int:
        """Negative eigenvalues; if the spectrum is not whole, there are at least so many."""
        return int((self.ritz < -self.noise).sum())

    def verdict(self) -> Verdict:
        """Return what a point is whose gradient is 0 and whose Hessian this is of.

        Both ends decide it. Degenerate is where an eigenvalue cannot be told from 0 and no other
        settles the matter: the Hessian does not say what is there.
        """
        low, high = self.smallest, self.largest
        if low < -self.noise and high > self.noise:
            return "saddle"
        if self._certain(0) and low > self.noise:
            return "minimum"
        if self._certain(-1) and high < -self.noise:
            return "maximum"
        return "degenerate"

    def _certain(self, end: int) -> bool:
        """Whether the sign of an end is known: nothing beyond it is expected past 0."""
        return float(self.residuals[end]) < abs(float(self.ritz[end]))


def lanczos(
    product: Product,
    size: int,
    *,
    steps: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
    padding: Tensor | None = None,
) -> Spectrum:
    """Return the spectrum of a matrix, as far as ``steps`` products with it tell.

    Memory: ``steps`` vectors in float64.

    Args:
        product: The matrix times a vector of ``dtype``; called ``steps`` times, at most.
        size: Length of the vectors.
        steps: Products, 1 or more; as many as there are dimensions give the whole spectrum.
        seed: Of the vector it begins with.
        dtype: What products are computed in; it decides what counts as 0.
        padding: Elements that are no dimensions, such as between two parameters: True there, shape
            ``(size,)``.

    Raises:
        ValueError: No steps or dimensions, or a product that is not finite.
    """
    real = torch.ones(size, dtype=torch.bool) if padding is None else ~padding
    dimensions = int(real.sum())
    if steps < 1 or dimensions < 1:
        raise ValueError(f"steps and dimensions must be 1 or more, got {steps} and {dimensions}")
    steps = min(steps, dimensions)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(steps, size, dtype=torch.float64)
    diagonal, beside = torch.zeros(steps, dtype=torch.float64), []
    basis[0] = _fresh(basis[:0], real, generator)
    scale = 0.0
    for step in range(steps):
        image = product(basis[step].to(dtype)).double() * real
        if not bool(torch.isfinite(image).all()):
            raise ValueError("the matrix times a vector is not finite")
        scale = max(scale, float(image.norm()))
        diagonal[step] = torch.dot(image, basis[step])
        left = _orthogonal(image, basis[: step + 1])
        length = float(left.norm())
        if step + 1 == steps:
            break
        # a remainder of rounding alone has no direction
        if length <= _noise(scale, dimensions, dtype):
            beside.append(0.0)
            basis[step + 1] = _fresh(basis[: step + 1], real, generator)
        else:
            beside.append(length)
            basis[step + 1] = left / length
    matrix = diagonal.diag()
    if beside:
        offs = torch.tensor(beside, dtype=torch.float64)
        matrix += offs.diag(1) + offs.diag(-1)
    values, vectors = torch.linalg.eigh(matrix)
    is_whole = steps == dimensions
    return Spectrum(
        ritz=values,
        residuals=(0.0 if is_whole else length) * vectors[-1].abs(),
        lowest=vectors[:, 0] @ basis,
        is_whole=is_whole,
        noise=_noise(scale, dimensions, dtype),
    )


def relative_gradient(x: Tensor, gradient: Tensor, loss: float) -> float:
    """Return how large a gradient is by the scales of the point and the loss.

    It is the largest |g_i| max(|x_i|, 1) / max(|f|, 1).

    Source: Dennis & Schnabel, "Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations", SIAM 1996, section 7.2.
    """
    return float((gradient.abs() * x.abs().clamp(min=1)).max()) / max(abs(loss), 1.0)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _fresh(basis: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(real.shape, dtype=torch.float64, generator=generator) * real
    left = _orthogonal(drawn, basis)
    unit: Tensor = left / left.norm()
    return unit


def _noise(scale: float, dimensions: int, dtype: torch.dtype) -> float:
    return 10 * torch.finfo(dtype).eps * math.sqrt(dimensions) * scale
