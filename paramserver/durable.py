"""Files that are whole or not there, whenever the process or the machine dies."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path``: at any moment the file is the old or the new one.

    Raises:
        OSError: The data cannot be written; a file that was there is as it was.
    """
    written = path.with_name(f"{path.name}.tmp")
    try:
        with written.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else the rename may reach the disk before the data does
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
