"""Training over a slow link: compressed or not, and with a pull for all of a node or one each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median
from subprocess import Popen

from deploy.bench.children import hear, tell
from deploy.bench.figures import OURS, Report
from deploy.bench.work import tasks
from workers.task import Task

PLAIN, INT8 = "float32", "int8"
AIM = 3.5
"""Gradients a second of `INT8` are to be so many times those of `PLAIN`."""

NUM_WORKERS = 4
"""Enough that some compute while messages of others are on the link."""

SECONDS, QUICK_SECONDS = (15.0, 20.0), (0.2, 0.6)
"""Of warming up, in which all memory is touched for the first time, and of measuring."""

ROUNDS, QUICK_ROUNDS = 3, 1

End = Callable[[str, Sequence[str]], AbstractContextManager[Popen[str]]]
"""Starts a process of `remote_trainees` at a side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How workers train."""

    how: str = PLAIN
    """What they push and read is compressed by."""
    rule: str = "asp"
    alone: bool = False
    """Whether each is told that it is on a machine of its own."""


COMPRESSED = {INT8: Way(how=INT8), PLAIN: Way()}
SHARED = {"a pull for all": Way(rule="bsp"), "a pull each": Way(rule="bsp", alone=True)}


def run(report: Report, end: End, host: str, link: str, *, quick: bool) -> None:
    """Let the ways to train take turns, and print their tables.

    Args:
        report: Shows them.
        end: Starts the ends.
        host: The far side's address.
        link: What lies between them, in words.
        quick: A small net, for a moment.
    """
    fast, slow = _compare(report, end, host, link, COMPRESSED, quick=quick)
    if fast < AIM * slow:
        report.note(f"{INT8} is {fast / slow:.2f} times as fast as {PLAIN}; the aim is {AIM:g}")
    _compare(report, end, host, f"{link}, bsp", SHARED, quick=quick)


def _compare(
    report: Report, end: End, host: str, link: str, ways: Mapping[str, Way], *, quick: bool
) -> list[float]:
    """Print a table of ``ways``, compared with the last of them; return their medians."""
    rounds: dict[str, list[float]] = {f"{OURS}, {name}": [] for name in ways}
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for found, way in zip(rounds.values(), ways.values(), strict=True):
            found.append(_rate(end, host, way, quick=quick))
    size = f"{_name(quick=quick)}, {NUM_WORKERS} workers, {link}"
    report.show(size, "gradients/s", rounds, list(rounds)[-1:])
    return [median(found) for found in rounds.values()]


def _rate(end: End, host: str, way: Way, *, quick: bool) -> float:
    """Return gradients a second of all workers together."""
    told = json.dumps({"host": host, "quick": quick, **asdict(way)})
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
