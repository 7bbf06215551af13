from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from deploy import benching
from deploy.bench import namespaces, remote_peers, remote_raylets
from deploy.bench.figures import Report
from deploy.bench.namespaces import Networks
from deploy.bench.remote_raylets import SgdServer, store_bytes
from deploy.flags import UsageError

needs_networks = pytest.mark.skipif(
    namespaces.why_not() is not None, reason=str(namespaces.why_not())
)


def test_where_no_networks_can_be_made_it_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(UsageError, match=r"cannot: .* need Linux and root; .* with --loopback"):
        benching.run(["remote", "--quick"])


def test_loopback_is_of_remote_only() -> None:
    with pytest.raises(UsageError, match="--loopback is of the benchmark remote; train uses no"):
        benching.run(["train", "--loopback"])


@pytest.mark.long
@pytest.mark.system
def test_push_and_pull_is_measured_over_loopback(capfd: pytest.CaptureFixture[str]) -> None:
    code = benching.run(["remote", "--quick", "--loopback", "--json"])

    figures = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert code == 0
    assert [figure["contender"] for figure in figures] == ["ours", "TCP socket", "bare gRPC stream"]
    assert all(figure["median"] > 0 for figure in figures)


@needs_networks
def test_two_networks_see_each_other_and_nothing_of_them_is_left() -> None:
    with namespaces.networks() as networks:
        routes = networks.inside("near", ["ip", "route"])
        told = subprocess.run(routes, capture_output=True, text=True, check=True).stdout
        assert told.splitlines() == [
            "10.88.0.0/24 dev cable proto kernel scope link src 10.88.0.1 "
        ]
        assert "10.88.0" not in _own_addresses()
        pids = networks.pids.values()

    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "cable" not in _own_addresses()


def _own_addresses() -> str:
    return subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout


def test_the_peer_at_the_far_end_takes_a_step_on_a_read_only_gradient() -> None:
    server = SgdServer(3, lr=0.5)
    gradient = np.array([1, 2, -4], np.float32)
    gradient.flags.writeable = False
    server.push_pull(gradient)

    params = server.push_pull(gradient)

    assert params.tolist() == [-1, -2, 4]


@pytest.mark.parametrize("numel", [2**16, 2**23, 2**25])
def test_an_object_store_has_room_for_several_exchanges_a_second(numel: int) -> None:
    assert store_bytes(numel) >= 16 * 4 * numel


def test_an_end_without_namespaces_of_its_own_leaves_this_machine_alone() -> None:
    with pytest.raises(RuntimeError, match=r"^an end has namespaces of its own; paramserver"):
        remote_raylets.main(["far", "8"])


def test_an_end_knows_nothing_of_another_ray() -> None:
    own = {"PATH": "/bin", "RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token"}

    environment = remote_peers.environment(own)

    assert environment["PATH"] == "/bin"
    assert "RAY_ADDRESS" not in environment
    assert environment["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        ({"ours": [2.0]}, None),
        ({"ours": [2.0], remote_peers.RAY: []}, None),
        ({"ours": [2.0], remote_peers.RAY: [6.0]}, None),
        (
            {"ours": [2.0], remote_peers.RAY: [5.0]},
            "ours is 2.50 times as fast as Ray object store; the aim is 3",
        ),
    ],
)
def test_a_missed_aim_is_told(rounds: dict[str, list[float]], told: str | None) -> None:
    assert remote_peers.missed(rounds) == told


def test_a_peer_that_fails_has_no_more_turns_and_the_benchmark_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(repeats: int) -> list[float]:
        raise RuntimeError("its near end has failed")

    report, rounds = Report("remote", json=True, quick=False), {"ours": [1.0]}
    peers: dict[str, remote_peers.Measure] = {"broken": fail, "well": lambda repeats: [2.0]}

    remote_peers.take_turns(report, peers, 1, rounds)

    assert list(peers) == ["well"]
    assert rounds["well"] == [2.0]
    assert not report.ours_failed
    assert "broken: did not run: RuntimeError: its near end has failed" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.system
