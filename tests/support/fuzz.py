"""Messages that break the contract of the gateway in every way there is, seeded."""

from __future__ import annotations

import os
import random
import zlib
from typing import Any

import grpc

from paramserver.messages import Kind
from paramserver.transports import schema
from paramserver.transports.frames import CHUNK_BYTES
from paramserver.transports.schema import Frame, Said

_NAMES = ("Register", "Snapshot", "Stats", "Health", "Exchange", "Unknown")
_PER_STREAM = 20


class Fuzzer:
    """Sends nonsense over one channel; every answer is fine but a crash."""

    def __init__(
        self,
        address: str,
        token: str,
        fingerprint: str,
        numel: int,
        seed: int,
        payload_bytes: int = 0,
    ) -> None:
        self._payload_bytes = payload_bytes
        self._channel = grpc.insecure_channel(address)
        self._random = random.Random(seed)
        self._token, self._fingerprint, self._numel = token, fingerprint, numel
        self.num_sent = 0
        self.codes: dict[str, int] = {}

    def run(self, num_messages: int) -> None:
        """Send ``num_messages``, in calls of one and in streams of several."""
        while self.num_sent < num_messages:
            self._one_call() if self._random.random() < 0.2 else self._stream()
        self._channel.close()

    def _one_call(self) -> None:
        name = self._random.choice(_NAMES)
        self.num_sent += 1
        request = self._random.randbytes(self._random.choice((0, 1, 7, 100, 5000)))
        call = self._channel.unary_unary(schema.method(name))
        try:
            call(request, metadata=self._metadata(), timeout=0.2)
            self._saw("OK")
        except grpc.RpcError as error:
            self._saw(error.code().name)

    def _stream(self) -> None:
        frames = [self._frame() for _ in range(self._random.randint(1, _PER_STREAM))]
        self.num_sent += len(frames)
        call = self._channel.stream_stream(schema.method("Exchange"))(
            iter(frames), metadata=self._metadata(), timeout=5
        )
        try:
            for heard, _ in enumerate(call):
                if heard == len(frames) or self._random.random() < 0.05:
                    call.cancel()  # cut in the middle
            self._saw("OK")
        except grpc.RpcError as error:
            self._saw(error.code().name)

    def _metadata(self) -> list[tuple[str, str | bytes]]:
        r = self._random
        right: dict[str, str | bytes] = {
            "paramserver-protocol": "1",
            "paramserver-token-bin": self._token.encode(),
            "paramserver-session-bin": os.urandom(16),
            "paramserver-shard": str(r.randint(0, 1)),
            "paramserver-worker": str(r.randint(-9, -3)),
            "paramserver-incarnation": "1",
            "paramserver-model-bin": self._fingerprint.encode(),
            "paramserver-received": "0",
        }
        if r.random() < 0.5:
            right["paramserver-payloads"] = "1"
        if r.random() < 0.5:
            right["paramserver-machine"], right["paramserver-anew"] = "m", str(r.randint(0, 2))
            right["paramserver-shelf"] = r.randbytes(16).hex()
        if r.random() < 0.4:
            key = r.choice(list(right))
            wrong: list[str | bytes] = (
                [b"", r.randbytes(16), r.randbytes(3000)]
                if key.endswith("-bin")
                else ["", "-1", "7", "2", "x" * 99, "9" * 40, "1e9", "nan"]
            )
            right[key] = r.choice(wrong)
        if r.random() < 0.1:
            del right[r.choice(list(right))]
        return list(right.items())

    def _frame(self) -> bytes:
        r = self._random
        kind = r.random()
        if kind < 0.2:
            return r.randbytes(r.randint(0, 200))
        said = Said(
            kind=r.choice((*Kind, 0, 14, 2**32 - 1)),
            action=r.choice((0, 1, 300)),
            worker=r.choice((-3, 0, 1, 2**31 - 1, -(2**31))),
            incarnation=r.choice((0, 1, 2**31 - 1)),
            seq=r.choice((0, 1, 2, -1, 2**62)),
            clock=r.choice((0, 1, -5)),
            read_version=r.choice((0, 1, -1, 2**62)),
            samples=r.choice((0, 1, -1)),
            norm=r.choice((0.0, 1.0, -1.0, float("nan"), float("inf"))),
            text=r.choice(("", "x", "\0", "é" * 5000)),
        )
        frame: Any = Frame(
            number=r.choice((0, 1, 2, 2**63)),
            length=r.choice((0, 4 * self._numel, 4 * self._numel + 1, self._payload_bytes, 2**63)),
            dtype=r.choice(("", "float32", "float64", "uint8", "object")),
            received=r.choice((0, 0, 1, 2**63)),
            offset=r.choice((0, 4, 2**63)),
            checksum=r.choice((0, r.getrandbits(32))),
            bye=r.random() < 0.02,
            data=r.randbytes(r.choice((0, 1, 100, 4 * self._numel, self._payload_bytes))),
        )
        if r.random() < 0.5:
            frame.offset, frame.checksum = 0, zlib.crc32(frame.data)
        if r.random() < 0.8:
            frame.message.CopyFrom(said)
        encoded: bytes = frame.SerializeToString()
        if kind < 0.4:
            return encoded[: r.randint(0, len(encoded))]
        if kind < 0.405:
            return encoded + bytes(2 * CHUNK_BYTES)
        return encoded

    def _saw(self, code: str) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1
