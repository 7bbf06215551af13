from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.errors import (
    InvariantError,
    NonFiniteGradientError,
    ParamServerError,
    ProtocolError,
    ResourceError,
    ServerLostError,
    StragglerTimeoutError,
)
from paramserver.messages import MAX_BYTES, Kind, Message, decode, encode, failure, raise_failure

INT32, INT64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
FLOAT = st.floats(allow_nan=False)
MESSAGES = st.builds(
    Message,
    kind=st.sampled_from(list(Kind)),
    action=st.integers(0, 255),
    worker=INT32,
    incarnation=INT32,
    seq=INT64,
    clock=INT64,
    version=INT64,
    read_version=INT64,
    staleness=INT64,
    samples=INT32,
    buffer=INT32,
    vector=INT32,
    step=INT32,
    scale=FLOAT,
    loss=FLOAT,
    norm=FLOAT,
    text=st.text(max_size=100),
    noise=FLOAT,
)


@given(MESSAGES)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert message.kind in list(Kind)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "a message of 0 bytes is cut short"),
        (encode(Message(Kind.PUSH))[:-1], "bytes is cut short"),
        (encode(Message(99)), "there is no message kind 99"),
        (encode(Message(Kind.FAIL)) + b"\xff", "not UTF-8"),
        (
            struct.pack("<BBH", Kind.PUSH, 0, 7) + encode(Message(Kind.PUSH))[4:],
            "speaks protocol 7",
        ),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, error: str) -> None:
    with pytest.raises(ProtocolError, match=error):
        decode(data)


def test_a_loss_that_is_not_a_number_travels() -> None:
    assert math.isnan(decode(encode(Message(Kind.PUSH, loss=math.nan))).loss)


@pytest.mark.parametrize(
    "error",
    [
        ProtocolError("no"),
        ResourceError("full"),
        InvariantError("ssp", "staleness", 4.0, 5.0, 1, 17),
        InvariantError("ssp", "staleness", 4.0, math.inf, 1, 17),
        NonFiniteGradientError(2, 9, "conv1.weight"),
        StragglerTimeoutError(0, 5, {1: 3, 12: 4}, 60.5),
        ServerLostError(3, "sending"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_at_the_other_side(error: ParamServerError) -> None:
    with pytest.raises(type(error)) as caught:
        raise_failure(decode(encode(failure(error))))

    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_an_error_too_long_for_a_message_arrives_shortened() -> None:
    error = ProtocolError("é" * MAX_BYTES)

    with pytest.raises(ParamServerError, match=r"^é{1000}$"):
        raise_failure(decode(encode(failure(error))))


def test_only_errors_of_the_tree_are_raised() -> None:
    with pytest.raises(ProtocolError, match="the server failed with"):
        raise_failure(Message(Kind.FAIL, text='{"type": "Mapping", "args": []}'))
