"""The processes beside the server: workers that train, and one that evaluates."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import ray
import torch
from torch import nn

from paramserver.client import Client
from paramserver.clipping import Clip
from paramserver.compression import Agreed, Compression
from paramserver.errors import ParamServerError
from paramserver.freed_memory import keep_freed_memory
from paramserver.layout import Layout
from paramserver.messages import Kind, Message
from paramserver.optimizers.push_form import PushForm
from paramserver.reach import Transport
from paramserver.transports.link import machine
from paramserver.transports.shared_memory import SharedMemoryConnection
from workers.curriculum import Course
from workers.estimate import GradientMode
from workers.examiner import Examined, Examiner, Keep, Looks
from workers.examples import Examples
from workers.local import Local
from workers.loop import Finished, train
from workers.oracles import Oracle
from workers.pieces import answer
from workers.pushes import Maker, push
from workers.task import Data, Task, batches_of, build_data, build_model

if TYPE_CHECKING:
    from paramserver.transports.grpc_connection import GrpcConnection
    from paramserver.transports.remote import Remote


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Where a run's shards are, and what it takes to be let in."""

    addresses: tuple[str, ...]
    """One a shard; the first leads."""
    cuts: tuple[range, ...]
    layout: Layout
    token: str
    timeout_s: float
    """Seconds an answer may take."""
    wait_s: float
    """Seconds an answer may take when a rule may make the worker wait."""
    slot_rows: int = 1
    """Rows of a slot; more than one for pushes of several, and for a program that asks for
    matrices."""
    transport: Transport = "auto"
    remotes: tuple[Remote, ...] = ()
    """What each is behind for workers on other machines; empty if nobody can come from there."""
    machines: tuple[str, ...] = ()
    """Which one each is on."""
    agreed: Agreed | None = None
    """How workers compress; None if they do not."""

    def connect(self, worker: int, incarnation: int) -> Client:
        """Join as ``worker``, or as a reader if it is below 0: followers first, then the leader."""
        hello = Message(
            Kind.HELLO,
            worker=worker,
            incarnation=incarnation,
            text=f"{self.token} {self.layout.fingerprint}",
        )
        connections: list[SharedMemoryConnection | GrpcConnection] = []
        try:
            for shard in reversed(range(len(self.addresses))):
                connections.insert(0, self._connect(shard, hello))
        except ParamServerError:
            for connection in connections:
                connection.close()
            raise
        clock = connections[0].welcome.clock
        return Client(
            connections, worker=worker, incarnation=incarnation, clock=clock, wait_s=self.wait_s
        )

    def _is_near(self, shard: int) -> bool:
        """Whether this process shares memory with ``shard``, and is to use it."""
        if not self.remotes or self.transport == "shared-memory":
            return True
        return self.transport == "auto" and self.machines[shard] == machine()

    def _connect(self, shard: int, hello: Message) -> SharedMemoryConnection | GrpcConnection:
        if not self._is_near(shard):
            # gRPC is imported by those processes alone that speak it
            from paramserver.transports.grpc_connection import GrpcConnection  # noqa: PLC0415

            return GrpcConnection(
                self.remotes[shard],
                shard,
                len(self.cuts[shard]),
                hello._replace(text=self.layout.fingerprint),
                dtype=self.layout.dtype,
                slot_rows=self.slot_rows,
                timeout_s=self.timeout_s,
                agreed=self.agreed if hello.worker >= 0 else None,
            )
        return SharedMemoryConnection(
            self.addresses[shard],
            shard,
            len(self.cuts[shard]),
            hello,
            dtype=self.layout.dtype,
            slot_rows=self.slot_rows,
            timeout_s=self.timeout_s,
        )


class Worker:
    """One worker process of an asynchronous run."""

    def __init__(self, task: Task, seed: int, threads: int) -> None:
        """Keep what `ready` needs: Ray hides what a constructor raises."""
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._task, self._seed = task, seed

    @cached_property
    def _model(self) -> nn.Module:
        return build_model(self._task, self._seed)

    @cached_property
    def _examples(self) -> Examples:
        return build_data(self._task).train

    def ready(self) -> int:
        """Build the model and load the data; return the process's id."""
        _ = self._model, self._examples
        return os.getpid()

    def run(
        self,
        servers: Servers,
        worker: int,
        incarnation: int,
        num_workers: int,
        batch_size: int,
        clip: Clip | None,
        gradient: GradientMode = "reverse",
        local: Local | None = None,
        course: Course | None = None,
        compress: Compression | None = None,
        compress_pull: Compression | None = None,
        *,
        num_chunks: int = 1,
        looks: bool = False,
    ) -> Finished:
        """Train until the run has ended; see `workers.loop.train`."""
        batches = batches_of(
            self._task,
            self._examples,
            batch_size,
            seed=self._seed,
            worker=worker,
            num_workers=num_workers,
            course=course,
        )
        with servers.connect(worker, incarnation) as client:
            return train(
                self._task,
                self._model,
                servers.layout,
                servers.cuts,
                client,
                self._examples,
                batches,
                seed=self._seed,
                gradient=gradient,
                clip=clip,
                num_chunks=num_chunks,
                local=local,
                compress=compress,
                compress_pull=compress_pull,
                looks=looks,
            )

    def push(
        self, servers: Servers, worker: int, incarnation: int, num_workers: int, form: PushForm
    ) -> Finished:
        """Push what ``form`` needs until the run has ended."""
        oracle = Oracle(self._task, self._model, servers.layout, self._examples, self._seed)
        maker = Maker(form, oracle, servers.layout, len(self._examples), worker, num_workers)
        with servers.connect(worker, incarnation) as client:
            return push(maker, servers.cuts, client)

    def answer(self, servers: Servers, worker: int, incarnation: int) -> Finished:
        """Answer a round program's requests until the run has ended."""
        oracle = Oracle(self._task, self._model, servers.layout, self._examples, self._seed)
        with servers.connect(worker, incarnation) as client:
            return answer(oracle, servers.cuts, client)


class Evaluator:
    """Evaluates consistent snapshots while the workers go on."""

    def __init__(self, task: Task, seed: int, threads: int, looks: Looks) -> None:
        """Keep what `ready` needs."""
        torch.set_num_threads(threads)
        self._task, self._seed, self._looks = task, seed, looks
        self._client: Client | None = None

    @cached_property
    def _model(self) -> nn.Module:
        return build_model(self._task, self._seed)

    @cached_property
    def _data(self) -> Data:
        return build_data(self._task)

    def ready(self) -> int:
        """Build the model and load the data; return the process's id."""
        _ = self._model, self._data
        return os.getpid()

    def connect(self, servers: Servers, incarnation: int) -> None:
        """Become a reader of the run's parameters, in the place of earlier ones."""
        self._examiner = Examiner(
            self._task,
            self._model,
            self._data,
            servers.layout,
            servers.cuts,
            seed=self._seed,
            looks=self._looks,
        )
        self._client = servers.connect(-1, incarnation)

    def evaluate(self, keep: Keep | None) -> Examined:
        """Return what comes of the version that is current now."""
        assert self._client is not None
        reading = self._client.read()
        examined = self._examiner.examine(reading.version, reading.params, keep)
        self._client.release()
        return examined


WorkerActor = ray.remote(max_restarts=0, max_task_retries=0)(Worker)
EvaluatorActor = ray.remote(max_restarts=0, max_task_retries=0)(Evaluator)
