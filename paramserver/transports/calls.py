"""The short calls to a run that listens: a place in it, its parameters once, how it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
import torch
from torch import Tensor

from paramserver.errors import ProtocolError
from paramserver.layout import Layout, layout_from_json
from paramserver.messages import Kind, Message
from paramserver.transports import schema
from paramserver.transports.frames import Filling, read_frame, read_message
from paramserver.transports.grpc_connection import GrpcConnection
from paramserver.transports.remote import Remote

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A guest's place in a run, and how the run is laid out."""

    worker: int
    incarnation: int
    layout: Layout
    cuts: tuple[range, ...]
    slot_rows: int
    wait_s: float
    gateways: tuple[str, ...]
    """Which each shard is behind; empty for the one that was asked."""

    def connect(self, remote: Remote, timeout_s: float) -> list[GrpcConnection]:
        """Say hello to every shard, the leader last; return the connections in order."""
        hello = Message(
            Kind.HELLO,
            worker=self.worker,
            incarnation=self.incarnation,
            text=self.layout.fingerprint,
        )
        connections: list[GrpcConnection] = []
        try:
            for shard in reversed(range(len(self.cuts))):
                gateway = self.gateways[shard] or remote.address
                connection = GrpcConnection(
                    replace(remote, address=gateway),
                    shard,
                    len(self.cuts[shard]),
                    hello,
                    dtype=self.layout.dtype,
                    slot_rows=self.slot_rows,
                    timeout_s=timeout_s,
                )
                connections.insert(0, connection)
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        return connections


def register(remote: Remote, *, reads: bool, timeout_s: float) -> Place:
    """Ask for a place as a worker, or as one who ``reads`` only.

    Raises:
        ResourceError: There is none.
        ParamServerError: The run is not there, or does not let this client in.
    """
    request = schema.RegisterRequest(reads=reads)
    reply = _ask(remote, "Register", request, schema.RegisterReply, timeout_s)
    stops = list(reply.cuts)
    return Place(
        worker=reply.worker,
        incarnation=reply.incarnation,
        layout=layout_from_json(json.loads(reply.layout)),
        cuts=tuple(range(a, b) for a, b in zip([0, *stops], stops, strict=False)),
        slot_rows=reply.slot_rows,
        wait_s=reply.wait_s,
        gateways=tuple(reply.gateways),
    )


def snapshot(
    remote: Remote, cuts: tuple[range, ...], dtype: torch.dtype, *, timeout_s: float
) -> tuple[int, Tensor]:
    """Read the parameters once; return their version and the flat vector.

    Raises:
        ParamServerError: The run is not there, or does not let this client in.
    """
    params = torch.zeros(cuts[-1].stop, dtype=dtype)

    def read(channel: grpc.Channel) -> int:
        call = channel.unary_stream(schema.method("Snapshot"))(
            schema.SnapshotRequest().SerializeToString(),
            metadata=remote.metadata(),
            timeout=timeout_s,
        )
        versions = {_fill(call, params[cut.start : cut.stop]) for cut in cuts}
        if len(versions) != 1:
            raise ProtocolError(f"torn read: the shards sent versions {sorted(versions)}")
        return versions.pop()

    return _called(remote, read, timeout_s), params


def stats(remote: Remote, *, timeout_s: float) -> Any:
    """Return what has come and gone, a `StatsReply`."""
    return _ask(remote, "Stats", schema.StatsRequest(), schema.StatsReply, timeout_s)


def serves(remote: Remote, *, timeout_s: float) -> bool:
    """Whether the shards serve."""
    reply = _ask(remote, "Health", schema.HealthRequest(), schema.HealthReply, timeout_s)
    return bool(reply.serves)


def _fill(frames: Iterator[bytes], into: Tensor) -> int:
    """Read one grant; return its version."""
    first = read_frame(next(frames))
    filling = Filling(first, read_message(first), [into])
    while not filling.is_whole:
        filling.add(read_frame(next(frames)))
    return filling.message.version


def _ask(remote: Remote, name: str, request: Any, reply: Any, timeout_s: float) -> Any:
    def ask(channel: grpc.Channel) -> Any:
        call = channel.unary_unary(schema.method(name), None, reply.FromString)
        return call(request.SerializeToString(), metadata=remote.metadata(), timeout=timeout_s)

    return _called(remote, ask, timeout_s)


def _called(remote: Remote, call: Callable[[grpc.Channel], T], timeout_s: float) -> T:
    with closing(remote.channel()) as channel:
        try:
            return call(channel)
        except grpc.RpcError as error:
            remote.raise_named(error, 0, "connecting", timeout_s)
