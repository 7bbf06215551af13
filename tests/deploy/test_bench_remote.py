from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from deploy import benching
from deploy.bench import namespaces
from deploy.flags import UsageError


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
    assert [figure["contender"] for figure in figures] == ["ours", "TCP socket"]
    assert all(figure["median"] > 0 for figure in figures)


@pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))
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
