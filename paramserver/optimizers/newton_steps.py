"""The steps of Newton's method and its kin from a whole Hessian, small enough to be factored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paramserver.errors import CurvatureError


def dense_direction(settings: dict[str, Any], h: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Newton's direction, downhill unless ``plain``; H was computed in ``dtype``."""
    if settings["plain"]:
        return plain_newton_step(h, g, damping=settings["damping"])
    least = 10 * torch.finfo(dtype).eps
    return newton_step(h, g, damping=settings["damping"], least=least)


def newton_step(h: Tensor, g: Tensor, *, damping: float, least: float) -> Tensor:
    """Return d = -(H + λI)⁻¹ g, with λ grown from ``damping`` until H + λI is positive definite.

    Parameters on which neither H nor g depends, such as padding, stay where they are.

    Args:
        h: The symmetric matrix H, shape ``(n, n)``, float64.
        g: The gradient, shape ``(n,)``, float64.
        damping: The first λ, 0 or more, in units of H.
        least: The least pivot that counts as above 0, as a share of H's largest element; about the
            precision that H was computed with.
    """
    used = (h != 0).any(0) | (g != 0)
    d = torch.zeros_like(g)
    if not used.any():
        return d
    a = h[used][:, used]
    size = float(a.abs().max()) or 1.0
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    lam = damping
    while True:
        factor, failed = torch.linalg.cholesky_ex(a + lam * identity)
        if not failed and float(factor.diagonal().min()) ** 2 > least * size:
            break
        lam = max(10 * lam, 10 * least * size)
    d[used] = -torch.cholesky_solve(g[used, None], factor)[:, 0]
    return d


def plain_newton_step(h: Tensor, g: Tensor, *, damping: float) -> Tensor:
    """Return d = -(H + λI)⁻¹ g, uphill too; arguments as those of `newton_step`.

    Raises:
        CurvatureError: H + λI is singular.
    """
    used = (h != 0).any(0) | (g != 0)
    a = h[used][:, used]
    a.diagonal().add_(damping)
    solution, failed = torch.linalg.solve_ex(a, g[used])
    if failed:
        raise CurvatureError("the Hessian's determinant", 0.0)
    d = torch.zeros_like(g)
    d[used] = -solution
    return d


def saddle_free_step(h: Tensor, g: Tensor, *, damping: float, floor: float) -> Tensor:
    """Return d = -(|H| + λI)⁻¹ g; arguments as those of `newton_step`.

    Args:
        h: The symmetric matrix H.
        g: The gradient.
        damping: λ.
        floor: The least size of an eigenvalue of H, as a share of the largest; below it, the
            floor stands for it.
    """
    values, vectors = torch.linalg.eigh(h)
    sizes = values.abs()
    sizes = sizes.clamp(min=floor * (float(sizes.max()) or 1.0)) + damping
    d: Tensor = -(vectors @ ((vectors.T @ g) / sizes))
    return d
