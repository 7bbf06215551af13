"""What a run leaves behind: a folder that people and other programs can read.

    config.json      what the run was asked for, written first: a killed run still says what it was
    metrics.jsonl    one object a line, each with gradients, updates and seconds
    updates.npz      one row a push, see `paramserver.ledger`; asynchronous runs only
    checkpoint/      see `paramserver.checkpoint`
    best/            likewise: the parameters of the best version, if early stopping kept them
    trajectory/      see `paramserver.trajectory`
    surface/         see `deploy.surface`
    result.json      what came out, written last
    report.html      see `deploy.report`

Everything is JSON as the standard has it: a value that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paramserver.durable import write_durably
from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.trajectory import rewind

AXES = ("gradients", "updates", "seconds")
"""What every line of metrics.jsonl has: how far the run was."""

RUNS = Path("runs")
"""Where records go that nobody named a folder for."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run, while it is written. Used by one thread."""

    path: Path

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunFolder:
        """Make the folder of a new run.

        Args:
            path: The folder; None makes ``runs/<date>-<time>-<name>``.
            name: What the run is, in a word or two.

        Raises:
            RecordError: The folder holds another run, or cannot be written.
        """
        try:
            path = _make_fresh(name) if path is None else path
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            files = (
                folder.config,
                folder.metrics,
                folder.updates,
                folder.checkpoint,
                folder.best,
                folder.trajectory,
                folder.result,
            )
            taken = any(file.exists() for file in files)
            if not taken:
                folder.metrics.touch(exist_ok=False)
        except OSError as error:
            raise RecordError(
                f"cannot write a record to {path or RUNS}: {error}; choose another folder (--out)"
            ) from error
        if taken:
            raise RecordError(
                f"{path} holds another run: choose another folder (--out), or go on with that run "
                f"(--resume {path})"
            )
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Open the folder of a run that goes on; a line that a kill cut short is cut off.

        Raises:
            RecordError: It is not the record of a run, or cannot be written.
        """
        folder = cls(path)
        _read_json(folder.config)
        _read_lines(folder.metrics)
        try:
            os.truncate(folder.metrics, folder.metrics.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise RecordError(f"cannot write {folder.metrics}: {error}") from error
        return folder

    def set_best_aside(self, version: int) -> Path:
        """Give the best version's checkpoint another name, which the record does not know.

        Raises:
            RecordError: It cannot be renamed.
        """
        aside = self.best.with_name(f"best-{version}")
        try:
            self.best.rename(aside)
        except OSError as error:
            raise RecordError(f"cannot rename {self.best}: {error}") from error
        return aside

    @property
    def config(self) -> Path:
        """What the run was asked for."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """The run's figures over time."""
        return self.path / "metrics.jsonl"

    @property
    def updates(self) -> Path:
        """The ledger."""
        return self.path / "updates.npz"

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return self.path / "checkpoint"

    @property
    def best(self) -> Path:
        """The folder of the best version's checkpoint; it has no state of the optimizer."""
        return self.path / "best"

    @property
    def trajectory(self) -> Path:
        """The folder of the parameters of evaluations; there if the run was to keep them."""
        return self.path / "trajectory"

    @property
    def surface(self) -> Path:
        """The folder of error surfaces that were computed around the run, a folder each."""
        return self.path / "surface"

    @property
    def result(self) -> Path:
        """What came out."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / "report.html"

    def log(self, metrics: Mapping[str, object]) -> None:
        """Append a line to metrics.jsonl; the operating system has it when this returns.

        Raises:
            ValueError: ``metrics`` lacks gradients, updates or seconds; nothing was written.
            RecordError: The line cannot be written.
        """
        missing = [axis for axis in AXES if axis not in metrics]
        if missing:
            raise ValueError(f"a line of metrics needs {', '.join(missing)}")
        line = json.dumps(_plain(metrics), allow_nan=False) + "\n"
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise RecordError(f"cannot write {self.metrics}: {error}; make room") from error

    def rewind(self, updates: int) -> None:
        """Forget what came after ``updates``: a run that goes on from a checkpoint does it again.

        Later lines of metrics.jsonl go, later snapshots of the trajectory, and the result.

        Raises:
            RecordError: The folder cannot be written.
        """
        kept = [line for line in _read_lines(self.metrics) if line["updates"] <= updates]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
        _write(self.metrics, text)
        rewind(self.trajectory, updates)
        self.result.unlink(missing_ok=True)

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write config.json, all or nothing.

        Raises:
            RecordError: It cannot be written.
        """
        _write(self.config, json.dumps(_plain(config), allow_nan=False, indent=1) + "\n")

    def write_result(self, result: Mapping[str, object]) -> None:
        """Write result.json, all or nothing.

        Raises:
            RecordError: It cannot be written; the one that was there is as it was.
        """
        _write(self.result, json.dumps(_plain(result), allow_nan=False, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Result:
    """What a trainer returns."""

    path: Path
    """The folder of the record."""
    metrics: dict[str, float]
    """Metrics of the version in `checkpoint`: the last one, or with early stopping the best."""
    best: dict[str, Any]
    """Metrics of the best version, with its ``version`` and ``seconds``."""
    checkpoint: Path | None
    """Folder of the checkpoint; None if none was written."""
    stopped_because: str
    record: dict[str, Any]
    """All of result.json."""

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return f"{figures or 'no metrics'} ({self.stopped_because}; record: {self.path})"


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it was read."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    """None if the run still goes, or was killed."""
    metrics: list[dict[str, Any]]
    updates: dict[str, NDArray[Any]] | None
    """The ledger's columns; None without a ledger."""


def read_record(path: Path) -> Record:
    """Read the record of a run that has ended, was killed, or still goes.

    Raises:
        RecordError: ``path`` is not the record of a run, or a file of it is damaged.
    """
    folder = RunFolder(path)
    return Record(
        path=path,
        config=_read_json(folder.config),
        result=_read_json(folder.result) if folder.result.exists() else None,
        metrics=_read_lines(folder.metrics),
        updates=Ledger.load(folder.updates).columns() if folder.updates.exists() else None,
    )


def versions() -> dict[str, str]:
    """Return what the run runs on: Python, the platform, packages, and the commit if there is one.

    The commit is of the repository the current directory is in, with ``-dirty`` if files differ.
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "ray", "numpy", "paramserver"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = shutil.which("git")
    if git is None:
        return found
    describe = [git, "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        said = subprocess.run(  # noqa: S603  # nothing in it comes from outside
            [*describe, "--exclude=*"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return found
    return {**found, "git": said.stdout.strip()}


def _make_fresh(name: str) -> Path:
    """Make a folder of this second's under `RUNS`, with a number behind if the name is taken."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-" + re.sub(r"[^\w.-]+", "-", name)
    RUNS.mkdir(parents=True, exist_ok=True)
    path, number = RUNS / stem, 1
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            path = RUNS / f"{stem}-{number}"
        else:
            return path


def _plain(value: object) -> object:
    """Return ``value`` in the types JSON has; a number that is not finite becomes None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _write(path: Path, text: str) -> None:
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error}; make room") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(
            f"{path.parent} is not the record of a run: it has no {path.name}"
        ) from None
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise RecordError(f"cannot read {path}: it does not hold a JSON object")
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that a kill cut short is left out."""
    try:
        *whole, _cut = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(
            f"{path.parent} is not the record of a run: cannot read {path.name}: {error}"
        ) from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise RecordError(f"cannot read line {number} of {path}: {error}") from error
        if not isinstance(line, dict) or not line.keys() >= set(AXES):
            raise RecordError(f"line {number} of {path} lacks one of {', '.join(AXES)}")
        lines.append(line)
    return lines
