"""What becomes of memory that a process has freed."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Make malloc use a freed gradient's memory again instead of giving it back to the system.

    By default glibc maps every large tensor afresh, and each step pays for its page faults; so does
    each frame of a network: half the system's time in a gateway (`paramserver bench remote`). The
    threads of a process share one arena: what lies in one of a thread's own is given back whatever
    the thresholds say.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, … of malloc.h
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
