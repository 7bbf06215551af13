"""`paramserver list`: every plug-in, its keys with their defaults, and its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS
from async_sgd.delays import DELAYS
from async_sgd.rules import RULES
from deploy.flags import Parser, UsageError, spell_value
from paramserver.averaging import AVERAGES
from paramserver.batch_sizes import ADAPTIVE_BATCHES
from paramserver.clipping import CLIPS
from paramserver.compression import COMPRESSIONS
from paramserver.optimizers import OPTIMIZERS
from paramserver.registry import Entry, Registry
from paramserver.schedules import SCHEDULES
from workers.curriculum import PACINGS
from workers.difficulty import DIFFICULTIES
from workers.local import LOCALS
from workers.stopping import STOPPINGS
from workers.tasks import TASKS

_COLUMNS = 100

KINDS: Mapping[str, Registry[Any]] = {
    "tasks": TASKS,
    "optimizers": OPTIMIZERS,
    "rules": RULES,
    "dampings": DAMPINGS,
    "compensations": COMPENSATIONS,
    "compressions": COMPRESSIONS,
    "locals": LOCALS,
    "delays": DELAYS,
    "averages": AVERAGES,
    "batches": ADAPTIVE_BATCHES,
    "schedules": SCHEDULES,
    "clips": CLIPS,
    "stoppings": STOPPINGS,
    "curricula": PACINGS,
    "difficulties": DIFFICULTIES,
}


def run(argv: Sequence[str]) -> int:
    """Print the plug-ins of the kinds in ``argv``, or of all."""
    kinds = ", ".join(KINDS)
    parser = Parser("paramserver list", f"List plug-ins, of all kinds or of some: {kinds}.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"one of {kinds}")
    wanted: list[str] = parser.read(argv).kinds
    for kind in wanted:
        if kind not in KINDS:
            raise UsageError(f"there is no list of {kind!r}; there are {kinds}")
    console = Console(width=_COLUMNS, highlight=False)
    for kind in wanted or KINDS:
        console.print(table(kind, KINDS[kind]))
    return 0


def table(kind: str, registry: Registry[Any]) -> Table:
    """Return the plug-ins of one kind as a table."""
    rows = Table(title=kind, title_justify="left", title_style="bold", expand=True)
    rows.add_column("name", no_wrap=True)
    rows.add_column("keys and defaults", no_wrap=True)
    rows.add_column("what it is", ratio=3)
    rows.add_column("source", ratio=2, style="dim", overflow="fold")
    for entry in registry:
        facts = "".join(f"\n{about}: {fact}" for about, fact in entry.facts.items())
        what = Text(entry.summary).append(facts, style="dim")
        rows.add_row(entry.name, _keys(entry), what, Text(entry.source))
    return rows


def _keys(entry: Entry[Any]) -> Text:
    """Return a line for each key; one without a default is marked as needed."""
    lines = [
        f"{key} (needed)" if default is ... else f"{key}={spell_value(default)}"
        for key, default in entry.parameters().items()
    ]
    return Text("\n".join(lines))
