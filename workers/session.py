"""Ray for the time of a run: joined at an address, or started on this machine and stopped after."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

from paramserver.errors import ResourceError

_CONNECT_S = 5.0
"""Seconds a cluster's address has to take a connection."""


@contextmanager
def ray_session(address: str | None, num_processes: int) -> Iterator[None]:
    """Have Ray for the time of the block; a Ray that runs already is used and left as it is.

    Args:
        address: Cluster to join; None starts Ray on this machine, where nothing listens to other
            machines.
        num_processes: Processes the run needs at the same time.

    Raises:
        ResourceError: No Ray answers at ``address``, or it cannot be started.
    """
    if ray.is_initialized():
        yield
        return
    ends = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
    _start(address, num_processes)
    if callable(ends) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends)
    try:
        yield
    finally:
        ray.shutdown()


def _start(address: str | None, num_processes: int) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    # Ray's token for a cluster of one's own is welcome; a line about it at every start is not.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns where it is unset
    if address is not None:
        _check_reachable(address)
    try:
        if address is None:
            # One CPU a process, so that Ray starts them all at once; threads are set by the run.
            with _ctrl_c_waits():
                ray.init(
                    num_cpus=num_processes,
                    include_dashboard=False,
                    object_store_memory=256 * 2**20,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at {address}"
        first_line = str(error).strip().partition("\n")[0]
        raise ResourceError(
            f"no Ray {where}: {first_line} (start one with `ray start --head`, or leave address "
            "out)"
        ) from error


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Let a first Ctrl-C wait for the block's end, and stop the Ray that was started in it.

    A Ray that is interrupted at its start is killed, not ended, and its agents stay for a minute.
    """
    usual, interrupts = signal.getsignal(signal.SIGINT), 0
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or usual is not signal.default_int_handler:  # no signal comes, or none of ours
        yield
        return

    def wait(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupts:
        ray.shutdown()
        raise KeyboardInterrupt


def _check_reachable(address: str) -> None:
    """Raise ResourceError if nobody listens at ``address``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # "auto" and the like, which Ray resolves
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray at {address}: {error.strerror or error} (start one with `ray start --head`, "
            "or leave address out)"
        ) from error
