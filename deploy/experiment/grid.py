"""A grid: every combination of the values of some flags, each with several seeds.

    mode = "simulate"                      # or "async", "sync": real runs, one at a time

    [grid]                                 # flags of `paramserver simulate`, a list of values each;
    workers = [1, 4, 16]                   # of `paramserver train` for real runs
    optimizer = ["momentum:lr=0.02", "dana:lr=0.02"]
    seeds = [0, 1, 2]

    [run]                                  # flags that are the same everywhere
    task = "digits:hidden=24"
    epochs = 10

Twelve simulations stand in Python as ``Grid(axes={"workers": [1, 4, 16], …}, seeds=(0, 1, 2),
run={"task": …})``. Values are written as on the command line, or as TOML tables.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

from async_sgd.simulator import REAL_ONLY
from deploy.experiment.pieces import Piece, Settings
from deploy.experiment.results import figures
from deploy.flags import Flags, UsageError
from deploy.running import PLUGINS, RunFlags
from deploy.simulate import SimulateFlags, simulator
from deploy.train import TrainFlags, trainer
from paramserver.errors import RunFailedError

Mode = Literal["simulate", "async", "sync"]

_OURS = ("config", "out", "resume", "like", "seeds")
"""Flags of single runs that make no sense in a grid."""

_MAX_NAME = 100
"""Characters of a folder's name; file systems take 255 bytes."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a grid."""

    varied: Mapping[str, str]
    """Flags that vary, as the command line takes them."""
    seed: int
    folder: str
    """Below the experiment's own."""
    settings: Settings
    """The mode and all flags, in types that JSON has."""

    @property
    def group(self) -> str:
        """What it has in common with the runs of other seeds."""
        return ", ".join(f"{key} {value}" for key, value in self.varied.items()) or "all"

    @property
    def piece(self) -> Piece:
        """What makes the run."""
        name = ", ".join([*([self.group] if self.varied else []), f"seed {self.seed}"])
        return Piece(name, self.folder, self.settings, make_run)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is crossed with what."""

    axes: Mapping[str, Sequence[Any]]
    """Values of each flag that varies, one or more."""

    seeds: Sequence[int]
    """Of each combination, one or more."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Flags that do not vary."""

    mode: Mode = "simulate"
    """In virtual time, or for real."""

    name: str = "the grid"
    """What errors call it."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            self._refuse(f"mode must be {' or '.join(get_args(Mode))}, got {self.mode!r}")
        for key, values in self.axes.items():
            if not isinstance(values, list | tuple) or not values:
                self._refuse(f"[grid] {key} must be a list of one value or more, got {values!r}")
            if key in self.run:
                self._refuse(f"{key} stands in [grid] and in [run]: give it once")
        for key in ("seed", "mode"):
            if key in self.axes or key in self.run:
                way = {"seed": "[grid] has seeds", "mode": "it stands above [grid]"}[key]
                self._refuse(f"{key} is no flag of single runs here: {way}")
        seeds = self.seeds
        if (
            not isinstance(seeds, list | tuple)
            or {type(seed) for seed in seeds} != {int}
            or len(set(seeds)) < len(seeds)
        ):
            self._refuse(f"[grid] seeds must be different whole numbers, got {seeds!r}")

    @classmethod
    def read(cls, path: Path) -> Grid:
        """Read the grid of a TOML file.

        Raises:
            UsageError: The file cannot be read, or says something that cannot be.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not TOML: {error}") from error
        for key in table:
            if key not in ("mode", "grid", "run"):
                raise UsageError(f"{path}: there is no key {key!r} (there are grid, mode, run)")
        axes, run = table.get("grid", {}), table.get("run", {})
        for key, part in (("grid", axes), ("run", run)):
            if not isinstance(part, dict):
                raise UsageError(f"{path}: [{key}] must be a table of flags")
        if "seeds" not in axes:
            raise UsageError(f"{path}: [grid] needs seeds, such as seeds = [0, 1, 2]")
        seeds = axes.pop("seeds")
        mode = table.get("mode", "simulate")
        return cls(axes=axes, seeds=seeds, run=run, mode=mode, name=str(path))

    @cached_property
    def cells(self) -> list[Cell]:
        """Every combination with every seed.

        Raises:
            UsageError: An unknown flag or plug-in, a value that is refused, or one given twice.
        """
        flags, cells = _flags(self.mode), list[Cell]()
        folders: dict[str, str] = {}
        for values in product(*self.axes.values()):
            given = {**self.run, **dict(zip(self.axes, values, strict=True))}
            built = _build(self.mode, given, self.name)
            varied = {key: flags.spell(key, getattr(built, key)) for key in self.varied}
            group = ",".join(f"{key}={value}" for key, value in varied.items()) or "all"
            if group in folders:
                self._refuse(f"[grid] {group} stands there twice")
            folder = _file_name(group)
            while folder in folders.values():  # of a group whose name differs in signs alone
                folder += "~"
            folders[group] = folder
            for seed in self.seeds:
                settings = {"mode": self.mode, **flags.describe(built), "seed": seed}
                cells.append(Cell(varied, seed, f"runs/{folder}/seed-{seed}", settings))
        return cells

    @property
    def varied(self) -> list[str]:
        """Flags with more than one value."""
        return [key for key, values in self.axes.items() if len(values) > 1]

    def spell(self, key: str, value: object) -> str:
        """Write a setting of a cell as the command line takes it."""
        return _flags(self.mode).spell(key, value)

    def _refuse(self, why: str) -> None:
        raise UsageError(f"{self.name}: {why}")


def make_run(settings: Settings, folder: Path) -> Settings:
    """Make the run of a cell and return its figures.

    Raises:
        ParamServerError: It failed.
        ValueError: A combination that cannot work.
        KeyboardInterrupt: It was interrupted.
    """
    given = {key: value for key, value in settings.items() if key != "mode" and value is not None}
    built = dataclasses.replace(_build(settings["mode"], given, "a run"), out=folder / "run")
    try:
        if isinstance(built, TrainFlags):
            result = trainer(built, lambda status: None).fit()
        else:
            result = simulator(cast(SimulateFlags, built), lambda status: None).fit()
    except RunFailedError as error:
        raise RunFailedError(error.reason, None) from error
    if result.stopped_because == "interrupted":
        raise KeyboardInterrupt
    return figures(folder / "run", built.until)


def replicas(flags: SimulateFlags, seeds: Sequence[int]) -> Grid:
    """Return the grid of one configuration, with several seeds."""
    described = _flags("simulate").describe(flags)
    run = {key: value for key, value in described.items() if value is not None and key != "seed"}
    return Grid(axes={}, seeds=tuple(seeds), run=run, name="--seeds")


def _flags(mode: Mode) -> Flags[Any]:
    if mode == "simulate":
        return Flags(SimulateFlags, PLUGINS, without={*REAL_ONLY, *_OURS})
    return Flags(TrainFlags, PLUGINS, without=_OURS)


def _build(mode: Mode, values: Mapping[str, Any], where: str) -> RunFlags:
    is_real = {} if mode == "simulate" else {"mode": mode}
    built: RunFlags = _flags(mode).build({**values, **is_real}, where)
    return built


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-.=," else "_" for c in text)[:_MAX_NAME]
