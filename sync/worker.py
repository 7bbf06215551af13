"""What a rank of the synchronous group does: a gradient, a step, until the run has ended.

Every decision follows from what all ranks told each other in a step, so all ranks decide alike:
that the budget is used up, that a gradient is not finite, that the driver wants the run to end or
to be saved.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from paramserver.averaging import Average
from paramserver.batch_sizes import AdaptiveBatch, Rate, Sizer, largest
from paramserver.clipping import Clip
from paramserver.compression import Compression, Traffic
from paramserver.errors import NonFiniteGradientError
from paramserver.groups import Group
from paramserver.layout import Layout
from paramserver.ledger import StalenessStats
from paramserver.optimizers import AnyOptimizer, Optimizer
from paramserver.optimizers.grouped import grouped
from paramserver.progress import all_made, hopeless
from paramserver.schedules import Schedule
from sync.collective import Collective, Sent
from sync.desk import Desk, Part, Position, Snapshot, Status
from sync.replicas import check_equal
from sync.sender import Sender
from sync.step import Outcome, Reduce, Report, Stepper
from workers.batches import seed_step
from workers.curriculum import Course
from workers.estimate import Estimator, GradientMode, remeasured
from workers.examples import Examples
from workers.gradients import BoundModel
from workers.own import Kept
from workers.recurrent import Carried
from workers.task import Task, batches_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every rank of a run is told, the same for all."""

    layout: Layout
    optimizer: AnyOptimizer
    """A push rule, which `Trainee` runs, or a round program, which `sync.rounds` does."""
    seed: int
    batch_size: int
    """Samples in one rank's batch, the first one if their number follows the noise."""
    adaptive_batch: AdaptiveBatch | None = None
    num_owned: int = 0
    """Samples that a rank owns, at least; a batch that follows the noise is no larger."""
    reduce: Reduce = "mean"
    clip_own: Clip | None = None
    """Applied by each rank to its own gradient."""
    clip_reduced: Clip | None = None
    """Applied to the reduced gradient."""
    schedule: Schedule | None = None
    groups: tuple[Group, ...] = ()
    """The task's groups of parameters."""
    course: Course | None = None
    """The order and pace of the samples, if there is a curriculum."""
    compress: Compression | None = None
    """What ranks send their gradients through."""
    average: Average | None = None
    """Of the parameters after each update: what is shown and evaluated in their place."""
    gradient: GradientMode = "reverse"
    """How ranks compute their gradients for a push rule."""
    on_nan: Literal["drop", "stop"] = "stop"
    """Whether a step with a gradient that is not finite is left out, or ends the run."""
    updates: int | None = None
    """Version at which the run ends."""
    samples: int | None = None
    """Samples after which it ends."""
    compare_every: int = 1000
    """Steps between two comparisons of the replicas; they are compared at the end as well."""

    def ended(self, position: Position, world: int) -> str | None:
        """Return why a run of ``world`` ranks ends at ``position``, if it does.

        The budget is used up there, or the parameters have diverged.
        """
        if self.updates is not None and position.version >= self.updates:
            return all_made(self.updates, position.version)
        if self.samples is not None and position.samples >= self.samples:
            return f"{position.samples} samples"
        return hopeless(position.spoilt, world)


@dataclass(frozen=True, slots=True)
class Finished:
    """How one rank's part in a run ended."""

    reason: str | None
    """None if the driver wanted it to end."""
    part: Part
    status: Status
    states: StalenessStats | None = None
    """How stale the states were that this rank carried, if the task is recurrent."""
    traffic: Traffic | None = None
    """What this rank has sent, if that is compressed; its own slice is counted as well."""


