"""A real run once more, from its record: the same pushes in the same order, so the same bits.

The sequencer is a plain state machine: joins, pushes and departures in the order they happened give
the same versions, drops and reads again. A gradient depends on what was read, on the worker's
number and its clock alone. So a record of who came when, and the seed, are all there is to a run.
Every recorded row is compared with the replayed one, its loss to the last bit, and the parameters
at the end with those of the checkpoint.

From a version on the run may be given another damping or compensation: what if it had had that?
Its pushes still come in the recorded order, with gradients of the parameters there then are.

Bits are equal where arithmetic is: on processors of one kind, with the same version of torch. A
model whose forward pass changes buffers that its gradient depends on, as spectral norm does, is
another one here: each worker has a model of its own, a replay has one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from async_sgd.jobs import OneByOne
from async_sgd.local_server import LocalServer
from async_sgd.recorded import recorded_setup
from async_sgd.samples import Samples
from async_sgd.setup import Ready
from async_sgd.simulation import Buffers, Change, late_joiners
from paramserver.checkpoint import load_checkpoint
from paramserver.compensation import Compensation
from paramserver.errors import RecordError
from paramserver.ledger import COLUMNS, Ledger, Move
from paramserver.measures import summary
from paramserver.record import RunFolder, read_record
from paramserver.rules import Damping
from paramserver.shard import Shard
from workers.examiner import Examiner
from workers.local import LOCALS
from workers.task import Task, build_model
from workers.threads import torch_threads

_TELL_EVERY = 200
"""Pushes after which the caller is told how far the replay is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """Another policy, from a version on."""

    at: int = 0
    """The version up to which the run is replayed as it was."""

    damping: Damping | None = None
    """Takes the place of the run's, or of none."""

    compensation: Compensation | None = None
    """Takes the place of the run's, or of none."""

    def __post_init__(self) -> None:
        if self.at < 0:
            raise ValueError(f"at must be version 0 or later, got {self.at}")
        if self.damping is None and self.compensation is None:
            raise ValueError("what if needs another damping or another compensation")


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay went."""

    pushes: int
    """Pushes replayed; every one of them was as recorded, up to what was changed."""
    version: int
    params: Tensor
    """The parameters at the end, shape ``(n,)``."""
    distance: float | None
    """Largest difference of a parameter from the run's checkpoint: 0 if all bits are equal. None if
    the run has no checkpoint of that version."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the parameters at the end."""
    measures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Mean and largest of what was measured of each push, if the run measured it."""


class Replay:
    """Replays the record of an asynchronous run."""

    def __init__(
        self, folder: Path, *, task: Task | None = None, what_if: WhatIf | None = None
    ) -> None:
        """Read the record.

        Args:
            folder: Of the run.
            task: What was trained, if the record cannot name it: a task made in Python.
            what_if: A change of policy on the way.

        Raises:
            RecordError: It is not the record of a run that can be replayed; says why.
            PluginError: It names plug-ins that do not exist here.
        """
        self.folder, self._what_if = folder, what_if
        record = read_record(folder)
        config = record.config
        if config.get("mode") not in ("async", "simulate"):
            raise RecordError(
                f"{folder} is a {config.get('mode')} run: only asynchronous ones have an order of "
                "pushes to replay"
            )
        if record.updates is None:
            raise RecordError(f"{folder} has no updates.npz: there is nothing to replay")
        self._result = record.result or {}
        self._ledger = Ledger.load(RunFolder(folder).updates)
        self._reasons = self._ledger.reasons()
        self._num_threads = int(self._result.get("threads", 1))
        self._num_shards = int(config.get("shards", 1))
        if (self._ledger.moves()["kind"] == Move.RESUME).any():
            raise RecordError(
                f"{folder} was stopped and resumed, which lost what was in flight: only a run made "
                "in one go can be replayed"
            )
        self._changes = [Change.parse(text) for text in config.get("changes", ())]
        self._setup = recorded_setup(folder, config, task)
        if self._setup.program is not None or self._setup.form is not None:
            raise RecordError(
                f"{folder} ran {self._setup.optimizer_name}, a round program: only the pushes of "
                "gradients are replayed"
            )
        if what_if is not None and (local := self._setup.local) is not None:
            name, scales = LOCALS.name_of(local), what_if.damping is not None and local.as_it_is
            if what_if.compensation is not None or scales:
                raise RecordError(
                    f"{folder} took local steps, {name}: what it pushed cannot be "
                    + ("damped" if scales else "compensated")
                )

    @property
    def task(self) -> Task:
        """What was trained."""
        return self._setup.task

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The run's ``result.json``; empty if it has not ended."""
        return self._result

    def run(self, progress: Callable[[Mapping[str, Any]], None] | None = None) -> Replayed:
        """Replay the run.

        Raises:
            RecordError: A push came out in another way than recorded; says which, and how.
            ParamServerError: The run cannot be built.
        """
        with torch_threads(self._num_threads):
            return self._run(progress)

    def _run(self, progress: Callable[[Mapping[str, Any]], None] | None) -> Replayed:
        ready = self._setup.ready(None)
        server = self._server(ready)
        rows, moves = self._ledger.rows(0), iter(self._ledger.moves().tolist())
        move = next(moves, None)
        switch = self._what_if
        for number, row in enumerate(rows):
            while move is not None and move[0] <= number:
                _move(server, *move[1:])
                move = next(moves, None)
            if switch is not None and server.sequencer.version >= switch.at:
                self._switch(server, switch)
                switch = None
            self._push(server, number, row, is_as_recorded=switch is self._what_if)
            if progress is not None and number % _TELL_EVERY == 0:
                progress({"updates": server.sequencer.version, "seconds": float(row["end"])})
        return self._came_out(ready, server, len(rows))

    def _server(self, ready: Ready) -> LocalServer:
        plan = ready.plan
        config, layout = plan.config, plan.layout
        start = ready.start(None, self.folder)
        buffers = Buffers(plan.capacity, layout.numel, layout.dtype)
        made_of = plan.shard(0, "", "", start)
        if plan.measure:
            made_of = replace(made_of, measured_cuts=layout.cuts(self._num_shards))
        shard = made_of.build(start.params, buffers)
        assert isinstance(shard, Shard), "round programs were refused"
        batch_size = plan.batch_size
        samples = Samples(
            plan.task,
            ready.data.train,
            batch_size,
            config.workers,
            seed=config.seed,
            course=plan.course,
        )
        model = build_model(plan.task, config.seed)
        gradients = OneByOne(
            plan.task,
            model,
            layout,
            samples,
            mode=config.gradient,
            clip=plan.clip_at_worker,
            num_chunks=plan.num_chunks,
            local=plan.local,
            compress=config.compress,
            compress_pull=config.compress_pull,
            num_shards=self._num_shards,
        )
        sequencer = plan.sequencer(start, None, absent=len(late_joiners(self._changes)))
        return LocalServer(sequencer, shard, buffers, gradients, batch_size)

    def _push(
        self, server: LocalServer, number: int, row: np.void, *, is_as_recorded: bool
    ) -> None:
        """Let the recorded push ``number`` arrive; see that it comes out as it did."""
        worker, now = int(row["worker"]), float(row["end"])
        reason = self._reasons[row["dropped"]]
        if reason == "ended" and server.sequencer.ended is None:
            server.sequencer.stop(str(self._result.get("stopped_because", "stopped")))
        job = server.jobs.get(worker)
        if job is None or (job.incarnation, job.seq) != (row["incarnation"], row["seq"]):
            raise RecordError(
                f"{self.folder}: push {number} is number {row['seq']} of worker {worker}, which "
                + ("waits then" if job is None else f"is at {job.seq} then")
            )
        if reason == "cancelled":
            server.push_cancelled(worker, int(row["read_version"]), int(row["samples"]), now)
        else:
            server.push(worker, now)
        replayed = server.sequencer.ledger.rows(number)[0]
        if is_as_recorded:
            self._compare(number, row, replayed, server.sequencer.ledger.reasons())

    def _compare(
        self, number: int, row: np.void, replayed: np.void, reasons: tuple[str, ...]
    ) -> None:
        """Raise RecordError if a row differs in anything but when its worker read."""
        then, now = self._reasons[row["dropped"]], reasons[replayed["dropped"]]
        differs = [] if then == now else [("outcome", then, now)]
        for name in COLUMNS.names or ():
            if name in ("start", "dropped"):
                continue
            same = row[name] == replayed[name] or (row[name] != row[name]) & (
                replayed[name] != replayed[name]
            )
            if not same:
                differs.append((name, row[name], replayed[name]))
        if differs:
            what = ", ".join(f"{name} {a!r} then and {b!r} now" for name, a, b in differs[:3])
            raise RecordError(
                f"{self.folder}: push {number} of worker {row['worker']} is another one now: {what}"
                "; bits are equal on processors of one kind and with the same torch"
            )

    def _switch(self, server: LocalServer, what_if: WhatIf) -> None:
        if what_if.damping is not None:
            server.sequencer.damping = what_if.damping
        if what_if.compensation is not None:
            params = server.shard.snapshots.params
            server.shard.compensator = what_if.compensation.build(params)

    def _came_out(self, ready: Ready, server: LocalServer, num_pushes: int) -> Replayed:
        plan, version = ready.plan, server.sequencer.version
        saved = server.save()
        params = saved.params
        server.sequencer.ledger.measure(plan.measures([saved]))
        columns = server.sequencer.ledger.columns()
        if self._what_if is None:
            self._compare_measures(columns)
        distance = None
        folder = RunFolder(self.folder).checkpoint
        if folder.exists():
            checkpoint = load_checkpoint(folder, plan.layout)
            if checkpoint.version == version:
                distance = float((checkpoint.params - params).abs().max())
        model = build_model(plan.task, plan.config.seed)
        with server.shown() as shown:
            examiner = Examiner(
                plan.task, model, ready.data, plan.layout, plan.cuts, seed=plan.config.seed
            )
            metrics = examiner.examine(version, [shown]).metrics
        return Replayed(num_pushes, version, params, distance, metrics, summary(columns))

    def _compare_measures(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Raise RecordError if a measure differs from the recorded one in a bit."""
        recorded = self._ledger.columns()
        for name in self._setup.measure:
            then = recorded.get(name)
            if then is None:  # the run was killed before it was saved
                continue
            differs = ~((then == columns[name]) | (np.isnan(then) & np.isnan(columns[name])))
            if differs.any():
                row = int(differs.argmax())
                raise RecordError(
                    f"{self.folder}: the {name} of push {row} is another one now: {then[row]!r} "
                    f"then and {columns[name][row]!r} now; bits are equal on processors of one "
                    "kind and with the same torch"
                )


def _move(server: LocalServer, kind: int, worker: int, incarnation: int, now: float) -> None:
    """Let what happened between pushes happen again; cancellations follow from the pushes."""
    if kind == Move.JOIN:
        server.join(worker, incarnation, now)
    elif kind == Move.LEAVE:
        server.leave(worker, now)
