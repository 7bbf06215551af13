"""A shard's process, without Ray around it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from async_sgd.rules import Pieces
from paramserver.actor import ShardServer
from paramserver.ledger import Ledger
from paramserver.optimizers import AnyOptimizer
from paramserver.packing import pack
from paramserver.progress import Budget, Progress
from paramserver.rounds import Answer, Ask, Round, RoundProgram, Sample, Step, dots
from paramserver.sequencer import Sequencer
from paramserver.shard_config import RoundsConfig, ShardConfig
from paramserver.transports.shared_memory import Host

NUMEL = 128


class NormFirst(RoundProgram):
    """Asks for a sum before anything else, as a program does that goes on from its memory."""

    def round(self, x: Tensor) -> Round:
        norm = float((yield from dots((x, x)))[0])
        answer: Answer = yield Ask("gradient", x, Sample("all"))
        return Step(x - answer.vector / norm, answer.loss, None)


class Spec:
    def build(self, params: Sequence[nn.Parameter]) -> NormFirst:
        return NormFirst(params, {"lr": 1.0})


@contextmanager
def two_shards() -> Iterator[tuple[ShardServer, ShardServer]]:
    name = uuid.uuid4().hex
    servers = []
    for index in range(2):
        config = ShardConfig(
            index=index,
            address=f"{name}-{index}",
            capacity=6,
            token="secret",
            fingerprint="layout",
            optimizer=cast(AnyOptimizer, Spec()),
            rounds=RoundsConfig(
                cut=range(index * 64, (index + 1) * 64), num_examples=8, num_workers=1
            ),
        )
        servers.append(ShardServer(config, pack(torch.ones(64)), torch.float32))
    try:
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.close()


def test_a_followers_share_never_comes_before_the_leader_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def serve_and_be_slow(host: Host, server: Any) -> None:
        serve(host, server)
        time.sleep(0.2)  # time enough for the thread to read what has come in

    serve = Host.serve
    monkeypatch.setattr(Host, "serve", serve_and_be_slow)
    sequencer = Sequencer(
        Pieces().build(1), budget=Budget(), progress=Progress(), ledger=Ledger(), on_nan="pass"
    )
    with two_shards() as (leader, follower):
        follower.follow()

        leader.lead(sequencer, [follower._config.address], 5.0)

        deadline = time.monotonic() + 10
        asked = leader._shard.runner  # type: ignore[union-attr]
        while not isinstance(asked.request, Ask) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert leader.failure() is None
        assert isinstance(asked.request, Ask)
        torch.testing.assert_close(asked.request.at, torch.ones(64))
