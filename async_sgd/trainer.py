"""The asynchronous trainer: starts shards, workers and an evaluator, and watches over them.

The driver is not in the step loop. Workers push to the shards and read from them by themselves; the
driver looks a few times a second, evaluates consistent snapshots, writes checkpoints, replaces
workers that died, and ends the run.

    driver --- status, save, stop ---> shard 0 (leads) <== push, read ==> worker 0, 1, …
       |                                  | orders
       |                                  v
       +--- evaluate --> evaluator     shard 1, 2, …
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch

from async_sgd.rules import RULES
from async_sgd.rules.asynchronous import Asynchronous
from paramserver.actor import ShardActor, ShardConfig
from paramserver.checkpoint import Checkpoint, gather_state, scatter_state
from paramserver.clipping import Clip
from paramserver.errors import (
    CheckpointError,
    ParamServerError,
    ResourceError,
    RunFailedError,
    ServerLostError,
    ServerTimeoutError,
)
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.optimizers import OPTIMIZERS, Optimizer
from paramserver.record import Result
from paramserver.rules import Damping, RuleSpec
from paramserver.sequencer import Budget, Progress, Sequencer
from paramserver.shard import Saved
from workers.actor import EvaluatorActor, Servers, WorkerActor
from workers.config import RunConfig
from workers.loop import Finished
from workers.run import Run
from workers.session import ray_session
from workers.task import Task, build_data, build_model

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""Seconds between two looks at the run."""

_STOP_S = 10.0
"""Seconds workers have to come back after the run was ended."""


class AsyncTrainer:
    """Trains a task on a parameter server, each worker at its own pace."""

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        config: RunConfig | None = None,
        *,
        rule: RuleSpec | None = None,
        damping: Damping | None = None,
        shards: int = 1,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Describe a run; `fit` makes it.

        Args:
            task: What is trained.
            optimizer: Applied on the server, to every update.
            config: Size, budget and deadlines.
            rule: Which pushes are applied and who waits for whom; None is asynchronous.
            damping: Shortens the steps of stale gradients; None does not.
            shards: Server processes the parameters are cut over.
            progress: Called with the state of the run a few times a second.

        Raises:
            ValueError: A combination that cannot work.
        """
        self.task, self.optimizer = task, optimizer
        self.config = config or RunConfig()
        self.rule: RuleSpec = rule or Asynchronous()
        self.damping, self.shards = damping, shards
        self.progress = progress
        clip = self.config.clip
        clips_mean = clip is not None and clip.where == "reduced" and clip.norm_needed
        if clips_mean and shards > 1 and self.rule.build(self.config.workers).gathers:
            raise ValueError(
                "clipping an averaged gradient by its norm needs the norm over all shards, which "
                "no shard has: clip with where=worker, or use 1 shard"
            )

    def fit(self) -> Result:
        """Run to the end, and return what came out.

        Ctrl-C ends the run in order: the record is written, with ``stopped_because``.

        Raises:
            RunFailedError: The run broke; its record is complete up to then.
            ParamServerError: It could not start.
        """
        model = build_model(self.task, self.config.seed)
        layout = Layout.of(model)
        cuts = layout.cuts(self.shards)
        num_train = len(build_data(self.task).train)
        if num_train < self.config.workers:
            raise ValueError(
                f"{self.config.workers} workers cannot share {num_train} samples: use fewer"
            )
        run = Run.start(self.task, self.config, layout, self._described())
        start = run.resumed or Checkpoint.fresh(
            layout, layout.flatten(model), self.optimizer_description()
        )
        if start.optimizer != self.optimizer_description():
            raise CheckpointError(
                f"{run.folder.path} was trained with {start.optimizer}, not "
                f"{self.optimizer_description()}"
            )
        with ray_session(self.config.address, self.config.workers + self.shards + 1):
            fleet = _Fleet(self, layout, cuts, start, num_train, run)
            try:
                fleet.start()
                fleet.watch()
            except KeyboardInterrupt:
                fleet.end("interrupted")
            finally:
                fleet.close()
        return run.result()

    def optimizer_description(self) -> dict[str, object]:
        """Return the optimizer as the record holds it."""
        return OPTIMIZERS.describe(self.optimizer)

    def _described(self) -> dict[str, object]:
        """Return what the record says of this trainer, beside the run's configuration."""
        damping = None if self.damping is None else type(self.damping).__name__
        return {
            "mode": "async",
            "optimizer": self.optimizer_description(),
            "rule": RULES.describe(self.rule),
            "damping": damping,
            "shards": self.shards,
        }


