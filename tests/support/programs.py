"""Runs round programs on functions of a flat vector, in one process or on slices in lock-step."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paramserver.rounds import Answer, Ask, RoundProgram, Runner, Sum


class Spec(Protocol):
    """Anything that builds a program."""

    def build(self, params: Sequence[nn.Parameter]) -> RoundProgram: ...


def built(spec: Spec, x: Tensor) -> RoundProgram:
    """Return the program of ``spec`` for a vector like ``x``."""
    return spec.build([nn.Parameter(x.detach().clone())])


class Answers:
    """Answers requests about ``f(x)``, a scalar, by automatic differentiation.

    An `answer` for `paramserver.rounds.minimise` and for `minimise_in_slices`. For functions that
    depend on the sample, ``of`` makes the function of a request and its round instead.

    ``ggnvp`` and ``fisher`` are the Hessian here: right where the loss is that of a linear model.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor] | None = None,
        *,
        of: Callable[[Ask, int], Callable[[Tensor], Tensor]] | None = None,
        samples: int = 1,
    ) -> None:
        assert (f is None) != (of is None)
        self._of = of if of is not None else lambda ask, round_: f
        self._samples = samples
        self.count: Counter[str] = Counter()
        """Requests answered, by kind."""
        self.asked: list[tuple[int, Ask]] = []
        """All requests with their round; ``at`` is a copy."""

    def __call__(self, ask: Ask, round_: int) -> Answer:
        f: Any = self._of(ask, round_)
        self.count[ask.kind] += 1
        self.asked.append((round_, Ask(ask.kind, ask.at.clone(), ask.on, ask.vector)))
        x = ask.at.detach()
        loss, rows = float("nan"), torch.empty(0, len(x), dtype=x.dtype)
        match ask.kind:
            case "loss":
                with torch.no_grad():
                    loss = float(f(x))
            case "gradient":
                loss, gradient = loss_and_gradient(f, x)
                rows = gradient[None]
            case "hvp" | "ggnvp":
                assert ask.vector is not None
                rows = torch.autograd.functional.hvp(f, x, ask.vector.detach())[1][None]
            case "hessian" | "fisher":
                rows = torch.autograd.functional.hessian(f, x)
            case "fisher_diagonal":
                rows = torch.autograd.functional.hessian(f, x).diagonal()[None].clone()
        return Answer(samples=self._samples, loss=loss, rows=rows)


def loss_and_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """Return ``f(x)`` and its gradient."""
    x = x.detach().clone().requires_grad_()
    loss = f(x)
    (gradient,) = torch.autograd.grad(loss, x)
    return float(loss.detach()), gradient.detach()


