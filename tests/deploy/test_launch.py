from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from deploy.flags import UsageError
from deploy.launch import check_folders, defaults, ended_in_order

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "GLOO_SOCKET_IFNAME", _JOB):
        monkeypatch.delenv(name, raising=False)


def in_a_job(monkeypatch: pytest.MonkeyPatch, *, copied: bool = True) -> None:
    """Pretend to be a driver that `ray job submit` started."""
    environment = {"working_dir": "gcs://_ray_pkg_1.zip"} if copied else {}
    job = {"runtime_env": environment, "metadata": {"job_submission_id": "first"}}
    monkeypatch.setenv(_JOB, json.dumps(job))


def test_at_home_nothing_is_taken_from_the_surroundings() -> None:
    assert defaults({}) == {}


def test_a_run_joins_the_cluster_it_is_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    assert defaults({}) == {"address": "10.0.0.1:6379"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mode": "sync"}, {"network_interface": "eth1"}),
        ({"mode": "sync", "collective": "shared_memory"}, {}),
        ({"mode": "async"}, {}),
        ({}, {}),
    ],
)
def test_gloos_own_variable_names_the_interface(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")

    assert defaults(given) == expected


def test_a_jobs_record_is_not_left_in_the_folder_that_ray_deletes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_a_job(monkeypatch)

    assert defaults({}) == {"out": Path.home() / "runs" / "first"}
    assert defaults({"out": Path("/runs/a")}) == {}
    assert defaults({"resume": Path("/runs/a")}) == {}


def test_a_job_without_a_copy_is_as_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, copied=False)

    assert defaults({}) == {}
    check_folders(Path("runs/a"), None)


@pytest.mark.parametrize("name", ["out", "resume"])
def test_a_job_refuses_a_folder_it_would_lose(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    in_a_job(monkeypatch)
    folders = {"out": None, "resume": None, name: Path("runs/a")}

    with pytest.raises(UsageError, match=f"^{name} is runs/a, in the job's copy of the working"):
        check_folders(**folders)


def test_a_job_may_name_folders_from_the_root_or_its_home(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch)

    check_folders(Path("/runs/a"), Path("~/runs/b"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_job_or_a_lost_terminal_ends_as_ctrl_c_does(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), ended_in_order():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_run_under_nohup_hears_no_lost_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
