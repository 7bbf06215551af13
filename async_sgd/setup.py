"""What an asynchronous run is asked to be, real or simulated: checked first, then made a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from async_sgd.combinations import check_combination
from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS
from async_sgd.plan import Plan
from async_sgd.rules import RULES
from async_sgd.rules.asynchronous import Asynchronous
from async_sgd.rules.pieces import Pieces
from paramserver.averaged_state import check_average
from paramserver.batch_sizes import largest
from paramserver.checkpoint import Checkpoint
from paramserver.compensation import Compensation, check_compensation
from paramserver.errors import CheckpointError
from paramserver.groups import described_with
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS, AnyOptimizer, Optimizer
from paramserver.optimizers.grouped import check_groups
from paramserver.optimizers.push_form import PushForm
from paramserver.rounds import RoundOptimizer, build_program, check_size
from paramserver.rules import Damping, RuleSpec
from workers.config import RunConfig
from workers.local import LOCALS, Local
from workers.programs import check_samples
from workers.task import Data, Task, batches_of, build_data, build_model
from workers.windows import Windows


@dataclass(frozen=True, slots=True)
class Ready:
    """A run that could start now."""

    plan: Plan
    params: Tensor
    """Where it starts, unless it is resumed; shape ``(n,)``."""
    data: Data

    def start(self, resumed: Checkpoint | None, folder: Path) -> Checkpoint:
        """Return where the run starts: at the beginning, or where the one in ``folder`` stopped.

        Raises:
            CheckpointError: That one was another run.
        """
        described, config = dict(self.plan.described), self.plan.config
        start = resumed or Checkpoint.fresh(self.plan.layout, self.params, described)
        if start.optimizer != described:
            raise CheckpointError(f"{folder} was trained with {start.optimizer}, not {described}")
        check_average(start.state, config.average)
        check_compensation(start.state, start.params, self.plan.compensation)
        return start


class Setup:
    """A combination of task, optimizer, rule and policies that can work."""

    def __init__(
        self,
        task: Task,
        optimizer: AnyOptimizer,
        config: RunConfig,
        *,
        rule: RuleSpec | None,
        damping: Damping | None,
        compensation: Compensation | None,
        local: Local | None = None,
        measure: Sequence[str] = (),
        shards: int,
    ) -> None:
        """Check it.

        Raises:
            ValueError: A combination that cannot work.
        """
        self.task, self.optimizer, self.config = config.applied_to(task), optimizer, config
        self.program = build_program(optimizer)
        self.rule: RuleSpec = rule or (Asynchronous() if self.program is None else Pieces())
        self.form: PushForm | None = None
        if self.program is not None and not isinstance(self.rule, Pieces):
            self.form, self.program = self._push_form(), None
        self.damping, self.compensation, self.shards = damping, compensation, shards
        self.local, self.measure = local, tuple(measure)
        check_combination(self)

    @property
    def optimizer_name(self) -> str:
        """The name the optimizer is registered under."""
        return OPTIMIZERS.name_of(self.optimizer)

    @property
    def cancels(self) -> bool:
        """Whether the rule may cancel what a worker computes."""
        return self.rule.build(self.config.workers).cancel_age is not None

    def described(self) -> dict[str, object]:
        """Return what a record says of it, beside the configuration."""
        damping, compensation, local = self.damping, self.compensation, self.local
        return {
            "mode": "async",
            "optimizer": OPTIMIZERS.describe(self.optimizer),
            "form": None if self.form is None else "pushes",
            "rule": RULES.describe(self.rule),
            "damping": None if damping is None else DAMPINGS.describe(damping),
            "compensation": None if compensation is None else COMPENSATIONS.describe(compensation),
            "local": None if local is None else LOCALS.describe(local),
            "measure": list(self.measure),
            "shards": self.shards,
        }

    def ready(self, progress: Callable[[Mapping[str, Any]], None] | None) -> Ready:
        """Build the model and load the data; see that they fit the rest.

        Raises:
            ValueError: Too few samples, or a group of parameters asks for what cannot be.
            LayoutError: The model has more parameters than a round program can hold.
            ParamServerError: The task cannot be built.
        """
        model = build_model(self.task, self.config.seed)
        layout = Layout.of(model, self.task.groups)
        if self.program is not None:
            check_size(cast(RoundOptimizer, self.optimizer), self.program, layout.flatten(model))
        if self.form is not None and self.form.whole:
            self.form.build([nn.Parameter(layout.flatten(model), requires_grad=False)])
        if self.program is None and self.form is None:
            rule = cast(Optimizer, self.optimizer)
            check_groups(rule, self.config.schedule, self.task.groups, layout)
        cuts = layout.cuts(self.shards)
        data = build_data(self.task)
        num_train = len(data.train)
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
        if self.config.adaptive_batch is not None:
            largest(self.config.adaptive_batch, num_train // self.config.workers)  # or it says why
        described = described_with(OPTIMIZERS.describe(self.optimizer), self.task.groups)
        plan = Plan(
            task=self.task,
            optimizer=self.optimizer,
            program=self.program,
            form=self.form,
            config=self.config,
            rule=self.rule,
            damping=self.damping,
            compensation=self.compensation,
            local=self.local,
            course=self.config.course(self.task, data),
            measure=self.measure,
            cancels=self.cancels,
            tabulates=self.rule.build(self.config.workers).tabulates,
            layout=layout,
            cuts=cuts,
            num_train=num_train,
            windows=self._windows(data),
            described=described if self.form is None else {**described, "form": "pushes"},
            progress=progress,
        )
        return Ready(plan, layout.flatten(model), data)

    def _windows(self, data: Data) -> Windows | None:
        """Return worker 0's, if workers read windows; ValueError if there are too few for all."""
        c, task = self.config, self.task
        if task.recurrent is None or self.program is not None or self.form is not None:
            return None
        size = c.batch_size or task.batch_size
        windows = batches_of(task, data.train, size, seed=c.seed, worker=0, num_workers=c.workers)
        assert isinstance(windows, Windows), "a recurrent task has windows"
        return windows

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