class _Fleet:
    """The processes of one run, from start to end."""

    def __init__(
        self,
        trainer: AsyncTrainer,
        layout: Layout,
        cuts: tuple[range, ...],
        start: Checkpoint,
        num_train: int,
        run: Run,
    ) -> None:
        self._t, self._config = trainer, trainer.config
        self._layout, self._cuts = layout, cuts
        self._start, self._num_train, self._run = start, num_train, run
        self._token = secrets.token_hex(16)
        name = secrets.token_hex(6)
        self._addresses = tuple(f"{name}/{i}" for i in range(len(cuts)))
        self._servers = Servers(
            addresses=self._addresses,
            cuts=cuts,
            layout=layout,
            token=self._token,
            timeout_s=self._config.call_timeout_s,
            wait_s=self._config.wait_timeout_s + self._config.call_timeout_s,
        )
        self._shards: list[Any] = []
        self._workers: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}  # the run() call of each worker
        self._incarnations = {
            w: start.workers.get(str(w), {}).get("incarnation", 0)
            for w in range(self._config.workers)
        }
        self._evaluator: Any = None
        self._evaluation: Any = None
        self._task_ref = ray.put(trainer.task)
        cores = len(os.sched_getaffinity(0))
        self._threads = self._config.threads or max(1, cores // self._config.workers)
        self._clip_at_worker, self._clip_at_shard = self._place_clip()

    def start(self) -> None:
        """Start every process, all at once, and let the workers go."""
        if self._config.address is not None:
            self._check_resources()
        for shard in range(len(self._cuts)):
            self._start_shard(shard)
        self._evaluator = EvaluatorActor.options(num_cpus=0).remote(
            self._task_ref, self._config.seed, 1
        )
        for worker in range(self._config.workers):
            self._spawn(worker)
        timeout_s = self._config.call_timeout_s
        self._get([shard.follow.remote() for shard in self._shards[1:]], "starting the shards")
        lead = self._shards[0].lead.remote(self._sequencer(), self._addresses[1:], timeout_s)
        self._get([lead], "starting the shards")
        ready = [w.pid.remote() for w in (*self._workers.values(), self._evaluator)]
        self._get(ready, "starting the workers")
        self._get([self._evaluator.connect.remote(self._servers)], "connecting the evaluator")
        self._run.started()
        for worker in self._workers:
            self._let_go(worker)

    def watch(self) -> None:
        """Look after the run until it has ended, then write what it left."""
        while self._runs:
            done, _ = ray.wait(list(self._runs), timeout=_POLL_S)
            for ref in done:
                self._came_back(ref)
            status = self._status()
            reached = self._evaluate_when_due()
            if reached is not None:
                self._stop(reached)
            if self._run.checkpoint_is_due() and status["ended"] is None:
                self._checkpoint()
            self._run.tell(status, self._t.progress)
            if status["error"] is not None:
                self._fail(status["error"])
            if status["ended"] is not None and not self._drain():
                break
        self._finish(str(self._status()["ended"] or "every worker left"))

    def end(self, reason: str) -> None:
        """End the run before its time, in order."""
        if not self._shards or self._run.started_at is None:
            raise KeyboardInterrupt
        self._stop(reason)
        self._drain()
        self._finish(reason)

    def close(self) -> None:
        """End every process; nothing of the run stays behind."""
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get([shard.close.remote() for shard in self._shards], timeout=5)
        for actor in (*self._workers.values(), *self._shards, self._evaluator):
            if actor is not None:
                ray.kill(actor)

    def _sequencer(self) -> Sequencer:
        c = self._config
        samples = None if c.epochs is None else math.ceil(c.epochs * self._num_train)
        counters: Mapping[str, Any] = self._start.extra
        progress = Progress(
            version=self._start.version,
            gradients=int(counters.get("gradients", 0)),
            samples=int(counters.get("samples", 0)),
            workers={int(w): dict(table) for w, table in self._start.workers.items()},
        )
        ledger = Ledger.load(self._run.folder.updates) if self._run.resumed else None
        return Sequencer(
            self._t.rule.build(c.workers),
            damping=self._t.damping,
            budget=Budget(updates=c.updates, samples=samples),
            on_nan=c.on_nan,
            wait_timeout_s=c.wait_timeout_s,
            progress=progress,
            ledger=ledger,
            expected=c.workers,
        )

    def _start_shard(self, index: int) -> None:
        cut = self._cuts[index]
        state = self._start.state
        config = ShardConfig(
            index=index,
            address=self._addresses[index],
            capacity=self._config.workers + 3,  # workers, a replacement, the evaluator, and one
            token=self._token,
            fingerprint=self._layout.fingerprint,
            optimizer=self._t.optimizer,
            schedule=self._config.schedule,
            clip=self._clip_at_shard,
            version=self._start.version,
            rule_state=None if state is None else scatter_state(state, cut),
            schedule_state=None if state is None else state.schedule,
        )
        params = self._start.params[cut.start : cut.stop].numpy()
        self._shards.append(ShardActor.options(num_cpus=0).remote(config, params))

    def _spawn(self, worker: int) -> None:
        cpus = 1 if self._config.address is not None else 0
        self._workers[worker] = WorkerActor.options(num_cpus=cpus).remote(
            self._task_ref, self._config.seed, self._threads
        )

    def _let_go(self, worker: int) -> None:
        self._incarnations[worker] += 1
        batch_size = self._config.batch_size or self._t.task.batch_size
        ref = self._workers[worker].run.remote(
            self._servers,
            worker,
            self._incarnations[worker],
            self._config.workers,
            batch_size,
            self._clip_at_worker,
        )
        self._runs[ref] = worker

    def _came_back(self, ref: Any) -> None:
        """A worker's call has ended: it has finished, it died, or it brings the run's error."""
        worker = self._runs.pop(ref)
        try:
            finished: Finished = ray.get(ref, timeout=self._config.call_timeout_s)
        except ray.exceptions.RayActorError:
            if self._run.failed(f"worker {worker}") > self._config.max_failures:
                self._fail(
                    ResourceError(
                        f"{self._run.num_failures} processes were lost; raise max_failures to go on"
                    )
                )
            if self._status()["ended"] is None:
                self._spawn(worker)
                self._let_go(worker)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ServerLostError | ServerTimeoutError):
                cause = self._why_lost() or cause
            self._fail(cause)
        else:
            assert finished.reason

    def _why_lost(self) -> BaseException | None:
        """Ask the shards what happened to the one that workers lost; it knows better than they."""
        for index, shard in enumerate(self._shards):
            try:
                failure = self._get([shard.failure.remote()], f"asking shard {index}")[0]
            except RunFailedError as error:
                return error
            if failure is not None:
                return RunFailedError(f"shard {index} failed: {failure}")
        return None

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._get([self._shards[0].status.remote()], "asking shard 0")[0]
        return status

    def _evaluate_when_due(self) -> str | None:
        """Start an evaluation when one is due, take its result when it is there.

        Returns why the run is to end, if the metrics reach the target.
        """
        if self._evaluation is None and self._run.evaluation_is_due():
            self._evaluation = self._evaluator.evaluate.remote()
        if self._evaluation is None:
            return None
        done, _ = ray.wait([self._evaluation], timeout=0)
        if not done:
            return None
        version, metrics = self._get([self._evaluation], "evaluating")[0]
        self._evaluation = None
        return self._run.evaluated(version, metrics, self._status())

    def _checkpoint(self) -> None:
        saved, progress, ledger = self._get([self._shards[0].save.remote()], "saving")[0]
        timeout_s = self._config.call_timeout_s
        others = [s.saved.remote(saved.version, timeout_s) for s in self._shards[1:]]
        parts: list[Saved] = [saved, *self._get(others, "saving")]
        state = gather_state(
            [(cut, part.rule) for cut, part in zip(self._cuts, parts, strict=True)]
        )
        checkpoint = Checkpoint(
            layout=self._layout,
            version=saved.version,
            params=torch.cat([part.params for part in parts]),
            optimizer=self._t.optimizer_description(),
            state=replace(state, schedule=saved.scheduler),
            workers={str(w): table for w, table in progress.workers.items()},
            extra={"mode": "async", "gradients": progress.gradients, "samples": progress.samples},
        )
        self._run.save(checkpoint, ledger)

    def _stop(self, reason: str) -> None:
        self._get([self._shards[0].stop.remote(reason)], "stopping")

    def _drain(self) -> bool:
        """Wait for the workers to come back; False if some did not in time."""
        deadline = time.monotonic() + _STOP_S
        while self._runs and time.monotonic() < deadline:
            done, _ = ray.wait(list(self._runs), timeout=_POLL_S)
            for ref in done:
                worker = self._runs.pop(ref)
                try:
                    ray.get(ref, timeout=self._config.call_timeout_s)
                except ray.exceptions.RayError as error:
                    logger.info("worker %d ended with %s", worker, type(error).__name__)
        return not self._runs

    def _finish(self, reason: str) -> None:
        """Evaluate and save the last version and write the record."""
        if self._evaluation is not None:
            self._get([self._evaluation], "evaluating")
        version, metrics = self._get([self._evaluator.evaluate.remote()], "evaluating")[0]
        status = self._status()
        self._run.evaluated(version, metrics, status)
        self._checkpoint()
        summary = self._get([self._shards[0].summary.remote()], "reading the ledger")[0]
        self._run.finish(reason, status, summary)

    def _fail(self, error: BaseException) -> None:
        """Write the record of a run that broke, and raise why."""
        with contextlib.suppress(ParamServerError, ray.exceptions.RayError):
            self._stop(str(error))
            self._drain()
            self._finish(f"error: {error}")
        raise RunFailedError(str(error), str(self._run.folder.path)) from error

    def _get(self, refs: Sequence[Any], doing: str) -> list[Any]:
        """Get actors' answers within the deadline; errors say what was being done."""
        timeout_s = self._config.call_timeout_s
        try:
            return list(ray.get(list(refs), timeout=timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            raise ServerTimeoutError(0, doing, timeout_s) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise RunFailedError(
                f"a server process was lost while {doing}; go on from the last checkpoint with "
                f"resume={self._run.folder.path}",
                str(self._run.folder.path),
            ) from error

    def _place_clip(self) -> tuple[Clip | None, Clip | None]:
        """Clip at the worker unless the averaged gradient is asked for."""
        clip = self._config.clip
        at_shard = clip is not None and clip.where == "reduced"
        return (None, clip) if at_shard else (clip, None)

    def _check_resources(self) -> None:
        wanted, there = self._config.workers, ray.cluster_resources().get("CPU", 0)
        if wanted > there:
            raise ResourceError(
                f"{wanted} workers need {wanted} CPUs and the cluster at {self._config.address} "
                f"has {there:g}: use fewer workers or add nodes"
            )
