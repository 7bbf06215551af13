"""Find and end the processes a run has started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path


def titled(title: str) -> list[int]:
    """Return the ids of processes below this one whose command line starts with ``title``.

    Other tests may run on this machine at the same time, on a Ray of their own.
    """
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                status = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            parents[int(folder.name)] = int(status[1])
            if command.startswith(title.encode()):
                found.append(int(folder.name))
    return [pid for pid in found if _is_below(pid, parents)]


def _is_below(pid: int, parents: Mapping[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def kill_and_wait(pid: int, timeout_s: float = 10.0) -> None:
    """SIGKILL ``pid`` and wait until it is gone or a zombie."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
    raise TimeoutError(f"process {pid} did not end")
