"""One shard under a round program: it adds up pieces, and runs the program on its own slice.

Orders come as for any push: `Action.TAKE` adds the piece that is held to the answer of the open
request, and the last one of a request goes on with the program, which makes the next request. What
a request is asked at is shown to workers in buffers that stay as they are while one is leased:

    request 4: hvp at x with v    [x: worker 0, worker 1]  [v: worker 0, worker 1]
    request 5: loss at x + t d    [x: worker 1 still]  [v: worker 1 still]  [x + t d: worker 0]

Readers that do not push see the parameters of the last finished round, never a trial point.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paramserver.averaged_state import with_average, without_average
from paramserver.averaging import Average
from paramserver.errors import CurvatureError, ProtocolError, ResourceError
from paramserver.messages import Message, unpack_numbers
from paramserver.rounds import Answer, Ask, RoundOptimizer, Runner, Sum
from paramserver.schedules import Schedule
from paramserver.shard import Held, Lease, Saved


class Shown:
    """The buffers that show the open request, and which of them are read."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        """Show nothing yet; two buffers for each reader and two more are always enough."""
        self._buffers = buffers
        self._readers = [0] * len(buffers)
        self._leases: dict[int, tuple[int, ...]] = {}
        self._current: tuple[int, ...] = ()

    def show(self, vectors: Sequence[Tensor]) -> None:
        """Copy what the next leases are of into buffers that nobody reads."""
        self._current = ()
        for vector in vectors:
            self._current += (self._fill(vector),)

    def lease(self, reader: int) -> tuple[int, ...]:
        """Keep what is shown as it is for ``reader``, whose earlier lease ends."""
        return self._keep(reader, self._current)

    def lease_copy(self, reader: int, vector: Tensor) -> int:
        """Show ``vector`` to ``reader`` alone, whose earlier lease ends."""
        self.release(reader)
        (buffer,) = self._keep(reader, (self._fill(vector),))
        return buffer

    def release(self, reader: int) -> None:
        """End the lease of ``reader``; it may have none."""
        for buffer in self._leases.pop(reader, ()):
            self._readers[buffer] -= 1

    def _keep(self, reader: int, buffers: tuple[int, ...]) -> tuple[int, ...]:
        self.release(reader)
        self._leases[reader] = buffers
        for buffer in buffers:
            self._readers[buffer] += 1
        return buffers

    def _fill(self, vector: Tensor) -> int:
        for buffer, readers in enumerate(self._readers):
            if readers == 0 and buffer not in self._current:
                self._buffers[buffer].copy_(vector)
                return buffer
        raise ResourceError(
            f"all {len(self._buffers)} buffers are read; a shard made for fewer readers cannot "
            "take more"
        )


class RoundShard(Held):
    """The state machine of one range of the parameters under a round program."""

    def __init__(
        self,
        params: Tensor,
        optimizer: RoundOptimizer,
        buffers: Sequence[Tensor],
        *,
        cut: range,
        num_rows: int = 1,
        schedule: Schedule | None = None,
        average: Average | None = None,
        version: int = 0,
        rounds: int = 0,
    ) -> None:
        """Start at ``params``, shape ``(n,)``; `begin` makes the first request.

        Args:
            params: The range's parameters; copied.
            optimizer: Builds the program.
            buffers: Buffers of shape ``(n,)``: two for each worker and reader and two more.
            cut: The range.
            num_rows: Rows of ``n`` that a slot has room for.
            schedule: Changes the program's learning rate with every round.
            average: Of the iterates, which readers then see; None shows the last round's.
            version: Requests answered before.
            rounds: Rounds finished before.
        """
        super().__init__(num_rows * params.numel(), params.dtype, version)
        self._shown = Shown(buffers)
        self.program = optimizer.build([nn.Parameter(params.clone(), requires_grad=False)])
        self.scheduler = None if schedule is None else schedule.build(self.program)
        self.runner = Runner(
            self.program, params.clone(), cut=cut, scheduler=self.scheduler, rounds=rounds
        )
        self.averager = None if average is None else average.build(params)
        self.error: CurvatureError | None = None
        """What the program could not go on after; the last finished round stands."""
        self._rows: Tensor | None = None  # sum of samples * rows
        self._loss, self._samples = 0.0, 0

    def begin(self) -> None:
        """Make the first request."""
        self._proceed(None)

    def restore(self, program: dict[str, Any], scheduler: dict[str, Any] | None) -> None:
        """Go on with a program's, an average's and a schedule's saved state."""
        own, average = without_average(program)
        self.program.load_state_dict(own)
        if self.averager is not None:
            self.averager.load_state_dict(average)
        if self.scheduler is not None and scheduler is not None:
            self.scheduler.load_state_dict(scheduler)

    def num_rows(self, ask: Ask) -> int:
        """Return how many rows the answer to ``ask`` has."""
        if ask.kind in ("hessian", "fisher"):
            return ask.at.numel()
        return 0 if ask.kind == "loss" else 1

    def _take(self, grad: Tensor, order: Message) -> None:
        ask = self.runner.request
        if not isinstance(ask, Ask):
            raise ProtocolError("a piece came while no request was open")
        k, n = self.num_rows(ask), ask.at.numel()
        if self._rows is None:
            self._rows = grad.new_zeros(k, n)
        self._rows.add_(grad[: k * n].view(k, n), alpha=order.samples)
        self._loss += order.samples * order.loss
        self._samples += order.samples
        if not order.step:
            return
        answer = Answer(self._samples, self._loss / self._samples, self._rows.div_(self._samples))
        self._rows, self._loss, self._samples = None, 0.0, 0
        self.version = order.version
        self._proceed(answer)

    def _go_on(self, text: str) -> None:
        request = self.runner.request
        if not isinstance(request, Sum):
            raise ProtocolError("a sum came that was not asked for")
        self._proceed(unpack_numbers(text, request.values.shape))

    def _proceed(self, answer: Answer | Tensor | None) -> None:
        """Run the program up to its next request, and show that; it may have ended instead."""
        runner = self.runner
        try:
            if answer is None or runner.answer(answer):
                if answer is not None and self.averager is not None:
                    self.averager.update(runner.x)
                runner.begin()
        except CurvatureError as error:
            self.error = error
            return
        if isinstance(runner.request, Ask):
            ask = runner.request
            self._shown.show([ask.at] if ask.vector is None else [ask.at, ask.vector])

    def _lease(self, reader: int) -> Lease:
        if reader < 0:
            mean = None if self.averager is None else self.averager.average()
            shown = self.runner.x if mean is None else mean
            return Lease(self._shown.lease_copy(reader, shown), self.runner.rounds)
        point, *vector = self._shown.lease(reader)
        return Lease(point, self.version, vector[0] if vector else -1)

    def _release(self, reader: int) -> None:
        self._shown.release(reader)

    def _save(self) -> Saved:
        return Saved(
            self.version,
            self.runner.x.clone(),
            copy.deepcopy(with_average(self.program.state_dict(), self.averager)),
            None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            self.runner.rounds,
        )


def partial(shard: RoundShard) -> Tensor | None:
    """Return this shard's share of the sum its program waits for; None if it waits for none."""
    request = shard.runner.request
    return request.values.to(torch.float64) if isinstance(request, Sum) else None
