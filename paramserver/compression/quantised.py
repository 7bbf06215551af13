"""A few levels, or the sign alone.

qsgd    in buckets of d elements, with s levels and u = s |x| / ‖x‖ of the bucket:
        sign(x) (‖x‖ / s) (floor(u), or one more with the probability u - floor(u))
        E Q(x) = x,   E ‖Q(x) - x‖² = (‖x‖/s)² Σ f (1 - f) <= min(d/s², √d/s) ‖x‖²,  f = frac(u)

sign    for each parameter of n elements:   (‖x‖₁ / n) sign(x)
        ‖C(x) - x‖² = (1 - ‖x‖₁² / (n ‖x‖²)) ‖x‖²,   where sign(0) is 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from paramserver.compression.base import Compressor, Slice
from paramserver.compression.rounding import in_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class QSGD:
    """Sends each element as one of a few levels, rounded up or down by chance: right on average.

    2 bits an element for 1 level, 4 for up to 7, 8 for up to 127, and a norm for each bucket.

    Source: Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding", NeurIPS 2017, arXiv:1610.02132; bits of fixed length here.
    """

    levels: int = 127
    """Levels above 0, s, from 1 to 127."""

    bucket: int = 512
    """Elements with one norm, 8 or more: the fewer, the less noise and the more norms."""

    feedback: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127:
            raise ValueError(f"levels must be 1 to 127, got {self.levels}")
        if self.bucket < 8:
            raise ValueError(f"bucket must be 8 elements or more, got {self.bucket}")

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Levels(of, self.levels, self.bucket)


class _Levels(Compressor):
    def __init__(self, of: Slice, levels: int, bucket: int) -> None:
        self._bits = 2 if levels == 1 else 4 if levels <= 7 else 8
        num_buckets = -(-of.numel // bucket)
        num_codes = -(-of.numel * self._bits // 8)
        super().__init__("qsgd", of, ((torch.uint8, num_codes), (of.dtype, num_buckets)))
        self._levels, self._bucket = levels, bucket

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        rows, s = in_rows(vector, self._bucket), self._levels
        norms = torch.linalg.vector_norm(rows, dim=1)
        whole = torch.where(norms > 0, norms, 1)
        chance = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed))
        u = rows.abs().div_(whole[:, None]).mul_(s)
        level = u.add_(chance).floor_().clamp_(max=s).mul_(rows.sign())
        codes = level.add_(s).to(torch.uint8).view(-1)[: self.slice.numel]
        return packed(codes, self._bits), norms

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        codes, norms = tensors
        level = unpacked(codes, self._bits, self.slice.numel).to(out.dtype).sub_(self._levels)
        rows = in_rows(level, self._bucket).mul_(norms.div(self._levels)[:, None])
        out.copy_(rows.view(-1)[: self.slice.numel])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledSign:
    """Sends the sign of each element, 1 bit, and the mean absolute value of each parameter.

    Without feedback it can lead away from the optimum, on convex problems too.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes", ICML 2019, arXiv:1901.09847; the first of its kind, Seide et al., INTERSPEECH 2014.
    """

    feedback: bool = True
    """Whether what is left out is added to what is sent next."""

    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = False

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Signs(of)


class _Signs(Compressor):
    def __init__(self, of: Slice) -> None:
        super().__init__("sign", of, ((torch.uint8, -(-of.numel // 8)), (of.dtype, len(of.parts))))

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        parts = self.slice.parts
        scales = vector.new_empty(len(parts))
        for i, part in enumerate(parts):
            one = torch.linalg.vector_norm(vector[part.start : part.stop], ord=1)
            scales[i] = one / (part.stop - part.start)
        bits = np.packbits((vector >= 0).numpy())
        return torch.from_numpy(bits), scales

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        bits, scales = tensors
        signs = torch.from_numpy(np.unpackbits(bits.numpy(), count=self.slice.numel))
        at = 0
        for part, scale in zip(self.slice.parts, scales, strict=True):
            out[at : part.start] = 0  # padding
            out[part.start : part.stop] = signs[part.start : part.stop]
            out[part.start : part.stop].mul_(2).sub_(1).mul_(scale)
            at = part.stop
        out[at:] = 0


def packed(codes: Tensor, bits: int) -> Tensor:
    """Put ``codes``, uint8 below 2^bits, several to a byte; the first has the lowest bits."""
    a_byte = 8 // bits
    rows, out = in_rows(codes, a_byte), None
    for i in range(a_byte):
        shifted = rows[:, i] << (i * bits)
        out = shifted if out is None else out | shifted
    assert out is not None
    return out.contiguous()


def unpacked(packed_codes: Tensor, bits: int, numel: int) -> Tensor:
    """Return the ``numel`` codes that `packed` has put together."""
    a_byte, mask = 8 // bits, 2**bits - 1
    rows = [(packed_codes >> (i * bits)) & mask for i in range(a_byte)]
    return torch.stack(rows, dim=1).view(-1)[:numel]
