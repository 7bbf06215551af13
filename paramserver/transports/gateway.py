"""The shards' gRPC server: clients on other nodes, and without Ray, come in here.

It is a process beside the shards, on their node, and their client: what remote clients send is
checked here, put where the shard sees it, and told to it as a local worker would. So what comes
over the network is parsed where no parameters are, and the shards know one kind of client.

    client --- one stream a shard ---> gateway --- Unix socket, shared memory ---> shard 0, 1, …

Shards on several nodes have a gateway on each. That of shard 0 gives places to guests, reads
snapshots, and has the leader's way to the shards elsewhere (`paramserver.transports.tunnel`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from paramserver.client import Client
from paramserver.errors import ParamServerError, ProtocolError, ResourceError
from paramserver.messages import Kind, Message
from paramserver.transports import Connection, schema
from paramserver.transports.admission import Places, Rate, check, refuse
from paramserver.transports.calls import serves
from paramserver.transports.conversations import Conversations, shard_of
from paramserver.transports.frames import write_message
from paramserver.transports.gateway_config import GatewayConfig
from paramserver.transports.grpc_connection import GrpcConnection
from paramserver.transports.link import Link
from paramserver.transports.remote import (
    SERVER_OPTIONS,
    is_local,
    split_address,
)
from paramserver.transports.sessions import Session
from paramserver.transports.shared_memory import SharedMemoryConnection
from paramserver.transports.tunnel import Far, Tunnel, check_lead, led

logger = logging.getLogger(__name__)

_SNAPSHOT_READER: Final = -(10**6)
"""The reader that snapshots are read as; below all others."""

_CLOSE_S: Final = 2.0
_HEALTH_S: Final = 5.0


class Gateway:
    """Listens from `start` to `close`."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.address = config.listen
        self._token = config.token.encode()
        self._lock = threading.Lock()  # of the guests, who came, and what is counted
        self._came: set[int] = set()  # workers with a conversation, so far
        self._conversations = Conversations(
            self._connect,
            num_shards=len(config.shards),
            limit=config.num_clients,
            linger_s=config.linger_s,
            agreed=config.agreed,
        )
        self._counted = dict.fromkeys(("messages", "refused", "received_bytes", "sent_bytes"), 0)
        self._calls = Rate(config.calls_per_s)
        first = config.first_guest
        reserved_s = config.timeout_s
        self._workers = Places(
            range(first, first + config.guests), self._conversations.has, reserved_s
        )
        self._readers = Places(
            range(-2, -2 - config.guests, -1), self._conversations.has, reserved_s
        )
        self._incarnation = int(time.time())  # later than any of an earlier run of this record
        self._snapshots: Client | None = None
        self._snapshot_lock = threading.Lock()  # of the reader above
        self._server: grpc.Server | None = None
        self._tunnels: list[Tunnel] = []

    def start(self) -> str:
        """Listen; return the address, with the port that was taken.

        Raises:
            ResourceError: The address cannot be listened at, or a certificate not be read.
        """
        c = self.config
        handlers = {
            "Register": grpc.unary_unary_rpc_method_handler(
                self._guarded(self._register), schema.RegisterRequest.FromString, _encoded
            ),
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "Lead": grpc.stream_stream_rpc_method_handler(self._lead),
            "Snapshot": grpc.unary_stream_rpc_method_handler(
                self._snapshot, schema.SnapshotRequest.FromString
            ),
            "Stats": grpc.unary_unary_rpc_method_handler(
                self._guarded(self._stats), schema.StatsRequest.FromString, _encoded
            ),
            "Health": grpc.unary_unary_rpc_method_handler(
                self._guarded(self._health), schema.HealthRequest.FromString, _encoded
            ),
        }
        room = c.num_clients + len(c.shards) + 8  # a call that is one too many is told so
        server = grpc.server(
            ThreadPoolExecutor(room, thread_name_prefix="gateway"),
            handlers=[grpc.method_handlers_generic_handler(schema.SERVICE, handlers)],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=room,
        )
        credentials = None if c.identity is None else c.identity.server_credentials()
        try:
            if credentials is None:
                port = server.add_insecure_port(c.listen)
            else:
                port = server.add_secure_port(c.listen, credentials)
        except RuntimeError as error:
            raise ResourceError(
                f"cannot listen at {c.listen}: it is taken, or no address of this machine; choose "
                "another port, or 0 for any"
            ) from error
        if not c.listen.startswith("unix"):
            host, _ = split_address(c.listen)
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if credentials is None and not is_local(c.listen):
            logger.warning("listening in clear text at %s", self.address)
        server.start()
        self._server = server
        self._conversations.start()
        self._tunnels = [
            Tunnel(far, shard, c.secret)
            for shard, far in enumerate(c.shards)
            if isinstance(far, Far)
        ]
        return self.address

    def close(self) -> None:
        """End every conversation. Twice is harmless."""
        for tunnel in self._tunnels:
            tunnel.close()
        if self._server is not None:
            self._server.stop(0).wait(_CLOSE_S)
        self._conversations.close()
        if self._snapshots is not None:
            self._snapshots.close()

    def counted(self) -> dict[str, int]:
        """Return how much has come, gone, and been refused."""
        with self._lock:
            return {**self._counted, "clients": len(self._conversations)}

    def came(self) -> set[int]:
        """Return who pushed through here so far: the run's own workers, and guests."""
        with self._lock:
            return set(self._came)

    def _admit(self, context: grpc.ServicerContext) -> dict[str, str | bytes]:
        """Return a call's metadata if it may be made, or end it."""
        metadata: dict[str, str | bytes] = dict(context.invocation_metadata())
        try:
            check(metadata, self._token)  # first: strangers do not use up what others may do
            if not self._calls.try_one():
                limit = self.config.calls_per_s
                raise ResourceError(f"more than {limit:g} calls a second come in: try again later")
        except (PermissionError, ParamServerError) as error:
            self._count(refused=1)
            refuse(context, error)
        return metadata

    def _guarded(self, answer: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            self._admit(context)
            try:
                return answer(request)
            except ParamServerError as error:
                self._count(refused=1)
                return refuse(context, error)

        return guarded

    def _register(self, request: Any) -> Any:
        c = self.config
        self._check_leads()
        with self._lock:
            worker = (self._readers if request.reads else self._workers).take()
            self._incarnation += 1
            return schema.RegisterReply(
                worker=worker,
                incarnation=self._incarnation,
                layout=c.layout,
                cuts=[cut.stop for cut in c.cuts],
                slot_rows=c.slot_rows,
                wait_s=c.wait_s,
                gateways=[s.remote.address if isinstance(s, Far) else "" for s in c.shards],
            )

    def _check_leads(self) -> None:
        if self.config.shards[0] is None:
            raise ProtocolError("this is not the gateway that the run is joined at: shard 0's is")

    def _stats(self, request: Any) -> Any:
        return schema.StatsReply(num_clients=self.config.num_clients, **self.counted())

    def _health(self, request: Any) -> Any:
        try:
            for shard in self.config.shards:
                if isinstance(shard, str):
                    Link.connect(shard).close()
                elif shard is not None and not serves(shard.remote, timeout_s=_HEALTH_S):
                    return schema.HealthReply(serves=False)
        except (OSError, ParamServerError):
            return schema.HealthReply(serves=False)
        return schema.HealthReply(serves=True)

    def _lead(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = self._admit(context)
        try:
            check_lead(metadata, self.config.secret)
            shard = shard_of(metadata, len(self.config.shards))
            yield from led(self._here(shard), shard, frames, context)
        except ParamServerError as error:
            self._count(refused=1)
            refuse(context, error)

    def _snapshot(self, request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        self._admit(context)
        with self._snapshot_lock:  # one at a time: its lease is on one version
            try:
                self._check_leads()
                reading = self._reader().read()
            except ParamServerError as error:
                self._count(refused=1)
                refuse(context, error)
            for number, params in enumerate(reading.params, 1):
                grant = Message(Kind.GRANT, version=reading.version)
                for frame in write_message(grant, number, [params]):
                    self._count(sent_bytes=len(frame))
                    yield frame
            self._reader().release()

    def _reader(self) -> Client:
        if self._snapshots is None:
            hello = Message(Kind.HELLO, worker=_SNAPSHOT_READER, incarnation=1)
            shards = range(len(self.config.shards))
            connections = [self._reach(shard, hello) for shard in reversed(shards)]
            self._snapshots = Client(
                connections[::-1], worker=hello.worker, incarnation=1, wait_s=self.config.timeout_s
            )
        return self._snapshots

    def _exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = self._admit(context)
        try:
            session, received, anew = self._conversations.take_up(metadata)
        except ParamServerError as error:
            self._count(refused=1)
            refuse(context, error)
        if session.hello.worker >= 0:
            with self._lock:
                self._came.add(session.hello.worker)
        stream = session.attach()
        if not context.add_callback(lambda: session.detach(stream)):
            session.detach(stream)
        threading.Thread(
            target=self._listen, args=(frames, session, stream), name="gateway-listen", daemon=True
        ).start()
        for frame in session.outgoing(stream, received, anew):
            self._count(sent_bytes=len(frame))
            yield frame
        if session.is_over:
            self._conversations.end(session)

    def _listen(self, frames: Iterator[bytes], session: Session, stream: int) -> None:
        rate = Rate(self.config.frames_per_s)
        try:
            for size, is_whole in session.take(frames, stream):
                self._count(received_bytes=size, messages=int(is_whole))
                if (early_s := rate.wait_s()) > 0:
                    time.sleep(early_s)
        except ParamServerError as error:
            self._count(refused=1)
            session.end_with(error)
        except grpc.RpcError:  # the stream broke; its end is told by its callback
            return
        if session.is_over:
            session.wake()
        else:  # the client says no more, and has not said that it leaves
            session.detach(stream)

    def _reach(self, shard: int, hello: Message) -> Connection:
        """Connect to a shard wherever it is."""
        c, far = self.config, self.config.shards[shard]
        if not isinstance(far, Far):
            return self._connect(shard, hello)
        return GrpcConnection(
            far.remote,
            shard,
            len(c.cuts[shard]),
            hello._replace(text=c.fingerprint),
            dtype=c.dtype,
            slot_rows=c.slot_rows,
            timeout_s=c.timeout_s,
        )

    def _here(self, shard: int) -> str:
        """Return the address of a shard on this node; ProtocolError if it is elsewhere."""
        address = self.config.shards[shard]
        if not isinstance(address, str):
            raise ProtocolError(f"shard {shard} is behind another gateway")
        return address

    def _connect(
        self, shard: int, hello: Message, fingerprint: str | None = None
    ) -> SharedMemoryConnection:
        c = self.config
        model = c.fingerprint if fingerprint is None else fingerprint
        return SharedMemoryConnection(
            self._here(shard),
            shard,
            len(c.cuts[shard]),
            hello._replace(text=f"{c.token} {model}"),
            dtype=c.dtype,
            slot_rows=c.slot_rows,
            timeout_s=c.timeout_s,
        )

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                self._counted[name] += value


def _encoded(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded
