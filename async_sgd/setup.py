"""What an asynchronous run is asked to be, real or simulated: checked first, then made a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from async_sgd.compensation import COMPENSATIONS
from async_sgd.damping import DAMPINGS
from async_sgd.plan import Plan
from async_sgd.rules import RULES
from async_sgd.rules.asynchronous import Asynchronous
from async_sgd.rules.pieces import Pieces
from async_sgd.rules.ssp import SSP
from paramserver.averaged_state import check_average
from paramserver.batch_sizes import largest
from paramserver.checkpoint import Checkpoint
from paramserver.compensation import Compensation, check_compensation
from paramserver.compression import COMPRESSIONS
from paramserver.errors import CheckpointError
from paramserver.groups import described_with, refuse_groups
from paramserver.layout import Layout
from paramserver.measures import check_measures
from paramserver.optimizers import OPTIMIZERS, SGD, AnyOptimizer, Optimizer
from paramserver.optimizers.base import is_per_worker, needs_norm
from paramserver.optimizers.grouped import check_groups
from paramserver.optimizers.push_form import PushForm
from paramserver.rounds import RoundOptimizer, build_program, check_size
from paramserver.rules import Damping, RuleSpec
from workers.config import RunConfig
from workers.local import LOCALS, Local
from workers.programs import check_adaptive, check_config, check_recurrent, check_samples
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
        check_measures(self.measure)
        self._check_program()
        self._check_groups()
        is_program = self.program is not None or self.form is not None
        check_recurrent(task, config, self.optimizer_name if is_program else None)
        check_adaptive(self.task, config, optimizer, self.optimizer_name)
        if config.adaptive_batch is not None:
            self._check_batches()
        if local is not None:
            self._check_local(local)
        self._check_workers()
        self._check_compress()
        if self.cancels:
            self._check_cancel()
        if self.rule.build(config.workers).tabulates:
            self._check_table()
        if shards > 1:
            self._check_norms()

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

    def _check_groups(self) -> None:
        """Raise ValueError if groups want rates of their own where there is one for all."""
        if self.program is not None or self.form is not None:
            refuse_groups(self.task.groups, self.optimizer_name)
        elif self.local is not None:
            name = LOCALS.name_of(self.local)
            refuse_groups(self.task.groups, f"local {name}", instead="no local steps")

    def _windows(self, data: Data) -> Windows | None:
        """Return worker 0's, if workers read windows; ValueError if there are too few for all."""
        c, task = self.config, self.task
        if task.recurrent is None or self.program is not None or self.form is not None:
            return None
        size = c.batch_size or task.batch_size
        windows = batches_of(task, data.train, size, seed=c.seed, worker=0, num_workers=c.workers)
        assert isinstance(windows, Windows), "a recurrent task has windows"
        return windows

    def _check_workers(self) -> None:
        """Raise ValueError if workers' gradients become one that must be told apart."""
        if is_per_worker(self.optimizer) and self.rule.build(self.config.workers).gathers:
            name, rule = self.optimizer_name, RULES.name_of(self.rule)
            raise ValueError(
                f"{name} keeps a velocity for each worker, and rule {rule} averages the gradients "
                "of several, which is nobody's: use asp, ssp, bounded or ringmaster, or optimizer "
                "momentum"
            )

    def _check_batches(self) -> None:
        """Raise ValueError if an update is not one gradient of a batch whose size is to follow."""
        if self.local is not None:
            raise ValueError(
                f"local {LOCALS.name_of(self.local)} takes several steps for a push, and "
                "adaptive_batch sizes the batch of one step of the server: leave one of them out"
            )
        if self.rule.build(self.config.workers).gathers:
            raise ValueError(
                f"rule {RULES.name_of(self.rule)} averages several gradients into one update, and "
                "adaptive_batch sizes that of one: use asp, ssp, bounded or ringmaster, or mode "
                "sync"
            )

    def _check_compress(self) -> None:
        """Raise ValueError for what needs gradients, or reads, that the wire has not changed."""
        push, pull = self.config.compress, self.config.compress_pull
        if push is not None and push.feedback:
            name = f"compress {COMPRESSIONS.name_of(push)} has feedback: what is pushed is of"
            if self.compensation is not None:
                raise ValueError(
                    f"{name} gradients at several points, and compensation "
                    f"{COMPENSATIONS.name_of(self.compensation)} corrects the gradient at one: "
                    "leave it out, or use bf16, qsgd or random-k"
                )
            if self.rule.build(self.config.workers).tabulates:
                raise ValueError(
                    f"{name} several gradients, and rule {RULES.name_of(self.rule)} takes it for "
                    "one, which it uses again and again: use bf16, qsgd or random-k"
                )
        if pull is not None and (self.compensation is not None or "gap" in self.measure):
            what = "measure gap" if self.compensation is None else "compensation"
            raise ValueError(
                f"with compress_pull workers compute at what came through, and {what} is of what "
                "the shard has shown them: leave one of them out"
            )

    def _check_cancel(self) -> None:
        """Raise ValueError for what cannot be given up half way."""
        for way in ("compress", "compress_pull"):
            compression = getattr(self.config, way)
            if compression is not None and (compression.feedback or compression.remembers):
                raise ValueError(
                    f"{way} {COMPRESSIONS.name_of(compression)} remembers what was sent, and a "
                    "rule with cancel=true throws it away on its way: leave cancel out, or use "
                    "bf16, fp16, qsgd or int8:feedback=false"
                )
        if self.task.recurrent is not None and self.task.recurrent.reset == "never":
            raise ValueError(
                f"task {self.task.name} carries a state from window to window, and a rule with "
                "cancel=true gives up windows half way: leave cancel out, or use reset=pull"
            )
        if self.form is not None:
            raise ValueError(
                f"{self.optimizer_name} keeps points from push to push, and a rule with "
                "cancel=true gives up what a worker computes half way: leave cancel out"
            )
        if self.local is not None and self.local.num_kept > 0:
            raise ValueError(
                f"local {LOCALS.name_of(self.local)} keeps {self.local.num_kept} vectors from push "
                "to push, which half of its steps would have changed when a rule with cancel=true "
                "gives them up: leave cancel out, or use steps that keep nothing, such as sgd"
            )

    def _check_table(self) -> None:
        """Raise ValueError for what has no meaning where gradients are used several times."""
        rule = RULES.name_of(self.rule)
        for what, is_there in (
            ("damping shortens the step of one gradient", self.damping is not None),
            ("compensation corrects a gradient for one update", self.compensation is not None),
        ):
            if is_there:
                raise ValueError(
                    f"{what}, and an update of rule {rule} averages gradients of every worker, "
                    "each used in several: leave it out, or use asp, ssp, bounded or ringmaster"
                )

    def _check_local(self, local: Local) -> None:
        """Raise ValueError for what local steps cannot be combined with."""
        name, steps = self.optimizer_name, f"local {LOCALS.name_of(local)}"
        local.check(self.config.workers)
        if self.program is not None or self.form is not None:
            raise ValueError(
                f"{name} asks workers for more than a gradient, each at the point it names, and "
                f"{steps} leaves that point: use a push rule, such as sgd or nesterov"
            )
        if self.compensation is not None:
            raise ValueError(
                f"{steps} pushes how far a worker came, which is no gradient, and compensation "
                f"{COMPENSATIONS.name_of(self.compensation)} corrects gradients: leave it out, and "
                "shorten the steps by damping"
            )
        if local.as_it_is:
            self._check_as_it_is(steps)
        if local.keeps_reads:
            self._check_keeps_reads(steps)

    def _check_keeps_reads(self, steps: str) -> None:
        """Raise ValueError for what counts on a new read after every push."""
        rule = RULES.name_of(self.rule)
        if self.rule.build(self.config.workers).gathers or isinstance(self.rule, SSP):
            raise ValueError(
                f"{steps} pushes several times of one read, and rule {rule} counts on a new one "
                "after every push: use asp, bounded or ringmaster, or fetch as often as you push"
            )
        if "gap" in self.measure:
            raise ValueError(
                f"{steps} goes on from what it fetched some pushes ago, which no shard keeps to "
                "measure the gap from: leave gap out, or fetch as often as you push"
            )

    def _check_as_it_is(self, steps: str) -> None:
        """Raise ValueError if the server would not add up what is pushed as it is."""
        clip = self.config.clip
        changed = {
            f"optimizer {self.optimizer_name}": self.optimizer != SGD(lr=1.0),
            f"rule {RULES.name_of(self.rule)}": self.rule.build(self.config.workers).gathers,
            "a damping": self.damping is not None,
            "a schedule": self.config.schedule is not None,
            "compress": self.config.compress is not None,
            "a clip with where=reduced": clip is not None and clip.where == "reduced",
        }
        for what in (what for what, changes in changed.items() if changes):
            raise ValueError(
                f"{steps} draws a worker and the server together by the same force, and {what} "
                "changes what the server gets of it: use optimizer sgd:lr=1, a rule that averages "
                "nothing, and none of damping, schedule, compress and clip with where=reduced"
            )

    def _check_norms(self) -> None:
        """Raise ValueError if something needs a norm that several shards cannot know.

        Workers measure that of what they push, but no shard has more than a slice of a mean, or of
        a gradient that was corrected.
        """
        if self.rule.build(self.config.workers).gathers:
            what, instead = "an averaged", "a rule that averages nothing"
        elif self.compensation is not None:
            what, instead = "a compensated", "no compensation"
        else:
            return
        clip = self.config.clip
        if clip is not None and clip.where == "reduced" and clip.norm_needed:
            raise ValueError(
                f"clipping {what} gradient by its norm needs the norm over all shards, which no "
                "shard has: clip with where=worker, or use 1 shard"
            )
        if needs_norm(self.optimizer):
            raise ValueError(
                f"{OPTIMIZERS.name_of(self.optimizer)} needs the norm of {what} gradient over all "
                f"shards, which no shard has: use 1 shard, or {instead}"
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
        if self.compensation is not None:
            raise ValueError(
                f"{name} does not push a gradient alone, and a compensation corrects nothing else: "
                "leave it out, and shorten the steps by damping"
                if self.form is not None
                else f"{name} is a round program: nothing in a round is stale, or compensated"
            )
        if self.measure:
            raise ValueError(
                f"{name} does not push a gradient alone, and measure {','.join(self.measure)} is "
                "of gradients that are stale: leave it out, or use a push rule"
            )
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
