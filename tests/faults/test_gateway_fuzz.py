"""Whatever is sent to the gateway, it goes on, takes no more memory, and the state is untouched."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from paramserver.client import Reading
from paramserver.compression import Agreed, Int8, TopK
from paramserver.layout import Layout, Slot
from tests.support.clusters import FINGERPRINT, TOKEN, GrpcCluster
from tests.support.fuzz import Fuzzer

NUMEL = 640
LAYOUT = Layout((Slot("weight", 0, (16, 40)),), torch.float32)
AGREED = Agreed(layout=LAYOUT, cuts=LAYOUT.cuts(2), push=TopK(share=0.1), pull=Int8(), seed=0)


class OpenCluster(GrpcCluster):
    settings: dict[str, Any] = {  # noqa: RUF012
        "listen": "127.0.0.1:0",
        "calls_per_s": 1e6,
        "linger_s": 0.1,
        "num_clients": 16,
        "agreed": AGREED,
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
        assert cluster.cuts == AGREED.cuts
        payload_bytes = AGREED.shard_end(0, 0).push_bytes or 0
        make = lambda seed: Fuzzer(  # noqa: E731
            cluster.gateway.address, TOKEN, FINGERPRINT, NUMEL // 2, seed, payload_bytes
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
        assert torch.allclose(torch.cat(reading.params), torch.zeros(NUMEL), atol=0.01)
        assert torch.equal(cluster.params(), torch.zeros(NUMEL))
