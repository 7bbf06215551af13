"""The synchronous trainer: starts the ranks and an evaluator, and watches over them.

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
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import ray
import torch

from paramserver.checkpoint import Checkpoint, gather_state
from paramserver.errors import (
    CheckpointError,
    ParamServerError,
    PeerLostError,
    ReplicaMismatchError,
    ResourceError,
    RunFailedError,
)
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS, Optimizer
from paramserver.record import Result
from sync.actor import EvaluatorActor, Group, Kind, RankActor, Start, pack
from sync.desk import Part, Position, Status
from sync.step import Reduce
from sync.worker import Finished, Plan
from workers.batches import Batches
from workers.config import RunConfig
from workers.run import Run
from workers.session import ray_session
from workers.task import Task, build_data, build_model

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""Seconds between two looks at the run."""


class SyncTrainer:
    """Trains a task with workers in step: every update is the reduced gradient of all of them."""

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        config: RunConfig | None = None,
        *,
        reduce: Reduce = "mean",
        collective: Literal["auto", "shared_memory", "gloo"] = "auto",
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Describe a run; `fit` makes it.

        Args:
            task: What is trained.
            optimizer: Applied to every reduced gradient.
            config: Size, budget and deadlines.
            reduce: ``mean`` weights each worker's gradient by its samples, as one process would
                that had read all batches; ``sum`` adds them.
            collective: What carries gradients between workers: ``shared_memory`` for workers on
                one node, ``gloo`` for several; ``auto`` looks where they are.
            progress: Called with the state of the run a few times a second.

        Raises:
            ValueError: A value that cannot work.
        """
        if reduce not in ("mean", "sum"):
            raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
        if collective not in ("auto", "shared_memory", "gloo"):
            raise ValueError(
                f"collective must be 'auto', 'shared_memory' or 'gloo', got {collective!r}"
            )
        self.task, self.optimizer = task, optimizer
        self.config = config or RunConfig()
        self.reduce: Reduce = reduce
        self.collective, self.progress = collective, progress

    def fit(self) -> Result:
        """Run to the end, and return what came out.

        Ctrl-C ends the run in order: the record is written, with ``stopped_because``.

        Raises:
            RunFailedError: The run broke; its record is complete up to then.
            ParamServerError: It could not start.
            ValueError: There are more workers than training samples.
        """
        layout = Layout.of(model := build_model(self.task, self.config.seed))
        plan = self._plan(layout, len(build_data(self.task).train))
        run = Run.start(self.task, self.config, layout, self._described())
        optimizer = OPTIMIZERS.describe(self.optimizer)
        start = run.resumed or Checkpoint.fresh(layout, layout.flatten(model), optimizer)
        if start.optimizer != optimizer:
            raise CheckpointError(
                f"{run.folder.path} was trained with {start.optimizer}, not {optimizer}"
            )
        with ray_session(self.config.address, self.config.workers + 1):
            _Crew(self, plan, start, run).drive()
        return run.result()

    def _plan(self, layout: Layout, num_train: int) -> Plan:
        c = self.config
        batch_size = c.batch_size or self.task.batch_size
        last = c.workers - 1
        Batches(num_train, batch_size, seed=c.seed, worker=last, num_workers=c.workers)  # checks
        clips_own = c.clip is not None and c.clip.where == "worker"
        return Plan(
            layout=layout,
            optimizer=self.optimizer,
            seed=c.seed,
            batch_size=batch_size,
            reduce=self.reduce,
            clip_own=c.clip if clips_own else None,
            clip_reduced=None if clips_own else c.clip,
            schedule=c.schedule,
            on_nan=c.on_nan,
            updates=c.updates,
            samples=None if c.epochs is None else math.ceil(c.epochs * num_train),
        )

    def _described(self) -> dict[str, Any]:
        """Return what the record says of this trainer, beside the run's configuration."""
        return {
            "mode": "sync",
            "optimizer": OPTIMIZERS.describe(self.optimizer),
            "reduce": self.reduce,
            "collective": self.collective,
        }


