"""The processes of one asynchronous run: shards, workers and an evaluator, from start to end.

The driver looks a few times a second, evaluates consistent snapshots, writes checkpoints, replaces
workers that died, and ends the run.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import ray

from async_sgd.carried import state_figures
from async_sgd.door import Door
from async_sgd.evaluations import Evaluations
from async_sgd.plan import Plan
from paramserver.actor import ShardActor
from paramserver.checkpoint import Checkpoint
from paramserver.compression import Traffic, agreed_by
from paramserver.errors import (
    ParamServerError,
    ResourceError,
    RunFailedError,
    ServerLostError,
    ServerTimeoutError,
)
from paramserver.ledger import Ledger
from paramserver.measures import summary
from paramserver.packing import pack
from paramserver.reach import Reach
from paramserver.shard import Saved
from workers.actor import Servers, WorkerActor
from workers.loop import Finished
from workers.reservation import Places
from workers.run import Run
from workers.vacancies import Vacancies

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""Seconds between two looks at the run."""

_STOP_S = 10.0
"""Seconds workers have to come back after the run was ended."""


class Fleet:
    """The processes of one run, from start to end."""

    def __init__(self, plan: Plan, start: Checkpoint, run: Run, reach: Reach) -> None:
        """Describe the processes that go on from ``start``; `start` makes them."""
        self._door = Door(reach, plan.config.address)
        plan = replace(plan, guests=self._door.num_places)
        self._plan, self._config = plan, plan.config
        self._layout, self._cuts = plan.layout, plan.cuts
        self._start, self._run = start, run
        self._token = secrets.token_hex(16)
        name = secrets.token_hex(6)
        self._addresses = tuple(f"{name}/{i}" for i in range(len(plan.cuts)))
        self._servers = Servers(
            addresses=self._addresses,
            cuts=plan.cuts,
            layout=plan.layout,
            token=self._token,
            timeout_s=self._config.call_timeout_s,
            wait_s=self._config.wait_timeout_s + self._config.call_timeout_s,
            slot_rows=plan.slot_rows,
            agreed=agreed_by(
                plan.layout,
                plan.cuts,
                self._config.compress,
                self._config.compress_pull,
                self._config.seed,
            ),
        )
        self._shards: list[Any] = []
        self._workers: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}  # the run() call of each worker
        self._incarnations = {
            w: start.workers.get(str(w), {}).get("incarnation", 0)
            for w in range(self._config.workers)
        }
        extra = start.extra
        self._last_status: dict[str, Any] = {
            "updates": start.version,
            "gradients": int(extra.get("gradients", 0)),
            "samples": int(extra.get("samples", 0)),
        }
        self._ledger: Ledger | None = None  # as it was at the last checkpoint
        self._has_failed = False
        self._lost_shard: int | None = None
        self._places = Places(
            self._config,
            servers=len(plan.cuts),
            workers=self._config.workers,
            one_node=not self._door.is_far,
        )
        self._task_ref, self._course_ref = ray.put(plan.task), ray.put(plan.course)
        self._measures: dict[str, Any] = {}  # of the pushes up to the last checkpoint
        self._traffic = Traffic()  # of the workers that have come back
        self._evaluations = Evaluations(
            self._task_ref,
            self._config.seed,
            self._servers,
            looks=self._config.looks,
            timeout_s=self._config.call_timeout_s,
            lost=self._lost,
            options=lambda: self._places.beside(0),
        )
        self._vacancies = Vacancies(self._places.lack, self._config.resources_timeout_s)
        self._threads = self._config.worker_threads

    def start(self) -> None:
        """Start every process, nearly all at once, and let the workers go."""
        self._places.take()
        for shard in range(len(self._cuts)):
            self._start_shard(shard)
        self._evaluations.start()
        for worker in range(self._config.workers):
            self._spawn(worker)
        timeout_s = self._config.call_timeout_s
        self._get([shard.follow.remote() for shard in self._shards[1:]], "starting the shards")
        self._open_door()
        ledger = Ledger.load(self._run.folder.updates) if self._run.resumed else None
        sequencer = self._plan.sequencer(self._start, ledger)
        lead = self._shards[0].lead.remote(sequencer, self._door.followers, timeout_s)
        self._get([lead], "starting the shards")
        ready = [w.ready.remote() for w in (*self._workers.values(), self._evaluations.actor)]
        self._get(ready, "starting the workers")
        self._door.tell(self._run.folder.path)
        self._evaluations.connect()
        self._run.started()
        if self._run.enough is not None:
            self._stop(self._run.enough)
        for worker in self._workers:
            self._let_go(worker)

    def _open_door(self) -> None:
        """Listen for workers on other machines, and for guests, if there may be any."""
        asked = [shard.machine.remote() for shard in self._shards]
        machines = self._get(asked, "starting the shards")
        self._servers = self._door.open(
            replace(self._servers, machines=tuple(machines)),
            self._config.workers,
            self._places.beside,
            self._config.call_timeout_s,
        )
        self._evaluations.servers = self._servers

    def watch(self) -> None:
        """Look after the run until it has ended, then write what it left.

        Raises:
            RunFailedError: It broke; its record is written, as far as there is anything to write.
        """
        try:
            self._watch()
        except RunFailedError as error:
            if self._has_failed:
                raise
            self._fail(error)
        except (ParamServerError, ValueError) as error:
            self._fail(self._explained(error))

    def _watch(self) -> None:
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
            self._run.tell(status, self._plan.progress)
            self._vacancies.look(len(status["live"]), time.monotonic())
            if status["error"] is not None:
                self._fail(self._explained(status["error"]))
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
        self._door.close()
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get([shard.close.remote() for shard in self._shards], timeout=5)
        for actor in (*self._workers.values(), *self._shards, self._evaluations.actor):
            if actor is not None:
                ray.kill(actor)
        self._places.free()

    def _start_shard(self, index: int) -> None:
        config = self._plan.shard(index, self._addresses[index], self._token, self._start)
        cut = self._cuts[index]
        params = pack(self._start.params[cut.start : cut.stop])
        actor = ShardActor.options(**self._places.server(index))
        self._shards.append(actor.remote(config, params, self._layout.dtype))

    def _spawn(self, worker: int) -> None:
        self._workers[worker] = WorkerActor.options(**self._places.worker(worker)).remote(
            self._task_ref, self._config.seed, self._threads
        )

    def _let_go(self, worker: int) -> None:
        self._incarnations[worker] += 1
        if self._plan.program is not None:
            ref = self._workers[worker].answer.remote(
                self._servers, worker, self._incarnations[worker]
            )
            self._runs[ref] = worker
            return
        if self._plan.form is not None:
            ref = self._workers[worker].push.remote(
                self._servers,
                worker,
                self._incarnations[worker],
                self._config.workers,
                self._plan.form,
            )
            self._runs[ref] = worker
            return
        ref = self._workers[worker].run.remote(
            self._servers,
            worker,
            self._incarnations[worker],
            self._config.workers,
            self._plan.batch_size,
            self._plan.clip_at_worker,
            self._config.gradient,
            self._plan.local,
            self._course_ref,
            self._config.compress,
            self._config.compress_pull,
            num_chunks=self._plan.num_chunks,
            looks=self._plan.cancels,
        )
        self._runs[ref] = worker

    def _came_back(self, ref: Any) -> None:
        """A worker's call has ended: it has finished, it died, or it brings the run's error."""
        worker = self._runs.pop(ref)
        try:
            finished: Finished = ray.get(ref, timeout=self._config.call_timeout_s)
        except ray.exceptions.RayActorError:
            self._lost(f"worker {worker}")
            if self._status()["ended"] is None:
                self._vacancies.open(time.monotonic())
                self._spawn(worker)
                self._let_go(worker)
        except ray.exceptions.RayTaskError as error:
            self._fail(self._explained(error.cause))
        else:
            self._finished(finished)

    def _finished(self, finished: Finished) -> None:
        """Count what a worker has sent that has come to its end."""
        if finished.traffic is not None:
            self._traffic.add(finished.traffic)

    def _explained(self, error: BaseException) -> BaseException:
        """Return ``error``, or what happened to the shard whose loss it tells of."""
        if isinstance(error, ServerLostError | ServerTimeoutError):
            return self._why_lost() or error
        return error

    def _why_lost(self) -> RunFailedError | None:
        """Ask the shards, and the gateways, what happened to the one that was lost."""
        asked = [shard.failure.remote() for shard in self._shards]
        for index, ref in enumerate(asked):
            try:
                failure = ray.get(ref, timeout=self._config.call_timeout_s)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                self._lost_shard = index
                return self._lost_for_good(f"shard {index} was lost")
            if failure is not None:
                return RunFailedError(f"shard {index} failed: {failure}")
        if self._door.is_lost(self._config.call_timeout_s):
            return self._lost_for_good(
                "a gateway was lost, by which processes on other nodes reach the shards"
            )
        return None

    def _lost_for_good(self, what: str) -> RunFailedError:
        folder = self._run.folder.path
        return RunFailedError(f"{what}; go on from the last checkpoint with resume={folder}")

    def _status(self) -> dict[str, Any]:
        (self._last_status,) = self._get([self._shards[0].status.remote()], "asking shard 0")
        return self._last_status

    def _evaluate_when_due(self) -> str | None:
        """Start an evaluation when one is due, take its result when it is there.

        Returns why the run is to end, if the metrics reach the target.
        """
        if not self._evaluations.is_under_way and self._run.evaluation_is_due():
            self._evaluations.begin(self._run.keep)
        evaluated = self._evaluations.take_if_there()
        return None if evaluated is None else self._run.evaluated(evaluated, self._status())

    def _evaluate_last(self) -> None:
        self._run.evaluated(self._evaluations.last(self._run.keep), self._status())

    def _lost(self, what: str) -> None:
        """Count the loss of a process; ResourceError if there were too many."""
        if self._run.failed(what) > self._config.max_failures:
            raise ResourceError(
                f"{self._run.num_failures} processes were lost; raise max_failures to go on"
            )

    def _checkpoint(self) -> None:
        saved, progress, ledger = self._get([self._shards[0].save.remote()], "saving")[0]
        timeout_s = self._config.call_timeout_s
        others = [s.saved.remote(saved.version, timeout_s) for s in self._shards[1:]]
        parts: list[Saved] = [saved, *self._get(others, "saving")]
        ledger.measure(self._plan.measures(parts))
        self._measures = summary(ledger.columns())
        self._ledger = ledger
        self._run.save(self._plan.checkpoint(parts, progress), ledger)

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
                    self._finished(ray.get(ref, timeout=self._config.call_timeout_s))
                except ray.exceptions.RayError as error:
                    logger.info("worker %d ended with %s", worker, type(error).__name__)
        return not self._runs

    def _finish(self, reason: str) -> None:
        """Evaluate and save the last version and write the record."""
        try:
            self._evaluate_last()
        finally:
            self._checkpoint()
        self._run.finish(reason, self._status(), self._summary())

    def _summary(self) -> dict[str, Any]:
        told: dict[str, Any]
        (told,) = self._get([self._shards[0].summary.remote()], "reading the ledger")
        if self._plan.measure:
            told["measures"] = self._measures
        if self._ledger is not None:
            told.update(state_figures(self._plan, self._ledger))
        if self._traffic.push.count > 0:
            told["traffic"] = self._traffic.figures()
        told.update(self._door.summary(self._config.call_timeout_s))
        return {**told, "threads": self._threads}

    def _fail(self, error: BaseException) -> NoReturn:
        """Write the record of a run that broke, as far as it can be had, and raise why."""
        self._has_failed = True
        reason = error.reason if isinstance(error, RunFailedError) else str(error)
        told: dict[str, Any] = {}

        def summarise() -> None:
            told.update(self._summary())

        leads = self._lost_shard != 0  # the leader alone knows where the run stands
        whole = self._lost_shard is None  # a part of a model is none
        last_duties: tuple[tuple[bool, Callable[[], object]], ...] = (
            (leads, lambda: self._stop(reason)),
            (True, self._drain),
            (whole, self._evaluate_last),
            (whole, self._checkpoint),
            (leads, self._status),  # pushes that came after the last look count, too
            (leads, summarise),
        )
        for is_possible, last_duty in last_duties:
            if not is_possible:
                continue
            try:
                last_duty()
            except Exception as another:  # whatever it is, the first error is the one to tell
                logger.warning("after %s: %s", type(error).__name__, another)
        self._run.finish(f"error: {reason}", self._last_status, told)
        raise RunFailedError(reason, str(self._run.folder.path)) from error

    def _get(self, refs: Sequence[Any], doing: str) -> list[Any]:
        """Get actors' answers within the deadline; errors say what was being done."""
        timeout_s = self._config.call_timeout_s
        try:
            return list(ray.get(list(refs), timeout=timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            raise ServerTimeoutError(0, doing, timeout_s) from error
        except ray.exceptions.RayTaskError as error:
            raise self._explained(error.cause) from None
        except ray.exceptions.RayActorError as error:
            lost = self._lost_for_good(f"a server process was lost while {doing}")
            raise self._why_lost() or lost from error
