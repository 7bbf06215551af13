"""A worker's own parameters: what it does with them between a read and a push.

    Travelled   starts anew at each read; pushes how far its optimizer's steps led
    Accrued     starts anew at a read, not at each; pushes the sum of its steps' gradients
    Tethered    goes on from where it was; pushes the force that draws it back

`workers.local` says what each is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from paramserver.compression import Wire
from paramserver.optimizers import Optimizer
from paramserver.optimizers.base import PushRule
from workers.estimate import Estimated, Estimator, Given, remeasured
from workers.gradients import BoundModel
from workers.recurrent import Carried
from workers.task import Task


class Own(Protocol):
    """One worker's own parameters: ``begin, step, …, step, end``, and so on for each push.

    After a gradient that is not finite there is no `end`, and the next `begin` follows.
    """

    @property
    def keeps(self) -> bool:
        """Whether the next `begin` will not look at what is read, as of the last `end`."""

    def begin(self, read: Sequence[Tensor], x: Sequence[Tensor]) -> None:
        """Write where the first gradient is to be computed.

        Args:
            read: What was read, a vector a shard; it stays as it is until `end`.
            x: Likewise; overwritten now and by each step. Not kept after `end`.
        """

    def step(self, grads: Sequence[Tensor]) -> None:
        """Move ``x`` by the gradient at it; ``grads``, shaped likewise, are not changed."""

    def end(self, out: Sequence[Tensor]) -> None:
        """Write what is to be pushed to ``out``, shaped likewise."""


class Travelled:
    """Steps of an optimizer from what was read; how far they led is pushed. An `Own`.

    It is ``w - x``, not ``x - w``: a server whose SGD has lr=1 ends where the worker did, up to the
    rounding of ``w - (w - x)``, which is none where no element was more than halved or doubled.
    """

    keeps = False

    def __init__(self, optimizer: Optimizer) -> None:
        """Step as ``optimizer`` does; what it remembers it keeps for the worker's life."""
        self._optimizer = optimizer
        self._rule: PushRule | None = None
        self._params: list[nn.Parameter] = []
        self._read: Sequence[Tensor] = ()

    def begin(self, read: Sequence[Tensor], x: Sequence[Tensor]) -> None:
        """Start at what was read."""
        torch._foreach_copy_(list(x), list(read))
        self._read = read
        if self._rule is None:
            self._params = [nn.Parameter(vector, requires_grad=False) for vector in x]
            self._rule = self._optimizer.build(self._params)
        for parameter, vector in zip(self._params, x, strict=True):
            parameter.data = vector

    def step(self, grads: Sequence[Tensor]) -> None:
        """Take the optimizer's step."""
        assert self._rule is not None, "begin comes first"
        self._rule.apply(grads)

    def end(self, out: Sequence[Tensor]) -> None:
        """Write the way from where the worker is to what it had read."""
        for vector, w, x in zip(out, self._read, self._params, strict=True):
            torch.sub(w, x.data, out=vector)
            x.data = w.new_empty(0)  # others may need its memory
        self._read = ()


class Accrued:
    """Plain SGD steps from what was read; the sum of their gradients is pushed. An `Own`.

    It starts where it was after all but one of so many pushes.
    """

    def __init__(self, lr: float, pushes_a_fetch: int = 1) -> None:
        """Take steps of learning rate ``lr``, and take over what is read after that many pushes."""
        self._lr, self._pushes_a_fetch = lr, pushes_a_fetch
        self._num_pushes = 0  # since the read that was taken over
        self._kept: list[Tensor] = []
        self._x: Sequence[Tensor] = ()
        self._sum: list[Tensor] = []

    @property
    def keeps(self) -> bool:
        """Whether it goes on where it is."""
        return len(self._kept) > 0

    def begin(self, read: Sequence[Tensor], x: Sequence[Tensor]) -> None:
        """Start at what was read, or where it was, with a sum of 0."""
        if not self._kept:
            self._num_pushes = 0
        torch._foreach_copy_(list(x), self._kept or list(read))
        self._kept = []
        self._x, self._sum = x, [torch.zeros_like(vector) for vector in x]

    def step(self, grads: Sequence[Tensor]) -> None:
        """Step, and add the gradient to the sum."""
        for x, total, grad in zip(self._x, self._sum, grads, strict=True):
            x.sub_(grad, alpha=self._lr)
            total.add_(grad)

    def end(self, out: Sequence[Tensor]) -> None:
        """Write the sum."""
        torch._foreach_copy_(list(out), self._sum)
        self._num_pushes += 1
        if self._num_pushes < self._pushes_a_fetch:
            self._kept = [vector.clone() for vector in self._x]
        self._x, self._sum = (), []


