"""The simulator: an asynchronous run in virtual time, in this process, described as a real one.

    AsyncTrainer(task, optimizer, config, rule=SSP(bound=4)).fit()      processes, real seconds
    Simulator(task, optimizer, config, rule=SSP(bound=4), delay=Gamma(cv=0.3)).fit()   virtual ones

Gradients, rules, damping and the shard are the real ones; only time is made up. So a thousand
workers need no cluster, and a run with other delays is the same run in all else. The seconds of the
configuration are virtual, and what it says of processes has no meaning here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from async_sgd.calibration import Calibration, distance
from async_sgd.carried import state_figures
from async_sgd.delays import DELAYS, DelayLaw, Exponential
from async_sgd.jobs import Batched, OneByOne
from async_sgd.network import Network
from async_sgd.plan import Plan
from async_sgd.samples import Samples
from async_sgd.setup import Ready, Setup
from async_sgd.simulation import Buffers, Change, Simulation, Times, late_joiners
from async_sgd.streams import Delays, Stream
from paramserver.compensation import Compensation
from paramserver.compression import wire_bytes
from paramserver.errors import ParamServerError, ResourceError, RunFailedError
from paramserver.measures import summary
from paramserver.optimizers import AnyOptimizer
from paramserver.record import Result
from paramserver.rules import Damping, RuleSpec
from paramserver.shard import Shard
from paramserver.standing import Standing
from workers.config import RunConfig
from workers.examiner import Examiner
from workers.local import Local
from workers.placement import Placement
from workers.run import Run
from workers.task import Task, build_model
from workers.threads import torch_threads

logger = logging.getLogger(__name__)

_MEMINFO = Path("/proc/meminfo")

_LOOK_AFTER = 5000
"""Events after which the caller is told where the run stands."""

REAL_ONLY = (
    *Placement.__dataclass_fields__,
    "resume", "threads", "checkpoint_every_s", "wait_timeout_s", "call_timeout_s",
    "max_failures",
)  # fmt: skip
"""Fields of the configuration that concern processes: in a simulated run they say nothing."""


class Simulator:
    """Simulates asynchronous training on a parameter server; see the module."""

    def __init__(
        self,
        task: Task,
        optimizer: AnyOptimizer,
        config: RunConfig | None = None,
        *,
        delay: DelayLaw | None = None,
        rule: RuleSpec | None = None,
        damping: Damping | None = None,
        compensation: Compensation | None = None,
        local: Local | None = None,
        measure: Sequence[str] = (),
        network: Network | None = None,
        service: DelayLaw | None = None,
        changes: Sequence[Change] = (),
        batched: bool = False,
        like: Calibration | None = None,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Describe a run; `fit` makes it.

        Args:
            task: What is trained.
            optimizer: A push rule, applied on the server to every update.
            config: Size and budget; its seconds are virtual.
            delay: Virtual seconds a worker takes for a gradient; None is exponential of mean 1.
                Local steps take the sum of as many.
            rule: Which pushes are applied and who waits for whom; None is asynchronous.
            damping: Shortens the steps of stale gradients; None does not.
            compensation: Corrects stale gradients; None does not.
            local: Steps of workers' own between a read and a push; None pushes each gradient.
            measure: What is measured of each push beside its staleness, some of ``gap``,
                ``cosine`` and ``step`` (`paramserver.measures`).
            network: Between each worker and the server; None takes no time.
            service: Virtual seconds the server takes for a push, one after the other; None is none.
            changes: Workers that come or go on the way.
            batched: Whether gradients in flight are computed together, which is faster for small
                models and has other bits.
            like: What ``delay`` was fitted to; the record compares the two runs.
            progress: Called with the state of the run now and then.

        Raises:
            ValueError: A combination that cannot work.
        """
        self._setup = Setup(
            task, optimizer, config or RunConfig(), rule=rule, damping=damping,
            compensation=compensation, local=local, measure=measure, shards=1,
        )  # fmt: skip
        self.config = self._setup.config
        self.delay: DelayLaw = delay or Exponential()
        self.network, self.service = network or Network(), service
        self.changes, self.batched, self.progress = tuple(changes), batched, progress
        self.like = like
        if self._setup.program is not None or self._setup.form is not None:
            raise ValueError(
                f"{self._setup.optimizer_name} is a round program, whose rounds have nothing stale "
                "in them: simulate a push rule"
            )
        for name in ("address", "resume"):
            if getattr(self.config, name) is not None:
                raise ValueError(f"{name} is for real runs: a simulated one has no such thing")
        if batched and self.config.gradient != "reverse":
            raise ValueError(
                f"batched computes by reverse mode only: leave it, or gradient="
                f"{self.config.gradient}"
            )
        if batched and self.config.adaptive_batch is not None:
            raise ValueError(
                "batched computes gradients of equally many samples side by side, and "
                "adaptive_batch changes their number: leave one of them out"
            )
        if batched and task.recurrent is not None:
            raise ValueError(
                "batched computes by torch.func.vmap, which cannot follow torch's recurrent layers "
                f"and carries no state from window to window of task {task.name}: leave it out"
            )
        self.delay.check(self.config.workers)
        if service is not None:
            service.check(self.config.workers)
        for change in self.changes:
            if change.worker >= self.config.workers:
                raise ValueError(
                    f"there is no worker {change.worker} to {change.what}: with "
                    f"{self.config.workers} workers the last one is {self.config.workers - 1}"
                )

    def fit(self) -> Result:
        """Run to the end, and return what came out.

        Ctrl-C ends the run in order: the record is written, with ``stopped_because``.

        Raises:
            RunFailedError: The run broke; its record is complete up to then.
            ResourceError: It could need more memory than there is.
            ParamServerError: It could not start.
        """
        with torch_threads(1):
            ready = self._setup.ready(self.progress)
            _check_memory(ready.plan)
            simulated = _Simulated(self, ready, self._described())
            try:
                simulated.watch()
            except KeyboardInterrupt:
                simulated.finish("interrupted")
            return simulated.run.result()

    def _described(self) -> dict[str, object]:
        """Return what the record says of this run, beside its configuration."""
        network, service = self.network, self.service
        return {
            **self._setup.described(),
            "mode": "simulate",
            "delay": DELAYS.describe(self.delay),
            "network": {"latency": network.latency, "bandwidth": network.bandwidth},
            "service": None if service is None else DELAYS.describe(service),
            "changes": [str(change) for change in self.changes],
            "batched": self.batched,
        }


