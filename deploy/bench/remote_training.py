"""Training over a slow link, with what workers push and read as it is, and compressed both ways."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median
from subprocess import Popen

from deploy.bench.children import hear, tell
from deploy.bench.figures import OURS, Report
from deploy.bench.work import tasks
from workers.task import Task

PLAIN, INT8 = "float32", "int8"
AIM = 3.5
"""Updates a second of `INT8` are to be so many times those of `PLAIN`."""

NUM_WORKERS = 4
"""Enough that some compute while messages of others are on the link."""

SECONDS, QUICK_SECONDS = (15.0, 20.0), (0.2, 0.6)
"""Of warming up, in which all memory is touched for the first time, and of measuring."""

ROUNDS, QUICK_ROUNDS = 3, 1

End = Callable[[str, Sequence[str]], AbstractContextManager[Popen[str]]]
"""Starts a process of `remote_trainees` at a side."""


def run(report: Report, end: End, host: str, link: str, *, quick: bool) -> None:
    """Let plain and compressed training take turns, and print their table.

    Args:
        report: Shows it.
        end: Starts the ends.
        host: The far side's address.
        link: What lies between them, in words.
        quick: A small net, for a moment.
    """
    rounds: dict[str, list[float]] = {f"{OURS}, {how}": [] for how in (INT8, PLAIN)}
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for contender, found in rounds.items():
            how = contender.removeprefix(f"{OURS}, ")
            found.append(_rate(end, host, how, quick=quick))
    size = f"{_name(quick=quick)}, {NUM_WORKERS} workers, {link}"
    report.show(size, "updates/s", rounds, [f"{OURS}, {PLAIN}"])
    fast, slow = (median(found) for found in rounds.values())
    if fast < AIM * slow:
        report.note(f"{INT8} is {fast / slow:.2f} times as fast as {PLAIN}; the aim is {AIM:g}")


def _rate(end: End, host: str, how: str, *, quick: bool) -> float:
    """Return updates a second of all workers together, compressed both ways by ``how``."""
    told = json.dumps({"host": host, "how": how, "quick": quick})
    with contextlib.ExitStack() as stack:
        words = hear(stack.enter_context(end("far", ("serve", told))))
        nears = [
            stack.enter_context(end("near", ("work", words, str(worker))))
            for worker in range(NUM_WORKERS)
        ]
        for near in nears:
            hear(near)  # it is ready
        for near in nears:
            tell(near, "go")
        return sum(float(hear(near)) for near in nears)


def task(*, quick: bool) -> Task:
    """Return the MLP that is trained, of 20 M parameters unless it is ``quick``."""
    return tasks(mnist=False, quick=quick)[_name(quick=quick)]


def _name(*, quick: bool) -> str:
    return next(name for name in tasks(mnist=False, quick=quick) if name.startswith("MLP"))
