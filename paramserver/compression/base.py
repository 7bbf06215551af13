"""What every compression is: a plug-in that makes a compressor for each shard's slice.

A payload's tensors have the same dtypes and lengths at every push: they follow from the slice and
the compression's keys alone. So both sides know beforehand what comes, what it takes on the wire,
and what to refuse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paramserver.compression import payload as wire_format
from paramserver.compression.payload import Payload
from paramserver.errors import ProtocolError
from paramserver.layout import Layout, overlaps


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one parameter that lies in a slice."""

    start: int
    """Its first element in the slice."""
    stop: int
    """One past its last element in the slice."""
    first: int
    """Which element of the parameter the first one is."""
    columns: int
    """Row length of the parameter as a matrix: what all but its first dimension have in all."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What a shard has of the parameters, as a compressor needs to know it."""

    numel: int
    """Elements, padding included."""
    dtype: torch.dtype
    parts: tuple[Part, ...]
    """Those of parameters, in order; what is in none is padding, which stays 0."""

    @classmethod
    def of(cls, layout: Layout, cut: range) -> Slice:
        """Return the slice ``cut`` of the vector of ``layout``."""
        parts = []
        for slot in layout.slots:
            for _, start, stop in overlaps(slot.offset, slot.end, [cut]):
                rows = slot.shape[0] if len(slot.shape) > 1 else slot.numel
                columns = slot.numel // max(rows, 1)
                at, first = start - cut.start, start - slot.offset
                parts.append(Part(at, stop - cut.start, first, columns))
        return cls(len(cut), layout.dtype, tuple(parts))


class Compressor(ABC):
    """Turns one worker's vectors of one slice into payloads, and payloads back into vectors.

    What comes out of `decompress` depends on the payload alone; `compress` may remember.
    """

    def __init__(self, kind: str, of: Slice, tensors: tuple[tuple[torch.dtype, int], ...]) -> None:
        """Make payloads called ``kind``, with tensors of these dtypes and numbers of elements."""
        self.kind, self.slice, self.tensors = kind, of, tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of every payload."""
        return wire_format.num_bytes(self.kind, self.slice.numel, self.slice.dtype, self.tensors)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensors of every payload, without a header."""
        return sum(of.itemsize * count for of, count in self.tensors)

    def payload_of(self, raw: Tensor) -> Payload:
        """Return the payload whose tensors are the `raw_bytes` bytes of ``raw``, uint8."""
        tensors = wire_format.split_raw(raw, self.tensors)
        return Payload(self.kind, self.slice.numel, self.slice.dtype, tensors)

    def compress(self, vector: Tensor, seed: int) -> Payload:
        """Compress ``vector``, shape ``(numel,)``, which stays as it is.

        What is random follows from ``seed`` alone, 0 to 2^63 - 1.
        """
        return Payload(
            self.kind, self.slice.numel, self.slice.dtype, self._compressed(vector, seed)
        )

    def decompress(self, payload: Payload, out: Tensor) -> None:
        """Write what ``payload`` stands for to ``out``, shape ``(numel,)``.

        Raises:
            ProtocolError: It is not a payload of this compressor; ``out`` was not changed.
        """
        came = (payload.kind, payload.numel, payload.dtype)
        wanted = (self.kind, self.slice.numel, self.slice.dtype)
        tensors = tuple((tensor.dtype, tensor.numel()) for tensor in payload.tensors)
        if came != wanted or tensors != self.tensors:
            raise ProtocolError(
                f"expected a payload {wanted} of {self.tensors}, got {came} of {tensors}"
            )
        self._decompress(payload.tensors, out)

    @abstractmethod
    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Return the payload's tensors."""

    @abstractmethod
    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        """Write what they stand for."""


class Compression(Protocol):
    """A way to compress, as it is named and recorded; a frozen dataclass."""

    @property
    def feedback(self) -> bool:
        """Whether what is left out is kept, and added to what is sent next."""

    @property
    def remembers(self) -> bool:
        """Whether its compressors remember what they have sent, feedback aside."""

    @property
    def is_close(self) -> bool:
        """Whether a vector that came through may take the place of the parameters."""

    def build(self, of: Slice) -> Compressor:
        """Make a compressor for one worker's vectors of the slice ``of``."""


class Plain(Compressor):
    """Sends vectors as they are."""

    def __init__(self, of: Slice) -> None:
        super().__init__("none", of, ((of.dtype, of.numel),))

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        return (vector.clone(),)

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        out.copy_(tensors[0])


def check_share(share: float) -> None:
    """Raise ValueError unless ``share`` of a vector can be sent."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")


def num_sent(share: float, numel: int) -> int:
    """Return how many of ``numel`` elements a share is, 1 or more."""
    return min(numel, max(1, round(share * numel)))
