"""The synchronous trainer: what a run is made of, and whether that fits; `sync.driver` makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from paramserver.averaged_state import check_average
from paramserver.batch_sizes import largest
from paramserver.checkpoint import Checkpoint
from paramserver.errors import CheckpointError
from paramserver.groups import described_with, refuse_groups
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS, AnyOptimizer, Optimizer
from paramserver.optimizers.grouped import check_groups
from paramserver.record import Result
from paramserver.rounds import RoundOptimizer, build_program, check_size
from sync.driver import Driver
from sync.step import Reduce
from sync.worker import Plan
from workers.config import RunConfig
from workers.curriculum import Course
from workers.programs import check_adaptive, check_config, check_recurrent, check_samples
from workers.run import Run
from workers.session import ray_session
from workers.task import Data, Task, batches_of, build_data, build_model


class SyncTrainer:
    """Trains a task with workers in step: every update is the reduced gradient of all of them."""

    def __init__(
        self,
        task: Task,
        optimizer: AnyOptimizer,
        config: RunConfig | None = None,
        *,
        reduce: Reduce = "mean",
        collective: Literal["auto", "shared_memory", "gloo"] = "auto",
        network_interface: str | None = None,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Describe a run; `fit` makes it.

        Args:
            task: What is trained.
            optimizer: Applied to every reduced gradient; or a round program, whose requests all
                workers answer together.
            config: Size, budget and deadlines.
            reduce: ``mean`` weights each worker's gradient by its samples, as one process would
                that had read all batches; ``sum`` adds them.
            collective: What carries gradients between workers: ``shared_memory`` for workers on
                one node, ``gloo`` for any; ``auto`` looks where they are, and takes memory within
                a node and gloo between nodes.
            network_interface: Network interface of each node that gloo is to use, such as
                ``eth0``; None takes the one whose address Ray knows the node by.
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
        if network_interface is not None and collective == "shared_memory":
            raise ValueError("network_interface is for gloo, and collective is 'shared_memory'")
        self.config = config or RunConfig()
        if asked := self.config.asked_of_servers:
            raise ValueError(f"{asked[0]} is for shards, and synchronous mode has none")
        self.network_interface = network_interface
        if self.config.compress_pull is not None:
            raise ValueError(
                "compress_pull is for mode async: in step all ranks have equal parameters, to the "
                "bit; use compress, which is for gradients"
            )
        self.task, self.optimizer = self.config.applied_to(task), optimizer
        self.reduce: Reduce = reduce
        self.collective, self.progress = collective, progress
        self.program = build_program(optimizer)  # to be looked at
        self._check_program()

    def _check_program(self) -> None:
        """Raise ValueError for what a round program cannot be combined with."""
        name = OPTIMIZERS.name_of(self.optimizer)
        check_recurrent(self.task, self.config, None if self.program is None else name)
        check_adaptive(self.task, self.config, self.optimizer, name)
        if self.config.adaptive_batch is not None and self.reduce != "mean":
            raise ValueError(
                f"adaptive_batch goes by the rate of a mean gradient, and reduce={self.reduce} "
                "makes steps longer by the number of workers: use reduce=mean"
            )
        if self.program is None:
            return
        check_config(name, self.config)
        refuse_groups(self.task.groups, name)
        if self.reduce != "mean":
            raise ValueError(
                f"{name} is a round program, which compares means over samples: use reduce='mean'"
            )

    def fit(self) -> Result:
        """Run to the end, and return what came out.

        Ctrl-C ends the run in order: the record is written, with ``stopped_because``.

        Raises:
            RunFailedError: The run broke; its record is complete up to then.
            ParamServerError: It could not start.
            LayoutError: The model has more parameters than a round program can hold.
            ValueError: There are fewer training samples than workers, or than are to be drawn; or
                a group of parameters asks for what cannot be.
        """
        model = build_model(self.task, self.config.seed)
        layout = Layout.of(model, self.task.groups)
        if self.program is None:
            rule = cast(Optimizer, self.optimizer)
            check_groups(rule, self.config.schedule, self.task.groups, layout)
        else:
            check_size(cast(RoundOptimizer, self.optimizer), self.program, layout.flatten(model))
        data = build_data(self.task)
        num_train = len(data.train)
        if self.program is not None:
            check_samples(OPTIMIZERS.name_of(self.optimizer), self.optimizer, num_train)
        plan = self._plan(layout, data, self.config.course(self.task, data))
        run = Run.start(self.task, self.config, layout, self._described())
        optimizer = described_with(OPTIMIZERS.describe(self.optimizer), self.task.groups)
        start = run.resumed or Checkpoint.fresh(layout, layout.flatten(model), optimizer)
        if start.optimizer != optimizer:
            raise CheckpointError(
                f"{run.folder.path} was trained with {start.optimizer}, not {optimizer}"
            )
        check_average(start.state, self.config.average)
        with ray_session(self.config.address, self.config.workers + 1):
            Driver(self, plan, start, run).drive()
        return run.result()

    def _plan(self, layout: Layout, data: Data, course: Course | None) -> Plan:
        c = self.config
        batch_size = c.batch_size or self.task.batch_size
        if self.program is None:  # a rank may have no piece of a sample, but never no batch
            last, num = c.workers - 1, c.workers
            batches_of(self.task, data.train, batch_size, seed=c.seed, worker=last, num_workers=num)
        if c.adaptive_batch is not None:
            largest(c.adaptive_batch, len(data.train) // c.workers)  # or it says why
        clips_own = c.clip is not None and c.clip.where == "worker"
        return Plan(
            layout=layout,
            optimizer=self.optimizer,
            seed=c.seed,
            batch_size=batch_size,
            adaptive_batch=c.adaptive_batch,
            num_owned=len(data.train) // c.workers,
            reduce=self.reduce,
            clip_own=c.clip if clips_own else None,
            clip_reduced=None if clips_own else c.clip,
            schedule=c.schedule,
            groups=self.task.groups,
            compress=c.compress,
            average=c.average,
            gradient=c.gradient,
            course=course,
            on_nan=c.on_nan,
            updates=c.updates,
            samples=None if c.epochs is None else math.ceil(c.epochs * len(data.train)),
        )

    def _described(self) -> dict[str, Any]:
        """Return what the record says of this trainer, beside the run's configuration."""
        return {
            "mode": "sync",
            "optimizer": OPTIMIZERS.describe(self.optimizer),
            "reduce": self.reduce,
            "collective": self.collective,
            "network_interface": self.network_interface,
        }
