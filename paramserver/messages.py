"""The messages between workers and shards: one fixed-size header, sometimes followed by text.

                  worker                leader (orders)            follower (another shard)
    join          HELLO  -------------> WELCOME, GRANT  ---ORDER-> WELCOME, GRANT
    push          PUSH   ------------------------------------>     HELD      (kept, not applied)
                  PUSH   -------------> GRANT | END | FAIL -ORDER-> GRANT     (commit)
    read again    READ   -------------> GRANT              -ORDER-> GRANT
    let go        RELEASE ------------> .                  -ORDER-> .
    leave         LEAVE  -------------> .                  -ORDER-> .
    (set-up)                            LEAD ------------> WELCOME
    (round programs)                         <--PARTIAL--- one share of a sum

Tensors never travel in messages: a transport puts them where both sides can see them. Nothing is
pickled; text is UTF-8.
"""

from __future__ import annotations

import base64
import enum
import json
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from paramserver import errors
from paramserver.errors import ParamServerError, ProtocolError

VERSION: Final = 2
"""Version of this protocol; both sides must have the same."""


class Kind(enum.IntEnum):
    """What a message asks or says."""

    HELLO = 1
    WELCOME = 2
    PUSH = 3
    HELD = 4
    READ = 5
    RELEASE = 6
    LEAVE = 7
    GRANT = 8
    END = 9
    FAIL = 10
    ORDER = 11
    LEAD = 12
    PARTIAL = 13


class Action(enum.IntEnum):
    """What an `Kind.ORDER` from the leader makes every shard do."""

    TAKE = 1
    """Add the held gradient to the update that is being gathered; apply it if ``step``."""
    DISCARD = 2
    """Forget the held gradient."""
    STEP = 3
    """Apply what has been gathered."""
    READ = 4
    """Lease the parameters as they are now to the reader."""
    RELEASE = 5
    """End the reader's lease."""
    LEAVE = 6
    """Forget the worker: its held gradient and its lease."""
    SAVE = 7
    """Copy the parameters and the optimizer's state as they are now, for a checkpoint."""
    SUM = 8
    """Go on with the sum of all shards' shares, which is the text."""


class Message(NamedTuple):
    """One message. A field that a kind does not use is 0."""

    kind: int
    action: int = 0
    worker: int = 0
    """Worker's number; negative for readers that do not push."""
    incarnation: int = 0
    seq: int = 0
    """Number of the push within the incarnation, from 1; a retry has the same."""
    clock: int = 0
    version: int = 0
    read_version: int = 0
    staleness: int = 0
    samples: int = 0
    """Of a push: those of its gradient. Of `Action.READ` and a grant: those of the next one; 0 if
    the run does not change their number."""
    buffer: int = 0
    """Which snapshot buffer was leased."""
    vector: int = -1
    """Which one holds the vector a product is taken with; -1 if there is none."""
    step: int = 0
    """Of a push: whether the next one is of the same read. Of `Action.TAKE`: whether the update is
    applied now. Of `Action.READ` and a grant: whether it takes the place of a cancelled read."""
    scale: float = 0.0
    loss: float = 0.0
    norm: float = 0.0
    """2-norm of the whole gradient."""
    text: str = ""
    noise: float = 0.0
    """Estimate of tr(S), S the covariance of one sample's gradient, where batches follow it."""


_HEADER: Final = struct.Struct("<BBHii qqqqq iiii dddd")
MAX_BYTES: Final = 65536
"""Largest message, text included; a Gram matrix of 75 vectors fits in one."""

MAX_TEXT_BYTES: Final = MAX_BYTES - _HEADER.size
"""Of them for the text, in UTF-8."""


def encode(m: Message) -> bytes:
    """Return the bytes of ``m``."""
    head = _HEADER.pack(
        m.kind, m.action, VERSION, m.worker, m.incarnation,
        m.seq, m.clock, m.version, m.read_version, m.staleness,
        m.samples, m.buffer, m.vector, m.step, m.scale, m.loss, m.norm,
        m.noise,
    )  # fmt: skip
    return head + m.text.encode()[:MAX_TEXT_BYTES] if m.text else head


def decode(data: bytes | memoryview) -> Message:
    """Read a message.

    Raises:
        ProtocolError: Too short, of another version of the protocol, of an unknown kind, or with
            text that is not UTF-8.
    """
    if len(data) < _HEADER.size:
        raise ProtocolError(f"a message of {len(data)} bytes is cut short")
    (
        kind, action, protocol, worker, incarnation, seq, clock, version, read_version, staleness,
        samples, buffer, vector, step, scale, loss, norm, noise,
    ) = _HEADER.unpack_from(data)  # fmt: skip
    if protocol != VERSION:
        raise ProtocolError(f"the other side speaks protocol {protocol}, this one {VERSION}")
    if not Kind.HELLO <= kind <= Kind.PARTIAL:
        raise ProtocolError(f"there is no message kind {kind}")
    try:
        text = bytes(data[_HEADER.size :]).decode() if len(data) > _HEADER.size else ""
    except UnicodeDecodeError as error:
        raise ProtocolError("the text of a message is not UTF-8") from error
    return Message(
        kind, action, worker, incarnation, seq, clock, version, read_version, staleness,
        samples, buffer, vector, step, scale, loss, norm, text, noise,
    )  # fmt: skip


def pack_numbers(values: Tensor) -> str:
    """Return float64 ``values`` of any shape as text; the other side knows the shape."""
    return base64.b85encode(values.contiguous().numpy().astype("<f8").tobytes()).decode()


def unpack_numbers(text: str, shape: Sequence[int]) -> Tensor:
    """Read what `pack_numbers` made.

    Raises:
        ProtocolError: The text is not that, or holds another number of values.
    """
    try:
        values = np.frombuffer(base64.b85decode(text), "<f8")
        return torch.from_numpy(values.astype(np.float64)).view(*shape)
    except (ValueError, RuntimeError) as error:
        raise ProtocolError(f"expected {tuple(shape)} numbers: {error}") from error


def failure(error: ParamServerError) -> Message:
    """Make the message that raises ``error`` at the other side."""
    text = json.dumps({"type": type(error).__name__, "args": error.args})
    if len(text) > MAX_TEXT_BYTES:  # cut short it could not be read at all
        text = json.dumps({"type": "ParamServerError", "args": [str(error)[:1000]]})
    return Message(Kind.FAIL, text=text)


def raise_failure(message: Message) -> None:
    """Raise the error a `Kind.FAIL` message carries."""
    raise error_of(message)


def error_of(message: Message) -> ParamServerError:
    """Return the error a `Kind.FAIL` message carries."""
    described = json.loads(message.text)
    kind = getattr(errors, described["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, ParamServerError)):
        return ProtocolError(f"the server failed with {message.text}")
    return kind(*(_int_keys(a) if isinstance(a, dict) else a for a in described["args"]))


def _int_keys(mapping: dict[str, object]) -> dict[int | str, object]:
    """Undo JSON's turning of integer keys into strings."""
    return {int(k) if k.lstrip("-").isdigit() else k: v for k, v in mapping.items()}
