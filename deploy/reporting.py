"""`paramserver report DIR…`: records of runs as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.flags import Parser
from deploy.report import write_report


def run(argv: Sequence[str]) -> int:
    """Write the page and print where it is."""
    parser = Parser("paramserver report", "Show one run, or several side by side, as one page.")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folder of a run's record"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="the page to write")
    given = parser.read(argv)
    print(write_report(given.folders, given.out))
    return 0
