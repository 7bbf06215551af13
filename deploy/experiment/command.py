"""`paramserver experiment`: named experiments, and grids of runs that a TOML file describes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deploy.experiment.named import NAMED
from deploy.flags import Flags, Parser, UsageError


@dataclass(frozen=True, kw_only=True)
class GridFlags:
    """What `paramserver experiment FILE.toml` can be told."""

    out: Path | None = None
    """Folder of the runs, the tables, the plots and the page; ``runs/`` and the file's name unless
    given. What is finished there is not made again."""

    jobs: int | None = None
    """Simulations at a time; as many as there are cores unless given. Real runs are made one at a
    time."""

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be 1 or more, got {self.jobs}")


def run(argv: Sequence[str]) -> int:
    """Run the experiment that ``argv`` names; 1 if something of it failed."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = argv
    if name.endswith(".toml"):
        return _grid(Path(name), rest)
    if name == "optimizers":
        from deploy.experiment import optimizers  # noqa: PLC0415  # imports torch and matplotlib

        return optimizers.run(rest)
    if name in NAMED:
        from deploy.experiment.named import run_named  # noqa: PLC0415

        return run_named(name, rest)
    names = ["optimizers", *NAMED]
    known = ", ".join(names)
    if name.startswith("-"):
        raise UsageError(f"name an experiment ({known}) or a TOML file first, then flags")
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"there is no experiment {name!r}{meant} (there are {known}, or a FILE.toml)")


def _grid(path: Path, argv: Sequence[str]) -> int:
    from deploy.experiment import comparison, findings  # noqa: PLC0415  # imports torch
    from deploy.experiment.grid import Grid  # noqa: PLC0415

    parser = Parser(
        "paramserver experiment FILE.toml",
        "Make every run of a grid, several at a time, and compare them. A run that is finished is\n"
        "not made again, so an experiment that was interrupted goes on where it was.",
        _EXAMPLE,
    )
    flags = Flags(GridFlags, {}).parse(argv, parser)
    grid = Grid.read(path)
    out = flags.out or Path("runs") / path.stem
    console = Console(stderr=True, highlight=False)
    jobs = flags.jobs or os.cpu_count() or 1
    compared = comparison.compare({"": grid}, out, jobs=jobs, console=console)[""]
    findings.tell(comparison.findings(compared, path.stem), out)
    return 1 if compared.failed else 0


_EXAMPLE = """A file:
  mode = "simulate"                  # or async, sync: real runs
  [grid]                             # flags of simulate, or of train, a list of values each
  optimizer = ["momentum:lr=0.02", "dana:lr=0.02"]
  workers = [1, 4, 16]
  seeds = [0, 1, 2]
  [run]                              # flags that are the same everywhere
  task = "digits:hidden=24"
  epochs = 10"""


def _help() -> str:
    lines = {"optimizers": "every optimizer, in both modes, on one task"}
    lines |= {name: named.what for name, named in NAMED.items()}
    return "\n".join(
        [
            "usage: paramserver experiment NAME [flags]",
            "       paramserver experiment FILE.toml [flags]",
            "",
            *(f"  {name:<20} {what}" for name, what in lines.items()),
            "",
            *_EXAMPLE.splitlines(),
        ]
    )
