"""Round programs: optimizers that need line searches, dot products or curvature products.

A program is a generator. It asks for something at a point, on a *named* sample, and goes on with
the answer; a round of requests makes one update:

    program      Ask(gradient at x)      Ask(loss at x + t d)      Sum(dot products)     Step(x')
                     |      ^                 |      ^                 |     ^              |
    driver           v      |                 v      |                 v     |              v
               mean over the sample     mean over the sample     sum over all slices   next round

Whoever owns a slice of the parameters (a shard, a rank of a synchronous group, or one process
alone) runs the same program on that slice. Vectors never travel between owners: only dot products
do, as `Sum`. All owners receive the same numbers, so they take the same branches; a program may
therefore branch on numbers from an `Answer` or a `Sum`, and on nothing it computed from its slice.

What lasts from round to round is in the optimizer's ``state``, and changes only after the round's
last request. So at any moment ``state`` and the parameters are those of the last finished round: a
checkpoint can be taken at any time, and a round that was cut off is made again from its start.

Source of the idea: Sandblaster, in Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from paramserver.errors import CurvatureError, LayoutError
from paramserver.lean import FlatOptimizer
from paramserver.schedules import Scheduler

Kind: TypeAlias = Literal[
    "loss", "gradient", "hvp", "ggnvp", "hessian", "fisher", "fisher_diagonal"
]
"""What can be asked for; all but ``loss`` and ``gradient`` concern curvature:

``loss``             the loss alone; no rows
``gradient``         the loss and its gradient; 1 row
``hvp``              Hessian times ``vector``; 1 row
``ggnvp``            generalised Gauss-Newton matrix times ``vector``; 1 row. It is the Fisher
                     matrix where the loss is the negative log-likelihood of a softmax or Gaussian
``hessian``          the Hessian, one row a parameter; for programs that are ``whole``
``fisher``           the Fisher matrix likewise
``fisher_diagonal``  the Fisher matrix's diagonal, labels sampled from the model; 1 row
"""

CURVATURE: frozenset[Kind] = frozenset({"hvp", "ggnvp", "hessian", "fisher", "fisher_diagonal"})


@dataclass(frozen=True, slots=True)
class Sample:
    """Training samples by name: one name, size and round mean the same samples every time."""

    name: str
    """Such as ``gradient``; other names draw other samples."""
    size: int | None = None
    """Number of samples, drawn anew each round; None takes all there are."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request that takes training samples to answer."""

    kind: Kind
    at: Tensor
    """The point, own slice, shape ``(n,)``. Not changed by the program until it is answered."""
    on: Sample
    vector: Tensor | None = None
    """What a product is taken with, own slice."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the samples say, as means over them."""

    samples: int
    loss: float
    """The mean loss; NaN for a product."""
    rows: Tensor
    """Own slice of each row, shape ``(k, n)``. The program may keep it and write to it."""

    @property
    def vector(self) -> Tensor:
        """The only row, shape ``(n,)``."""
        assert len(self.rows) == 1, f"an answer of {len(self.rows)} rows is no vector"
        return self.rows[0]


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A request for the sum of ``values`` over all owners; the answer has their shape."""

    values: Tensor
    """This owner's share, float64."""


Request: TypeAlias = Ask | Sum


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a round ends with."""

    x: Tensor
    """The parameters from now on, own slice; a new tensor, or the one the round began with."""
    loss: float
    """The loss the round began with."""
    stop: str | None = None
    """Why the run is to end here, such as ``the gradient's norm is 1e-06``; None goes on."""


Round: TypeAlias = Generator[Request, Any, Step]
Sums: TypeAlias = Generator[Sum, Tensor, Tensor]


