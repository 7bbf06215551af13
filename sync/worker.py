"""What a rank of the synchronous group does: a gradient, a step, until the run has ended.

Every decision follows from what all ranks told each other in the step, so all ranks decide alike:
that the budget is used up, that a gradient is not finite, that the driver wants the run to end or
to be saved. The driver's wishes wait on a `Desk` for the end of the step.
"""

from __future__ import annotations

import copy
import hashlib
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paramserver.clipping import Clip
from paramserver.errors import NonFiniteGradientError, ReplicaMismatchError
from paramserver.layout import Layout
from paramserver.optimizers import Optimizer
from paramserver.schedules import Schedule
from sync.collective import Collective
from sync.step import Outcome, Reduce, Report, Stepper
from workers.batches import Batches, step_seed
from workers.examples import Examples
from workers.gradients import BoundModel
from workers.task import Task, user_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every rank of a run is told, the same for all."""

    layout: Layout
    optimizer: Optimizer
    seed: int
    batch_size: int
    """Samples in one rank's batch."""
    reduce: Reduce = "mean"
    clip_own: Clip | None = None
    """Applied by each rank to its own gradient."""
    clip_reduced: Clip | None = None
    """Applied to the reduced gradient."""
    schedule: Schedule | None = None
    on_nan: Literal["drop", "stop"] = "stop"
    updates: int | None = None
    """Version at which the run ends."""
    samples: int | None = None
    """Samples after which it ends."""
    compare_every: int = 1000
    """Steps between two comparisons of the replicas; they are compared at the end as well."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands between two steps."""

    version: int = 0
    """Updates applied."""
    clock: int = 0
    """Steps taken, those left out included."""
    gradients: int = 0
    """Gradients the updates are made of."""
    samples: int = 0
    """Samples those gradients are made of."""


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a run's state at one position; nothing in it is shared with the rank."""

    position: Position
    cut: range
    params: Tensor
    rule: dict[str, Any]
    """The ``state_dict`` of the optimizer on the slice."""
    scheduler: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Finished:
    """How a rank's part of a run ended."""

    reason: str
    part: Part


class Desk:
    """Where the driver's threads leave what they want of the loop, and get it. Thread-safe.

    The loop looks at `stop`, `save` and `show` once a step, and lays answers on the desk.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        """The run is to end after this step."""
        self.save = threading.Event()
        """Every rank is to lay its `Part` on its desk after this step; set at one rank only."""
        self.show = threading.Event()
        """This rank is to lay a copy of all parameters on the desk."""
        self._changed = threading.Condition()
        self._laid: dict[type, Any] = {}
        self._is_closed = False
        self.status: dict[str, Any] = {}
        """Where the run stands; replaced as a whole, never changed."""

    def lay(self, answer: Part | Shown) -> None:
        """Leave ``answer`` for whoever waits for it; an earlier one nobody took is replaced."""
        with self._changed:
            self._laid[type(answer)] = answer
            self._changed.notify_all()

    def take(self, kind: type, timeout_s: float) -> Any:
        """Wait for an answer of ``kind`` and take it; None if the loop ends without one.

        Raises:
            TimeoutError: The loop did not get to it in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: kind in self._laid or self._is_closed, timeout_s):
                raise TimeoutError(f"no {kind.__name__} within {timeout_s:.1f} s")
            return self._laid.pop(kind, None)

    def close(self) -> None:
        """Say that the loop has ended; what has been laid can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Shown:
    """All parameters at one version, a copy."""

    version: int
    params: Tensor


def train(
    task: Task,
    model: nn.Module,
    examples: Examples,
    collective: Collective,
    plan: Plan,
    desk: Desk,
    params: Tensor,
    *,
    start: Position = Position(),  # noqa: B008  # frozen
    rule: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> Finished:
    """Train from ``start`` until the budget is used up or the driver ends the run.

    Args:
        task: Gives the loss.
        model: The task's model; its parameters are shown those of the group.
        examples: The training data.
        collective: The group; left to the caller to close.
        plan: What is trained and for how long.
        desk: Carries the driver's wishes; closed at the end.
        params: The parameters to start from, shape ``(numel,)``.
        start: Where the run stands.
        rule: The optimizer's saved state on this rank's slice.
        scheduler: The schedule's saved state.

    Raises:
        PeerLostError: Another rank is gone or silent; the step in flight was not finished.
        NonFiniteGradientError: A gradient was not finite and the plan says to stop; all ranks
            raise it alike, and it was not applied.
        ReplicaMismatchError: The ranks' models differ.
        TaskError: The task's loss failed.
    """
    try:
        rank = _Rank(task, model, examples, collective, plan, desk)
        rank.load(params, start, rule, scheduler)
        return rank.run()
    finally:
        desk.close()


class _Rank:
    """The state of the loop."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        examples: Examples,
        collective: Collective,
        plan: Plan,
        desk: Desk,
    ) -> None:
        self._task, self._model, self._examples = task, model, examples
        self._collective, self._plan, self._desk = collective, plan, desk
        self._stepper = Stepper(
            collective,
            plan.optimizer,
            reduce=plan.reduce,
            clip=plan.clip_reduced,
            schedule=plan.schedule,
        )
        self._bound = BoundModel(model, plan.layout, [range(plan.layout.numel)])
        self._bound.read([collective.params])
        self._bound.write_gradients_to([collective.grad])
        self._batches = Batches(
            len(examples),
            plan.batch_size,
            seed=plan.seed,
            worker=collective.rank,
            num_workers=collective.world,
        )
        self._position = Position()
        self._dropped: dict[str, int] = {}
        self._waited_s = [0.0] * collective.world  # by rank, for slower ones
        self._shown = torch.empty(0)
        self._torn_down = False

    def load(
        self,
        params: Tensor,
        start: Position,
        rule: dict[str, Any] | None,
        scheduler: dict[str, Any] | None,
    ) -> None:
        """Bring the group to ``start``; see `train`."""
        group, cut = self._collective, self._collective.cut
        self._position = start
        group.exchange(start.clock, ())
        group.params[cut.start : cut.stop] = params[cut.start : cut.stop]
        if rule is not None:
            self._stepper.restore(rule, scheduler)
        group.publish()
        self._tell(math.nan)
