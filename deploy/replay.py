"""`paramserver replay DIR`: a run once more from its record, compared bit for bit; or what if."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS
from async_sgd.replay import Replay, Replayed, WhatIf
from deploy.flags import Parser, UsageError
from deploy.outcome import measure
from deploy.progress import Progress
from workers.tasks import task

DIFFERS = 1


def run(argv: Sequence[str]) -> int:
    """Replay as ``argv`` says; return 1 if the parameters came out in another way than recorded."""
    parser = Parser(
        "paramserver replay",
        "Make an asynchronous run again from its record, in one process: every push in the order\n"
        "it came, compared bit for bit. With --damping or --compensation: what if it had had that?",
        "For example:\n"
        "  paramserver replay runs/today\n"
        "  paramserver replay runs/today --compensation dc-asgd --at 500",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the run's record")
    parser.add_argument("--task", metavar="NAME", help="what was trained, if the record cannot say")
    parser.add_argument("--damping", metavar="NAME", help="replay with this damping")
    parser.add_argument("--compensation", metavar="NAME", help="replay with this compensation")
    parser.add_argument(
        "--at", type=int, metavar="VERSION", help="from this version on (default: the beginning)"
    )
    given = parser.read(argv)
    replay = Replay(
        given.folder,
        task=None if given.task is None else task(given.task),
        what_if=_what_if(given.damping, given.compensation, given.at),
    )
    with Progress(Console(stderr=True), f"replaying {given.folder} …") as progress:
        replayed = replay.run(progress)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    is_as_it_was = given.damping is None and given.compensation is None
    console.print(_outcome(replay.recorded, replayed, is_as_it_was=is_as_it_was))
    return DIFFERS if is_as_it_was and replayed.distance not in (0.0, None) else 0


def _what_if(damping: str | None, compensation: str | None, at: int | None) -> WhatIf | None:
    if damping is None and compensation is None:
        if at is not None:
            raise UsageError("--at says from when on: give --damping or --compensation as well")
        return None
    try:
        return WhatIf(
            at=at or 0,
            damping=None if damping is None else DAMPINGS.parse(damping),
            compensation=None if compensation is None else COMPENSATIONS.parse(compensation),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _outcome(recorded: Mapping[str, Any], replayed: Replayed, *, is_as_it_was: bool) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {"pushes": f"{replayed.pushes:,}", "version": f"{replayed.version:,}"}
    if is_as_it_was:
        rows["pushes"] += ", each as recorded"
        rows["parameters"] = {
            None: "the run left no checkpoint of this version to compare with",
            0.0: "equal to the checkpoint's, bit for bit",
        }.get(replayed.distance, f"differ from the checkpoint's by up to {replayed.distance:.3g}")
    rows["replayed"] = _metrics(replayed.metrics)
    if recorded.get("final"):
        rows["recorded"] = _metrics(recorded["final"])
    then = recorded.get("measures", {})
    for name, of in replayed.measures.items():
        rows[name] = measure(of) + (f" (recorded: {measure(then[name])})" if name in then else "")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in sorted(values))
