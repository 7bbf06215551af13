"""What an experiment has found: claims and whether they hold, tables, plots, and what failed.

Everything goes to the terminal, into files that other programs read, and onto a page that stands
alone. A claim that does not hold is a finding, not an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text

from deploy import page
from deploy.experiment.charts import Chart
from deploy.experiment.results import Row, write_csv
from paramserver.durable import write_durably
from paramserver.errors import RecordError


@dataclass(frozen=True, slots=True)
class Claim:
    """One line an experiment is held to."""

    text: str
    """What is claimed, with its tolerance."""
    holds: bool
    measured: str
    """What came out, and how far from what was claimed."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that all have the same columns; without any it is not shown."""

    title: str
    rows: Sequence[Row]
    name: str = ""
    """Of its file; empty: it has none."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that is told."""

    title: str
    about: str
    """A sentence."""
    facts: Mapping[str, str]
    """What holds for all of it: sizes, laws, conventions."""
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    failed: Sequence[str] = ()
    """What has failed, and why."""
    files: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    """Rows for other programs, by the name of their file."""


def tell(findings: Findings, out: Path) -> None:
    """Print the findings, and write them below ``out``.

    Raises:
        RecordError: They cannot be written.
    """
    tables = {table.name: table.rows for table in findings.tables if table.name}
    for name, rows in {**tables, **findings.files}.items():
        write_csv(out / f"{name}.csv", rows)
    if findings.claims:
        said: list[Row] = [
            {"claim": c.text, "holds": _yes(c.holds), "measured": c.measured}
            for c in findings.claims
        ]
        write_csv(out / "claims.csv", said)
    try:
        for chart in findings.charts:
            chart.save(out / f"{chart.name}.png")
        write_durably(out / "report.html", _page(findings).encode())
    except OSError as error:
        raise RecordError(f"cannot write into {out}: {error}") from error
    width = None if sys.stdout.isatty() else 130
    _print(findings, Console(highlight=False, width=width, soft_wrap=False))
    names = [*tables, *findings.files, *(["claims"] if findings.claims else [])]
    pictures = [f"{chart.name}.png" for chart in findings.charts]
    print(f"tables: {', '.join(str(out / f'{name}.csv') for name in names)}")
    if pictures:
        print(f"plots:  {', '.join(str(out / picture) for picture in pictures)}")
    print(f"report: {out / 'report.html'}")


def _print(findings: Findings, console: Console) -> None:
    for table in filter(lambda table: table.rows, findings.tables):
        heads = list(table.rows[0])
        shown = Shown(title=table.title, title_justify="left", title_style="bold", box=None)
        for head in heads:
            is_number = all(isinstance(row[head], int | float | None) for row in table.rows)
            shown.add_column(head, justify="right" if is_number else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(_value(row[head])) for head in heads))
        console.print(shown)
        if table.note:
            console.print(table.note, markup=False)
        console.print()
    for claim in findings.claims:
        mark = "[green]holds[/]         " if claim.holds else "[red]does not hold[/] "
        console.print(mark, Text(f"{claim.text}: {claim.measured}"), sep="")
    for line in findings.failed:
        console.print(f"failed: {line}", markup=False)
    if findings.claims:
        held = sum(claim.holds for claim in findings.claims)
        console.print(f"\n{held} of {len(findings.claims)} claims hold")


def _page(findings: Findings) -> str:
    claims = [
        (_yes(claim.holds, "✓ holds", "✗ does not hold"), claim.text, claim.measured)
        for claim in findings.claims
    ]
    held = sum(claim.holds for claim in findings.claims)
    return page.page(
        findings.title,
        findings.about,
        [
            page.facts(findings.facts),
            page.section(
                f"Claims: {held} of {len(claims)} hold" if claims else "",
                [page.table(["", "claim", "measured"], claims, wide=True)] if claims else [],
            ),
            page.section(
                "Plots",
                [page.figure(c.svg(), c.title, c.caption, c.legend) for c in findings.charts],
            ),
            *(page.section(table.title, _tabulated(table)) for table in findings.tables),
            page.section("Failed", [page.note(line) for line in findings.failed]),
        ],
    )


def _tabulated(table: Table) -> list[str]:
    if not table.rows:
        return []
    heads = list(table.rows[0])
    rows = [[_value(row[head]) for head in heads] for row in table.rows]
    return [page.table(heads, rows), *([page.note(table.note)] if table.note else [])]


def _value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return _yes(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _yes(value: bool, yes: str = "yes", no: str = "no") -> str:
    return yes if value else no


def file_name(text: str) -> str:
    """Return ``text`` as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")
