"""PowerSGD: each parameter as a matrix of low rank.

    M (m × n)   P ← orthonormal columns of M Q      Q ← Mᵀ P      sent: P, Q      comes out: P Qᵀ

One step of subspace iteration, which begins at the Q of the push before: gradients of one parameter
resemble each other, and over some pushes P comes to span their leading directions. It is exact for
a matrix of rank r or less, but for a Q that misses a direction of it.

The paper sums P and Q over the workers between the steps, which makes one factorisation of their
mean. An asynchronous push has nobody to sum with: each worker's own gradient is factorised, and
synchronous mode averages what comes out of them.

A shard has whole rows of a matrix; what is left of one that a cut goes through, vectors, and
matrices that two factors would not make smaller are sent as they are.

Source: Vogels, Karimireddy & Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv:1905.13727.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paramserver.compression.base import Compressor, Part, Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerSGD:
    """Sends two thin factors in the place of each matrix, and vectors as they are.

    Source: Vogels, Karimireddy & Jaggi, NeurIPS 2019, arXiv:1905.13727.
    """

    rank: int = 2
    """Columns of the factors, 1 or more."""

    feedback: bool = True
    """Whether what is left out is added to what is sent next."""

    remembers: ClassVar[bool] = True
    is_close: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {self.rank}")

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Factors(of, self.rank)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Whole rows of a parameter in a slice."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def view(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.stop].view(self.rows, self.columns)


class _Factors(Compressor):
    def __init__(self, of: Slice, rank: int) -> None:
        self._rank = rank
        found = (_matrix(part) for part in of.parts)
        self._matrices = [m for m in found if rank * (m.rows + m.columns) < m.rows * m.columns]
        self._rest = _without(of.parts, self._matrices)
        self._wide = torch.promote_types(of.dtype, torch.float32)  # there is no 16-bit QR
        self._q: list[Tensor] = []  # where each matrix's next step begins
        super().__init__(
            "powersgd",
            of,
            (
                (of.dtype, rank * sum(m.rows for m in self._matrices)),
                (of.dtype, rank * sum(m.columns for m in self._matrices)),
                (of.dtype, sum(map(len, self._rest))),
            ),
        )

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        chance = torch.Generator().manual_seed(seed)
        if not self._q:
            self._q = [self._drawn(m.columns, chance) for m in self._matrices]
        ps, qs = [], []
        for i, matrix in enumerate(self._matrices):
            m = matrix.view(vector).to(self._wide)
            p = torch.linalg.qr(m @ self._q[i]).Q
            q = m.T @ p
            ps.append(p.reshape(-1).to(vector.dtype))
            qs.append(q.reshape(-1).to(vector.dtype))
            self._q[i] = self._alive(q, chance)
        rest = [vector[r.start : r.stop] for r in self._rest]
        return tuple(torch.cat([vector.new_empty(0), *pieces]) for pieces in (ps, qs, rest))

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        ps, qs, rest = tensors
        out.zero_()
        for r, piece in zip(self._rest, rest.split([len(r) for r in self._rest]), strict=True):
            out[r.start : r.stop] = piece
        each_p = ps.split([self._rank * m.rows for m in self._matrices])
        each_q = qs.split([self._rank * m.columns for m in self._matrices])
        for matrix, p, q in zip(self._matrices, each_p, each_q, strict=True):
            thin = p.view(-1, self._rank).to(self._wide), q.view(-1, self._rank).to(self._wide)
            matrix.view(out).copy_(thin[0] @ thin[1].T)

    def _alive(self, q: Tensor, chance: torch.Generator) -> Tensor:
        """Return ``q`` with columns drawn anew where it has none: from 0 no step leads away."""
        norms = torch.linalg.vector_norm(q, dim=0)
        is_dead = norms <= torch.finfo(q.dtype).eps * norms.max()
        return torch.where(is_dead, self._drawn(len(q), chance), q) if bool(is_dead.any()) else q

    def _drawn(self, columns: int, chance: torch.Generator) -> Tensor:
        return torch.randn(columns, self._rank, generator=chance, dtype=self._wide)


def _matrix(part: Part) -> _Matrix:
    """Return the whole rows in ``part``, perhaps none."""
    head = -part.first % part.columns  # the end of a row that the shard before has begun
    rows = max(part.stop - part.start - head, 0) // part.columns
    return _Matrix(part.start + head, rows, part.columns)


def _without(parts: tuple[Part, ...], matrices: list[_Matrix]) -> list[range]:
    """Return what of ``parts`` is in none of ``matrices``."""
    left = []
    for part in parts:
        at = part.start
        for matrix in matrices:
            if part.start <= matrix.start < part.stop:
                left.append(range(at, matrix.start))
                at = matrix.stop
        left.append(range(at, part.stop))
    return [r for r in left if len(r) > 0]