class RoundProgram(FlatOptimizer):
    """An optimizer in rounds; torch's schedulers and ``state_dict`` work on it.

    It has one parameter group with one flat parameter, whose ``state`` holds what lasts: tensors
    whose last dimension is the slice's length, and single numbers.
    """

    whole: ClassVar[bool] = False
    """Whether it needs the whole vector in one place: it then cannot be cut into shards, and every
    rank of a synchronous group holds all of it."""

    max_parameters: ClassVar[int | None] = None
    """Parameters it can hold; None is no limit."""

    cut: range
    """The own slice of the whole vector; set before the first round."""

    def __init__(self, params: Sequence[nn.Parameter], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.cut = range(self._param.numel())

    @abstractmethod
    def round(self, x: Tensor) -> Round:
        """Make one update from ``x``, own slice, shape ``(n,)``, which is not to be written to."""


class RoundOptimizer(Protocol):
    """The configuration of a round program: what the command line names and every owner builds."""

    @property
    def lr(self) -> float:
        """Learning rate, or the first step a line search tries; a schedule changes it."""

    def build(self, params: Sequence[nn.Parameter]) -> RoundProgram:
        """Make the program for one flat parameter, the own slice."""


def dots(*pairs: tuple[Tensor, Tensor]) -> Sums:
    """Return the dot product of each pair over all owners, float64, shape ``(len(pairs),)``."""
    return (yield Sum(torch.stack([_dot(a, b) for a, b in pairs])))


def gram(vectors: Sequence[Tensor]) -> Sums:
    """Return all dot products among ``vectors`` over all owners, float64, shape ``(k, k)``.

    Some columns at a time: 21 vectors of a million elements took 0.4 s; one by one, 3.3 s.
    """
    k, n = len(vectors), len(vectors[0])
    own = torch.zeros(k, k, dtype=torch.float64)
    for start in range(0, n, _COLUMNS):
        block = torch.stack([v[start : start + _COLUMNS] for v in vectors]).double()
        own.addmm_(block, block.T)
    return (yield Sum(own))


_COLUMNS = 1 << 16
"""Of a Gram matrix's vectors at a time: 21 of them in float64 take 11 MB."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return a dot product that was added up in double precision."""
    return torch.dot(a.double(), b.double())


def finite(value: float, what: str) -> float:
    """Return ``value``.

    Raises:
        CurvatureError: It is NaN or infinite.
    """
    if not math.isfinite(value):
        raise CurvatureError(what, value)
    return value


class Runner:
    """One owner's program and where it stands: it waits for the answer to `request`.

    A plain state machine: the same answers give the same requests on every owner.
    """

    def __init__(
        self,
        program: RoundProgram,
        x: Tensor,
        *,
        cut: range | None = None,
        scheduler: Scheduler | None = None,
        rounds: int = 0,
    ) -> None:
        """Stand before the round after ``rounds`` at ``x``; `begin` makes the first request."""
        self.program, self.scheduler = program, scheduler
        program.cut = range(len(x)) if cut is None else cut
        self.x = x
        """The parameters after the last finished round, own slice."""
        self.rounds = rounds
        """Rounds finished."""
        self.loss = math.nan
        """The loss the last finished round began with."""
        self.stop: str | None = None
        """Why the program has ended; None while it goes on."""
        self.request: Request | None = None
        """What it waits for; None before `begin` and once it has ended."""
        self._going: Round | None = None

    def begin(self) -> None:
        """Start the next round, unless the program has ended."""
        if self.stop is None:
            self._going = self.program.round(self.x)
            self._advance(None)

    def answer(self, answer: Answer | Tensor) -> bool:
        """Go on with the answer to `request`; return whether that finished a round.

        The next round is not begun.

        Raises:
            CurvatureError: The program cannot go on; parameters and state are those of the last
                finished round.
        """
        return self._advance(answer)

    def _advance(self, answer: Answer | Tensor | None) -> bool:
        assert self._going is not None, "a program is asked for its next request once it has begun"
        try:
            self.request = self._going.send(answer)
        except StopIteration as ended:
            step: Step = ended.value
            self.x, self.loss, self.stop = step.x, step.loss, step.stop
            self.rounds += 1
            self.request = self._going = None
            self.program.step()  # tells the scheduler, which warns of updates that it misses
            if self.scheduler is not None:
                self.scheduler.step()
            return True
        return False


def build_program(optimizer: object) -> RoundProgram | None:
    """Return the program that ``optimizer`` builds, for a few parameters, to be looked at.

    Returns None if that configuration builds a push rule.
    """
    build: Callable[[Sequence[nn.Parameter]], object] = optimizer.build  # type: ignore[attr-defined]
    built = build([nn.Parameter(torch.zeros(64))])
    return built if isinstance(built, RoundProgram) else None


def check_size(optimizer: RoundOptimizer, program: RoundProgram, params: Tensor) -> None:
    """Raise LayoutError if a ``whole`` program cannot hold a matrix for ``params``."""
    if program.whole:
        optimizer.build([nn.Parameter(torch.zeros_like(params), requires_grad=False)])


def check_holds(program: str, num_parameters: int, limit: int, instead: str) -> None:
    """Raise LayoutError if a program would have to hold more than it can.

    Args:
        program: Its name.
        num_parameters: Parameters of the model, padding included.
        limit: The most it holds.
        instead: What to use instead.
    """
    if num_parameters > limit:
        raise LayoutError(
            f"{program} holds a {num_parameters:,} x {num_parameters:,} matrix for "
            f"{num_parameters:,} parameters, and its limit is {limit:,}: use {instead}"
        )


def minimise(
    program: RoundProgram,
    x: Tensor,
    answer: Callable[[Ask, int], Answer],
    *,
    max_rounds: int,
    on_round: Callable[[Runner], None] | None = None,
) -> Runner:
    """Run a program in this process: the driver of tests and of problems without samples.

    Args:
        program: Built on one parameter of the shape of ``x``.
        x: Where to start, shape ``(n,)``; not changed.
        answer: Answers a request; its second argument is the number of the round, from 0.
        max_rounds: Rounds after which to end, if the program does not by itself.
        on_round: Called after each round.
    """
    runner = Runner(program, x.clone())
    while runner.stop is None and runner.rounds < max_rounds:
        runner.begin()
        while (request := runner.request) is not None:
            runner.answer(
                request.values if isinstance(request, Sum) else answer(request, runner.rounds)
            )
        if on_round is not None:
            on_round(runner)
    return runner
