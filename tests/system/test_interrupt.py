"""Ctrl-C on a real command: the record is written and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


def children_of(group: int) -> list[str]:
    """Return the command lines of processes of this user whose environment names the group."""
    mark = f"PARAMSERVER_TEST={group}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:  # it has ended meanwhile, or is not ours
                continue
    return found


def start(*flags: str) -> subprocess.Popen[str]:
    """Start ``paramserver train`` in an environment that names this process."""
    command = [sys.executable, "-m", "deploy", "train", *flags]
    environment = {**os.environ, "PARAMSERVER_TEST": str(os.getpid()), "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def left(timeout_s: float = 15) -> list[str]:
    """Return what has not ended in time: Ray's own processes end after their driver."""
    deadline = time.monotonic() + timeout_s
    while (found := children_of(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


@pytest.mark.parametrize("mode", ["async", pytest.param("sync", marks=pytest.mark.long)])
def test_ctrl_c_writes_the_record_and_leaves_nothing(tmp_path: Path, mode: str) -> None:
    out = tmp_path / "run"
    process = start("--mode", mode, "--epochs", "100000", "--out", str(out))
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)  # until the run has written its first line

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=50)

    assert process.returncode == 130, output
    assert json.loads((out / "result.json").read_text())["stopped_because"] == "interrupted"
    assert (out / "checkpoint" / "manifest.json").exists()
    assert left() == []


def test_ctrl_c_while_ray_starts_leaves_nothing(tmp_path: Path) -> None:
    process = start("--out", str(tmp_path / "run"))
    deadline = time.monotonic() + 60
    while not any("/raylet" in line for line in children_of(os.getpid())):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=50)

    assert process.returncode == 130, output
    assert output.endswith("paramserver: interrupted\n")
    assert left() == []
