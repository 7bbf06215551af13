"""What travels in the place of a slice: a header, and flat tensors.

    4 bytes           header, JSON                                    tensors, little-endian
    header's length   {"kind", "numel", "dtype", "tensors": [[dtype, numel], …]}   one after another

A transport that frames tensors by itself sends the fields as they are; the bytes here are what is
counted, and what a file or a test would hold. Nothing is pickled, and sizes are looked at before
anything is made of them.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paramserver.errors import ProtocolError

_LENGTH = struct.Struct("<I")
_MAX_HEADER = 4096
"""Bytes a header may have."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int8, torch.uint8,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """A slice, compressed."""

    kind: str
    """Name of what made it."""
    numel: int
    """Elements of the slice."""
    dtype: torch.dtype
    """Of the slice."""
    tensors: tuple[Tensor, ...]
    """Flat and contiguous; what they are is agreed with the compression."""

    @property
    def num_bytes(self) -> int:
        """Bytes that `to_bytes` makes."""
        shapes = [(tensor.dtype, tensor.numel()) for tensor in self.tensors]
        return num_bytes(self.kind, self.numel, self.dtype, shapes)

    @property
    def as_bytes(self) -> list[Tensor]:
        """The bytes of each tensor, uint8, not copied."""
        return [tensor.view(torch.uint8) for tensor in self.tensors]

    @property
    def raw(self) -> Tensor:
        """The bytes of all tensors, one after another, for who knows what they are."""
        return torch.cat(self.as_bytes)

    def to_bytes(self) -> bytes:
        """Write header and tensors."""
        assert sys.byteorder == "little", "tensors travel as they lie in memory"
        shapes = [(tensor.dtype, tensor.numel()) for tensor in self.tensors]
        head = _header(self.kind, self.numel, self.dtype, shapes)
        return b"".join([_LENGTH.pack(len(head)), head, self.raw.numpy().tobytes()])

    @classmethod
    def from_bytes(cls, data: bytes) -> Payload:
        """Read what `to_bytes` wrote.

        Raises:
            ProtocolError: It is cut short or too long, or its header is not one.
        """
        kind, numel, dtype, shapes, at = _read_header(data)
        wanted = at + sum(of.itemsize * count for of, count in shapes)
        if len(data) != wanted:
            raise ProtocolError(f"a payload of {wanted} bytes came as {len(data)}")
        raw = torch.empty(0, dtype=torch.uint8)
        if len(data) > at:
            raw = torch.frombuffer(bytearray(data[at:]), dtype=torch.uint8)
        return cls(kind, numel, dtype, split_raw(raw, shapes))


Shapes = Sequence[tuple[torch.dtype, int]]
"""The dtype and the number of elements of each tensor."""


def split_raw(raw: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """Return the tensors that `Payload.raw` has put together, not copied where that can be."""
    pieces = raw.split([of.itemsize * count for of, count in shapes])
    return tuple(
        (p if _begins(p, of) else p.clone()).view(of)
        for p, (of, _) in zip(pieces, shapes, strict=True)
    )


def _begins(piece: Tensor, of: torch.dtype) -> bool:
    """Whether numbers of a dtype may begin where ``piece`` does."""
    return piece.data_ptr() % of.itemsize == int(piece.storage_offset()) % of.itemsize == 0


def num_bytes(kind: str, numel: int, dtype: torch.dtype, shapes: Shapes) -> int:
    """Return the bytes of a payload with tensors of ``shapes``."""
    head = len(_header(kind, numel, dtype, shapes))
    return _LENGTH.size + head + sum(of.itemsize * count for of, count in shapes)


def _header(kind: str, numel: int, dtype: torch.dtype, shapes: Shapes) -> bytes:
    fields = {
        "kind": kind,
        "numel": numel,
        "dtype": _name(dtype),
        "tensors": [[_name(of), count] for of, count in shapes],
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _read_header(data: bytes) -> tuple[str, int, torch.dtype, list[tuple[torch.dtype, int]], int]:
    """Return kind, numel, dtype, shapes, and where the tensors begin."""
    length = _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else 0
    if not 0 < length <= min(_MAX_HEADER, len(data) - _LENGTH.size):
        raise ProtocolError(f"a payload of {len(data)} bytes has no whole header")
    at = _LENGTH.size + length
    try:
        fields = json.loads(data[_LENGTH.size : at])
        shapes = [(_DTYPES[of], _count(count)) for of, count in fields["tensors"]]
        kind, numel, dtype = fields["kind"], _count(fields["numel"]), _DTYPES[fields["dtype"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"a payload's header cannot be read: {error!r}") from error
    return str(kind), numel, dtype, shapes, at


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a number of elements, got {value!r}")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
