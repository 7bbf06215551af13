"""What the loss is around a run: which slice, its points, and the path of training on it."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploy.surface.heights import Ground, heights
from deploy.trained import Trained, trained
from paramserver.durable import write_durably
from paramserver.errors import RecordError
from paramserver.record import RunFolder, read_record
from paramserver.trajectory import Snapshots, read_trajectory
from workers.landscape import Slice, around, between, filter_normalised, grid, principal
from workers.task import Task

Along = Literal["random", "between", "principal"]
Part = Literal["train", "test", "validation"]

_REACH: Mapping[Along, float] = {"random": 1.0, "between": 0.25, "principal": 0.25}
_POINTS = {1: 101, 2: 25}


@dataclass(frozen=True, slots=True, kw_only=True)
class SurfaceConfig:
    """Where to look."""

    along: Along = "principal"
    """``principal`` directions of the path of training, ``between`` sets of parameters, or
    ``random`` directions, each filter as long as the model's own."""

    dims: int = 2
    """Directions: 1 gives a curve, 2 a surface."""

    points: int | None = None
    """Points along each direction; 25 of a surface and 101 of a curve unless given."""

    reach: float | None = None
    """How far to look. Random: to each side, where 1 is as far as the parameters are long; 1 unless
    given. Else beyond the ends of the path, in parts of its extent; 0.25 unless given."""

    other: Path | None = None
    """Another run of the same model; ``between`` then leads from this one's end to that one's, else
    from the beginning of the path to its end."""

    data: Part = "train"
    """Samples the loss is of."""

    samples: int = 1000
    """At most so many of them."""

    seed: int = 0
    """Draws random directions and samples."""

    def __post_init__(self) -> None:
        if self.along not in get_args(Along):
            raise ValueError(f"along must be {', '.join(get_args(Along))}, got {self.along!r}")
        if self.dims not in (1, 2):
            raise ValueError(f"dims must be 1 or 2, got {self.dims}")
        if self.data not in get_args(Part):
            raise ValueError(f"data must be {', '.join(get_args(Part))}, got {self.data!r}")
        if self.points is not None and self.points < 3:
            raise ValueError(f"points must be 3 or more, got {self.points}")
        if self.reach is not None and not 0 < self.reach < math.inf:
            raise ValueError(f"reach must be above 0, got {self.reach}")
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.other is not None and self.along != "between":
            raise ValueError(f"other is a run to look towards: use along=between, not {self.along}")

    @property
    def num_points(self) -> int:
        """Points along each direction."""
        return self.points or _POINTS[self.dims]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surface:
    """Losses on a slice."""

    config: SurfaceConfig
    task: str
    axes: tuple[NDArray[np.float64], ...]
    """Coordinates along each direction."""
    losses: NDArray[np.float64]
    """A row for each second coordinate, a column for each first; of a curve, a value each. Not
    finite where the loss is not."""
    slice: Slice
    versions: tuple[int, ...]
    """Of the path's points; none if the run kept no trajectory."""
    path: NDArray[np.float64]
    """Where they are nearest to in the slice, shape ``(len(versions), dims)``."""
    path_losses: NDArray[np.float64]
    """The losses at the points themselves."""
    shadow_losses: NDArray[np.float64]
    """The losses in the slice where they are nearest to."""
    inside: float | None
    """Share of the path's squared distances from the origin that lies in the slice."""
    shares: tuple[float, ...] = ()
    """Of principal directions, each one's share of how far the path is spread out."""
    marks: Mapping[str, tuple[float, ...]]
    """Coordinates of what the slice was laid through, by name."""

    def save(self, folder: Path) -> None:
        """Write ``surface.npz``, ``surface.csv`` and, if there is a path, ``path.csv``.

        Raises:
            RecordError: They cannot be written.
        """
        arrays: dict[str, Any] = {
            **{f"axis_{i}": axis for i, axis in enumerate(self.axes)},
            "losses": self.losses,
            "origin": self.slice.origin.numpy(),
            "directions": self.slice.directions.numpy(),
            "versions": np.array(self.versions, np.int64),
            "path": self.path,
            "path_losses": self.path_losses,
            "shadow_losses": self.shadow_losses,
        }
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        names = ["x", "y"][: len(self.axes)]
        where = np.meshgrid(*self.axes)
        columns = [part.ravel() for part in (*where, self.losses)]
        files = {
            "surface.npz": packed.getvalue(),
            "surface.csv": _csv([*names, "loss"], zip(*columns, strict=True)),
        }
        if self.versions:
            path = zip(
                self.versions, *self.path.T, self.path_losses, self.shadow_losses, strict=True
            )
            files["path.csv"] = _csv(["version", *names, "loss", "loss_in_slice"], path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_durably(folder / name, content)
        except OSError as error:
            raise RecordError(f"cannot write into {folder}: {error}") from error


def look(
    folder: Path,
    config: SurfaceConfig | None = None,
    *,
    task: Task | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Surface:
    """Compute the error surface around the run recorded in ``folder``.

    Args:
        folder: Of the record.
        config: Where to look.
        task: What was trained, if the record cannot name it: a task made in Python.
        jobs: Worker processes; as many as there are cores unless given.
        progress: Told how many points are done, of how many.

    Raises:
        RecordError: The record lacks something, or is of another model; says what.
        PluginError: It names a task that does not exist here.
        TaskError: The task cannot be built, or its loss failed.
        ValueError: There are no such directions.
        ResourceError: A worker was lost, or Ray cannot be started.
    """
    config = config or SurfaceConfig()
    run = trained(folder, task)
    run.check_part(config.data)
    snapshots = _snapshots(run, folder)
    slice_, shares, marks = _laid(run, config, snapshots)
    vectors = slice_.origin[None] if snapshots is None else snapshots.vectors
    path = slice_.project(vectors)
    values = grid(_bounds(config, path, marks), config.num_points)
    table = torch.stack([t.ravel() for t in torch.meshgrid(*values, indexing="xy")], dim=1)
    tables = [table] if snapshots is None else [table, path, vectors]
    ground = Ground(run.task, run.layout, slice_, config.data, config.samples, config.seed)
    found = heights(ground, tables, jobs=jobs or os.cpu_count() or 1, progress=progress)
    losses, shadows, own = [np.array(row, np.float64) for row in [*found, [], []][:3]]
    return Surface(
        config=config,
        task=run.task.name,
        axes=tuple(axis.numpy() for axis in values),
        losses=losses.reshape([len(axis) for axis in reversed(values)]),
        slice=slice_,
        versions=() if snapshots is None else snapshots.versions,
        path=path.numpy() if snapshots is not None else np.empty((0, config.dims)),
        path_losses=own,
        shadow_losses=shadows,
        inside=None if snapshots is None else slice_.inside(snapshots.vectors),
        shares=shares,
        marks={name: tuple(at) for name, at in marks.items()},
    )


def _snapshots(run: Trained, folder: Path) -> Snapshots | None:
    snapshots = read_trajectory(RunFolder(folder).trajectory)
    if snapshots is not None:
        run.check(folder, snapshots.layout)
    return snapshots


def _end(run: Trained, snapshots: Snapshots | None) -> Tensor:
    """Return the parameters a run ended with."""
    return run.checkpoint().params if snapshots is None else snapshots.vectors[-1]


def _laid(
    run: Trained, config: SurfaceConfig, snapshots: Snapshots | None
) -> tuple[Slice, tuple[float, ...], dict[str, list[float]]]:
    """Return the slice, the shares of its principal directions, and what it was laid through."""
    end = _end(run, snapshots)
    if config.along == "random":
        slice_ = filter_normalised(run.layout, end, config.dims, seed=config.seed)
        return slice_, (), {"end": [0.0] * config.dims}
    if config.other is not None:
        read_record(config.other)
        another = replace(run, folder=config.other)
        other = _end(another, _snapshots(another, config.other))
        if config.dims == 1:
            return between(end, other), (), {"end": [0.0], "other run": [1.0]}
        start = _path(run.folder, snapshots, "a plane through two runs and a beginning").vectors[0]
        slice_ = between(end, other, start)
        at = slice_.project(start[None])[0].tolist()
        return slice_, (), {"end": [0.0, 0.0], "other run": [1.0, 0.0], "start": at}
    path = _path(run.folder, snapshots, f"looking along={config.along}")
    if config.along == "principal":
        slice_, shares = principal(path.vectors, end, config.dims)
        first, last = slice_.project(path.vectors[[0, -1]]).tolist()
        return slice_, shares, {"start": first, "end": last}
    middle = path.vectors[len(path.vectors) // 2] if config.dims == 2 else None
    slice_ = between(path.vectors[0], end, middle)
    first, last = slice_.project(path.vectors[[0, -1]]).tolist()
    return slice_, (), {"start": first, "end": last}


def _path(folder: Path, snapshots: Snapshots | None, what: str) -> Snapshots:
    if snapshots is None:
        raise RecordError(
            f"{folder} kept no trajectory, which {what} needs: train with --trajectory 100, or "
            "look along random directions"
        )
    return snapshots


def _bounds(
    config: SurfaceConfig, path: Tensor, marks: Mapping[str, list[float]]
) -> list[tuple[float, float]]:
    reach = _REACH[config.along] if config.reach is None else config.reach
    if config.along == "random":
        return [(-reach, reach)] * config.dims
    named = torch.tensor(list(marks.values()), dtype=torch.float64)
    shown = named if config.other is not None else torch.cat([path, named])
    return around(shown, reach)


def _csv(heads: list[str], rows: Any) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_plain(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _plain(value: Any) -> object:
    return value.item() if isinstance(value, np.generic) else value