class _Simulated:
    """One run under way, and what a driver does beside it."""

    def __init__(self, simulator: Simulator, ready: Ready, described: Mapping[str, object]) -> None:
        plan = self._plan = ready.plan
        config, layout, num_workers = plan.config, plan.layout, plan.config.workers
        self._like = simulator.like
        self._examiner = Examiner(
            plan.task,
            build_model(plan.task, config.seed),
            ready.data,
            layout,
            plan.cuts,
            seed=config.seed,
            looks=config.looks,
        )
        start = ready.start(None, Path())
        buffers = Buffers(plan.capacity, layout.numel, layout.dtype)
        shard = plan.shard(0, "", "", start).build(start.params, buffers)
        assert isinstance(shard, Shard), "a round program was refused"
        self._sequencer = plan.sequencer(start, None, absent=len(late_joiners(simulator.changes)))
        self._standing = Standing(self._sequencer)
        samples = Samples(
            plan.task,
            ready.data.train,
            plan.batch_size,
            num_workers,
            seed=config.seed,
            course=plan.course,
        )
        self._computed = self._gradients(samples, batched=simulator.batched)
        self._simulation = Simulation(
            self._sequencer,
            shard,
            buffers,
            self._computed,
            samples.batch_size,
            self._times(simulator),
            num_workers=num_workers,
            changes=simulator.changes,
        )
        self.run = Run.start(
            plan.task, config, layout, described, clock=lambda: self._simulation.now
        )
        self.run.started()
        self._next_evaluation = config.evaluate_every_s or math.inf

    def _gradients(self, samples: Samples, *, batched: bool) -> Batched | OneByOne:
        plan = self._plan
        model, clip = build_model(plan.task, plan.config.seed), plan.clip_at_worker
        common: dict[str, Any] = {
            "clip": clip,
            "local": plan.local,
            "compress": plan.config.compress,
            "compress_pull": plan.config.compress_pull,
        }
        if batched:
            return Batched(plan.task, model, plan.layout, samples, **common)
        return OneByOne(
            plan.task,
            model,
            plan.layout,
            samples,
            mode=plan.config.gradient,
            num_chunks=plan.num_chunks,
            **common,
        )

    def _times(self, simulator: Simulator) -> Times:
        config, layout, local = self._plan.config, self._plan.layout, self._plan.local

        def delays(law: DelayLaw, stream: Stream) -> Delays:
            return Delays(law, config.workers, seed=config.seed, stream=stream)

        service, network, cuts = simulator.service, simulator.network, self._plan.cuts
        ways = [wire_bytes(layout, cuts, c) for c in (config.compress, config.compress_pull)]
        return Times(
            compute=delays(simulator.delay, Stream.COMPUTE),
            service=None if service is None else delays(service, Stream.SERVICE),
            one_way_s=sum(map(network.seconds, ways)) / 2,
            steps=None if local is None else tuple(map(local.num_steps, range(config.workers))),
        )

    def watch(self) -> None:
        """Simulate to the end, evaluating and recording on the way.

        Raises:
            RunFailedError: The run broke; its record is written.
        """
        sequencer = self._sequencer
        try:
            while self._simulation.run(self._next_evaluation, _LOOK_AFTER):
                status = self._status()
                if self._simulation.now >= self._next_evaluation:
                    self._next_evaluation += self._plan.config.evaluate_every_s
                    reached = self._evaluate(status)
                    if reached is not None:
                        sequencer.stop(reached)
                self.run.tell(status, self._plan.progress)
        except (ParamServerError, ValueError) as error:
            self._fail(error)
        assert sequencer.ended is not None
        self.finish(sequencer.ended)

    def finish(self, reason: str) -> None:
        """Evaluate and save the last version, and write the record."""
        self._sequencer.stop(reason)
        status = self._status()
        self.run.tell(status, self._plan.progress)
        self._evaluate(status)
        self._save()
        self.run.finish(reason, status, self._summary())

    def _summary(self) -> dict[str, Any]:
        ledger = self._sequencer.ledger
        told = {**self._standing.summary(), **state_figures(self._plan, ledger)}
        if self._plan.measure:
            told["measures"] = summary(ledger.columns())
        traffic = self._computed.traffic
        if traffic.push.count > 0:
            told["traffic"] = traffic.figures()
        if self._like is not None:
            simulated = ledger.staleness.histogram()
            told["like"] = {
                "path": str(self._like.folder),
                "law": DELAYS.describe(self._like.law),
                "gradients_per_s": self._like.gradients_per_s,
                "staleness": {"histogram": dict(self._like.staleness)},
                "distance": distance(self._like.staleness, simulated),
            }
        return told

    def _status(self) -> dict[str, Any]:
        return self._standing.status(self._simulation.now)

    def _evaluate(self, status: Mapping[str, Any]) -> str | None:
        """Record the metrics now, at ``status``; return why to stop if they reach the target."""
        with self._simulation.server.shown() as params:
            examined = self._examiner.examine(self._sequencer.version, [params], self.run.keep)
        return self.run.evaluated(examined, status)

    def _save(self) -> None:
        saved = self._simulation.server.save()
        self._sequencer.ledger.measure(self._plan.measures([saved]))
        checkpoint = self._plan.checkpoint([saved], self._sequencer.progress())
        self.run.save(checkpoint, self._sequencer.ledger)

    def _fail(self, error: ParamServerError | ValueError) -> NoReturn:
        """Write the record of a run that broke, as far as it can be had, and raise why."""
        self._sequencer.stop(str(error))
        status = self._status()
        for last_duty in (lambda: self._evaluate(status), self._save):
            try:
                last_duty()
            except Exception as another:  # whatever it is, the first error is the one to tell
                logger.warning("after %s: %s", type(error).__name__, another)
        self.run.finish(f"error: {error}", status, self._summary())
        raise RunFailedError(str(error), str(self.run.folder.path)) from error


def _check_memory(plan: Plan) -> None:
    """Raise ResourceError if what workers read and keep does not fit into this machine's memory."""
    layout, num_workers = plan.layout, plan.config.workers
    kept = 0 if plan.local is None else plan.local.num_kept
    kept += 2 * plan.tabulates  # the table's
    push, pull = plan.config.compress, plan.config.compress_pull
    kept += int(push is not None and push.feedback)  # what was left out
    kept += 0 if pull is None else 1 + pull.feedback  # what is seen; and room for a difference
    needed = (num_workers * (1 + kept) + 2) * layout.num_bytes
    there = _available_bytes()
    if needed > there:
        own = f" and keep {kept} vectors each" if kept else ""
        raise ResourceError(
            f"{num_workers} workers may read as many versions of {layout.numel:,} parameters at "
            f"once{own}, {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are available: use "
            "fewer workers or a smaller model"
        )


def _available_bytes() -> int:
    """Return the memory that programs can still have, caches included where the system says so."""
    if _MEMINFO.exists():
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
