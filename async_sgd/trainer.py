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

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from async_sgd.damping import DAMPINGS
from async_sgd.fleet import Fleet
from async_sgd.plan import Plan
from async_sgd.rules import RULES
from async_sgd.rules.asynchronous import Asynchronous
from async_sgd.rules.pieces import Pieces
from paramserver.averaged_state import check_average
from paramserver.checkpoint import Checkpoint
from paramserver.errors import CheckpointError
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS, AnyOptimizer
from paramserver.optimizers.base import needs_norm
from paramserver.optimizers.push_form import PushForm
from paramserver.record import Result
from paramserver.rounds import RoundOptimizer, build_program, check_size
from paramserver.rules import Damping, RuleSpec
from workers.config import RunConfig
from workers.programs import check_config, check_samples
from workers.run import Run
from workers.session import ray_session
from workers.task import Task, build_data, build_model


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
        shards: int = 1,
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
            shards: Server processes the parameters are cut over.
            progress: Called with the state of the run a few times a second.

        Raises:
            ValueError: A combination that cannot work.
        """
        self.task, self.optimizer = task, optimizer
        self.config = config or RunConfig()
        self.program = build_program(optimizer)
        self.rule: RuleSpec = rule or (Asynchronous() if self.program is None else Pieces())
        self.form: PushForm | None = None
        if self.program is not None and not isinstance(self.rule, Pieces):
            self.form, self.program = self._push_form(), None
        self.damping, self.shards = damping, shards
        self.progress = progress
        self._check_program()
        clip = self.config.clip
        gathers = self.rule.build(self.config.workers).gathers and shards > 1
        if gathers and clip is not None and clip.where == "reduced" and clip.norm_needed:
            raise ValueError(
                "clipping an averaged gradient by its norm needs the norm over all shards, which "
                "no shard has: clip with where=worker, or use 1 shard"
            )
        if gathers and needs_norm(optimizer):
            raise ValueError(
                f"{OPTIMIZERS.name_of(optimizer)} needs the norm of an averaged gradient over all "
                "shards, which no shard has: use 1 shard, or a rule that averages nothing"
            )

    def _push_form(self) -> PushForm:
        """Return a round program's push form; raise ValueError if it has none, or not so."""
        name, rule = OPTIMIZERS.name_of(self.optimizer), RULES.name_of(self.rule)
        if not hasattr(self.optimizer, "pushes"):
            raise ValueError(
                f"{name} is a round program without a push form: it runs under rule pieces, not "
                f"{rule}"
            )
        form: PushForm = self.optimizer.pushes()
        if self.rule.build(self.config.workers).gathers:
            raise ValueError(
                f"{name} keeps what each worker has pushed, and rule {rule} averages it over the "
                "workers: use asp, ssp or bounded, or pieces"
            )
        return form

    def _check_program(self) -> None:
        """Raise ValueError for what a round program, or a push rule, cannot be combined with."""
        name = OPTIMIZERS.name_of(self.optimizer)
        needs = self.program or self.form
        if needs is None:
            if isinstance(self.rule, Pieces):
                raise ValueError(f"rule pieces is for round programs, and {name} is a push rule")
            return
        if self.damping is not None and self.program is not None:
            raise ValueError(f"{name} is a round program: nothing in a round is stale, or damped")
        check_config(name, self.config)
        if self.form is not None and self.form.work == "block" and self.config.schedule is not None:
            raise ValueError(
                f"{name} moves to where a worker found the least: a schedule changes nothing about "
                "that; damping does"
            )
        if needs.whole and self.shards > 1:
            raise ValueError(
                f"{name} needs the whole vector in one place: use 1 shard, not {self.shards}"
            )

    def fit(self) -> Result:
        """Run to the end, and return what came out.

        Ctrl-C ends the run in order: the record is written, with ``stopped_because``.

        Raises:
            RunFailedError: The run broke; its record is complete up to then.
            ParamServerError: It could not start.
            LayoutError: The model has more parameters than a round program can hold.
        """
        model = build_model(self.task, self.config.seed)
        layout = Layout.of(model)
        if self.program is not None:
            check_size(cast(RoundOptimizer, self.optimizer), self.program, layout.flatten(model))
        if self.form is not None and self.form.whole:
            self.form.build([nn.Parameter(layout.flatten(model), requires_grad=False)])
        cuts = layout.cuts(self.shards)
        num_train = len(build_data(self.task).train)
        if num_train < self.config.workers:
            raise ValueError(
                f"{self.config.workers} workers cannot share {num_train} samples: use fewer"
            )
        if self.program is not None or self.form is not None:
            check_samples(OPTIMIZERS.name_of(self.optimizer), self.optimizer, num_train)
        if self.form is not None and (self.form.spec.batch or 1) * self.config.workers > num_train:
            raise ValueError(
                f"{self.config.workers} workers cannot each push {self.form.spec.batch} of "
                f"{num_train} samples: use a smaller batch"
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
        check_average(start.state, self.config.average)
        with ray_session(self.config.address, self.config.workers + self.shards + 1):
            fleet = Fleet(self._plan(layout, cuts, num_train), start, run)
            try:
                fleet.start()
                fleet.watch()
            except KeyboardInterrupt:
                fleet.end("interrupted")
            finally:
                fleet.close()
        return run.result()

    def _plan(self, layout: Layout, cuts: tuple[range, ...], num_train: int) -> Plan:
        return Plan(
            task=self.task,
            optimizer=self.optimizer,
            program=self.program,
            form=self.form,
            config=self.config,
            rule=self.rule,
            damping=self.damping,
            layout=layout,
            cuts=cuts,
            num_train=num_train,
            described=self.optimizer_description(),
            progress=self.progress,
        )

    def optimizer_description(self) -> dict[str, object]:
        """Return the optimizer as the record holds it."""
        described = OPTIMIZERS.describe(self.optimizer)
        return described if self.form is None else {**described, "form": "pushes"}

    def _described(self) -> dict[str, object]:
        """Return what the record says of this trainer, beside the run's configuration."""
        damping = None if self.damping is None else DAMPINGS.describe(self.damping)
        return {
            "mode": "async",
            "optimizer": OPTIMIZERS.describe(self.optimizer),
            "form": None if self.form is None else "pushes",
            "rule": RULES.describe(self.rule),
            "damping": damping,
            "shards": self.shards,
        }
