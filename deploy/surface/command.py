"""`paramserver surface DIR`: the error surface around a run, with the path of training on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy import page
from deploy.bar import Bar
from deploy.flags import Flags, Parser, UsageError
from deploy.surface.look import Surface, SurfaceConfig, look
from deploy.surface.pictures import Picture, pictures
from paramserver.durable import write_durably
from paramserver.errors import RecordError
from paramserver.record import RunFolder
from workers.tasks import task


@dataclass(frozen=True, kw_only=True)
class SurfaceFlags(SurfaceConfig):
    """What `paramserver surface` can be told."""

    task: str | None = None
    """What was trained, if the record cannot say."""

    jobs: int | None = None
    """Worker processes; as many as there are cores unless given."""

    out: Path | None = None
    """Folder of the page, the pictures and the tables; in the run's ``surface/`` unless given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be 1 or more, got {self.jobs}")


def run(argv: Sequence[str]) -> int:
    """Compute the surface that ``argv`` asks for, draw it, and print where it is."""
    parser = Parser(
        "paramserver surface DIR",
        "The error surface around a run: the loss on a line or a plane through its parameters,\n"
        "computed by worker processes, with the path of training on it.",
        "For example:\n"
        "  paramserver train --trajectory 100 --evaluate-every-s 0.1 --out runs/today\n"
        "  paramserver surface runs/today\n"
        "  paramserver surface runs/today --along random --dims 1",
    )
    wants_help = bool({"-h", "--help"} & set(argv))
    if not wants_help and (not argv or argv[0].startswith("-")):
        raise UsageError("name the folder of a run's record first, then flags (see --help)")
    flags = Flags(SurfaceFlags, {}).parse(argv if wants_help else argv[1:], parser)
    folder = Path(argv[0])
    what = None if flags.task is None else task(flags.task)
    try:
        with Bar("losses") as bar:
            surface = look(folder, flags, task=what, jobs=flags.jobs, progress=bar)
    except ValueError as error:
        raise UsageError(str(error)) from error
    out = flags.out or RunFolder(folder).surface / f"{flags.along}-{flags.dims}d"
    surface.save(out)
    drawn = list(pictures(surface))
    write(surface, drawn, folder, out)
    for name, value in facts(surface).items():
        print(f"{name:<22}{value}")
    print(f"tables: {out / 'surface.csv'}, {out / 'surface.npz'}")
    print(f"plots:  {', '.join(str(out / f'{picture.name}.png') for picture in drawn)}")
    print(f"report: {out / 'report.html'}")
    return 0


def facts(surface: Surface) -> dict[str, str]:
    """Return what there is to say of ``surface``, by name."""
    config, losses = surface.config, surface.losses
    finite = losses[np.isfinite(losses)]
    said = {
        "task": surface.task,
        "along": config.along + (f", towards {config.other}" if config.other else ""),
        "points": " x ".join(str(len(axis)) for axis in surface.axes),
        "loss of": f"up to {config.samples:,} {config.data} samples, drawn by seed {config.seed}",
    }
    if finite.size:
        lowest = np.unravel_index(
            np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)), losses.shape
        )
        at = ", ".join(
            f"{axis[i]:.3g}" for axis, i in zip(surface.axes, reversed(lowest), strict=True)
        )
        said["losses"] = f"{finite.min():.4g} at ({at}) to {finite.max():.4g}"
    if finite.size < losses.size:
        said["not finite"] = f"{losses.size - finite.size} of {losses.size} losses"
    if surface.versions:
        said["path"] = (
            f"{len(surface.versions)} snapshots, versions {surface.versions[0]:,} to "
            f"{surface.versions[-1]:,}"
        )
    if surface.inside is not None and not math.isnan(surface.inside):
        said["path in the slice"] = f"{100 * surface.inside:.3g} % of its squared distances"
    return said


def write(surface: Surface, drawn: Sequence[Picture], run_folder: Path, out: Path) -> None:
    """Write the pictures and the page below ``out``.

    Raises:
        RecordError: They cannot be written.
    """
    whole = page.page(
        f"Error surface of {surface.task}",
        str(run_folder),
        [
            page.facts(facts(surface)),
            page.section("Surface", [page.figure(p.svg(), p.title, p.caption) for p in drawn]),
        ],
    )
    try:
        for picture in drawn:
            picture.save(out / f"{picture.name}.png")
        write_durably(out / "report.html", whole.encode())
    except OSError as error:
        raise RecordError(f"cannot write into {out}: {error}") from error
