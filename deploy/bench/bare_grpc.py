"""What gRPC alone moves: chunks of bytes over one stream there, and as many back.

Nothing is written into frames, checked or put anywhere, so it is a limit for what is built on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import grpc

from paramserver.transports.frames import CHUNK_BYTES
from paramserver.transports.remote import COMMON_OPTIONS

_METHOD = "/bench.Bare/Exchange"


def num_chunks(num_bytes: int) -> int:
    """Return in how many chunks ``num_bytes`` are sent."""
    return max(1, num_bytes // CHUNK_BYTES)


class BareServer:
    """Sends back as many chunks as have come, whenever there are ``num_chunks``."""

    def __init__(self, host: str, num_bytes: int) -> None:
        """Listen at a free port of ``host``, for ``num_bytes`` each way."""
        self._num_chunks = num_chunks(num_bytes)
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        service, _, method = _METHOD[1:].partition("/")
        self._server = grpc.server(
            ThreadPoolExecutor(2),
            handlers=[grpc.method_handlers_generic_handler(service, {method: handler})],
            options=COMMON_OPTIONS,
        )
        self.address = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        self._server.start()

    def close(self) -> None:
        """End every stream."""
        self._server.stop(0)

    def _exchange(self, chunks: Iterator[bytes], context: object) -> Iterator[bytes]:
        for number, chunk in enumerate(chunks, 1):
            if number % self._num_chunks == 0:
                yield from [chunk] * self._num_chunks


class BareClient:
    """The other end of `BareServer`."""

    def __init__(self, address: str, num_bytes: int) -> None:
        """Open a stream to ``address``, for ``num_bytes`` each way."""
        self._chunks = [bytes(min(CHUNK_BYTES, num_bytes))] * num_chunks(num_bytes)
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = grpc.insecure_channel(address, COMMON_OPTIONS)
        self._call: Any = self._channel.stream_stream(_METHOD)(iter(self._outgoing.get, None))

    def exchange(self) -> None:
        """Send all chunks, and wait for as many."""
        for chunk in self._chunks:
            self._outgoing.put(chunk)
        for _ in self._chunks:
            next(self._call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._outgoing.put(None)
        self._channel.close()
