"""Pieces of anonymous shared memory, seen as rows of a tensor.

A segment is a memfd: nameless, so a killed process leaves nothing behind, not limited by a small
/dev/shm, and open only to whom its descriptor was handed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from paramserver.errors import ResourceError

_PAGE = mmap.PAGESIZE


class Segment:
    """A piece of anonymous shared memory, seen as equal rows of a tensor."""

    def __init__(
        self, fd: int, rows: int, numel: int, dtype: torch.dtype, *, writable: bool
    ) -> None:
        """Map ``rows`` rows of ``numel`` elements of the memory behind ``fd``, and keep it open."""
        self.fd = fd
        stride = _stride(numel, dtype)
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, rows * stride, mmap.MAP_SHARED, access)
        with warnings.catch_warnings():  # torch warns of read-only memory; nobody here writes to it
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.rows: Sequence[Tensor] = [
                torch.frombuffer(self._map, dtype=dtype, count=numel, offset=i * stride)
                for i in range(rows)
            ]

    @classmethod
    def create(cls, name: str, rows: int, numel: int, dtype: torch.dtype) -> Segment:
        """Make a new segment of zeros; its pages take memory only once they are written."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(fd, rows * _stride(numel, dtype))
        return cls(fd, rows, numel, dtype, writable=True)

    @classmethod
    def attach(cls, fd: int, numel: int, dtype: torch.dtype, *, writable: bool) -> Segment:
        """Map a segment that another process made."""
        return cls(
            fd, os.fstat(fd).st_size // _stride(numel, dtype), numel, dtype, writable=writable
        )

    def close(self) -> None:
        """Close the descriptor; the memory goes with the last tensor that shows it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def check_memory(needed: int) -> None:
    """Raise ResourceError unless ``needed`` bytes are available to this process."""
    available = _available_bytes()
    if needed > available:
        raise ResourceError(
            f"the shard needs {needed / 2**20:.0f} MiB of shared memory and "
            f"{available / 2**20:.0f} MiB are available: use fewer workers, more shards on other "
            "nodes, or a smaller model"
        )


def _available_bytes() -> int:
    """Memory that can still be taken: the machine's, or the container's limit if that is less."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _stride(numel: int, dtype: torch.dtype) -> int:
    """Bytes from one row to the next: whole pages, so rows never share one."""
    return -(-numel * dtype.itemsize // _PAGE) * _PAGE
