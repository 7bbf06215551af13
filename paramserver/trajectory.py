"""The path of a run through parameter space: the parameters of its evaluations, in the record.

    trajectory/v0.safetensors      where the run started
    trajectory/v112.safetensors    a vector each, named by its version
    trajectory/v230.safetensors

There are at most so many. One too many, and the one goes whose neighbours are closest to each
other: what is left stays spread evenly over the versions, and the first and the newest stay.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from paramserver.durable import write_durably
from paramserver.errors import LayoutError, RecordError
from paramserver.layout import Layout, layout_from_json

LEAST = 3
"""Snapshots that a trajectory must have room for: two, and one that takes the newest's place."""

_NAME = re.compile(r"v(\d+)\.safetensors")


class Trajectory:
    """The path of a run while it is written. Used by one thread."""

    def __init__(self, folder: Path, layout: Layout, most: int) -> None:
        """Go on with what is in ``folder``, of vectors of ``layout``, ``most`` of them."""
        self._folder, self._layout, self._most = folder, layout, most
        self._described = {"layout": json.dumps(layout.to_json())}

    def add(self, version: int, params: Tensor) -> None:
        """Keep ``params``, shape ``(layout.numel,)``, as ``version``; it is on disk on return.

        Raises:
            RecordError: It cannot be written; what was there is as it was.
        """
        data = safetensors.torch.save({"params": params.contiguous()}, self._described)
        path = _file(self._folder, version)
        try:
            self._folder.mkdir(exist_ok=True)
            write_durably(path, data)
            versions = _versions(self._folder)
            while len(versions) > self._most:
                gaps = [
                    after - before for before, after in zip(versions, versions[2:], strict=False)
                ]
                _file(self._folder, versions.pop(1 + gaps.index(min(gaps)))).unlink()
        except OSError as error:
            raise RecordError(
                f"cannot write {path}: {error}; make room, or keep fewer snapshots (--trajectory)"
            ) from error


def rewind(folder: Path, version: int) -> None:
    """Forget what came after ``version``, and what a kill cut short.

    Raises:
        RecordError: The folder cannot be written.
    """
    try:
        for path in folder.glob("*.tmp"):
            path.unlink()
        for later in _versions(folder):
            if later > version:
                _file(folder, later).unlink()
    except OSError as error:
        raise RecordError(f"cannot write {folder}: {error}") from error


@dataclass(frozen=True, slots=True)
class Snapshots:
    """A trajectory as it was read."""

    layout: Layout
    versions: tuple[int, ...]
    """One or more, rising."""
    vectors: Tensor
    """The parameters of each, shape ``(len(versions), layout.numel)``."""


def read_trajectory(folder: Path) -> Snapshots | None:
    """Read a trajectory; None if there is nothing in ``folder``.

    Raises:
        RecordError: A snapshot is damaged, is not finite, or is of another model than the first.
    """
    versions = _versions(folder)
    if not versions:
        return None
    read = [_read(_file(folder, version)) for version in versions]
    first = read[0][0]
    for version, (layout, vector) in zip(versions, read, strict=True):
        path = _file(folder, version)
        difference = first.difference(layout)
        if difference is not None:
            raise RecordError(f"{path} is of another model than the run's first ({difference})")
        if not torch.isfinite(vector).all():
            raise RecordError(
                f"{path} holds parameters that are not finite: the run broke, and there is no "
                "surface around it; delete the file to look at the run up to then"
            )
    return Snapshots(first, tuple(versions), torch.stack([vector for _, vector in read]))


def _read(path: Path) -> tuple[Layout, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            layout = layout_from_json(json.loads(file.metadata()["layout"]))
            params: Tensor = file.get_tensor("params")
    except (OSError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise RecordError(f"cannot read {path}: {error}; delete it to do without") from error
    if params.shape != (layout.numel,):
        raise LayoutError(f"{path} must hold {layout.numel} elements, got {tuple(params.shape)}")
    return layout, params


def _file(folder: Path, version: int) -> Path:
    return folder / f"v{version}.safetensors"


def _versions(folder: Path) -> list[int]:
    """Return the versions there are, rising."""
    if not folder.exists():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in found if name)
