"""Two networks of this machine with one cable between them, for as long as a block runs.

    near 10.88.0.1 --- cable --- 10.88.0.2 far

Each is a network namespace under one process. Nothing else is on the cable, and it leads nowhere;
when the two processes end, the kernel takes it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ADDRESSES = {"near": "10.88.0.1", "far": "10.88.0.2"}
_START_S = 10.0


class Networks:
    """The two networks; `networks` makes them."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.pids = pids
        """Of the process of each."""

    def inside(self, side: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs ``command`` in the network ``near`` or ``far``."""
        return [_tool("nsenter"), "--target", str(self.pids[side]), "--net", *command]

    def shape(self, bits_per_s: int) -> None:
        """Let no more than ``bits_per_s`` through the cable, each way.

        Raises:
            RuntimeError: The kernel has no token bucket, or ``tc`` failed otherwise.
        """
        rate = ["rate", f"{bits_per_s}bit", "burst", "256kb", "latency", "50ms"]
        for side in self.pids:
            _run(
                self.inside(
                    side, [_tool("tc"), *["qdisc", "add", "dev", "cable", "root", "tbf"], *rate]
                )
            )


def why_not() -> str | None:
    """Say what keeps networks from being made here; None if nothing does."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "networks of their own need Linux and root"
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (ip is iproute2's)"
    tried = subprocess.run(  # noqa: S603  # words of our own
        [_tool("unshare"), "--net", "true"], check=False, capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"not allowed here: {tried.stderr.strip()}"


def can_shape() -> bool:
    """Whether there is ``tc``."""
    return shutil.which("tc") is not None


@contextmanager
def networks() -> Iterator[Networks]:
    """Make the two networks and the cable; take them back at the end.

    Raises:
        RuntimeError: The kernel did not let them be made.
    """
    processes = {side: _unshared() for side in ADDRESSES}
    try:
        pids = {side: process.pid for side, process in processes.items()}
        made = Networks(pids)
        for pid in pids.values():
            _wait_for_network(pid)
        link = "link add cable type veth peer name cable netns"
        _run(made.inside("near", [_tool("ip"), *link.split(), str(pids["far"])]))
        for side, address in ADDRESSES.items():
            for words in (
                f"addr add {address}/24 dev cable",
                "link set cable up",
                "link set lo up",
            ):
                _run(made.inside(side, [_tool("ip"), *words.split()]))
        yield made
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _unshared() -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  # words of our own
        [_tool("unshare"), "--net", "sleep", "infinity"],
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # it only asks the kernel for something
    )


def die_with_parent() -> None:
    """Let this process end when its parent does, however that ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _wait_for_network(pid: int) -> None:
    """Wait until ``unshare`` has done its work."""
    own, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/net") != own:
                return
        time.sleep(0.01)
    raise RuntimeError(f"no network of its own in {_START_S:g} s")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[4:])} failed: {done.stderr.strip()}")


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is not installed")
    return path