class Trainee:
    """One rank's model, data and place in the group."""

    def __init__(
        self, task: Task, model: nn.Module, examples: Examples, collective: Collective, plan: Plan
    ) -> None:
        """Show ``model`` the group's parameters, which `load` brings.

        Args:
            task: Gives the loss.
            model: The task's model; it is not to be used otherwise.
            examples: The training data.
            collective: The group; left to the caller to close.
            plan: What is trained and for how long.
        """
        self._model, self._examples = model, examples
        self._collective, self._plan = collective, plan
        self.cut = collective.cut
        """What the rule of this rank updates."""
        rule = cast(Optimizer, plan.optimizer)
        optimizer, schedule = grouped(rule, plan.schedule, plan.groups, plan.layout, self.cut)
        self._stepper = Stepper(
            collective,
            optimizer,
            reduce=plan.reduce,
            clip=plan.clip_reduced,
            schedule=schedule,
            average=plan.average,
        )
        self._bound = BoundModel(model, plan.layout, [range(plan.layout.numel)])
        self._bound.read([collective.params])
        adaptive, self._sizer = plan.adaptive_batch, self._sized()
        self._compute = Estimator(
            plan.gradient,
            task,
            self._bound,
            [range(plan.layout.numel)],
            [collective.grad],
            seed=plan.seed,
            clip=plan.clip_own,
            num_chunks=1 if adaptive is None else adaptive.chunks,
        )
        self._sender: Sender | None = None
        if plan.compress is not None:
            self._sender = Sender(collective, plan.layout, plan.compress, plan.seed)
        self._sent: Sent | None = None  # this step's gradient, if it is compressed
        self._batches = batches_of(
            task,
            examples,
            plan.batch_size if adaptive is None else largest(adaptive, plan.num_owned),
            seed=plan.seed,
            worker=collective.rank,
            num_workers=collective.world,
            course=plan.course,
        )
        self._kept = Kept.at_first(task, None)
        self._states = StalenessStats()
        self._names = [slot.name for slot in plan.layout.slots] + ["loss"]
        self._position = Position()
        self._state_version = 0  # that of the parameters which made the carried state

    def load(
        self,
        params: Tensor,
        position: Position = Position(),  # noqa: B008  # frozen
        rule: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
    ) -> None:
        """Bring the group to ``position``; every rank calls this with the same.

        Args:
            params: The parameters there, shape ``(numel,)``.
            position: Where the run stands.
            rule: The optimizer's state on this rank's slice; None before the first update.
            scheduler: The schedule's state.
        """
        self._collective.exchange(position.clock, ())
        self._stepper.params.copy_(params[self.cut.start : self.cut.stop])
        if rule is not None:
            self._stepper.restore(rule, scheduler)
        self._stepper.show()
        self._position = position
        if self._sizer is not None:
            self._sizer.averages = position.averages

    def train(self, desk: Desk) -> Finished:
        """Train until the budget is used up or the driver ends the run.

        Raises:
            PeerLostError: Another rank is gone or silent; the step in flight was not finished.
            NonFiniteGradientError: A gradient was not finite and the plan says to stop; all ranks
                raise it alike, and it was not applied.
            ReplicaMismatchError: The ranks' models differ.
            TaskError: The task's loss failed.
        """
        plan, world = self._plan, self._collective.world
        status = Status(self._position, waited_s=(0.0,) * world)
        desk.status = status
        saved, stop = 0, False
        self._model.train()
        try:
            while (reason := plan.ended(self._position, world)) is None and not stop:
                report = self._gradient(desk)
                outcome = self._stepper.step(self._position.clock + 1, report, self._sent)
                status = self._account(outcome, status)
                desk.status = status
                stop = any(r.stop for r in outcome.reports)
                wanted = int(max(r.save for r in outcome.reports))
                if wanted > saved:
                    saved = wanted
                    desk.lay(self._part(saved))
                if any(r.show for r in outcome.reports):
                    self._show(desk, bool(outcome.reports[self._collective.rank].show))
                if self._position.clock % plan.compare_every == 0:
                    self._compare()
            self._compare()
            states = None if self._kept.carried is None else self._states
            traffic = None if self._sender is None else self._sender.traffic
            return Finished(reason, self._part(), status, states, traffic)
        except NonFiniteGradientError:
            desk.lay(self._part())  # all ranks are at the end of the same step: it can be kept
            raise
        finally:
            desk.close()

    def _gradient(self, desk: Desk) -> Report:
        """Compute this rank's gradient into its slot."""
        start = time.perf_counter()
        clock = self._position.clock
        seed_step(self._plan.seed, self._collective.rank, clock)
        version, sizer = self._position.version, self._sizer
        size = None if sizer is None else sizer.size(version)
        batch = self._batches.read(self._examples, clock, version, size)
        done = self._compute(batch, self._collective.rank, clock, self._carried())
        if self._sender is not None and not done.layer:
            self._sent = self._sender.send_(self._collective.grad, clock)
            done = remeasured(done, self._bound)
        return Report(
            samples=size or self._batches.batch_size,
            loss=done.loss,
            norm=done.norm,
            seconds=time.perf_counter() - start,
            bad_layer=self._names.index(done.layer) if done.layer else -1,
            stop=desk.stop,
            save=desk.save,
            show=desk.show.is_set(),
            noise=done.noise,
        )

    def _sized(self) -> Sizer | None:
        """Return what sizes the batches, the same on every rank; None if nothing does."""
        plan = self._plan
        if plan.adaptive_batch is None:
            return None
        return Sizer(
            plan.adaptive_batch,
            Rate(cast(Optimizer, plan.optimizer), plan.schedule),
            first=plan.batch_size,
            owned=plan.num_owned,
            num_sharing=self._collective.world,
        )

    def _carried(self) -> Carried | None:
        """Return what holds this rank's state, if the task is recurrent; count how stale it is."""
        kept, position = self._kept, self._position
        if kept.carried is None:
            return None
        if kept.resets:
            kept.carried.reset()
        elif kept.carried.at(position.clock) is not None:
            self._states.add(self._collective.rank, position.version - self._state_version)
        self._state_version = position.version
        return kept.carried

    def _account(self, outcome: Outcome, status: Status) -> Status:
        """Move on from a step; a gradient that is not finite ends the run if the plan says so."""
        was, reports = self._position, outcome.reports
        if not outcome.applied and self._plan.on_nan == "stop":
            worker = outcome.culprit
            layer = self._names[int(reports[worker].bad_layer)]
            raise NonFiniteGradientError(worker, was.clock + 1, layer)
        waited_s = blame(status.waited_s, [r.seconds for r in reports])
        if not outcome.applied:
            spoilt = was.spoilt + len(reports)
            self._position = replace(was, clock=was.clock + 1, spoilt=spoilt)
            dropped = status.dropped + len(reports)
            return Status(self._position, status.loss_sum, dropped, waited_s, status.batch_size)
        samples = sum(r.samples for r in reports)
        loss = sum(r.loss * r.samples for r in reports) / samples
        size = 0
        if self._sizer is not None:
            self._sizer.add(sum(r.noise for r in reports) / len(reports), loss)
            size = self._sizer.size(was.version + 1)
        self._position = Position(
            was.version + 1,
            was.clock + 1,
            was.gradients + len(reports),
            was.samples + int(samples),
            averages=was.averages if self._sizer is None else self._sizer.averages,
        )
        return Status(self._position, status.loss_sum + loss, status.dropped, waited_s, size)

    def _show(self, desk: Desk, is_wanted: bool) -> None:
        """Bring the average of the parameters together where a rank wants them, or themselves."""
        group, apart = self._collective, self._stepper.evaluated()
        if apart is not None:
            group.exchange(self._position.clock, ())
            group.vector[self.cut.start : self.cut.stop] = apart
            group.publish(vector=True)
        if is_wanted:
            desk.show.clear()
            shown = group.params if apart is None else group.vector
            desk.lay(Snapshot(self._position.version, shown.clone()))

    def _part(self, number: int = 0) -> Part:
        """Copy this rank's share of the run's state."""
        cut = self.cut
        scheduler = self._stepper.scheduler
        return Part(
            number,
            self._position,
            cut,
            self._stepper.params.clone(),
            self._stepper.saved(),
            None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
        )

    def _compare(self) -> None:
        """Check that all ranks' models have the same parameters, to the last bit."""
        seen = (p for p in self._model.parameters() if p.requires_grad)
        check_equal(self._collective, self._position.clock, seen)


def blame(waited_s: Sequence[float], seconds: Sequence[float]) -> tuple[float, ...]:
    """Add to ``waited_s``, by rank, what all others waited for the slowest of ``seconds``."""
    last = max(range(len(seconds)), key=lambda rank: seconds[rank])
    waited = list(waited_s)
    waited[last] += sum(seconds[last] - s for s in seconds)
    return tuple(waited)
