"""A TCP proxy whose wire can be cut: nothing gets through, and nobody is told."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Self


class Wire:
    """Forwards connections to ``port`` of this machine, while it is whole."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._whole, self._is_open = threading.Event(), True
        self._whole.set()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Let nothing through."""
        self._whole.clear()

    def mend(self) -> None:
        """Let through what has waited, and what comes."""
        self._whole.set()

    def reset(self) -> None:
        """End every connection; new ones are taken."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self.mend()
        self.reset()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (*self._sockets, self._listener):
            sock.close()

    def _accept(self) -> None:
        while self._is_open:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                continue
            self._sockets += [near, far]
            thread = threading.Thread(target=self._forward, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        try:
            while self._is_open:
                self._whole.wait()
                for sock in select.select([near, far], [], [], 0.05)[0]:
                    data = sock.recv(1 << 16)
                    self._whole.wait()
                    if not data:
                        return
                    other[sock].sendall(data)
        except OSError:
            return
        finally:
            for sock in (near, far):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
