"""Fewer bits an element: 16-bit floats, and 8-bit integers with a scale for each block.

    int8    |---- block ----|---- block ----|--
    step    max|x| / 127      max|x| / 127         q = round(x / step)    comes out as q step

An element comes out within half a step of its block. Rounding is to the nearest: of many small
gradients beside a large one all may come out as 0, and with ``feedback`` they are not forgotten.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from paramserver.compression.base import Compressor, Slice

_LARGEST = 127
_AT_ONCE = 2**20
"""Elements looked at together: few enough that what is made of them stays near the processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BFloat16:
    """Sends 16-bit floats with the range of 32-bit ones: half the bytes, 8 bits of precision.

    Source: Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019,
    arXiv:1905.12322.
    """

    feedback: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = True

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Cast("bf16", of, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float16:
    """Sends 16-bit floats: half the bytes, 11 bits of precision, values up to 65,504.

    What is larger comes out as that, what is below 3e-8 as 0.

    Source: IEEE 754-2008, binary16.
    """

    feedback: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = True

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Cast("fp16", of, torch.float16)


class _Cast(Compressor):
    def __init__(self, kind: str, of: Slice, to: torch.dtype) -> None:
        super().__init__(kind, of, ((to, of.numel),))
        self._to, self._limit = to, torch.finfo(to).max

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        return (vector.clamp(-self._limit, self._limit).to(self._to),)

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        out.copy_(tensors[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Sends 8-bit integers, and a scale for each block: about a quarter of the bytes.

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016,
    arXiv:1511.04561; in blocks, Dettmers et al., ICLR 2022, arXiv:2110.02861 (linear here).
    """

    block: int = 256
    """Elements with one scale, 8 or more: the fewer, the finer and the larger."""

    feedback: bool = True
    """Whether what is rounded off is added to what is sent next."""

    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 8:
            raise ValueError(f"block must be 8 elements or more, got {self.block}")

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Blocks(of, self.block)


class _Blocks(Compressor):
    def __init__(self, of: Slice, block: int) -> None:
        num_blocks = -(-of.numel // block)
        super().__init__("int8", of, ((torch.int8, of.numel), (of.dtype, num_blocks)))
        whole, at_once = of.numel // block, max(1, _AT_ONCE // block)
        edges = [*range(0, whole, at_once), whole]
        if whole < num_blocks:  # the last one is shorter, and comes alone
            edges.append(num_blocks)
        self._parts = [
            (slice(first * block, min(end * block, of.numel)), slice(first, end))
            for first, end in itertools.pairwise(edges)
        ]

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        q = torch.empty(vector.shape, dtype=torch.int8)
        steps = vector.new_empty(self.tensors[1][1])
        for at, blocks in self._parts:
            step = steps[blocks]
            rows = vector[at].view(len(step), -1)
            scaled = rows.abs()
            torch.div(scaled.amax(1), _LARGEST, out=step)
            # Where the step is too small for a float, everything comes out as 0.
            torch.div(rows, torch.where(step > 0, step, 1)[:, None], out=scaled)
            q[at] = scaled.round_().clamp_(-_LARGEST, _LARGEST).view(-1)
        return q, steps

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        q, steps = tensors
        for at, blocks in self._parts:
            step = steps[blocks]
            out[at].view(len(step), -1).copy_(q[at].view(len(step), -1)).mul_(step[:, None])


def in_rows(vector: Tensor, length: int) -> Tensor:
    """Return ``vector`` in rows of ``length``, the last filled up with 0; a view if none is."""
    missing = -vector.numel() % length
    return (pad(vector, (0, missing)) if missing else vector).view(-1, length)
