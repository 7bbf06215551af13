"""Find and end the processes a run has started."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def titled(title: str) -> list[int]:
    """Return the ids of processes whose command line starts with ``title``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if command.startswith(title.encode()):
                found.append(int(folder.name))
    return found


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
