"""Runs that are reached over gRPC: their own workers', and guests that know nothing of Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from async_sgd import AsyncTrainer
from paramserver.errors import ResourceError, RunFailedError
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.optimizers import Adam
from paramserver.reach import Reach
from paramserver.transports.remote import split_address
from tests.support.certificates import Authority
from tests.support.processes import kill_and_wait, titled
from workers.config import RunConfig
from workers.task import build_model
from workers.tasks import task

pytestmark = pytest.mark.system

GUEST = """
import json, sys, torch
import paramserver

told = json.load(open(sys.argv[1]))
with paramserver.Client.connect(
    told["address"], told["token"], told["ca"], certificate=sys.argv[2], key=sys.argv[3]
) as client:
    reading = client.first_read()
    for slot in client.slots:
        slot.zero_()
    for _ in range(5):
        reading = client.push(norm=0.0)
    print(client.worker, client.layout.num_parameters, reading.version > 4, "ray" in sys.modules)
"""


def test_workers_train_over_grpc_when_told_to_and_nothing_is_left(tmp_path: Path) -> None:
    config = RunConfig(workers=2, epochs=6, evaluate_every_s=0.0, out=tmp_path / "run")
    reach = Reach(transport="grpc")

    result = AsyncTrainer(task("digits"), Adam(lr=3e-3), config, shards=2, reach=reach).fit()

    assert result.metrics["accuracy"] > 0.9
    assert not (tmp_path / "run" / "connect.json").exists()


@pytest.mark.long
def test_a_run_whose_gateway_is_lost_ends_once_by_name_with_a_complete_record(
    tmp_path: Path,
) -> None:
    killed: list[int] = []

    def kill(status: Mapping[str, Any]) -> None:
        if killed or status["updates"] < 20:
            return
        for pid in titled("ray::GatewayServer"):
            kill_and_wait(pid)
            killed.append(pid)

    config = RunConfig(workers=2, epochs=10_000, evaluate_every_s=0.0, out=tmp_path / "run")
    reach = Reach(transport="grpc")
    trainer = AsyncTrainer(task("digits"), Adam(), config, reach=reach, progress=kill)

    with pytest.raises(RunFailedError, match="a gateway was lost, by which processes") as failed:
        trainer.fit()

    assert len(killed) == 1
    assert failed.value.record == str(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "a gateway was lost" in result["stopped_because"]
    assert result["updates"] >= 20
    assert (
        len(Ledger.load(tmp_path / "run" / "updates.npz").columns()["seq"]) == result["gradients"]
    )


@pytest.mark.long
def test_a_guest_joins_over_mutual_tls_without_ray(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "certificates", "ours")
    server, guest = authority.identity("server"), authority.identity("guest")
    said: list[str] = []
    path = tmp_path / "run" / "connect.json"

    def invite(status: object) -> None:
        if said or not path.exists():
            return
        assert path.stat().st_mode & 0o777 == 0o600
        assert split_address(json.loads(path.read_text())["address"])[0] == "127.0.0.1"
        command = [
            sys.executable,
            "-c",
            GUEST,
            str(path),
            *map(str, (guest.certificate, guest.key)),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        said.append(
            subprocess.run(
                command, capture_output=True, text=True, timeout=60, env=environment, check=True
            ).stdout
        )

    config = RunConfig(workers=1, epochs=20, evaluate_every_s=0.0, out=tmp_path / "run")
    reach = Reach(
        listen="127.0.0.1:0",
        guests=1,
        tls_certificate=Path(str(server.certificate)),
        tls_key=Path(str(server.key)),
        tls_ca=authority.ca,
    )

    AsyncTrainer(task("digits"), Adam(lr=3e-3), config, reach=reach, progress=invite).fit()

    model = build_model(task("digits"), 0)
    assert said == [f"1 {Layout.of(model).num_parameters} True False\n"]


@pytest.mark.long
def test_a_run_does_not_listen_to_others_in_clear_text_unless_told_to(tmp_path: Path) -> None:
    config = RunConfig(workers=1, updates=1, out=tmp_path / "run")
    trainer = AsyncTrainer(task("digits"), Adam(), config, reach=Reach(listen="10.0.0.7:0"))

    with pytest.raises(ResourceError, match="could read the token and the parameters"):
        trainer.fit()