class Copies:
    """Copies of one program, each on its own slice, as a driver with several owners runs them.

    It asserts that all copies make the same request at the same time.
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = runners

    @property
    def x(self) -> Tensor:
        """The whole vector."""
        return torch.cat([r.x for r in self.runners])

    @property
    def rounds(self) -> int:
        return self.runners[0].rounds

    @property
    def loss(self) -> float:
        return self.runners[0].loss

    @property
    def stop(self) -> str | None:
        (stop,) = {r.stop for r in self.runners}
        return stop

    def round(self, answer: Callable[[Ask, int], Answer]) -> None:
        """Make one round on all copies."""
        for r in self.runners:
            r.begin()
        while self.runners[0].request is not None:
            for r, reply in zip(self.runners, self._replies(answer), strict=True):
                r.answer(reply)
        assert all(r.request is None for r in self.runners)
        assert len({(r.rounds, r.stop) for r in self.runners}) == 1

    def _replies(self, answer: Callable[[Ask, int], Answer]) -> Sequence[Answer | Tensor]:
        requests = [r.request for r in self.runners]
        sums = [q for q in requests if isinstance(q, Sum)]
        if sums:
            assert len(sums) == len(requests)
            total = torch.stack([q.values for q in sums]).sum(0)
            return [total.clone() for _ in sums]
        asks = [q for q in requests if isinstance(q, Ask)]
        assert len(asks) == len(requests)
        assert len({(q.kind, q.on, q.vector is None) for q in asks}) == 1
        vectors = [q.vector for q in asks if q.vector is not None]
        whole = Ask(
            asks[0].kind,
            torch.cat([q.at for q in asks]),
            asks[0].on,
            torch.cat(vectors) if vectors else None,
        )
        reply = answer(whole, self.rounds)
        return [
            Answer(reply.samples, reply.loss, _columns(reply.rows, r.program.cut))
            for r in self.runners
        ]


def _columns(rows: Tensor, cut: range) -> Tensor:
    """Return a copy of the columns of one slice."""
    return rows[:, cut.start : cut.stop].clone()


def minimise_in_slices(
    spec: Spec,
    x: Tensor,
    answer: Callable[[Ask, int], Answer],
    *,
    sizes: Sequence[int],
    max_rounds: int,
) -> Copies:
    """Run copies of a program on consecutive slices of ``x`` of the given ``sizes``."""
    slices = x.split(list(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    copies = Copies(
        [
            Runner(built(spec, part), part.clone(), cut=range(start, start + len(part)))
            for part, start in zip(slices, starts, strict=True)
        ]
    )
    while copies.stop is None and copies.rounds < max_rounds:
        copies.round(answer)
    return copies


def requests_of(
    program: RoundProgram,
    x: Tensor,
    answer: Callable[[Ask, int], Answer],
    *,
    max_rounds: int,
    on_request: Callable[[Runner], None],
) -> Runner:
    """Run a program as `minimise` does, and call ``on_request`` before each answer."""
    runner = Runner(program, x.clone())
    while runner.stop is None and runner.rounds < max_rounds:
        runner.begin()
        while (request := runner.request) is not None:
            on_request(runner)
            runner.answer(
                request.values if isinstance(request, Sum) else answer(request, runner.rounds)
            )
    return runner


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def assert_state_changes_only_between_rounds(
    spec: Spec, x: Tensor, answer: Callable[[Ask, int], Answer], *, rounds: int
) -> None:
    """Run, and look at the state before each answer."""
    program = built(spec, x)
    states: dict[int, Any] = {}

    def look(runner: Runner) -> None:
        now = copy.deepcopy(program.state_dict())
        assert same(states.setdefault(runner.rounds, now), now)

    requests_of(program, x, answer, max_rounds=rounds, on_request=look)
    assert len(states) == rounds, "the run ended early"


def assert_resumes_exactly(
    spec: Spec, x: Tensor, answer: Callable[[Ask, int], Answer], *, rounds: int, cut_at: int
) -> None:
    """Cut a run short within a round, go on from its saved state, and compare with one that was
    not cut."""
    through = requests_of(
        built(spec, x), x, answer, max_rounds=rounds, on_request=lambda runner: None
    )
    first = Runner(built(spec, x), x.clone())
    while first.rounds < cut_at:
        _finish_round(first, answer)
    first.begin()  # a round that is never finished
    saved, at = io.BytesIO(), first.x.clone()
    torch.save(first.program.state_dict(), saved)
    saved.seek(0)

    program = built(spec, x)
    program.load_state_dict(torch.load(saved))
    then = Runner(program, at, rounds=cut_at)
    while then.stop is None and then.rounds < rounds:
        _finish_round(then, answer)

    assert torch.equal(then.x, through.x)
    assert (then.rounds, then.loss, then.stop) == (through.rounds, through.loss, through.stop)
    assert same(then.program.state_dict(), through.program.state_dict())


def _finish_round(runner: Runner, answer: Callable[[Ask, int], Answer]) -> None:
    runner.begin()
    while (request := runner.request) is not None:
        runner.answer(
            request.values if isinstance(request, Sum) else answer(request, runner.rounds)
        )


def rosenbrock(x: Tensor) -> Tensor:
    """The chained Rosenbrock function; its minimum is 0 at (1, …, 1)."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(eigenvalues: Sequence[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix with these eigenvalues and a right-hand side, float64."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    a = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return (a + a.T) / 2, torch.randn(n, generator=generator, dtype=torch.float64)
