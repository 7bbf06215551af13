"""One shard: a contiguous range of the parameters, its optimizer, and who reads which version.

A shard decides nothing. It holds gradients until the leader's order says what to do with them, and
does that in the leader's order, so every shard passes through the same versions.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paramserver.averaged_state import with_average, without_average
from paramserver.averaging import Average
from paramserver.clipping import Clip
from paramserver.compensation import Compensation, with_compensation, without_compensation
from paramserver.errors import LayoutError, ProtocolError
from paramserver.gradient_table import GradientTable
from paramserver.measures import Gauge
from paramserver.messages import Action, Message
from paramserver.optimizers import Optimizer
from paramserver.optimizers.base import needs_norm
from paramserver.optimizers.push_form import PushedRule
from paramserver.schedules import Schedule
from paramserver.snapshots import Snapshots


class Lease(NamedTuple):
    """What a reader was given."""

    buffer: int
    version: int
    """The version that is in it."""
    vector: int = -1
    """The buffer of the vector that belongs to it; -1 if there is none."""


@dataclass(slots=True)
class _Held:
    incarnation: int
    seq: int
    grad: Tensor


@dataclass(frozen=True, slots=True)
class Saved:
    """A shard as it was at one version; nothing in it is shared with the shard."""

    version: int
    params: Tensor
    rule: dict[str, Any]
    """The ``state_dict`` of the optimizer; of averager and compensator as well, if there are."""
    scheduler: dict[str, Any] | None
    rounds: int | None = None
    """Rounds a program has finished; None for a push rule."""
    measured: NDArray[np.float64] | None = None
    """`paramserver.measures.Gauge.sums`; None if nothing is measured."""


class Held(ABC):
    """What every kind of shard does: it keeps pushes until it is ordered what to do with them."""

    version: int
    saved: Saved | None = None
    """What the last `Action.SAVE` copied."""

    def __init__(self, numel: int, dtype: torch.dtype, version: int) -> None:
        """Take pushes of ``numel`` elements, from ``version`` on."""
        self.version = version
        self._push_numel, self._push_dtype = numel, dtype
        self._held: dict[int, _Held] = {}

    def hold(self, worker: int, incarnation: int, seq: int, grad: Tensor) -> None:
        """Keep ``grad``, as long as a slot, until an order says what to do with it; without a copy.

        Raises:
            LayoutError: The gradient has another shape or dtype; it was not kept.
        """
        if grad.shape != (self._push_numel,) or grad.dtype != self._push_dtype:
            raise LayoutError(
                f"expected a gradient of {self._push_numel} {self._push_dtype}, got "
                f"{tuple(grad.shape)} {grad.dtype}"
            )
        self._held[worker] = _Held(incarnation, seq, grad)

    def execute(self, order: Message) -> Lease | None:
        """Do what the leader ordered; return what is leased by `Action.READ`.

        Raises:
            ProtocolError: The order takes a gradient that is not held, or arrives out of order.
        """
        lease = None
        match order.action:
            case Action.TAKE:
                self._take(self._taken(order), order)
            case Action.DISCARD:
                self._discard(order.worker)
            case Action.LEAVE:
                self._leave(order.worker)
            case Action.STEP:
                self._step_gathered(order.version)
            case Action.READ:
                lease = self._lease(order.worker)
            case Action.RELEASE:
                self._release(order.worker)
            case Action.SAVE:
                self.saved = self._save()
            case Action.SUM:
                self._go_on(order.text)
            case _:
                raise ProtocolError(f"there is no action {order.action}")
        if self.version != order.version:
            raise ProtocolError(f"an order for version {order.version} came at {self.version}")
        return lease

    def _taken(self, order: Message) -> Tensor:
        """Return the gradient that ``order`` takes, which is held no more."""
        held = self._held.pop(order.worker, None)
        if held is None or (held.incarnation, held.seq) != (order.incarnation, order.seq):
            raise ProtocolError(
                f"an order takes push {order.seq} of worker {order.worker}, which is not held"
            )
        # The pusher has finished with what it read: its buffer may be written again.
        self._release(order.worker)
        return held.grad

    def _discard(self, worker: int) -> None:
        """Forget what ``worker`` has pushed, if anything is held, and what it has read."""
        self._held.pop(worker, None)
        self._release(worker)

    def _leave(self, worker: int) -> None:
        """Forget ``worker``, which takes part no more."""
        self._discard(worker)

    @abstractmethod
    def _take(self, grad: Tensor, order: Message) -> None:
        """Do what the rule or program does with a gradient that was held."""

    def _step_gathered(self, version: int) -> None:
        raise ProtocolError("there is nothing gathered to step on here")

    @abstractmethod
    def _lease(self, reader: int) -> Lease:
        """Show ``reader`` what it is to read, until it is released."""

    @abstractmethod
    def _release(self, reader: int) -> None:
        """End the lease of ``reader``, if it has one."""

    @abstractmethod
    def _save(self) -> Saved:
        """Copy everything a checkpoint needs."""

    def _go_on(self, text: str) -> None:
        raise ProtocolError("no sum is waited for here")


class Shard(Held):
    """The state machine of one range of the parameters under a push rule; one call at a time."""

    def __init__(
        self,
        params: Tensor,
        optimizer: Optimizer,
        buffers: Sequence[Tensor],
        *,
        schedule: Schedule | None = None,
        clip: Clip | None = None,
        compensation: Compensation | None = None,
        average: Average | None = None,
        gauge: Gauge | None = None,
        tabulates: bool = False,
        version: int = 0,
        num_rows: int = 1,
    ) -> None:
        """Start at ``params``, shape ``(n,)``.

        Args:
            params: The range's parameters; copied.
            optimizer: Builds the rule that applies updates.
            buffers: Snapshot buffers, shape ``(n,)`` each: one a reader plus one.
            schedule: Changes the learning rate with every update.
            clip: Applied to each update's gradient before the rule; None if workers clip.
            compensation: Corrects each gradient when it is taken; only where rows are gradients.
            average: Of the iterates, which readers that do not push then see; None shows the
                parameters.
            gauge: Measures each push, and each update.
            tabulates: Whether the rule does (`paramserver.rules.Rule.tabulates`).
            version: Updates that made ``params``.
            num_rows: Rows of ``n`` that are pushed: 1 is a gradient.
        """
        super().__init__(num_rows * params.numel(), params.dtype, version)
        self.snapshots = Snapshots(buffers, params)
        self._param = nn.Parameter(self.snapshots.params, requires_grad=False)
        self.rule = optimizer.build([self._param])
        self.scheduler = None if schedule is None else schedule.build(self.rule)
        self._clip = clip
        self.compensator = None if compensation is None else compensation.build(params)
        self.averager = None if average is None else average.build(params)
        self._gauge = gauge
        self._table = GradientTable(params) if tabulates else None
        self._gathered: Tensor | None = None  # sum of weight * scale * gradient
        self._weight = 0.0  # sum of weight * scale
        self._full_weight = 0.0  # sum of weight
        self._loss = 0.0  # sum of weight * loss
        self._norm_needed = clip is not None or needs_norm(optimizer)
        self._pushed = self.rule if isinstance(self.rule, PushedRule) else None

    def _lease(self, reader: int) -> Lease:
        mean = self.averager.average() if self.averager is not None and reader < 0 else None
        if mean is not None:
            buffer = self.snapshots.lease_own(reader)
            self.snapshots.leased(reader).copy_(mean)
        elif self.rule.shows and reader >= 0:
            buffer = self.snapshots.lease_own(reader)
            self.rule.show(self.snapshots.leased(reader), reader)
        else:
            buffer = self.snapshots.lease(reader)
        return Lease(buffer, self.version)

    def _release(self, reader: int) -> None:
        self.snapshots.release(reader)

    def _leave(self, worker: int) -> None:
        super()._leave(worker)
        self.rule.left(worker)
        if self._table is not None:
            self._table.forget(worker)

    def _taken(self, order: Message) -> Tensor:
        """Return the gradient that ``order`` takes, corrected by what has changed since its read.

        The buffer that was read is released, and stays as it is until the next update is written.
        """
        if self.compensator is None and self._gauge is None:
            return super()._taken(order)
        params, read = self.snapshots.params, self.snapshots.leased(order.worker)
        grad = super()._taken(order)
        if self._gauge is not None:
            self._gauge.on_take(grad, params, read)
        if self.compensator is None:
            return grad
        self.compensator.correct_(
            grad,
            params,
            read,
            worker=order.worker,
            staleness=order.staleness,
            lr=self.rule.rate,
        )
        return grad

    def _take(self, grad: Tensor, order: Message) -> None:
        self.rule.came_from(order.worker, order.clock, order.samples)
        if self._table is not None:
            mean = self._table.add(order.worker, grad, step=bool(order.step))
            if mean is not None:
                self._apply(mean, order.loss, self._norm_of(mean), order.scale, order.version)
            return
        if order.step and self._gathered_nothing:
            # The worker has measured the norm; a correction has changed it since.
            norm = order.norm if self.compensator is None else self._norm_of(grad)
            self._apply(grad, order.loss, norm, order.scale, order.version)
            return
        weight = float(max(order.samples, 1))
        if self._gathered is None:
            self._gathered = torch.zeros_like(grad)
        self._gathered.add_(grad, alpha=weight * order.scale)
        self._loss += weight * order.loss
        self._weight += weight * order.scale
        self._full_weight += weight
        if order.step:
            self._step_gathered(order.version)

    def _save(self) -> Saved:
        rule = with_average(self.rule.state_dict(), self.averager)
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return Saved(
            self.version,
            self.snapshots.params.clone(),
            copy.deepcopy(with_compensation(rule, self.compensator)),
            copy.deepcopy(scheduler),
            measured=None if self._gauge is None else self._gauge.sums(),
        )

    def restore(self, rule: dict[str, Any], scheduler: dict[str, Any] | None) -> None:
        """Go on with the saved state of the optimizer and of all that is kept beside it."""
        own, average = without_average(rule)
        own, compensation = without_compensation(own)
        self.rule.load_state_dict(own)
        if self.compensator is not None:
            self.compensator.load_state_dict(compensation)
        if self.averager is not None:
            self.averager.load_state_dict(average)
        if self.scheduler is not None and scheduler is not None:
            self.scheduler.load_state_dict(scheduler)

    @property
    def _gathered_nothing(self) -> bool:
        return self._full_weight == 0.0

    def _step_gathered(self, version: int) -> None:
        assert self._gathered is not None
        mean = self._gathered.div_(self._weight)
        # The mean direction takes the damping's share of the step: for SGD this is the mean of the
        # damped gradients, and Adam, which ignores a gradient's scale, is damped as well.
        loss = self._loss / self._full_weight
        self._apply(mean, loss, self._norm_of(mean), self._weight / self._full_weight, version)
        mean.zero_()
        self._weight = self._full_weight = self._loss = 0.0

    def _norm_of(self, grad: Tensor) -> float:
        """Return the norm of ``grad`` if it is needed, else NaN; it must be the whole gradient."""
        return float(torch.linalg.vector_norm(grad)) if self._norm_needed else math.nan

    def _apply(self, grad: Tensor, loss: float, norm: float, scale: float, version: int) -> None:
        self.version = version  # it is the leader's order, whatever the rule makes of it
        self.rule.told(loss, norm)
        if self._clip is not None:
            self._clip.apply_(grad, norm)
        if self._pushed is None or self._pushed.touches():
            self._param.data = self.snapshots.writable()
            self.rule.apply([grad], scale)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.compensator is not None:
            self.compensator.on_update(self._param.data)
        if self._gauge is not None:
            self._gauge.on_update(self._param.data)
        if self.averager is not None:
            self.averager.update(self._param.data)
