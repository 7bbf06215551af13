"""A piece of an experiment: made once, in a folder of its own, and found there again.

The folder's ``piece.json`` is written twice: when the piece begins, with ``result`` null, and when
it is finished. A piece that was killed or failed is made again, in an empty folder. A finished one
is used again only if all it depends on is as it was, so that results of different settings are
never mixed; what a file holds that the settings name, such as a trace, is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from paramserver.durable import write_durably
from paramserver.errors import RecordError

Settings = Mapping[str, Any]
"""In types that JSON has."""

_FILE = "piece.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """Something to be made, here or in another process."""

    name: str
    """What people call it."""

    folder: str
    """Below the experiment's own."""

    settings: Settings
    """All that the result depends on."""

    make: Callable[[Settings, Path], Settings]
    """Makes it in an empty folder and returns the result; a function of a module."""

    def _described(self) -> Settings:
        maker = f"{self.make.__module__}.{self.make.__qualname__}"
        described = {**self.settings, "made by": maker, "version": metadata.version("paramserver")}
        plain: Settings = json.loads(json.dumps(described, default=str))
        return plain

    @property
    def fingerprint(self) -> str:
        """A hash of all that the result depends on, this package's version included."""
        text = json.dumps(self._described(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def found(self, out: Path) -> Settings | None:
        """Return the result if it is there; None if it has to be made.

        Raises:
            RecordError: The folder holds a finished piece of other settings, or something else.
        """
        folder = out / self.folder
        written = _read(folder)
        if written is None:
            if folder.is_dir() and any(folder.iterdir()):
                raise RecordError(
                    f"{folder} holds something else than a piece of an experiment: choose another "
                    "folder (--out)"
                )
            return None
        result: Settings | None = written["result"]
        if result is not None and written["fingerprint"] != self.fingerprint:
            raise RecordError(
                f"{folder} was made with other settings ({self._differences(written['settings'])}):"
                " choose another folder (--out), or delete that one"
            )
        return result

    def begin(self, out: Path) -> Path:
        """Make the piece's folder, or empty it of what was not finished.

        Raises:
            RecordError: It cannot be written.
        """
        folder = out / self.folder
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise RecordError(f"cannot write {folder}: {error}") from error
        self._write(folder, None)
        return folder

    def finish(self, out: Path, result: Settings) -> None:
        """Keep the result.

        Raises:
            RecordError: It cannot be written.
        """
        self._write(out / self.folder, result)

    def _write(self, folder: Path, result: Settings | None) -> None:
        written = {
            "fingerprint": self.fingerprint,
            "settings": self._described(),
            "result": result,
        }
        text = json.dumps(written, indent=1, allow_nan=False)
        try:
            write_durably(folder / _FILE, text.encode())
        except OSError as error:
            raise RecordError(f"cannot write {folder / _FILE}: {error}; make room") from error

    def _differences(self, then: Settings) -> str:
        now = self._described()
        return ", ".join(
            f"{key.replace('_', ' ')} {_brief(then.get(key))}, now {_brief(now.get(key))}"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
        )


def _read(folder: Path) -> Settings | None:
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        written: Settings = json.loads(path.read_text(encoding="utf-8"))
        if not written.keys() >= {"fingerprint", "settings", "result"}:
            raise ValueError("it is not a piece of an experiment")
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    return written


def _brief(value: object) -> str:
    """Write a setting as an error can hold it: a plug-in as the command line names it."""
    if isinstance(value, Mapping):
        keys = ",".join(f"{key}={part}" for key, part in value.items() if key != "name")
        return f"{value.get('name', '')}:{keys}" if keys else str(value.get("name", ""))
    return "none" if value is None else str(value)