@pytest.mark.timeout(300)
@needs_networks
def test_the_peers_row_is_printed_and_nothing_of_ray_is_left() -> None:
    with _bench("--json") as bench:
        seen: set[_Process] = set()
        while bench.poll() is None:
            seen = _descendants(bench.pid) | seen  # by their newest names
            time.sleep(0.1)
        assert bench.stdout is not None
        figures = [json.loads(line) for line in bench.stdout]

    bare = [f for f in figures if "link" not in f["size"]]
    assert bench.returncode == 0
    assert [f["contender"] for f in bare] == [
        "ours", "TCP socket", "bare gRPC stream", "Ray object store",
    ]  # fmt: skip
    assert all(f["ratios"]["Ray object store"] > 0 for f in bare)
    assert "Ray object store" not in {f["contender"] for f in figures if f not in bare}
    assert _num_raylets(seen) == 2
    assert not _left(seen)
    assert not _files_of_ray()


@pytest.mark.long
@pytest.mark.system
@pytest.mark.timeout(300)
@needs_networks
def test_nothing_of_ray_outlives_a_benchmark_that_is_killed() -> None:
    with _bench() as bench:
        while _num_raylets(seen := _descendants(bench.pid)) < 2:
            assert bench.poll() is None
            time.sleep(0.1)

        bench.kill()

        left = _left(seen)
    assert not left
    assert not _files_of_ray()


@pytest.mark.long
@pytest.mark.system
@pytest.mark.timeout(300)
@needs_networks
def test_the_peers_gradient_and_parameters_go_over_the_cable() -> None:
    report, numel = Report("remote", json=True, quick=True), 2**20
    with (
        namespaces.networks() as networks,
        remote_peers.started(report, networks, numel) as peers,
    ):
        sent, received = _over_the_cable(networks)

        times = peers[remote_peers.RAY](2)

        sent_now, received_now = _over_the_cable(networks)
    assert len(times) == 2
    exchanged = 3 * 4 * numel  # one exchange warms up
    assert exchanged <= sent_now - sent < 1.2 * exchanged
    assert exchanged <= received_now - received < 1.2 * exchanged


@contextmanager
def _bench(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "deploy", "bench", "remote", "--quick", "--peers", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        try:
            yield bench
        finally:
            bench.kill()


@dataclass(frozen=True)
class _Process:
    pid: int
    started: int  # ids come again
    name: str = field(compare=False)  # another program's, later
    space: str = field(compare=False)


def _processes() -> dict[_Process, int]:
    """The parent's id of every process that has not ended."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat, space = (folder / "stat").read_text(), os.readlink(folder / "ns" / "pid")
            except OSError:  # it has ended meanwhile
                continue
            name, _, rest = stat.partition("(")[2].rpartition(") ")
            state, parent, *others = rest.split()
            if state not in "ZX":  # it has, and its parent has not looked
                found[_Process(int(folder.name), int(others[17]), name, space)] = int(parent)
    return found


def _descendants(pid: int) -> set[_Process]:
    """What ``pid`` or its descendants have started."""
    parents, found, new = _processes(), set[_Process](), {pid}
    while new:
        children = {child for child, parent in parents.items() if parent in new}
        found |= children
        new = {child.pid for child in children}
    return found


def _num_raylets(processes: set[_Process]) -> int:
    """In how many process namespaces there is one; its children have its name at first."""
    return len({process.space for process in processes if process.name == "raylet"})


def _left(processes: set[_Process], timeout_s: float = 10) -> set[_Process]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + timeout_s
    while (left := processes & _processes().keys()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _files_of_ray() -> list[str]:
    """Files where the benchmark's Ray has its own, had it not a ``/dev/shm`` to itself."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(("ray", "plasma"))]


def _over_the_cable(networks: Networks) -> tuple[int, int]:
    """Bytes the near network has sent and received."""
    command = networks.inside("near", ["ip", "-s", "-j", "link", "show", "cable"])
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted = json.loads(told)[0]["stats64"]
    return counted["tx"]["bytes"], counted["rx"]["bytes"]
