"""What a benchmark found: medians of rounds, ratios, a table for people or JSON lines."""

from __future__ import annotations

import json as jsonlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

OURS = "ours"
"""What the names of this project's own contenders begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One contender at one size."""

    name: str
    """The benchmark."""
    size: str
    contender: str
    median: float
    """Of the rounds' figures; so are ``min`` and ``max``."""
    min: float
    max: float
    unit: str
    """``ms`` for times, where less is better; ``…/s`` for rates."""
    ratio: float | None = None
    """How many times as fast as the contender ``ratio_to``."""
    ratio_to: str | None = None
    ratios: Mapping[str, float] | None = None
    """The same against every yardstick."""


def speedup(mine: float, yardstick: float, unit: str) -> float:
    """Return how many times as fast ``mine`` is as ``yardstick``, times or rates by ``unit``."""
    return mine / yardstick if unit.endswith("/s") else yardstick / mine


def figures(
    name: str,
    size: str,
    unit: str,
    rounds: Mapping[str, Sequence[float]],
    yardsticks: Sequence[str],
) -> list[Figure]:
    """Sum up each contender's rounds, compared with each of ``yardsticks`` that ran.

    Args:
        name: The benchmark.
        size: What was measured, in words.
        unit: ``ms`` or ``…/s``.
        rounds: For each contender, one figure a round; those without any are left out.
        yardsticks: Contenders to compare with; ``ratio`` is against the first that ran.
    """
    medians = {c: statistics.median(values) for c, values in rounds.items() if values}
    there = [y for y in yardsticks if y in medians]
    found = []
    for contender, median in medians.items():
        ratios = {y: speedup(median, medians[y], unit) for y in there}
        found.append(
            Figure(
                name=name,
                size=size,
                contender=contender,
                median=median,
                min=min(rounds[contender]),
                max=max(rounds[contender]),
                unit=unit,
                ratio=ratios[there[0]] if there else None,
                ratio_to=there[0] if there else None,
                ratios=ratios,
            )
        )
    return found


class Report:
    """Prints figures as they are found."""

    def __init__(self, name: str, *, json: bool, quick: bool) -> None:
        self.name = name
        self.ours_failed = False
        self.figures: list[Figure] = []
        self._json = json
        self._console = Console()
        self._errors = Console(file=sys.stderr, stderr=True)
        if quick:
            self.note("quick: shows that the benchmark works; the figures mean nothing")

    def show(
        self,
        size: str,
        unit: str,
        rounds: Mapping[str, Sequence[float]],
        yardsticks: Sequence[str] = (),
    ) -> list[Figure]:
        """Print what the contenders did at one size, and return it."""
        found = figures(self.name, size, unit, rounds, yardsticks)
        self.figures += found
        if self._json:
            for figure in found:
                print(jsonlib.dumps(asdict(figure)), flush=True)
        elif found:
            self._console.print(_table(self.name, size, found))
        return found

    def note(self, text: str) -> None:
        """Say something beside the figures; on stderr, so that JSON lines stay alone."""
        (self._errors if self._json else self._console).print(text, markup=False, highlight=False)

    def failed(self, contender: str, error: BaseException) -> None:
        """Say that a contender could not run; the others go on."""
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        self.note(f"{contender}: did not run: {type(error).__name__}: {first_line}")
        self.ours_failed |= contender.startswith(OURS)


def _table(name: str, size: str, found: Sequence[Figure]) -> Table:
    table = Table(title=f"{name}: {size}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for column in (found[0].unit, "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    yardsticks = list(found[0].ratios or {})
    for yardstick in yardsticks:
        table.add_column(f"÷ {yardstick}", justify="right")
    for f in found:
        numbers = [f"{x:.4g}" for x in (f.median, f.min, f.max)]
        ratios = [f"{(f.ratios or {})[y]:.2f}" for y in yardsticks]
        style = "bold" if f.contender.startswith(OURS) else None
        table.add_row(f.contender, *numbers, *ratios, style=style)
    return table
