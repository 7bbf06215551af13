"""What a rank does under a round program: it runs the program on its own slice of the parameters.

    Ask    publish     every rank's slice of the point, and of the vector of a product
           compute     this rank's pieces of the sample
           exchange    samples and losses, added up; every rank's rows are complete
           reduce      own slice of the mean over the sample, one row at a time
    Sum    exchange    shares, added in the order of the ranks

All ranks go on with the same numbers, so they make the same requests. A program that is ``whole``
runs on the whole vector on every rank alike: each row is then reduced by slices and published, so
that every rank goes on with the same bits.

Between two requests, program and parameters are those of the last finished round: that is what is
saved and shown, and a run that is ended in the middle of a round stands where the round began.

Source of the idea: Sandblaster, in Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from paramserver.averaged_state import with_average, without_average
from paramserver.errors import CurvatureError
from paramserver.rounds import Answer, Ask, Kind, RoundOptimizer, Runner, Sample, Sum, build_program
from sync.collective import Collective, add_up
from sync.desk import Desk, Part, Position, Snapshot, Status
from sync.replicas import check_equal
from sync.worker import Finished, Plan, blame
from workers.samples import Piece, num_pieces

MIN_PIECE = 256
"""Samples in a piece, at least, unless there are too few for all ranks to have one: smaller ones
cost more in calls than in arithmetic, whatever the batch size of a push rule may be."""


class Oracle(Protocol):
    """Computes what a program asks for; `workers.oracles.Oracle` is one."""

    def answer(
        self, kind: Kind, point: Tensor, piece: Piece, vector: Tensor | None
    ) -> tuple[int, float, Tensor]:
        """Return the samples of ``piece``, their mean loss, and the mean rows, ``(k, numel)``.

        ``point`` and ``vector`` are whole vectors, and are not changed.
        """


class Report(NamedTuple):
    """What a rank tells with its pieces of a request: a row of the exchange."""

    samples: float
    """Samples in the pieces; 0 if this rank has none."""
    loss: float
    """The sum of their losses."""
    seconds: float
    """Time they took to compute."""
    stop: float
    """1 if the run is to end after this request."""
    save: float
    """Number of the latest save that is wanted; a new one is made after this request."""
    show: float
    """1 if this rank wants a snapshot."""


def pieces_for_all(sample: Sample, num_examples: int, batch_size: int, world: int) -> int:
    """Return into how many pieces ``sample`` is cut: equally many for every rank.

    A piece has about as many samples as a batch, but not fewer than `MIN_PIECE` where that leaves
    one for every rank. No piece is empty.

    Raises:
        ValueError: The sample is larger than ``num_examples``.
    """
    size = num_pieces(sample, num_examples, piece_size=1)
    per_rank = num_pieces(sample, num_examples, piece_size=max(batch_size, MIN_PIECE) * world)
    return min(per_rank * world, size)


class RoundTrainee:
    """One rank's program and place in the group; the counterpart of `sync.worker.Trainee`."""

    def __init__(
        self, oracle: Oracle, num_examples: int, collective: Collective, plan: Plan
    ) -> None:
        """Take part in ``collective``; `load` brings the parameters.

        Args:
            oracle: Computes the pieces.
            num_examples: Training samples there are.
            collective: The group; left to the caller to close.
            plan: What is trained and for how long; its optimizer is a round program's.
        """
        self._oracle, self._num_examples = oracle, num_examples
        self._collective, self._plan = collective, plan
        self._spec = cast(RoundOptimizer, plan.optimizer)
        looked_at = build_program(self._spec)
        assert looked_at is not None, "a round program was asked for"
        self._whole = looked_at.whole
        numel = plan.layout.numel
        self.cut = range(numel) if self._whole else collective.cut
        """What the program of this rank runs on."""
        self._position = Position()
        self._gradients = self._samples = 0  # evaluated so far in this round
        self._status = Status()
        self._heard: tuple[Report, ...] = ()  # what all told with the last request
        self._saved = 0

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
            rule: The program's and its average's state on `cut`; None before the first round.
            scheduler: The schedule's state.
        """
        x = params[self.cut.start : self.cut.stop].clone()
        self._program = self._spec.build([nn.Parameter(x, requires_grad=False)])
        schedule = self._plan.schedule
        self._scheduler = None if schedule is None else schedule.build(self._program)
        average = self._plan.average
        self._averager = None if average is None else average.build(x)
        if rule is not None:
            rule, state = without_average(rule)
            self._program.load_state_dict(rule)
            if self._averager is not None:
                self._averager.load_state_dict(state)
            if self._scheduler is not None and scheduler is not None:
                self._scheduler.load_state_dict(scheduler)
        self._runner = Runner(
            self._program, x, cut=self.cut, scheduler=self._scheduler, rounds=position.version
        )
        self._position = position
        self._status = Status(position, waited_s=(0.0,) * self._collective.world)
        self._collective.exchange(position.clock, ())

    def train(self, desk: Desk) -> Finished:
        """Train until the budget is used up, the program ends or the driver ends the run.

        Raises:
            PeerLostError: Another rank is gone or silent; the round in flight was not finished.
            CurvatureError: The program cannot go on; all ranks raise it alike.
            ReplicaMismatchError: The ranks' parameters differ.
            TaskError: The task's loss failed.
        """
        runner, stop = self._runner, False
        desk.status = self._status
        try:
            while (reason := self._ended()) is None and not stop:
                runner.begin()
                stop = self._settle(desk)
                while runner.request is not None and not stop:
                    runner.answer(self._answer(runner.request, desk))
                    stop = self._settle(desk)
            self._compare()
            return Finished(reason, self._part(), self._status)
        except CurvatureError:
            desk.lay(self._part())  # all ranks are at the end of the same round: it can be kept
            raise
        finally:
            desk.close()

    @property
    def _step(self) -> int:
        """The number of the round that is made, from 1 on."""
        return self._runner.rounds + 1

    def _ended(self) -> str | None:
        return self._runner.stop or self._plan.ended(self._position, self._collective.world)

    def _answer(self, request: Ask | Sum, desk: Desk) -> Answer | Tensor:
        if isinstance(request, Ask):
            return self._ask(request, desk)
        values = request.values
        return values if self._whole else add_up(self._collective, self._step, values)

    def _ask(self, ask: Ask, desk: Desk) -> Answer:
        """Answer ``ask`` together with all ranks."""
        group = self._collective
        point, vector = self._meet(ask)
        start = time.perf_counter()
        of = pieces_for_all(ask.on, self._num_examples, self._plan.batch_size, group.world)
        samples, loss, rows = 0, 0.0, None
        for number in range(group.rank, of, group.world):
            piece = Piece(ask.on, self._runner.rounds, number, of)
            n, mean_loss, mean_rows = self._oracle.answer(ask.kind, point, piece, vector)
            samples += n
            loss += n * mean_loss
            rows = mean_rows.mul(n) if rows is None else rows.add_(mean_rows, alpha=n)
        k = _num_rows(ask.kind, self._plan.layout.numel)
        if k > 0:
            self._bring(rows, 0)
        told = Report(
            samples=samples,
            loss=loss,
            seconds=time.perf_counter() - start,
            stop=desk.stop,
            save=desk.save,
            show=desk.show.is_set(),
        )
        reports = tuple(map(Report._make, group.exchange(self._step, told)))
        total = sum(r.samples for r in reports)
        self._heard = reports
        waited_s = blame(self._status.waited_s, [r.seconds for r in reports])
        self._status = replace(self._status, waited_s=waited_s)
        if ask.kind == "gradient":
            self._gradients += of
            self._samples += int(total)
        mean_rows = self._reduce(rows, k, 1 / total)
        return Answer(int(total), sum(r.loss for r in reports) / total, mean_rows)

    def _meet(self, ask: Ask) -> tuple[Tensor, Tensor | None]:
        """Return the whole point and vector that ``ask`` is about."""
        if self._whole:
            return ask.at, ask.vector
        group, cut = self._collective, self.cut
        group.params[cut.start : cut.stop] = ask.at
        if ask.vector is not None:
            group.vector[cut.start : cut.stop] = ask.vector
        group.publish(vector=ask.vector is not None)
        return group.params, None if ask.vector is None else group.vector

    def _bring(self, rows: Tensor | None, row: int) -> None:
        """Put this rank's share of one row where the others find it."""
        if rows is None:
            self._collective.grad.zero_()
        else:
            self._collective.grad.copy_(rows[row])

    def _reduce(self, rows: Tensor | None, k: int, weight: float) -> Tensor:
        """Return the own cut of the sum of all ranks' ``rows`` times ``weight``, ``(k, n)``.

        The first row has been brought and exchanged.
        """
        group, own = self._collective, self._collective.cut
        reduced = group.params.new_empty(k, len(self.cut))
        for row in range(k):
            if row > 0:
                self._bring(rows, row)
                group.exchange(self._step, ())
            of_slice = group.reduce([weight] * group.world)
            if self._whole:
                group.params[own.start : own.stop] = of_slice
                group.publish()
                reduced[row] = group.params
            else:
                reduced[row] = of_slice
                if row + 1 < k:
                    group.publish()
        return reduced

    def _settle(self, desk: Desk) -> bool:
        """Move on if a round was finished, and heed the driver; return whether the run is to end.

        What the driver wants is done by all ranks alike, since all have heard it with a request.
        """
        if self._runner.rounds > self._position.version:
            self._account()
            desk.status = self._status
            if self._position.clock % self._plan.compare_every == 0:
                self._compare()
        heard, self._heard = self._heard, ()
        if any(r.show for r in heard):
            self._show(desk, bool(heard[self._collective.rank].show))
        wanted = int(max((r.save for r in heard), default=0))
        if wanted > self._saved:
            self._saved = wanted
            desk.lay(self._part(wanted))
        return any(r.stop for r in heard)

    def _account(self) -> None:
        """Count the round that has just been finished."""
        was, runner = self._position, self._runner
        self._position = Position(
            version=runner.rounds,
            clock=was.clock + 1,
            gradients=was.gradients + self._gradients,
            samples=was.samples + self._samples,
        )
        self._gradients = self._samples = 0
        if self._averager is not None:
            self._averager.update(runner.x)
        loss_sum = self._status.loss_sum + runner.loss
        self._status = replace(self._status, position=self._position, loss_sum=loss_sum)

    def _show(self, desk: Desk, is_wanted: bool) -> None:
        """Show the last finished round's parameters, or their average, where it is wanted."""
        mean = None if self._averager is None else self._averager.average()
        whole = self._together(self._runner.x if mean is None else mean)
        if is_wanted:
            desk.show.clear()
            desk.lay(Snapshot(self._position.version, whole.clone()))
        self._collective.exchange(self._step, ())  # until then nobody writes to what was copied

    def _together(self, own: Tensor) -> Tensor:
        """Return the whole vector that every rank has its ``own`` cut of, until an exchange."""
        if self._whole:
            return own
        group, cut = self._collective, self.cut
        group.params[cut.start : cut.stop] = own
        group.publish()
        return group.params

    def _compare(self) -> None:
        check_equal(self._collective, self._position.clock, [self._together(self._runner.x)])

    def _part(self, number: int = 0) -> Part:
        """Copy this rank's share of the run's state; a whole program's is rank 0's."""
        numel = self._plan.layout.numel
        scheduler = None if self._scheduler is None else copy.deepcopy(self._scheduler.state_dict())
        if self._whole and self._collective.rank > 0:
            nothing = range(numel, numel)
            return Part(number, self._position, nothing, self._runner.x[:0].clone(), {}, scheduler)
        return Part(
            number,
            self._position,
            self.cut,
            self._runner.x.clone(),
            copy.deepcopy(with_average(self._program.state_dict(), self._averager)),
            scheduler,
        )


def _num_rows(kind: Kind, numel: int) -> int:
    """Return how many rows the answer to a request of ``kind`` has."""
    if kind in ("hessian", "fisher"):
        return numel
    return 0 if kind == "loss" else 1