class Tethered:
    """Steps of a worker that never starts anew, and is drawn to the centre. An `Own`.

    With its parameters x, velocity v and the centre c that it has just read:

        e = alpha (x - c)                          before the first step
        v ← momentum v - lr g(x + momentum v)      each step
        x ← x + v                                  each step; the first takes off e as well
        push -e                                    after the last
    """

    keeps = False

    def __init__(self, lr: float, alpha: float, momentum: float) -> None:
        """Step by ``lr`` and ``momentum``, drawn with strength ``alpha``."""
        self._lr, self._alpha, self._momentum = lr, alpha, momentum
        self._own: list[Tensor] = []
        self._velocity: list[Tensor] = []
        self._force: list[Tensor] = []
        self._shown: Sequence[Tensor] = ()
        self._is_drawn = False

    def begin(self, read: Sequence[Tensor], x: Sequence[Tensor]) -> None:
        """Measure the force; a worker that begins is at the centre, where there is none."""
        if not self._own:
            self._own = [vector.clone() for vector in read]
            self._velocity = [torch.zeros_like(vector) for vector in read if self._momentum]
        self._force = [
            torch.sub(mine, centre).mul_(self._alpha)
            for mine, centre in zip(self._own, read, strict=True)
        ]
        self._shown, self._is_drawn = x, False
        self._show()

    def step(self, grads: Sequence[Tensor]) -> None:
        """Step; the first one gives in to the force, too."""
        if self._momentum:
            torch._foreach_mul_(self._velocity, self._momentum)
            torch._foreach_add_(self._velocity, list(grads), alpha=-self._lr)
            torch._foreach_add_(self._own, self._velocity)
        else:
            torch._foreach_add_(self._own, list(grads), alpha=-self._lr)
        if not self._is_drawn:
            torch._foreach_sub_(self._own, self._force)
            self._is_drawn = True
        self._show()

    def end(self, out: Sequence[Tensor]) -> None:
        """Write the force's opposite, which the server subtracts from the centre."""
        for vector, force in zip(out, self._force, strict=True):
            torch.neg(force, out=vector)
        self._shown, self._force = (), []

    def _show(self) -> None:
        torch._foreach_copy_(list(self._shown), self._own)
        if self._momentum:
            torch._foreach_add_(list(self._shown), self._velocity, alpha=self._momentum)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a worker keeps from push to push; it is lost with the worker."""

    own: Own | None = None
    """Its own parameters; None if it computes a gradient at what it has read."""
    carried: Carried | None = None
    """The state of a recurrent task; None of any other."""
    resets: bool = False
    """Whether that state is initial again at each read."""
    wire: Wire | None = None
    """What it pushes and reads through; None if nothing is compressed."""

    @classmethod
    def at_first(
        cls, task: Task, make_own: Callable[[], Own] | None, wire: Wire | None = None
    ) -> Kept:
        """Return what a worker of ``task`` has at the beginning of its life."""
        own = None if make_own is None else make_own()
        if task.recurrent is None:
            return cls(own, wire=wire)
        return cls(own, Carried(), task.recurrent.reset == "pull", wire)

    def seen(self, read: Sequence[Tensor], version: int) -> Sequence[Tensor]:
        """Return what the worker sees of ``version``, which it has read, one vector a shard."""
        keeps = self.own is not None and self.own.keeps  # then nothing is sent to it
        return read if self.wire is None or keeps else self.wire.read(read, version)

    def sends_(self, slots: Sequence[Tensor], step: int, done: Estimated) -> bool:
        """Leave in ``slots`` what comes out of them at the server; False if that is the same.

        What is not finite is not sent: the server needs to know of it, and has no use for it.
        """
        if self.wire is None or done.layer:
            return False
        self.wire.push_(slots, step)
        return self.wire.compresses


class Work:
    """What a worker does between a read and a push: a gradient, or several steps of its own."""

    def __init__(
        self,
        compute: Estimator,
        bound: BoundModel,
        slots: Sequence[Tensor],
        *,
        look: Callable[[], None] | None = None,
    ) -> None:
        """Compute by ``compute``, which writes the gradients of ``bound`` to ``slots``.

        ``look`` is called between steps, to raise an error that ends them.
        """
        self._compute, self._bound, self._slots, self._look = compute, bound, slots, look
        self._x: list[Tensor] = []  # made when it is needed

    def __call__(
        self,
        kept: Kept,
        read: Sequence[Tensor],
        version: int,
        worker: int,
        steps: range,
        batch: Given,
        batch_of: Callable[[int], Given],
    ) -> Estimated:
        """Leave what is to be pushed in the slots.

        Args:
            kept: What the worker has kept, and keeps.
            read: What it has read, a vector a shard.
            version: Of what it has read.
            worker: Its number.
            steps: Their numbers, which stand for the clock in all that is random in them.
            batch: The first step's, for which torch was seeded.
            batch_of: Seeds torch for another step and returns its batch.
        """
        own, carried = kept.own, kept.carried
        if carried is not None and kept.resets and (own is None or not own.keeps):
            carried.reset()
        read = kept.seen(read, version)
        if own is None:
            self._bound.read(read)
            return self._compute(batch, worker, steps.start, carried)
        if not self._x:
            self._x = [torch.empty_like(slot) for slot in self._slots]
        own.begin(read, self._x)
        total = 0.0
        for taken, step in enumerate(steps, start=1):
            if taken > 1:
                if self._look is not None:
                    self._look()
                batch = batch_of(step)
            self._bound.read(self._x)
            done = self._compute(batch, worker, step, carried)
            if done.layer:
                return Estimated(done.loss, math.nan, done.layer, steps=taken)
            own.step(self._slots)
            total += done.loss
        own.end(self._slots)
        done = Estimated(total / len(steps), 0.0, steps=len(steps), keeps=own.keeps)
        return remeasured(done, self._bound)

    def send(self, kept: Kept, steps: range, done: Estimated) -> Estimated:
        """Leave in the slots what comes through the wire of what is there, and tell of that.

        Args:
            kept: What the worker keeps: with feedback, what was left out.
            steps: Those that ``done`` tells of.
            done: What is in the slots.
        """
        is_other = kept.sends_(self._slots, steps.start, done)
        return remeasured(done, self._bound) if is_other else done
