"""Find the files of public data sets, check them, and fetch them if that was asked for.

A file is looked for in the folder the user named, in ``$PARAMSERVER_DATA``, in the cache
(``$XDG_CACHE_HOME/paramserver``, else ``~/.cache/paramserver``) and where Debian puts it; packed or
not, directly in the folder or in a subfolder of the data set. What counts is the sha256 of the
unpacked content: copies in another wrapping are the same data. Only the cache is ever written to.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from paramserver.errors import DataError

logger = logging.getLogger(__name__)

_DOWNLOAD_LOCK_TIMEOUT_S = 600.0

_UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of a data set."""

    name: str
    """Name of the unpacked file."""

    packing: str
    """What the packed file's name ends in: ``.gz`` or ``.bz2``; empty if it is never packed."""

    sha256: str
    """Of the unpacked content."""

    packed_sha256: str
    """Of the packed file as the mirrors hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A public data set: where its files may lie, and where they come from."""

    name: str
    """Name of its subfolder, such as ``fashion-mnist``."""

    files: tuple[DataFile, ...]
    """What it consists of."""

    task: str
    """Task that is trained on it, named in messages."""

    mirrors: tuple[str, ...]
    """Addresses of folders that hold the packed files, tried in order."""

    other_folders: tuple[str, ...] = ()
    """Subfolders used by others, such as torchvision's ``MNIST/raw``."""

    system_folders: tuple[str, ...] = ()
    """Where a package of the operating system puts the files."""

    def read(self, *, data_dir: str | None = None, download: bool = False) -> list[bytes]:
        """Return the unpacked content of every file, checked, in the order of ``files``.

        Args:
            data_dir: Folder to look in first; it is never written to.
            download: Whether a file that is nowhere may be fetched into the cache. One process of
                a machine fetches, the others wait for it.

        Raises:
            DataError: A file is nowhere, altered or could not be fetched; the message says which
                folders were tried and how to get it.
        """
        return [self._read(file, data_dir, download) for file in self.files]

    def _read(self, file: DataFile, data_dir: str | None, download: bool) -> bytes:
        altered: list[DataError] = []
        for path in self._candidates(file, data_dir):
            if not path.is_file():
                continue
            try:
                return _content(path, file)
            except DataError as error:  # another folder may hold a good copy
                logger.warning("%s", error)
                altered.append(error)
        if download:
            return self._download(file)
        raise altered[0] if altered else self._missing(file, data_dir)

    def _candidates(self, file: DataFile, data_dir: str | None) -> Iterator[Path]:
        for folder in self._folders(data_dir):
            for subfolder in (self.name, *self.other_folders, "."):
                for name in dict.fromkeys((file.name + file.packing, file.name)):
                    yield folder / subfolder / name

    def _folders(self, data_dir: str | None) -> list[Path]:
        named = (data_dir, os.environ.get("PARAMSERVER_DATA"))
        folders = [Path(folder).expanduser().absolute() for folder in named if folder]
        return [*folders, _cache(), *map(Path, self.system_folders)]

    def _missing(self, file: DataFile, data_dir: str | None) -> DataError:
        tried = ", ".join(map(str, self._folders(data_dir)))
        unpacked = f" (or unpacked {file.name})" if file.packing else ""
        return DataError(
            f"{self.name}: there is no {file.name}{file.packing}{unpacked} in "
            f"{tried}, directly or in {' or '.join((self.name, *self.other_folders))}. Fetch it "
            f"with `paramserver train --task {self.task}:download=true`, or name its folder with "
            f"`{self.task}:data_dir=FOLDER` or the environment variable PARAMSERVER_DATA"
        )

    def _download(self, file: DataFile) -> bytes:
        """Fetch ``file`` into the cache from the first mirror that has it; return its content."""
        try:
            import pooch  # noqa: PLC0415  an optional extra, needed by nobody who has the files
        except ImportError:
            raise DataError(
                f"{self.name}: downloading needs pooch: pip install 'paramserver[data]'"
            ) from None
        folder, packed = _cache() / self.name, file.name + file.packing
        failures = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / f"{packed}.lock", timeout=_DOWNLOAD_LOCK_TIMEOUT_S):
                for mirror in self.mirrors:
                    try:  # a good file in the cache, put there by another process, is used as it is
                        pooch.retrieve(
                            mirror + packed,
                            known_hash=f"sha256:{file.packed_sha256}",
                            fname=packed,
                            path=folder,
                        )
                    except (OSError, ValueError) as error:  # unreachable; another content
                        failures.append(f"{mirror}: {error}")
                        logger.warning("%s: %s%s failed: %s", self.name, mirror, packed, error)
                    else:
                        return _content(folder / packed, file)
        except (OSError, filelock.Timeout) as error:
            raise DataError(f"{self.name}: {packed} cannot be put in {folder}: {error}") from error
        raise DataError(
            f"{self.name}: no mirror gave {packed}. Put it in {folder} by hand, or name its folder "
            f"with `{self.task}:data_dir=FOLDER`. " + "; ".join(failures)
        )


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "paramserver"


def _content(path: Path, file: DataFile) -> bytes:
    """Read, unpack and check ``path``."""
    try:
        content = path.read_bytes()
        if path.name != file.name:
            content = _UNPACK[file.packing](content)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path} is altered or cut short: the sha256 of its content is {found} instead of "
            f"{file.sha256}; delete it or name another folder"
        )
    return content
