"""The driver of a synchronous run: starts the ranks and an evaluator, and watches over them.

The driver is not in the step loop. The ranks meet in a group of their own and step together; the
driver looks a few times a second, has consistent snapshots evaluated, writes checkpoints, and ends
the run.

    driver --- status, save, stop ---> rank 0 <==== exchange, publish ====> rank 1, rank 2, …
       |                                 | snapshot
       +--- evaluate --> evaluator <-----+

A rank that is lost takes its slice of the optimizer's state with it. The group is then formed anew,
with a new process for each lost one, and goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import ray
import torch

from paramserver.averaged_state import averaged
from paramserver.checkpoint import Checkpoint, gather_state
from paramserver.compression import Traffic
from paramserver.errors import (
    ParamServerError,
    ResourceError,
    RunFailedError,
    ServerTimeoutError,
)
from paramserver.ledger import StalenessStats
from paramserver.packing import pack
from sync.collective import fair_cuts
from sync.crew import Crew, Lost
from sync.desk import Part, Position, Status
from sync.worker import Plan
from workers.examiner import Examined
from workers.reservation import Places
from workers.run import Run

if TYPE_CHECKING:
    from sync.trainer import SyncTrainer

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""Seconds between two looks at the run."""


class Driver:
    """Looks after one run, from start to end."""

    def __init__(self, trainer: SyncTrainer, plan: Plan, start: Checkpoint, run: Run) -> None:
        """Describe the run of ``trainer`` that goes on from ``start``; `drive` makes it."""
        self._t, self._config = trainer, trainer.config
        if run.enough is not None:  # no rank is to take a step before it hears of that
            plan = replace(plan, updates=start.version)
        self._plan, self._run = plan, run
        self._latest = start  # what a group that is formed anew goes on from
        self._crew = Crew(
            trainer.task,
            seed=self._config.seed,
            looks=self._config.looks,
            world=self._config.workers,
            threads=self._config.worker_threads,
            places=Places(
                self._config,
                workers=self._config.workers,
                one_node=trainer.collective == "shared_memory",
            ),
            network_interface=trainer.network_interface,
            compressed=self._config.compress is not None,
            wait_timeout_s=self._config.wait_timeout_s,
            call_timeout_s=self._config.call_timeout_s,
        )
        self._status = Status(Position.of(start)).figures()
        self._summary: dict[str, Any] = {}
        self._states: StalenessStats | None = None  # how stale those were that rank 0 carried
        self._traffic = Traffic()  # of the ranks of the last group
        self._ending = self._run.enough  # why the driver wants the run to end

    def drive(self) -> None:
        """Run to the end; no process stays behind, however it ends."""
        try:
            self._crew.start(self._t.collective)
            self._run.started()
            try:
                self._train()
            except ParamServerError as error:
                self._fail(error)
        finally:
            self._crew.close()

    def _train(self) -> None:
        try:
            self._form()
            self._watch()
        except KeyboardInterrupt:
            self._ending = "interrupted"
            self._watch()

    def _watch(self) -> None:
        """Look after the run until it has ended, then write what it left."""
        while not (self._crew.has_ended(_POLL_S) and self._came_back()):
            self._status = self._crew.status() or self._status
            if self._ending is None:
                self._ending = self._evaluate_when_due()
            if self._ending is not None:
                self._crew.stop()
                continue
            if self._run.checkpoint_is_due() and (parts := self._crew.save()):
                self._save(self._joined(parts))
            self._run.tell(self._status, self._t.progress)

    def _came_back(self) -> bool:
        """The ranks have come back: write what they bring, or form the group anew.

        Returns whether the run has ended.
        """
        came = self._crew.collect()
        if not isinstance(came, Lost):
            last = came[0]
            reason = self._ending or last.reason
            assert reason is not None, "a run ends by itself or because the driver wants it to"
            self._states = last.states
            for traffic in (f.traffic for f in came if f.traffic is not None):
                self._traffic.add(traffic)
            self._finish(reason, self._joined([f.part for f in came]), last.status)
            return True
        since = self._latest.version
        with_it = f" (with versions {since + 1} to {came.reached})" if came.reached > since else ""
        for who in [f"rank {rank}" for rank in came.ranks] or ["a connection between ranks"]:
            self._lost(who + with_it)
        if self._ending is not None:
            self._finish(self._ending, self._latest, Status(Position.of(self._latest)))
            return True
        self._crew.replace(came.ranks)
        self._form()
        return False

    def _form(self) -> None:
        """Form a group of all ranks, which goes on from the latest checkpoint."""
        while True:
            try:
                self._crew.form(self._plan, self._latest, Position.of(self._latest))
            except ray.exceptions.RayActorError:
                for rank in self._crew.replace_dead():
                    self._lost(f"rank {rank}")
            else:
                return

    def _lost(self, what: str) -> None:
        """Count the loss of a process; ResourceError if there were too many."""
        if self._run.failed(what) > self._config.max_failures:
            raise ResourceError(
                f"{self._run.num_failures} processes were lost; raise max_failures to go on"
            )

    def _evaluate_when_due(self) -> str | None:
        """Start an evaluation when one is due, take its result when it is there.

        Returns why the run is to end, if the metrics reach the target.
        """
        if not self._crew.is_evaluating and self._run.evaluation_is_due():
            self._crew.begin_evaluation(self._run.keep)
        evaluated = self._evaluated(timeout_s=0)
        return None if evaluated is None else self._run.evaluated(evaluated, self._status)

    def _evaluated(self, timeout_s: float) -> Examined | None:
        """Take the evaluation that was begun, if it is there; an evaluator may be lost over it."""
        try:
            return self._crew.evaluation(timeout_s)
        except ray.exceptions.RayActorError:
            if self._crew.revive_evaluator():
                self._lost("the evaluator")
            return None  # else rank 0 is lost, and will be missed

    def _evaluate_last(self, checkpoint: Checkpoint) -> None:
        timeout_s = self._config.call_timeout_s
        cuts = fair_cuts(self._plan.layout, self._config.workers)
        params = averaged(checkpoint.params, checkpoint.state, self._plan.average, cuts)
        evaluated = None
        while evaluated is None:
            self._crew.begin_evaluation(self._run.keep, (checkpoint.version, pack(params)))
            evaluated = self._evaluated(timeout_s)
            if evaluated is None and self._crew.is_evaluating:
                raise ServerTimeoutError(0, "evaluating the last version", timeout_s)
        self._run.evaluated(evaluated, self._status)

    def _save(self, checkpoint: Checkpoint) -> None:
        self._run.save(checkpoint)
        self._latest = checkpoint

    def _finish(self, reason: str, checkpoint: Checkpoint, status: Status) -> None:
        """Evaluate and save the last version, and write the record."""
        self._tell_end(status)
        try:
            self._evaluate_last(checkpoint)
        finally:
            self._save(checkpoint)
        self._run.finish(reason, self._status, self._summary)

    def _fail(self, error: ParamServerError) -> NoReturn:
        """Write the record of a run that broke, and raise why."""
        self._crew.stop()
        checkpoint, status = self._salvage()
        self._tell_end(status)
        for last_duty in (self._evaluate_last, self._save):
            try:
                last_duty(checkpoint)
            except Exception as another:  # whatever it is, the first error is the one to tell
                logger.warning("after %s: %s", type(error).__name__, another)
        self._run.finish(f"error: {error}", self._status, self._summary)
        raise RunFailedError(str(error), str(self._run.folder.path)) from error

    def _salvage(self) -> tuple[Checkpoint, Status]:
        """Return the last state of a run that broke that is whole."""
        try:
            came = self._crew.collect()
            if not isinstance(came, Lost):  # it was not the ranks that broke
                return self._joined([f.part for f in came]), came[0].status
        except ParamServerError:
            logger.debug("the ranks broke", exc_info=True)  # known: it is why the run is ended
        parts = self._crew.parts(0)
        checkpoint = self._latest if parts is None else self._joined(parts)
        return checkpoint, Status(Position.of(checkpoint))

    def _tell_end(self, status: Status) -> None:
        """Set the figures the record ends with."""
        self._status = {**self._status, **status.figures()}
        waits = {f"worker {rank}": {"seconds": s} for rank, s in enumerate(status.waited_s)}
        self._summary = {
            "collective": self._crew.kind,
            "reduce": self._t.reduce,
            "dropped": self._status["dropped"],
            "waits": waits,
        }
        if self._states is not None:
            self._summary["state_staleness"] = self._states.summary()
        if self._traffic.push.count > 0:
            self._summary["traffic"] = {"push": self._traffic.push.figures()}

    def _joined(self, parts: Sequence[Part]) -> Checkpoint:
        """Make one checkpoint of every rank's share."""
        position = parts[0].position
        assert all(part.position == position for part in parts), "ranks save at the same step"
        world = len(parts)
        if parts[0].cut == range(self._plan.layout.numel):
            parts = parts[:1]  # of a program that is whole, which every rank has alike
        state = gather_state([(part.cut, part.rule) for part in parts])
        clock = {"incarnation": 0, "seq": position.clock, "clock": position.clock}
        return Checkpoint(
            layout=self._plan.layout,
            version=position.version,
            params=torch.cat([part.params for part in parts]),
            optimizer=self._latest.optimizer,
            state=replace(state, schedule=parts[0].scheduler),
            workers={str(rank): dict(clock) for rank in range(world)},
            extra={
                "mode": "sync",
                "gradients": position.gradients,
                "samples": position.samples,
                "rounds": None if self._t.program is None else position.version,
                "averages": position.averages.state(),
            },
        )
