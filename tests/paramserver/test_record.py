from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paramserver import record
from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.record import Result, RunFolder, read_record, versions


def line(updates: int, **figures: object) -> dict[str, object]:
    return {
        "kind": "train",
        "gradients": 2 * updates,
        "updates": updates,
        "seconds": 0.5,
        **figures,
    }


def started(path: Path) -> RunFolder:
    folder = RunFolder.create(path, "digits-async")
    folder.write_config({"task": "digits", "workers": 2})
    return folder


def test_a_folder_of_its_own_is_made_for_a_run_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    folder = RunFolder.create(None, "my.tasks:digits-async")

    assert re.fullmatch(r"runs/\d{8}-\d{6}-my\.tasks-digits-async", str(folder.path))
    assert folder.path.is_dir()


def test_runs_of_the_same_second_get_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Now:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "datetime", Now)

    names = [RunFolder.create(None, "a").path.name for _ in range(3)]

    assert names == ["20260102-030405-a", "20260102-030405-a-2", "20260102-030405-a-3"]


def test_a_folder_with_other_files_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    assert RunFolder.create(tmp_path, "a").metrics.exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "updates.npz", "result.json"])
def test_the_folder_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")

    message = r"holds another run: choose another folder \(--out\), or .* \(--resume "
    with pytest.raises(RecordError, match=message):
        RunFolder.create(tmp_path, "a")

    assert (tmp_path / name).read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RecordError, match=r"^cannot write a record to .*choose another"):
            RunFolder.create(path, "a")


def test_runs_being_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()

    with pytest.raises(RecordError, match=r"^cannot write a record to runs: "):
        RunFolder.create(None, "a")


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    folder = started(tmp_path)
    for updates in (1, 2):
        folder.log(line(updates, loss=0.25))

        logged = [json.loads(text) for text in folder.metrics.read_text().splitlines()]

        assert logged[-1] == line(updates, loss=0.25)
    assert len(logged) == 2


def test_a_line_without_its_axes_is_refused(tmp_path: Path) -> None:
    folder = started(tmp_path)

    with pytest.raises(ValueError, match=r"^a line of metrics needs updates, seconds$"):
        folder.log({"gradients": 1, "loss": 0.5})

    assert folder.metrics.read_text() == ""


def test_what_is_not_finite_is_null_and_numpy_is_plain(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.log(line(1, loss=math.nan, norm=np.float32("inf"), n=np.int64(3)))
    folder.write_result({"best": {"loss": math.inf}, "histogram": {0: 5}, "out": Path("a/b")})

    read = read_record(tmp_path)

    assert read.metrics == [line(1, loss=None, norm=None, n=3)]
    assert read.result == {"best": {"loss": None}, "histogram": {"0": 5}, "out": "a/b"}


def test_a_result_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    folder = started(tmp_path)
    folder.write_result({"updates": 1})
    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RecordError, match=r"^cannot write .*result.json: .*No space left"):
        folder.write_result({"updates": 2})

    assert read_record(tmp_path).result == {"updates": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_whole_record_is_read_back(tmp_path: Path) -> None:
    folder = started(tmp_path)
    ledger = Ledger()
    ledger.append(
        version=1, worker=0, incarnation=0, seq=1, clock=1, read_version=0, staleness=0,
        start=0.0, end=0.1, samples=32, loss=0.5, grad_norm=1.0,
    )  # fmt: skip
    ledger.save(folder.updates)
    folder.log(line(1, loss=0.5))
    folder.write_result({"updates": 1})

    read = read_record(tmp_path)

    assert (read.path, read.config) == (tmp_path, {"task": "digits", "workers": 2})
    assert (read.result, read.metrics) == ({"updates": 1}, [line(1, loss=0.5)])
    assert read.updates is not None
    assert read.updates["version"].tolist() == [1]


def test_the_record_of_a_killed_run_says_what_it_was(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.log(line(1))
    with folder.metrics.open("a") as file:
        file.write('{"kind": "train", "grad')

    read = read_record(tmp_path)

    assert read.config["task"] == "digits"
    assert read.metrics == [line(1)]
    assert (read.result, read.updates) == (None, None)


def test_a_resumed_run_does_not_write_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    started(tmp_path).log(line(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind"')

    RunFolder.reopen(tmp_path).log(line(2))

    assert read_record(tmp_path).metrics == [line(1), line(2)]


def test_rewinding_forgets_what_the_resumed_run_does_again(tmp_path: Path) -> None:
    folder = started(tmp_path)
    for updates in (1, 2, 3):
        folder.log(line(updates))
    folder.write_result({"updates": 3})

    folder.rewind(updates=2)
    folder.log(line(3, loss=0.5))

    read = read_record(tmp_path)
    assert read.metrics == [line(1), line(2), line(3, loss=0.5)]
    assert read.result is None


@pytest.mark.parametrize("use", [RunFolder.reopen, read_record])
def test_a_folder_that_is_no_record_is_refused(tmp_path: Path, use: Any) -> None:
    with pytest.raises(RecordError, match=r"is not the record of a run: it has no config\.json$"):
        use(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"task": ', r"^cannot read .*config\.json: "),
        ("config.json", "[]", r"^cannot read .*config\.json: it does not hold a JSON object"),
        ("result.json", "\x00", r"^cannot read .*result\.json: "),
        ("metrics.jsonl", '{"a": 1}\n', r"^line 1 of .* lacks one of gradients, updates, seconds"),
        ("metrics.jsonl", '{"a\n{}\n', r"^cannot read line 1 of .*metrics\.jsonl: "),
        ("updates.npz", "no zip", r"^cannot read .*updates\.npz as a ledger"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    started(tmp_path)
    (tmp_path / name).write_text(text)

    with pytest.raises(RecordError, match=message):
        read_record(tmp_path)


def test_a_record_without_metrics_is_refused(tmp_path: Path) -> None:
    started(tmp_path).metrics.unlink()

    with pytest.raises(
        RecordError, match=r"is not the record of a run: cannot read metrics\.jsonl"
    ):
        read_record(tmp_path)


def test_versions_name_every_part_and_need_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    outside = versions()
    monkeypatch.setenv("PATH", str(tmp_path))
    without_git = versions()

    assert {"python", "platform", "torch", "ray", "numpy"} <= outside.keys()
    assert without_git == outside
    assert "git" not in outside


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_versions_name_the_commit_and_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=0"]
        subprocess.run(["git", *identity, *words], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    git("init")
    Path("file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = versions()["git"]
    Path("file").write_text("2")

    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    assert versions()["git"] == f"{clean}-dirty"


def test_a_result_prints_in_one_line(tmp_path: Path) -> None:
    result = Result(
        path=Path("runs/a"),
        metrics={"accuracy": 0.97251, "loss": 0.1},
        best={},
        checkpoint=None,
        stopped_because="accuracy=0.97 reached",
        record={},
    )

    assert str(result) == "accuracy 0.9725, loss 0.1 (accuracy=0.97 reached; record: runs/a)"
