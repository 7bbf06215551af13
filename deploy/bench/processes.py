"""Ray and the processes of a contender, all of which end with it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import ray

STARTUP_S = 90.0
"""Seconds a process of a contender has to start or to answer."""


@contextmanager
def ray_for_bench(*, quick: bool) -> Iterator[None]:
    """Have Ray for the time of the block, with room for a peer's largest messages."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns where it is unset
    ray.init(
        num_cpus=4,  # processes it starts at once; the contenders' actors ask for none
        include_dashboard=False,
        object_store_memory=(256 if quick else 3072) * 2**20,
        _node_ip_address="127.0.0.1",
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


class Processes:
    """Ray actors that end with the block."""

    def __init__(self) -> None:
        self._actors: list[Any] = []
        self.named: dict[str, Any] = {}
        """Actors that are asked for something after the measurement, by name."""

    def start(self, actor_class: type, *args: Any) -> Any:
        """Start an actor of a plain class; at-most-once calls, no restarts."""
        remote: Any = ray.remote(max_restarts=0, max_task_retries=0)(actor_class)
        return self.adopt(remote.options(num_cpus=0).remote(*args))

    def adopt(self, actor: Any) -> Any:
        """End ``actor`` with the block, too."""
        self._actors.append(actor)
        return actor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for actor in reversed(self._actors):
            ray.kill(actor)
        self._actors.clear()


def ask(refs: Sequence[Any], timeout_s: float = STARTUP_S) -> list[Any]:
    """Return actors' answers; GetTimeoutError if one does not come in time.

    An error in one of them is raised at once, whatever the others do.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(refs)
    while waiting:
        left_s = max(0.0, deadline - time.monotonic())
        done, waiting = ray.wait(waiting, timeout=left_s)
        ray.get(done or waiting, timeout=0 if not done else timeout_s)
    answers: list[Any] = ray.get(list(refs), timeout=timeout_s)
    return answers


def free_port() -> int:
    """Return a port of this machine that nobody listens at now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Call once to warm up, then return the milliseconds of each of ``repeats`` calls."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times
