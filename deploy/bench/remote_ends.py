"""The two ends of `paramserver bench remote`, each with processes of its own, without Ray.

    near: client, socket, stream  <--- cable --->  far: gateway --- shared memory --- shard;
                                                        socket; stream

The driver starts ``python -m deploy.bench.remote_ends far HOST NUMEL``, reads one line of JSON, and
hands it to ``… near``, which then does what it reads line by line, and answers each line.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from async_sgd.rules import Asynchronous
from deploy.bench import children
from deploy.bench.bare_grpc import BareServer, bare_client
from deploy.bench.processes import STARTUP_S, timed
from deploy.bench.work import synthetic_gradient
from paramserver.actor import ShardServer
from paramserver.client import Client
from paramserver.freed_memory import keep_freed_memory
from paramserver.messages import Kind, Message
from paramserver.optimizers import SGD
from paramserver.packing import pack
from paramserver.sequencer import Sequencer
from paramserver.shard_config import ShardConfig
from paramserver.transports.frames import as_bytes
from paramserver.transports.gateway import Gateway
from paramserver.transports.gateway_config import GatewayConfig
from paramserver.transports.grpc_connection import GrpcConnection
from paramserver.transports.remote import Remote


def far(host: str, numel: int) -> None:
    """Serve a shard over gRPC, and a socket, until standard input ends."""
    keep_freed_memory()
    address, token = f"bench-{secrets.token_hex(6)}", secrets.token_hex(8)
    config = ShardConfig(
        index=0,
        address=address,
        capacity=2,
        token=token,
        fingerprint="flat",
        optimizer=SGD(lr=0.01),
    )
    gateway = Gateway(
        GatewayConfig(
            listen=f"{host}:0",
            shards=(address,),
            cuts=(range(numel),),
            dtype=torch.float32,
            token=token,
            fingerprint="flat",
            clear_text=True,  # the cable leads nowhere
        )
    )
    with children.shard(serve_shard, config, numel), contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0)))
        threading.Thread(target=_echo, args=(listener, 4 * numel), daemon=True).start()
        bare = BareServer(host, 4 * numel)
        stack.callback(bare.close)
        stack.callback(gateway.close)
        told = {
            "bare": bare.address,
            "address": gateway.start(),
            "token": token,
            "numel": numel,
            "socket": listener.getsockname()[:2],
        }
        print(json.dumps(told), flush=True)
        sys.stdin.read()


def serve_shard(config: ShardConfig, numel: int, ready: Any) -> None:
    """Serve until the process is ended."""
    server = ShardServer(config, pack(torch.zeros(numel)), torch.float32)
    server.lead(Sequencer(Asynchronous().build(1)), [], 30.0)
    ready.set()
    threading.Event().wait()


def near(told: dict[str, Any]) -> None:
    """Measure what standard input asks for, a contender and repeats a line."""
    torch.set_num_threads(1)
    keep_freed_memory()
    gradient = synthetic_gradient((told["numel"],))
    with (
        _client(told) as client,
        socket.create_connection(told["socket"], STARTUP_S) as plain,
        bare_client(told["bare"], 4 * told["numel"]) as bare,
    ):
        client.first_read()
        client.slots[0].copy_(gradient)
        received = as_bytes(torch.zeros_like(gradient))

        def exchange() -> None:
            plain.sendall(as_bytes(gradient).data)
            _receive(plain, received.data)

        contenders: dict[str, Callable[[], object]] = {
            "ours": client.push,
            "socket": exchange,
            "bare": bare,
        }
        for line in sys.stdin:
            asked = json.loads(line)
            times = timed(contenders[asked["contender"]], asked["repeats"])
            print(json.dumps(times), flush=True)


def _client(told: dict[str, Any]) -> Client:
    connection = GrpcConnection(
        Remote(address=told["address"], token=told["token"], clear_text=True),
        0,
        told["numel"],
        Message(Kind.HELLO, worker=0, incarnation=1, text="flat"),
    )
    return Client([connection], worker=0, incarnation=1)


def _echo(listener: socket.socket, size: int) -> None:
    """Send back what has come, ``size`` bytes at a time."""
    plain, _ = listener.accept()
    buffer = memoryview(bytearray(size))
    with plain:
        while _receive(plain, buffer):
            plain.sendall(buffer)


def _receive(plain: socket.socket, into: memoryview) -> bool:
    """Fill ``into``; False if the other side has ended."""
    while into:
        size = plain.recv_into(into)
        if not size:
            return False
        into = into[size:]
    return True


def main(argv: Sequence[str]) -> None:
    """Be one of the two ends."""
    match argv:
        case ["far", host, numel]:
            far(host, int(numel))
        case ["near", told]:
            near(json.loads(told))
        case _:
            raise ValueError(f"an end is near or far, got {argv}")


if __name__ == "__main__":
    main(sys.argv[1:])
