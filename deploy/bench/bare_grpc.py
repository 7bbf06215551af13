"""What gRPC alone moves: chunks of bytes over one stream there, and as many back.

Nothing is written into frames, checked or put anywhere, so it is a limit for what is built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc

from paramserver.transports.frames import CHUNK_BYTES
from paramserver.transports.remote import COMMON_OPTIONS, SERVER_OPTIONS

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
            options=SERVER_OPTIONS,
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


@contextmanager
def bare_client(address: str, num_bytes: int) -> Iterator[Callable[[], None]]:
    """Open a stream to a `BareServer`; give what sends ``num_bytes`` and waits for as many."""
    chunks = [bytes(min(CHUNK_BYTES, num_bytes))] * num_chunks(num_bytes)
    outgoing: SimpleQueue[bytes | None] = SimpleQueue()
    with grpc.insecure_channel(address, COMMON_OPTIONS) as channel:
        call: Any = channel.stream_stream(_METHOD)(iter(outgoing.get, None))

        def exchange() -> None:
            for chunk in chunks:
                outgoing.put(chunk)
            for _ in chunks:
                next(call)

        yield exchange
        outgoing.put(None)
