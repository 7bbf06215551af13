"""What becomes of memory that a process has freed."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Make malloc use a freed gradient's memory again instead of giving it back to the system.

    By default glibc maps every large tensor afresh, and each step pays for its page faults; so does
    each frame of a network: half the system's time in a gateway (`paramserver bench remote`).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
