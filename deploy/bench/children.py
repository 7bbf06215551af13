"""Processes that a benchmark starts, talks to line by line, and never leaves behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from deploy.bench.namespaces import die_with_parent
from deploy.bench.processes import STARTUP_S

_END_S = 10.0


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Have a process for the time of the block; the end of its standard input tells it to end.

    ``options`` are those of `subprocess.Popen`.
    """
    process = subprocess.Popen(  # noqa: S603  # words of our own
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509  # it only asks the kernel for something
        **options,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed, and has said so
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def tell(process: subprocess.Popen[str], words: str) -> None:
    """Say a line to a child."""
    print(words, file=process.stdin, flush=True)


def hear(process: subprocess.Popen[str]) -> str:
    """Return the next line that a child says.

    Raises:
        RuntimeError: It has ended.
    """
    said: IO[str] | None = process.stdout
    line = said.readline() if said is not None else ""
    if not line:
        raise RuntimeError("one of the two ends has failed; what it said is above")
    return line


@contextmanager
def shard(serve: Callable[..., None], *args: Any) -> Iterator[None]:
    """Have a shard's process for the time of the block.

    It runs ``serve``, of a module's top, with ``args`` and an event that is set once it serves.

    Raises:
        TimeoutError: It does not.
    """
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=serve, args=(*args, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(STARTUP_S):
            raise TimeoutError(f"no shard in {STARTUP_S:g} s")
        yield
    finally:
        process.terminate()
        process.join()
