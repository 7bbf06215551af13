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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from async_sgd.fleet import Fleet
from async_sgd.setup import Setup
from paramserver.compensation import Compensation
from paramserver.optimizers import AnyOptimizer
from paramserver.reach import Reach
from paramserver.record import Result
from paramserver.rules import Damping, RuleSpec
from workers.config import RunConfig
from workers.local import Local
from workers.run import Run
from workers.session import ray_session
from workers.task import Task


class AsyncTrainer:
    """Trains a task on a parameter server, each worker at its own pace."""

    def __init__(
        self,
        task: Task,
        optimizer: AnyOptimizer,
        config: RunConfig | None = None,
        *,
        rule: RuleSpec | None = None,
        damping: Damping | None = None,
        compensation: Compensation | None = None,
        local: Local | None = None,
        measure: Sequence[str] = (),
        shards: int = 1,
        reach: Reach | None = None,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Describe a run; `fit` makes it.

        Args:
            task: What is trained.
            optimizer: Applied on the server, to every update; or a round program, whose requests
                workers answer piece by piece. Under another rule than pieces, its push form.
            config: Size, budget and deadlines.
            rule: Which pushes are applied and who waits for whom; None is asynchronous, and
                pieces for a round program.
            damping: Shortens the steps of stale gradients; None does not.
            compensation: Corrects stale gradients by what has changed since; None does not.
            local: Steps of workers' own between a read and a push; None pushes each gradient.
            measure: What is measured of each push beside its staleness, some of ``gap``,
                ``cosine`` and ``step`` (`paramserver.measures`).
            shards: Server processes the parameters are cut over.
            reach: What the run listens on beside Unix sockets, and what its workers reach the
                shards by; None shares memory on this machine, and is not reached from others.
            progress: Called with the state of the run a few times a second.

        Raises:
            ValueError: A combination that cannot work.
        """
        self.config = config or RunConfig()
        self._setup = Setup(
            task,
            optimizer,
            self.config,
            rule=rule,
            damping=damping,
            compensation=compensation,
            local=local,
            measure=measure,
            shards=shards,
        )
        self._reach = reach or Reach()
        if self._reach.guests and self.config.adaptive_batch is not None:
            raise ValueError(
                "adaptive_batch goes by the noise that workers measure, and guests push gradients "
                "without it: leave out guests or adaptive_batch"
            )
        self.progress = progress

    def fit(self) -> Result:
        """Run to the end, and return what came out.

        Ctrl-C ends the run in order: the record is written, with ``stopped_because``.

        Raises:
            RunFailedError: The run broke; its record is complete up to then.
            ParamServerError: It could not start.
            LayoutError: The model has more parameters than a round program can hold.
        """
        setup = self._setup
        ready = setup.ready(self.progress)
        run = Run.start(setup.task, self.config, ready.plan.layout, setup.described())
        start = ready.start(run.resumed, run.folder.path)
        with ray_session(self.config.address, self.config.workers + setup.shards + 1):
            fleet = Fleet(ready.plan, start, run, self._reach)
            try:
                fleet.start()
                fleet.watch()
            except KeyboardInterrupt:
                fleet.end("interrupted")
            finally:
                fleet.close()
        return run.result()
