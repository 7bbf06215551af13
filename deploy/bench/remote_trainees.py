"""The two ends of training over a slow link: the real worker's loop, and a shard behind a gateway.

    near: a process for each worker  <--- link --->  far: gateway --- shared memory --- shard

`remote_training` starts ``serve`` at the far side, hands what it says to each ``work`` at the near
one, and lets all of them go at once.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch

from async_sgd.rules import RULES
from deploy.bench import children
from deploy.bench.remote_training import NUM_WORKERS, PLAIN, QUICK_SECONDS, SECONDS, task
from deploy.bench.work import OPTIMIZER, SEED, Meter
from paramserver.actor import ShardServer
from paramserver.compression import COMPRESSIONS, Compression, agreed_by
from paramserver.freed_memory import keep_freed_memory
from paramserver.layout import Layout
from paramserver.packing import pack
from paramserver.sequencer import Sequencer
from paramserver.shard_config import ShardConfig
from paramserver.transports import grpc_connection
from paramserver.transports.gateway import Gateway
from paramserver.transports.gateway_config import GatewayConfig
from paramserver.transports.remote import Remote
from workers.actor import Servers
from workers.loop import train as train_worker
from workers.task import batches_of, build_data, build_model


class Enough(Exception):  # noqa: N818  # nothing went wrong
    """The measurement is over."""


def serve(told: dict[str, Any]) -> None:
    """Serve a shard over gRPC until standard input ends."""
    keep_freed_memory()
    what = task(quick=told["quick"])
    layout = Layout.of(build_model(what, SEED))
    address, token = f"bench-{secrets.token_hex(6)}", secrets.token_hex(8)
    way = _compression(told["how"])
    gateway = Gateway(
        GatewayConfig(
            listen=f"{told['host']}:0",
            shards=(address,),
            cuts=layout.cuts(1),
            dtype=layout.dtype,
            token=token,
            fingerprint=layout.fingerprint,
            agreed=agreed_by(layout, layout.cuts(1), way, way, SEED),
            clear_text=True,  # the cable leads nowhere
        )
    )
    torch.set_num_threads(1)
    with children.shard(_serve_shard, address, token, told["rule"], told["quick"]):
        try:
            print(json.dumps({**told, "address": gateway.start(), "token": token}), flush=True)
            sys.stdin.read()
        finally:
            gateway.close()


def _serve_shard(address: str, token: str, rule: str, quick: bool, ready: Any) -> None:
    """Serve until the process is ended."""
    model = build_model(task(quick=quick), SEED)
    layout = Layout.of(model)
    config = ShardConfig(
        index=0,
        address=address,
        capacity=NUM_WORKERS + 1,
        token=token,
        fingerprint=layout.fingerprint,
        optimizer=OPTIMIZER,
    )
    server = ShardServer(config, pack(layout.flatten(model)), layout.dtype)
    server.lead(Sequencer(RULES.parse(rule).build(NUM_WORKERS)), [], 30.0)
    ready.set()
    threading.Event().wait()


def work(told: dict[str, Any], worker: int) -> None:
    """Train as ``worker`` when standard input says so, and say how many gradients a second."""
    keep_freed_memory()
    torch.set_num_threads(1)
    if told["alone"]:
        vars(grpc_connection)["machine"] = lambda: f"machine {worker}"
    what, way = task(quick=told["quick"]), _compression(told["how"])
    model, examples = build_model(what, SEED), build_data(what).train
    layout = Layout.of(model)
    cuts = layout.cuts(1)
    servers = Servers(
        addresses=("",),
        cuts=cuts,
        layout=layout,
        token=told["token"],
        timeout_s=60.0,
        wait_s=60.0,
        transport="grpc",
        remotes=(Remote(address=told["address"], token=told["token"], clear_text=True),),
        agreed=agreed_by(layout, cuts, way, way, SEED),
    )
    meter = Meter(*(QUICK_SECONDS if told["quick"] else SECONDS))

    def count(_: int) -> None:
        if not meter.count():
            raise Enough

    batches = batches_of(
        what, examples, what.batch_size, seed=SEED, worker=worker, num_workers=NUM_WORKERS
    )
    print("ready", flush=True)
    sys.stdin.readline()
    with servers.connect(worker, 1) as client, contextlib.suppress(Enough):
        train_worker(
            what, model, layout, cuts, client, examples, batches, seed=SEED,
            compress=way, compress_pull=way, before_push=count,
        )  # fmt: skip
    print(meter.rate(), flush=True)


def _compression(how: str) -> Compression | None:
    return None if how == PLAIN else COMPRESSIONS.parse(how)


def main(argv: Sequence[str]) -> None:
    """Be one of the two ends."""
    match argv:
        case ["serve", told]:
            serve(json.loads(told))
        case ["work", told, worker]:
            work(json.loads(told), int(worker))
        case _:
            raise ValueError(f"an end serves or works, got {argv}")


if __name__ == "__main__":
    main(sys.argv[1:])
