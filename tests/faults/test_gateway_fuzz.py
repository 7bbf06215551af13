"""Whatever is sent to the gateway, it goes on, takes no more memory, and the state is untouched."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from paramserver.client import Reading
from tests.support.clusters import FINGERPRINT, TOKEN, GrpcCluster
from tests.support.fuzz import Fuzzer

NUMEL = 640


class OpenCluster(GrpcCluster):
    settings: dict[str, Any] = {  # noqa: RUF012
        "listen": "127.0.0.1:0",
        "calls_per_s": 1e6,
        "linger_s": 0.1,
        "num_clients": 16,
    }


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    "num_messages", [600, pytest.param(24_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_nonsense_changes_nothing(num_messages: int) -> None:
    with OpenCluster(torch.ones(NUMEL), shards=2, readers=9) as cluster:
        client = cluster.join(0)
        client.first_read()
        make = lambda seed: Fuzzer(  # noqa: E731
            cluster.gateway.address, TOKEN, FINGERPRINT, NUMEL // 2, seed
        )
        make(0).run(200)
        before, threads = resident(), threading.active_count()
        fuzzer = make(1)

        fuzzer.run(num_messages)

        assert {"UNAUTHENTICATED", "FAILED_PRECONDITION"} <= set(fuzzer.codes), fuzzer.codes
        assert torch.equal(cluster.params(), torch.ones(NUMEL))
        assert cluster.sequencer.version == 0
        assert cluster.sequencer.live() == [0]
        assert [host.failure for host in cluster.hosts] == [None, None]
        assert resident() - before < 64 * 2**20
        assert threading.active_count() <= threads + 40
        for slot in client.slots:
            slot.fill_(1.0)
        reading = client.push(norm=1.0)
        assert isinstance(reading, Reading)
        assert torch.equal(torch.cat(reading.params), torch.zeros(NUMEL))
