"""Snapshots that stay still while others are made: who reads which buffer of the parameters.

Parameters live in a ring of buffers. Readers lease the current one and read it in place; a buffer
with a lease is never written. When an update finds the current buffer leased it first copies it to
a free one, which becomes current (copy on write):

    buffers   [A: v7, leased by worker 1]   [B: v8, current, leased by worker 0]   [C: free]
    worker 0 pushes: its lease on B ends -> nobody reads B -> v9 is written in place, no copy
    worker 1 pushes: its lease on A ends -> B is leased again -> copy B to A, v10 is written to A

So a version that nobody reads costs no copy, and one buffer a reader plus one is always enough.

A rule may show workers another point than the parameters, and a reader may be shown their average:
that is written to a free buffer, which its reader has for itself. It still has one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paramserver.errors import ResourceError


class Snapshots:
    """The ring of parameter buffers and who reads which."""

    def __init__(self, buffers: Sequence[Tensor], params: Tensor) -> None:
        """Copy ``params`` into the first of ``buffers``, all of shape ``(n,)``."""
        self._buffers = buffers
        self._readers = [0] * len(buffers)
        self._unused = list(range(len(buffers) - 1, 0, -1))  # neither read nor current
        self._leases: dict[int, int] = {}  # reader -> buffer
        self.current = 0
        buffers[0].copy_(params)

    @property
    def params(self) -> Tensor:
        """The parameters now. Not to be written: see `writable`."""
        return self._buffers[self.current]

    def lease(self, reader: int) -> int:
        """Keep the current buffer as it is for ``reader``, whose earlier lease ends; return it."""
        self.release(reader)
        self._leases[reader] = self.current
        self._readers[self.current] += 1
        return self.current

    def lease_own(self, reader: int) -> int:
        """Give ``reader`` alone a buffer for the caller to write, end its earlier lease; return it.

        Raises:
            ResourceError: Every other buffer is leased; nothing was changed but the lease.
        """
        self.release(reader)
        buffer = self._free()
        self._leases[reader] = buffer
        self._readers[buffer] += 1
        return buffer

    def leased(self, reader: int) -> Tensor:
        """Return the buffer that ``reader`` has leased."""
        return self._buffers[self._leases[reader]]

    def release(self, reader: int) -> None:
        """End the lease of ``reader``; it may have none."""
        buffer = self._leases.pop(reader, None)
        if buffer is not None:
            self._readers[buffer] -= 1
            if self._readers[buffer] == 0 and buffer != self.current:
                self._unused.append(buffer)

    def writable(self) -> Tensor:
        """Return the current parameters in a buffer that nobody reads.

        Raises:
            ResourceError: Every other buffer is leased; nothing was changed.
        """
        if self._readers[self.current]:
            free = self._free()
            self._buffers[free].copy_(self._buffers[self.current])
            self.current = free
        return self._buffers[self.current]

    def _free(self) -> int:
        """Take a buffer that nobody reads, other than the current one."""
        if not self._unused:
            raise ResourceError(
                f"all {len(self._buffers)} snapshot buffers are read; a shard made for fewer "
                "readers cannot take more"
            )
        return self._unused.pop()

    @property
    def num_leases(self) -> int:
        """Readers that hold a lease."""
        return len(self._leases)
