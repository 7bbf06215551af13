from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from workers.spectrum import lanczos, relative_gradient

DOUBLE = torch.float64


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Return a matrix with these eigenvalues and directions of no meaning."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=generator)).Q
    return q @ eigenvalues.to(DOUBLE).diag() @ q.T


def hessian_at(function: Callable[[Tensor], Tensor], *at: float) -> Tensor:
    point = torch.tensor(at, dtype=DOUBLE)
    hessian: Tensor = torch.autograd.functional.hessian(function, point)
    return hessian


def test_as_many_steps_as_dimensions_give_every_eigenvalue() -> None:
    matrix = symmetric(torch.randn(30, generator=torch.Generator().manual_seed(3)))

    found = lanczos(matrix.mv, 30, steps=99, seed=0)

    assert found.is_whole
    assert found.ritz.numpy() == pytest.approx(np.linalg.eigvalsh(matrix.numpy()), abs=1e-12)
    assert found.residuals.max() == 0


def test_few_steps_give_both_ends_as_scipy_does() -> None:
    """An independent implementation, ARPACK, on a spectrum like a net's: a bulk and outliers."""
    bulk = torch.linspace(-0.05, 1, 395)
    matrix = symmetric(torch.cat([bulk, torch.tensor([-0.6, -0.3, 8.0, 20.0, 45.0])]))
    operator = LinearOperator(matrix.shape, matvec=lambda v: matrix.numpy() @ v, dtype=np.float64)
    ends = eigsh(operator, k=4, which="BE", return_eigenvectors=False)

    found = lanczos(matrix.mv, 400, steps=60, seed=0)

    assert not found.is_whole
    assert [*found.ritz[:2], *found.ritz[-2:]] == pytest.approx(sorted(ends), rel=1e-6)
    assert matrix @ found.lowest == pytest.approx(found.smallest * found.lowest, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_no_bound_is_ever_broken(steps: int) -> None:
    """Residuals hold an eigenvalue each; Ritz values interlace with the eigenvalues."""
    for seed in range(20):
        matrix = symmetric(torch.randn(40, generator=torch.Generator().manual_seed(seed)), seed)
        eigenvalues = torch.linalg.eigvalsh(matrix)

        found = lanczos(matrix.mv, 40, steps=steps, seed=seed)

        away = (eigenvalues[None] - found.ritz[:, None]).abs().amin(1)
        assert (away <= found.residuals + 1e-12).all()
        assert (eigenvalues[:steps] <= found.ritz + 1e-12).all()
        assert (eigenvalues[-steps:] >= found.ritz - 1e-12).all()
        assert found.num_negative <= int((eigenvalues < 0).sum())


def test_eigenvalues_of_several_dimensions_are_counted_as_often() -> None:
    matrix = symmetric(torch.tensor([-2.0] * 3 + [0.0] * 4 + [5.0] * 3))

    found = lanczos(matrix.mv, 10, steps=10, seed=0)

    assert found.ritz.tolist() == pytest.approx([-2] * 3 + [0] * 4 + [5] * 3, abs=1e-12)
    assert found.num_negative == 3


def test_converged_eigenvalues_have_no_ghosts() -> None:
    """Without reorthogonalisation the largest is found several times over long before the end."""
    matrix = symmetric(torch.cat([torch.linspace(0, 1, 199), torch.tensor([1e6])]))

    found = lanczos(matrix.mv, 200, steps=120, seed=0)

    assert int((found.ritz > 2).sum()) == 1


@pytest.mark.parametrize(
    ("function", "verdict", "negative"),
    [
        pytest.param(lambda p: p[0] ** 2 - p[1] ** 2, "saddle", 1, id="x²-y²"),
        pytest.param(lambda p: p[0] ** 3 - 3 * p[0] * p[1] ** 2, "degenerate", 0, id="monkey"),
        pytest.param(lambda p: (p[0] * p[1] - 1) ** 2 / 2, "saddle", 1, id="two-layer-linear"),
        pytest.param(lambda p: p[0] ** 2 + 3 * p[1] ** 2, "minimum", 0, id="bowl"),
        pytest.param(lambda p: -(p[0] ** 2) - p[1] ** 2, "maximum", 2, id="summit"),
        pytest.param(lambda p: p[0] ** 2 + p[1] ** 4, "degenerate", 0, id="valley"),
    ],
)
def test_what_is_at_the_origin(
    function: Callable[[Tensor], Tensor], verdict: str, negative: int
) -> None:
    hessian = hessian_at(function, 0.0, 0.0)

    found = lanczos(hessian.mv, 2, steps=2, seed=0)

    assert found.verdict() == verdict
    assert found.num_negative == negative
    assert found.ritz.tolist() == pytest.approx(torch.linalg.eigvalsh(hessian).tolist())


def test_an_end_that_has_not_settled_makes_no_minimum() -> None:
    """One step sees the Rayleigh quotient of a random vector: above 0, and no proof of anything."""
    matrix = symmetric(torch.cat([torch.tensor([-1.0]), torch.linspace(50, 100, 99)]))

    early = lanczos(matrix.mv, 100, steps=1, seed=0)
    late = lanczos(matrix.mv, 100, steps=40, seed=0)

    assert early.smallest > 0
    assert late.verdict() == "saddle"


def test_padding_is_no_dimension() -> None:
    padding = torch.tensor([False, True, False, True])
    matrix = torch.tensor([3.0, 99.0, -1.0, 99.0], dtype=DOUBLE).diag()

    found = lanczos(matrix.mv, 4, steps=4, seed=0, padding=padding)

    assert found.ritz.tolist() == pytest.approx([-1, 3])
    assert found.lowest.abs().tolist() == pytest.approx([0, 0, 1, 0])


def test_products_in_single_precision_have_more_that_is_not_told_from_0() -> None:
    matrix = symmetric(torch.cat([torch.tensor([-1e-6, 1e-6]), torch.linspace(1, 9, 48)]))

    double = lanczos(matrix.mv, 50, steps=50, seed=0)
    single = lanczos(matrix.float().mv, 50, steps=50, seed=0, dtype=torch.float32)

    assert double.verdict() == "saddle"
    assert single.verdict() == "degenerate"


def test_what_is_not_finite_or_empty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"times a vector is not finite"):
        lanczos(lambda v: v * math.nan, 3, steps=2, seed=0)
    with pytest.raises(ValueError, match=r"must be 1 or more, got 0 and 3"):
        lanczos(lambda v: v, 3, steps=0, seed=0)


def test_a_relative_gradient_does_not_depend_on_units() -> None:
    """Large parameters and losses scaled alike leave it as it was."""
    x, gradient = torch.tensor([10.0, -40.0]), torch.tensor([0.3, 0.2])

    plain = relative_gradient(x, gradient, 5.0)

    assert plain == pytest.approx(40 * 0.2 / 5)
    assert relative_gradient(10 * x, gradient / 10, 5.0) == pytest.approx(plain)
    assert relative_gradient(x, 10 * gradient, 50.0) == pytest.approx(plain)
