"""Frames, against protobuf's own encoder and decoder."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramserver.errors import ProtocolError
from paramserver.messages import Kind, Message
from paramserver.transports.frames import CHUNK_BYTES, Filling, read_frame, write_message
from paramserver.transports.schema import Frame

NAMES = ("number", "length", "dtype", "offset", "checksum", "bye")


def test_what_is_written_by_hand_is_what_protobuf_would_write() -> None:
    tensor = torch.arange(5.0)

    (encoded,) = write_message(Message(Kind.PUSH, seq=3), 7, [tensor])

    frame = Frame.FromString(encoded)
    assert frame.SerializeToString(deterministic=True) == encoded
    assert frame.data == tensor.numpy().tobytes()
    assert frame.checksum == zlib.crc32(frame.data)


@given(
    st.fixed_dictionaries(
        {
            **dict.fromkeys(("number", "length", "offset"), st.integers(0, 2**64 - 1)),
            "dtype": st.text(max_size=20),
            "checksum": st.integers(0, 2**32 - 1),
            "bye": st.booleans(),
            "data": st.binary(max_size=300),
        }
    )
)
def test_what_protobuf_writes_is_read(fields: dict[str, Any]) -> None:
    received = read_frame(Frame(**fields).SerializeToString())

    assert {name: getattr(received, name) for name in fields} == fields
    assert received.said is None


@given(st.binary(max_size=200))
def test_what_is_read_of_any_bytes_is_what_protobuf_reads_or_refused(encoded: bytes) -> None:
    try:
        received = read_frame(encoded)
    except ProtocolError as error:
        assert str(error).startswith(("what came is not a frame", "a frame has 32 fields"))  # noqa: PT017
        return

    frame = Frame.FromString(encoded)

    assert {n: getattr(received, n) for n in NAMES} == {n: getattr(frame, n) for n in NAMES}
    assert bytes(received.data) == frame.data


def test_data_may_come_before_other_fields_and_the_last_one_counts() -> None:
    first, last = Frame(data=b"first"), Frame(data=b"last")
    encoded = b"".join(f.SerializeToString() for f in (first, last, Frame(number=9)))

    received = read_frame(encoded)

    assert (received.number, bytes(received.data)) == (9, b"last")


def test_tensors_that_lie_across_frames_come_whole() -> None:
    sent = [torch.arange(CHUNK_BYTES // 4 + 3.0), torch.arange(10.0)]
    into = [torch.zeros_like(tensor) for tensor in sent]
    message = Message(Kind.PUSH)
    first, *others = (read_frame(each) for each in write_message(message, 1, sent))

    filling = Filling(first, message, into)
    for frame in others:
        filling.add(frame)

    assert filling.is_whole
    assert all(torch.equal(a, b) for a, b in zip(sent, into, strict=True))


def test_a_frame_of_many_fields_is_refused_before_it_is_looked_through() -> None:
    with pytest.raises(ProtocolError, match="a frame has 32 fields at most"):
        read_frame(Frame(number=1).SerializeToString() * 500_000)
