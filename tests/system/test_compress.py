"""Real processes that push and read through compression."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from async_sgd.replay import Replay
from async_sgd.trainer import AsyncTrainer
from deploy.outcome import outcome
from paramserver.compression import COMPRESSIONS
from paramserver.optimizers import Adam
from paramserver.reach import Reach, Transport
from sync.trainer import SyncTrainer
from workers.config import RunConfig
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shared-memory", "grpc"])
def test_a_compressed_run_replays_bit_for_bit_and_tells_its_bytes(
    tmp_path: Path, transport: Transport
) -> None:
    """One thread each, so that sums have one order."""
    config = RunConfig(
        workers=2, updates=60, evaluate_every_s=0, threads=1, out=tmp_path / "run",
        compress=COMPRESSIONS.parse("top-k:share=0.05"), compress_pull=COMPRESSIONS.parse("int8"),
    )  # fmt: skip

    AsyncTrainer(
        task("digits"), Adam(lr=0.01), config, shards=2, reach=Reach(transport=transport)
    ).fit()

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    push, pull = record["traffic"]["push"], record["traffic"]["pull"]
    assert push["count"] >= 60
    assert push["bytes"] < push["plain_bytes"] / 5
    assert pull["bytes"] < pull["plain_bytes"] / 2.5  # the first reads are plain
    assert [name for name in outcome(record).columns[0].cells if name.endswith("ed")] == [
        "pushed", "pulled", "dropped",
    ]  # fmt: skip
    if transport == "grpc":
        gateway = record["gateway"]  # headers that travel are others than those that are counted
        assert gateway["received_bytes"] == pytest.approx(push["bytes"], rel=0.1)
        assert gateway["sent_bytes"] == pytest.approx(pull["bytes"], rel=0.2)  # evaluations, too
    assert Replay(tmp_path / "run").run().distance == 0.0


@pytest.mark.long
@pytest.mark.parametrize("collective", ["shared_memory", "gloo"])
def test_ranks_send_factors_and_stay_equal(tmp_path: Path, collective: str) -> None:
    config = RunConfig(
        workers=2, updates=60, evaluate_every_s=0, out=tmp_path / "run",
        compress=COMPRESSIONS.parse("powersgd"),
    )  # fmt: skip

    result = SyncTrainer(task("digits"), Adam(lr=0.01), config, collective=collective).fit()

    traffic = result.record["traffic"]["push"]
    assert traffic["count"] == 2 * 60
    assert traffic["bytes"] < traffic["plain_bytes"] / 8
    assert result.metrics["accuracy"] > 0.8
