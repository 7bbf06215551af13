"""The frames of a stream: messages and their tensors' bytes, checked as they come in.

A tensor's bytes are written into a frame by hand, as its last field, with one copy instead of
protobuf's three, and found in one that comes without any instead of protobuf's six. The encoding is
the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from torch import Tensor

from paramserver.errors import ProtocolError
from paramserver.messages import MAX_BYTES, MAX_TEXT_BYTES, Kind, Message
from paramserver.transports.pulls import Holder
from paramserver.transports.schema import Frame, Said

try:
    from zlib_ng.zlib_ng import crc32  # the same number, at 8.7 GB/s instead of 1.1
except ImportError:
    from zlib import crc32

CHUNK_BYTES: Final = 2**20
"""Bytes of tensors in one frame, at most."""

MAX_FRAME_BYTES: Final = CHUNK_BYTES + 2 * MAX_BYTES
"""Largest frame that is read at all."""

_DATA_TAG: Final = 15 << 3 | 2  # field 15, length-delimited
_MAX_FIELDS: Final = 32
_FIXED: Final = {1: 8, 5: 4}
"""Bytes of a field by its wire type; the others tell their length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A frame that has come, as `paramserver.proto` describes it."""

    number: int
    said: Any
    """The message that it begins, if it does."""
    length: int
    dtype: str
    offset: int
    checksum: int
    received: int
    """The last of the other side's messages that the sender has whole."""
    bye: bool
    holder: Holder | None
    """Who has the tensors that the frame does not bring."""
    data: memoryview
    """Not copied."""


def write_message(
    m: Message,
    number: int,
    tensors: Sequence[Tensor] = (),
    *,
    received: int = 0,
    holder: Holder | None = None,
) -> Iterator[bytes]:
    """Yield the frames of a message and its ``tensors``, which are read as the frames are made.

    Args:
        m: What is said.
        number: Of the message, from 1.
        tensors: Contiguous, of one dtype.
        received: The last of the other side's messages that is here.
        holder: Who has the tensors, if they are not brought.
    """
    parts = [as_bytes(tensor) for tensor in tensors]
    dtype = dtype_name(tensors[0].dtype) if tensors else ""
    length = sum(len(part) for part in parts)
    said = Said(**m._asdict())
    frame = Frame(number=number, message=said, length=length, dtype=dtype, received=received)
    if holder is not None:
        frame.shelf, frame.shelf_number = holder
    offset = 0
    for part in parts:
        for start in range(0, len(part), CHUNK_BYTES):
            data = part[start : start + CHUNK_BYTES].data
            frame.offset, frame.checksum = offset, crc32(data)
            head = frame.SerializeToString()
            yield b"".join((head, _varint(_DATA_TAG), _varint(len(data)), data))
            frame = Frame(number=number)
            offset += len(data)
    if not offset:
        yield frame.SerializeToString()


def write_bye() -> bytes:
    """Return the frame of a client that leaves."""
    encoded: bytes = Frame(bye=True).SerializeToString()
    return encoded


def read_frame(encoded: bytes) -> Received:
    """Return the frame that ``encoded`` is.

    Raises:
        ProtocolError: It is none.
    """
    try:
        head, data = _without_data(encoded)
        frame = Frame.FromString(head)
    except (DecodeError, IndexError) as error:
        raise ProtocolError("what came is not a frame of this protocol") from error
    return Received(
        number=frame.number,
        said=frame.message if frame.HasField("message") else None,
        length=frame.length,
        dtype=frame.dtype,
        offset=frame.offset,
        checksum=frame.checksum,
        received=frame.received,
        bye=frame.bye,
        holder=Holder(frame.shelf, frame.shelf_number) if frame.shelf else None,
        data=data,
    )


def _without_data(encoded: bytes) -> tuple[bytes, memoryview]:
    """Split a frame into its other fields, which protobuf is to read, and its data.

    Raises:
        IndexError: A field has no end, or is of a kind that no frame has.
        ProtocolError: There are more fields than a frame has.
    """
    kept: list[bytes] = []
    data, at = memoryview(b""), 0
    for _ in range(_MAX_FIELDS):
        if at == len(encoded):
            return b"".join(kept), data
        start = at
        tag, at = _read_varint(encoded, at)
        if (wire := tag & 7) == 0:
            _, at = _read_varint(encoded, at)
        elif wire == 2:
            length, at = _read_varint(encoded, at)
            if at + length > len(encoded):
                raise IndexError(length)
            if tag == _DATA_TAG:
                data = memoryview(encoded)[at : at + length]
                at += length
                continue
            at += length
        elif wire in _FIXED:
            at += _FIXED[wire]
        else:
            raise IndexError(wire)
        kept.append(encoded[start:at])
    raise ProtocolError(f"a frame has {_MAX_FIELDS} fields at most")


def read_message(frame: Received) -> Message:
    """Return the message that ``frame`` begins.

    Raises:
        ProtocolError: There is none, no such kind or action, or its text is too long.
    """
    said = frame.said
    if said is None:
        raise ProtocolError(f"frame {frame.number} begins no message")
    if not Kind.HELLO <= said.kind <= Kind.PARTIAL or said.action > 255:
        raise ProtocolError(f"there is no message kind {said.kind} with action {said.action}")
    if len(said.text.encode()) > MAX_TEXT_BYTES:
        raise ProtocolError(f"a message's text of {len(said.text):,} characters is too long")
    return Message(*(getattr(said, name) for name in Message._fields))


class Filling:
    """The tensors of one message, as far as they have come."""

    def __init__(self, frame: Received, message: Message, tensors: Sequence[Tensor]) -> None:
        """Take what ``frame`` announces into ``tensors``.

        Raises:
            ProtocolError: It announces another length or dtype than theirs.
        """
        self.number: int = frame.number
        self.message = message
        self._parts = [as_bytes(tensor) for tensor in tensors]
        self._length, self._offset = sum(len(part) for part in self._parts), 0
        dtype = dtype_name(tensors[0].dtype) if tensors else ""
        if frame.length != self._length:
            raise ProtocolError(
                f"message {self.number} brings {frame.length:,} bytes of tensors; "
                f"{self._length:,} were expected"
            )
        if frame.dtype != dtype:
            raise ProtocolError(f"the tensors are {dtype or 'none'}, and {frame.dtype!r} came")
        if frame.data or self._length:
            self.add(frame)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are here."""
        return self._offset == self._length

    def add(self, frame: Received) -> None:
        """Copy what a frame brings to its place.

        Raises:
            ProtocolError: It is not what comes next, or it was altered on its way.
        """
        data = np.frombuffer(frame.data, np.uint8)
        if frame.number != self.number:
            raise ProtocolError(
                f"message {frame.number} came before the end of message {self.number}"
            )
        if frame.offset != self._offset or not 0 < len(data) <= self._length - self._offset:
            raise ProtocolError(
                f"bytes {frame.offset:,} to {frame.offset + len(data):,} of message {self.number} "
                f"came; {self._offset:,} to at most {self._length:,} were expected"
            )
        if frame.checksum != crc32(frame.data):
            raise ProtocolError(
                f"message {self.number} was altered on its way: its checksum differs"
            )
        start = self._offset
        for part in self._parts:
            here = data[: max(0, len(part) - start)]
            part[start : start + len(here)] = here
            data, start = data[len(here) :], max(0, start - len(part))
        self._offset = frame.offset + len(frame.data)


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of a contiguous tensor, not copied."""
    return tensor.view(-1).view(torch.uint8).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a frame calls ``dtype``."""
    return str(dtype).removeprefix("torch.")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(encoded: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at ``at``, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = encoded[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value, at
