"""What a run takes from where it is started: at home, on a cluster's head, or as a job of Ray's.

The environment is read here: by ``$RAY_ADDRESS`` a job knows its cluster, and Ray tells it of the
copy of the working directory it runs in, which is deleted after it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.flags import UsageError

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Names the variable, so oddly called, in which Ray describes a job to its driver."""


def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for flags that are not among ``given``."""
    values: dict[str, Any] = {}
    if address := os.environ.get("RAY_ADDRESS"):
        values["address"] = address
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface and given.get("mode") == "sync" and given.get("collective") != "shared_memory":
        values["network_interface"] = interface
    job = _job_in_a_copy()
    if job is not None and "out" not in given and "resume" not in given:
        values["out"] = Path.home() / "runs" / job
    return values


def check_folders(out: Path | None, resume: Path | None) -> None:
    """Refuse folders that a job would lose.

    Raises:
        UsageError: One is in the job's copy of the working directory.
    """
    if _job_in_a_copy() is None:
        return
    for name, folder in (("out", out), ("resume", resume)):
        if folder is not None and not folder.expanduser().is_absolute():
            raise UsageError(
                f"{name} is {folder}, in the job's copy of the working directory, which Ray "
                f"deletes: give a path from the root, on the head or on storage that all nodes see"
            )


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM, which `ray job stop` sends, and a lost terminal end a run as Ctrl-C does.

    A signal that is ignored, as a lost terminal is under nohup, stays ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_ENDING = (signal.SIGTERM, signal.SIGHUP)


def _job_in_a_copy() -> str | None:
    """Return the submission id of the job this is, if it runs in a copy of a working directory."""
    described = os.environ.get(_JOB)
    if described is None:
        return None
    job = json.loads(described)
    if not job.get("runtime_env", {}).get("working_dir"):
        return None
    return str(job.get("metadata", {}).get("job_submission_id", "job"))