class _Crew:
    """The processes of one run, from start to end."""

    def __init__(self, trainer: SyncTrainer, plan: Plan, start: Checkpoint, run: Run) -> None:
        self._t, self._config = trainer, trainer.config
        self._plan, self._run = plan, run
        self._latest = start  # what a group that is formed anew goes on from
        self._world = self._config.workers
        self._kind: Kind = "shared_memory"
        self._ranks: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}  # the train() call of each rank
        self._evaluator: Any = None
        self._evaluation: Any = None
        self._asked: Any = None  # the status() call that is under way
        self._num_saves = 0
        self._task = ray.put(trainer.task)
        self._threads = self._config.threads or max(1, _num_cores() // self._world)
        self._status = _status_at(_position(start))
        self._summary: dict[str, Any] = {}
        self._ending: str | None = None  # why the driver wants the run to end

    def drive(self) -> None:
        """Run to the end; nothing stays behind, however it ends."""
        try:
            try:
                self._start()
                self._watch()
            except KeyboardInterrupt:
                if self._run.started_at is None:
                    raise
                self._ending = "interrupted"
                self._watch()
        except ParamServerError as error:
            if self._run.started_at is None:
                raise
            self._fail(error)
        finally:
            for actor in (*self._ranks.values(), self._evaluator):
                if actor is not None:
                    ray.kill(actor)

    def _start(self) -> None:
        """Start every process, all at once, and let the ranks go."""
        if self._config.address is not None:
            self._check_resources()
        self._spawn_evaluator()
        for rank in range(self._world):
            self._spawn(rank)
        self._kind = self._choose()
        self._get([self._evaluator.ready.remote()], "starting the evaluator")
        self._run.started()
        self._form()

    def _watch(self) -> None:
        """Look after the run until it has ended, then write what it left."""
        while True:
            done, _ = ray.wait(list(self._runs), timeout=_POLL_S)
            if done and self._came_back():
                return
            self._look()
            if self._ending is None:
                self._ending = self._evaluate_when_due()
                if self._ending is None and self._run.checkpoint_is_due():
                    self._checkpoint()
            else:  # said again and again: a group that is just being formed may not have heard it
                self._ranks[0].stop.remote()
            self._run.tell(self._status, self._t.progress)

    def _came_back(self) -> bool:
        """A rank's call has ended, so all will: take what they bring.

        Returns whether the run has ended; if not, the group has been formed anew.
        """
        finished, errors = self._wait_for_all()
        if len(finished) == self._world:
            last = finished[0]
            reason = self._ending or last.reason
            assert reason is not None, "a run ends by itself or because the driver wants it to"
            self._finish(reason, self._joined([f.part for f in finished.values()]), last.status)
            return True
        for error in errors.values():
            if not isinstance(error, PeerLostError | ray.exceptions.RayActorError):
                raise error
        survivors = {r for r, e in errors.items() if isinstance(e, PeerLostError)} | set(finished)
        lost = sorted(set(range(self._world)) - survivors)
        self._count(lost, survivors)
        if self._ending is not None:
            self._finish(self._ending, self._latest, None)
            return True
        self._replace(lost)
        self._form()
        return False

    def _wait_for_all(self) -> tuple[dict[int, Finished], dict[int, BaseException]]:
        """Return what each rank's call came back with; a rank the others miss may stay away."""
        finished: dict[int, Finished] = {}
        errors: dict[int, BaseException] = {}
        missed: set[int] = set()
        # A rank waits for rank 0 twice as long as rank 0 for the others; see sync.star.
        deadline = time.monotonic() + 2 * self._config.wait_timeout_s + self._config.call_timeout_s
        while self._runs and time.monotonic() < deadline:
            done, _ = ray.wait(list(self._runs), timeout=_POLL_S)
            for ref in done:
                rank = self._runs.pop(ref)
                try:
                    finished[rank] = ray.get(ref, timeout=self._config.call_timeout_s)
                except ray.exceptions.RayTaskError as error:
                    errors[rank] = error.cause
                except ray.exceptions.RayActorError as error:
                    errors[rank] = error
                error = errors.get(rank)
                missed |= set(error.peers) if isinstance(error, PeerLostError) else set()
            if done and missed.issuperset(self._runs.values()):
                deadline = min(deadline, time.monotonic() + _LAST_WORD_S)
        self._runs.clear()
        return finished, errors

    # --- the group ---

    def _form(self) -> None:
        """Form a group of all ranks, and let it go on from the latest checkpoint."""
        group = Group(
            kind=self._kind,
            layout=self._plan.layout,
            world=self._world,
            token=secrets.token_hex(16),
            timeout_s=self._config.wait_timeout_s,
        )
        address = ""
        while not address:  # until every rank is ready; one may be lost here as well
            refs = {rank: actor.prepare.remote(rank, group) for rank, actor in self._ranks.items()}
            lost = []
            for rank, ref in refs.items():
                try:
                    self._get([ref], "preparing the ranks")
                except ray.exceptions.RayActorError:
                    lost.append(rank)
            if not lost:
                address = str(self._get([refs[0]], "preparing the ranks")[0])
            self._replace(lost)
        params = ray.put(pack(self._latest.params))
        start = ray.put(Start(_position(self._latest), self._latest.state))
        for rank, actor in self._ranks.items():
            ref = actor.train.remote(rank, group, address, self._plan, start, params)
            self._runs[ref] = rank
        self._asked = None

    def _replace(self, lost: Sequence[int]) -> None:
        """Start a new process for each lost rank."""
        for rank in lost:
            ray.kill(self._ranks[rank])
            self._spawn(rank)

    def _count(self, lost: Sequence[int], survivors: Iterable[int]) -> None:
        """Note who was lost, and with them the versions since the last checkpoint.

        Raises:
            ResourceError: More were lost than the run may lose.
        """
        reached, kept = self._status["updates"], self._latest.version
        asked = [self._ranks[rank].status.remote() for rank in survivors]
        for ref in ray.wait(asked, num_returns=len(asked), timeout=_LAST_WORD_S)[0] if asked else []:
            with contextlib.suppress(ray.exceptions.RayError):  # lost by now as well
                reached = max(reached, ray.get(ref, timeout=_LAST_WORD_S)["updates"])
        versions = f"versions {kept + 1} to {reached}" if reached > kept else "no version"
        for who in [f"rank {rank}" for rank in lost] or ["a connection between ranks"]:
            number = self._run.failed(f"{who} ({versions} lost with it)")
        if number > self._config.max_failures:
            raise ResourceError(f"{number} processes were lost; raise max_failures to go on")

    def _spawn(self, rank: int) -> None:
        cpus = 1 if self._config.address is not None else 0
        self._ranks[rank] = RankActor.options(num_cpus=cpus).remote(
            self._task, self._config.seed, self._threads
        )

    def _spawn_evaluator(self) -> None:
        self._evaluator = EvaluatorActor.options(num_cpus=0).remote(
            self._task, self._config.seed, 1
        )

    def _choose(self) -> Kind:
        """Choose what carries gradients by where the ranks are, once they are ready."""
        asked = self._t.collective
        there = self._get([r.node.remote() for r in self._ranks.values()], "starting the ranks")
        num_nodes = len(set(there))
        if asked == "shared_memory" and num_nodes > 1:
            raise ResourceError(
                f"the workers are on {num_nodes} nodes, which share no memory: use collective='gloo'"
            )
        if asked != "auto":
            return asked
        return "shared_memory" if num_nodes == 1 else "gloo"

    # --- what the run is asked, and leaves ---

    def _look(self) -> None:
        """See where the run stands, as rank 0 knows it; an answer that is late is left for later."""
        if self._asked is None:
            self._asked = self._ranks[0].status.remote()
        done, _ = ray.wait([self._asked], timeout=_POLL_S)
        if done:
            with contextlib.suppress(ray.exceptions.RayActorError):  # its call comes back and says so
                self._status = ray.get(self._asked, timeout=self._config.call_timeout_s)
            self._asked = None

    def _evaluate_when_due(self) -> str | None:
        """Start an evaluation when one is due, take its result when it is there.

        Returns why the run is to end, if the metrics reach the target.
        """
        timeout_s = self._config.call_timeout_s
        if self._evaluation is None and self._run.evaluation_is_due():
            snapshot = self._ranks[0].snapshot.remote(timeout_s)
            self._evaluation = self._evaluator.evaluate.remote(snapshot)
        if self._evaluation is None or not ray.wait([self._evaluation], timeout=0)[0]:
            return None
        evaluation, self._evaluation = self._evaluation, None
        try:
            evaluated = ray.get(evaluation, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TimeoutError):
                logger.warning("an evaluation is left out: %s", error.cause)
                return None
            raise error.cause from None
        except ray.exceptions.RayActorError:
            return self._mourn_evaluator()
        if evaluated is None:
            return None
        version, metrics = evaluated
        return self._run.evaluated(version, metrics, self._status)

    def _mourn_evaluator(self) -> None:
        """Replace the evaluator, if it was it that was lost and not rank 0."""
        try:
            self._get([self._evaluator.ready.remote()], "looking for the evaluator")
        except ray.exceptions.RayActorError:
            if self._run.failed("the evaluator") > self._config.max_failures:
                raise ResourceError(
                    f"{self._run.num_failures} processes were lost; raise max_failures to go on"
                ) from None
            self._spawn_evaluator()

    def _checkpoint(self) -> None:
        """Write the state at the end of a step; left out if a rank is lost meanwhile."""
        self._num_saves += 1
        self._ranks[0].begin_save.remote(self._num_saves)
        parts = self._parts(self._num_saves)
        if parts is not None:
            self._save(self._joined(parts))

    def _parts(self, number: int) -> list[Part] | None:
        """Return every rank's share of a save; None if one has none."""
        timeout_s = self._config.call_timeout_s
        refs = [r.saved.remote(number, timeout_s) for r in self._ranks.values()]
        try:
            parts: list[Part | None] = ray.get(refs, timeout=2 * timeout_s)
        except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("a checkpoint is left out: %s", getattr(error, "cause", error))
            return None
        except ray.exceptions.RayActorError:  # its call comes back and says so
            return None
        whole = [part for part in parts if part is not None]
        return whole if len(whole) == self._world else None

    def _joined(self, parts: Sequence[Part]) -> Checkpoint:
        """Make one checkpoint of every rank's share."""
        position = parts[0].position
        assert all(part.position == position for part in parts), "ranks save at the same step"
        state = gather_state([(part.cut, part.rule) for part in parts])
        clock = {"incarnation": 0, "seq": position.clock, "clock": position.clock}
        return Checkpoint(
            layout=self._plan.layout,
            version=position.version,
            params=torch.cat([part.params for part in parts]),
            optimizer=self._latest.optimizer,
            state=replace(state, schedule=parts[0].scheduler),
            workers={str(rank): dict(clock) for rank in range(self._world)},
            extra={"mode": "sync", "gradients": position.gradients, "samples": position.samples},
        )

    def _save(self, checkpoint: Checkpoint) -> None:
        self._run.save(checkpoint)
        self._latest = checkpoint

    def _finish(self, reason: str, checkpoint: Checkpoint, status: Status | None) -> None:
        """Evaluate and save the last version, and write the record."""
        if status is not None:
            self._status = {**self._status, **figures(status)}
        else:
            self._status = {**self._status, **figures(Status(_position(checkpoint)))}
        last = self._evaluator.evaluate.remote((checkpoint.version, pack(checkpoint.params)))
        version, metrics = self._get([last], "evaluating")[0]
        self._run.evaluated(version, metrics, self._status)
        self._save(checkpoint)
        self._run.finish(reason, self._status, self._summary(status))

    def _fail(self, error: ParamServerError) -> None:
        """Write the record of a run that broke, and raise why."""
        ...
