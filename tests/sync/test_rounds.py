"""Round programs on ranks, each on a thread, against the same program alone in one process."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.averaging import AllIterates, LastIterates
from paramserver.checkpoint import gather_state, scatter_state
from paramserver.errors import CurvatureError, PeerLostError, ReplicaMismatchError, TaskError
from paramserver.layout import Layout
from paramserver.optimizers.lbfgs import LBFGS
from paramserver.rounds import (
    Answer,
    Ask,
    Kind,
    Round,
    RoundOptimizer,
    RoundProgram,
    Runner,
    Sample,
    Step,
    dots,
    finite,
    gram,
    minimise,
)
from paramserver.schedules import LinearWarmup
from sync.collective import Collective
from sync.desk import Desk, Part, Position, Snapshot
from sync.rounds import MIN_PIECE, RoundTrainee, pieces_for_all
from sync.worker import Finished, Plan
from tests.support.ranks import KINDS, group, results
from tests.support.ranks import Kind as Means
from workers.samples import Piece, indices

DOUBLE = torch.float64
EXAMPLES, ROUNDS = 500, 6
LAYOUT = Layout.of(nn.Linear(64, 3, bias=False, dtype=DOUBLE))
TINY = Layout.of(nn.Linear(8, 8, bias=False, dtype=DOUBLE))
DRAWN = 400
"""Samples of a round's gradient."""


class Descent(RoundProgram):
    """x - t lr (g + the last g), with an exact t, and stops where no loss falls any more."""

    def round(self, x: Tensor) -> Round:
        drawn = Sample("gradient", DRAWN)
        at_x: Answer = yield Ask("gradient", x, drawn)
        finite(at_x.loss, "the loss")
        d = at_x.vector.clone()
        for old in self.memory.get("old", d[None][:0]):
            d += old / 4
        product: Answer = yield Ask("hvp", x, drawn, d)
        gd, dhd = (yield from dots((at_x.vector, d), (d, product.vector))).tolist()
        new = x - self.settings["lr"] * gd / dhd * d
        trial: Answer = yield Ask("loss", new, Sample("all"))
        finite(trial.loss, "the loss of the trial")
        ((dd,),) = (yield from gram([d])).tolist()
        self.memory["old"] = torch.stack([at_x.vector, d])
        self.memory["length"] = dd
        return Step(new, at_x.loss, f"|d|^2 is {dd:.0e}" if dd < 1e-20 else None)


class Newton(RoundProgram):
    """Newton's method, on the whole vector."""

    whole = True
    max_parameters = 1000

    def round(self, x: Tensor) -> Round:
        at_x: Answer = yield Ask("gradient", x, Sample("all"))
        curvature: Answer = yield Ask("hessian", x, Sample("curvature", DRAWN))
        step = torch.linalg.solve(curvature.rows, at_x.vector)
        ((length,),) = (yield from gram([step])).tolist()
        self.memory["rows"] = curvature.rows
        self.memory["length"] = length
        return Step(x - step, at_x.loss)


@dataclass(frozen=True)
class Spec:
    kind: type[RoundProgram] = Descent
    lr: float = 1.0

    def __str__(self) -> str:
        return self.kind.__name__

    def build(self, params: Sequence[nn.Parameter]) -> RoundProgram:
        return self.kind(params, {"lr": self.lr})


PROGRAMS: list[RoundOptimizer] = [Spec(), Spec(Newton)]
CASES: list[tuple[RoundOptimizer, Means]] = [
    (Spec(), "shared_memory"),
    (Spec(), "gloo"),
    (Spec(Newton), "shared_memory"),  # over gloo as well in the test of its bits, which takes 3 s
]


class Bowls:
    """Example i is sum over coordinates of a_i (x - c_i)^2 / 2 + x^4 / 4; an oracle of means."""

    def __init__(self, numel: int = LAYOUT.numel) -> None:
        noise = torch.Generator().manual_seed(0)
        self.a = 1 + torch.rand(EXAMPLES, numel, generator=noise, dtype=DOUBLE)
        self.c = torch.randn(EXAMPLES, numel, generator=noise, dtype=DOUBLE)

    def answer(
        self, kind: Kind, point: Tensor, piece: Piece, vector: Tensor | None
    ) -> tuple[int, float, Tensor]:
        of = indices(piece, EXAMPLES, seed=0)
        a, off = self.a[of], point - self.c[of]
        loss = float((a * off * off / 2 + point**4 / 4).sum(1).mean())
        if kind == "loss":
            return len(of), loss, point.new_zeros(0, len(point))
        if kind == "gradient":
            return len(of), loss, (a * off + point**3).mean(0, keepdim=True)
        diagonal = a.mean(0) + 3 * point**2
        if kind == "hessian":
            return len(of), math.nan, diagonal.diag()
        assert kind == "hvp"
        assert vector is not None
        return len(of), math.nan, (diagonal * vector)[None]


class Watched(Bowls):
    """Does something before the answer to a request, counted from 1 on, on each rank."""

    def __init__(self, when: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.when, self.act, self.number = when, act, 0

    def answer(
        self, kind: Kind, point: Tensor, piece: Piece, vector: Tensor | None
    ) -> tuple[int, float, Tensor]:
        self.number += 1
        if self.number == self.when:
            self.act()
        return super().answer(kind, point, piece, vector)


def rounds_of(optimizer: RoundOptimizer) -> int:
    """Return enough rounds to see: Newton's bring 192 rows each."""
    return 3 if optimizer == Spec(Newton) else ROUNDS


def plan(optimizer: RoundOptimizer | None = None, layout: Layout = LAYOUT, **fields: Any) -> Plan:
    optimizer = optimizer or Spec()
    defaults = {"updates": rounds_of(optimizer), "batch_size": 32, "compare_every": 1}
    return Plan(layout=layout, optimizer=optimizer, seed=0, **{**defaults, **fields})


def start(layout: Layout = LAYOUT) -> Tensor:
    return torch.full((layout.numel,), 2.0, dtype=DOUBLE)


def train(
    plan: Plan,
    *,
    world: int = 2,
    kind: Means = "shared_memory",
    oracle: Callable[[int], Bowls] | None = None,
    desks: dict[int, Desk] | None = None,
    parts: Sequence[Part] | None = None,
) -> list[Finished | BaseException]:
    """Train on every rank, from the start or from what ``parts`` saved."""
    bowls = Bowls(plan.layout.numel)

    def body(collective: Collective) -> Finished:
        mine = bowls if oracle is None else oracle(collective.rank)
        one = RoundTrainee(mine, EXAMPLES, collective, plan)
        if parts is None:
            one.load(start(plan.layout))
        else:
            owned = [part for part in parts if part.rule]
            state = gather_state([(part.cut, part.rule) for part in owned])
            one.load(
                torch.cat([part.params for part in parts]),
                parts[0].position,
                scatter_state(state, one.cut),
                parts[0].scheduler,
            )
        return one.train((desks or {}).get(collective.rank, Desk()))

    return group(kind, plan.layout, world, body)


def alone(
    optimizer: RoundOptimizer,
    rounds: int | None = None,
    layout: Layout = LAYOUT,
    on_round: Callable[[Runner], None] | None = None,
) -> Runner:
    """Make the rounds in one process."""
    bowls = Bowls(layout.numel)

    def answer(ask: Ask, number: int) -> Answer:
        return Answer(*bowls.answer(ask.kind, ask.at, Piece(ask.on, number, 0, 1), ask.vector))

    program = optimizer.build([nn.Parameter(start(layout))])
    rounds = rounds or rounds_of(optimizer)
    return minimise(program, start(layout), answer, max_rounds=rounds, on_round=on_round)


def params(finished: Sequence[Finished | Part]) -> Tensor:
    return torch.cat([one.params if isinstance(one, Part) else one.part.params for one in finished])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("optimizer", "kind"), CASES, ids=str)
def test_ranks_run_a_program_as_one_process_does(
    optimizer: RoundOptimizer, kind: Means, world: int
) -> None:
    finished = results(train(plan(optimizer), world=world, kind=kind))

    expected = alone(optimizer)
    torch.testing.assert_close(params(finished), expected.x, rtol=0, atol=1e-10)
    (memory,) = expected.program.state_dict()["state"].values()
    saved = finished[0].part.rule["state"][0]
    assert saved["length"] == pytest.approx(memory["length"], rel=1e-8)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_lbfgs_on_ranks_is_lbfgs_alone(world: int) -> None:
    lbfgs = LBFGS(tolerance=1e-8)

    finished = results(train(plan(lbfgs, updates=100), world=world))

    expected = alone(lbfgs, rounds=100)
    torch.testing.assert_close(params(finished), expected.x, rtol=0, atol=1e-10)
    assert {one.reason for one in finished} == {finished[0].reason}
    assert finished[0].part.position.version == expected.rounds < 100
    off = Bowls().answer("gradient", params(finished), Piece(Sample("all"), 0, 0, 1), None)[2]
    assert off.norm() <= 1e-8


@pytest.mark.parametrize("optimizer", PROGRAMS, ids=["sliced", "whole"])
def test_a_run_is_the_same_every_time(optimizer: RoundOptimizer) -> None:
    once = params(results(train(plan(optimizer), world=3)))
    again = params(results(train(plan(optimizer), world=3)))

    assert torch.equal(once, again)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_holds_the_same_bits_of_a_whole_program(kind: Means) -> None:
    class Kept(Newton):
        def round(self, x: Tensor) -> Round:
            kept.setdefault(threading.current_thread().name, []).append(x)
            return super().round(x)

    kept: dict[str, list[Tensor]] = {}
    finished = results(train(plan(Spec(Kept), updates=2), world=3, kind=kind))

    expected = alone(Spec(Newton), rounds=2)
    torch.testing.assert_close(params(finished), expected.x, rtol=0, atol=1e-10)
    assert len(kept) == 3
    first = kept["rank 0"]
    assert len(first) == 2
    for others in kept.values():
        assert all(map(torch.equal, first, others))


@pytest.mark.parametrize(("optimizer", "kind"), CASES, ids=str)
def test_ranks_without_a_slice_or_a_piece_take_part(
    optimizer: RoundOptimizer, kind: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sync.rounds.pieces_for_all", lambda *of: 2)

    finished = results(train(plan(optimizer, TINY), world=3, kind=kind))

    expected = alone(optimizer, layout=TINY)
    torch.testing.assert_close(params(finished), expected.x, rtol=0, atol=1e-10)


def test_all_that_belongs_to_a_whole_program_is_rank_0s() -> None:
    finished = results(train(plan(Spec(Newton)), world=3))

    assert [len(one.part.params) for one in finished] == [LAYOUT.numel, 0, 0]
    assert [one.part.rule == {} for one in finished] == [False, True, True]


def test_rounds_end_a_run() -> None:
    finished = results(train(plan(updates=3)))

    assert [one.reason for one in finished] == ["3 updates"] * 2
    pieces = pieces_for_all(Sample("gradient", DRAWN), EXAMPLES, 32, 2)
    assert finished[0].part.position == Position(
        version=3, clock=3, gradients=3 * pieces, samples=3 * DRAWN
    )


def test_samples_of_gradients_end_a_run_at_the_end_of_a_round() -> None:
    finished = results(train(plan(updates=None, samples=DRAWN + 1)))

    assert [one.reason for one in finished] == [f"{2 * DRAWN} samples"] * 2


def test_a_program_may_end_the_run() -> None:
    class Short(Descent):
        def round(self, x: Tensor) -> Round:
            step = yield from super().round(x)
            rounds = self.memory["rounds"] = self.memory.get("rounds", 0) + 1
            return replace(step, stop="that is enough" if rounds == 2 else None)

    finished = results(train(plan(Spec(Short))))

    assert [one.reason for one in finished] == ["that is enough"] * 2
    assert finished[0].part.position.version == 2


def test_the_status_tells_the_loss_each_round_began_with() -> None:
    finished = results(train(plan(updates=2)))

    losses = [alone(Spec(), rounds=n).loss for n in (1, 2)]
    assert finished[0].status.loss_sum == pytest.approx(sum(losses))
    assert finished[1].status.loss_sum == finished[0].status.loss_sum


def test_a_schedule_moves_with_the_rounds() -> None:
    schedule = LinearWarmup(updates=4, start=0.1)

    finished = results(train(plan(Spec(lr=0.5), schedule=schedule, updates=3)))

    program = Spec(lr=0.5).build([nn.Parameter(start())])
    scheduler = schedule.build(program)
    for _ in range(3):
        program.step()
        scheduler.step()
    groups = finished[0].part.rule["param_groups"]
    assert groups[0]["lr"] == pytest.approx(program.settings["lr"])
    assert not torch.equal(params(finished), params(results(train(plan(Spec(lr=0.5), updates=3)))))


@pytest.mark.parametrize(("optimizer", "kind"), CASES, ids=str)
def test_what_was_saved_goes_on_as_if_never_stopped(optimizer: RoundOptimizer, kind: Means) -> None:
    keys = {"schedule": LinearWarmup(updates=5, start=0.1), "average": LastIterates(n=2)}
    straight = results(train(plan(optimizer, **keys), kind=kind))

    begun = results(train(plan(optimizer, **keys, updates=2), kind=kind))
    resumed = results(train(plan(optimizer, **keys), kind=kind, parts=[f.part for f in begun]))

    assert torch.equal(params(resumed), params(straight))
    assert resumed[0].part.position == straight[0].part.position
    for mine, theirs in zip(resumed, straight, strict=True):
        torch.testing.assert_close(mine.part.rule, theirs.part.rule, rtol=0, atol=0)


MIDDLE_OF_ROUND_3 = 3 * 2 + 2
"""The number of a request, where a round has three and a rank one piece of each."""


def on_one(rank: int, when: int, act: Callable[[], None]) -> Callable[[int], Bowls]:
    """Let one rank do something in the middle of a round."""
    return lambda r: Watched(when, act) if r == rank else Bowls()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_can_be_ended_in_the_middle_of_a_round(rank: int) -> None:
    desks = {0: Desk(), 1: Desk()}

    def stop() -> None:
        desks[rank].stop = True

    oracle = on_one(rank, MIDDLE_OF_ROUND_3, stop)
    stopped = results(train(plan(), desks=desks, oracle=oracle))
    resumed = results(train(plan(), parts=[one.part for one in stopped]))

    assert [one.reason for one in stopped] == [None, None]
    after_2 = results(train(plan(updates=2)))
    assert stopped[0].part.position == stopped[1].part.position == after_2[0].part.position
    assert torch.equal(params(stopped), params(after_2))
    assert torch.equal(params(resumed), params(results(train(plan()))))
    assert resumed[0].part.position.samples == ROUNDS * DRAWN


def test_a_save_in_the_middle_of_a_round_is_of_the_last_finished_one() -> None:
    desks = {0: Desk(), 1: Desk()}

    def save() -> None:
        desks[0].save = 1

    straight = results(train(plan(), desks=desks, oracle=on_one(0, MIDDLE_OF_ROUND_3, save)))
    parts = [desk.part(1, timeout_s=0) for desk in desks.values()]

    saved = [part for part in parts if part is not None]
    after_2 = results(train(plan(updates=2)))
    assert [part.position for part in saved] == [after_2[0].part.position] * 2
    assert torch.equal(params(saved), params(after_2))
    assert torch.equal(params(results(train(plan(), parts=saved))), params(straight))


def watched_desk() -> tuple[list[Part | Snapshot], Desk]:
    """Return a desk, and what will be laid on it."""
    laid: list[Part | Snapshot] = []

    class Seen(Desk):
        def lay(self, answer: Part | Snapshot) -> None:
            laid.append(answer)

    return laid, Seen()


@pytest.mark.parametrize(("optimizer", "kind"), CASES, ids=str)
def test_a_snapshot_is_never_a_trial_point(optimizer: RoundOptimizer, kind: Means) -> None:
    shown, desk = watched_desk()
    requests = 2 if optimizer == Spec(Newton) else 3
    oracle = on_one(0, 2 * requests + 2, desk.show.set)
    finished = results(train(plan(optimizer), kind=kind, desks={0: desk}, oracle=oracle))

    (snapshot,) = shown
    assert isinstance(snapshot, Snapshot)
    after = results(train(plan(optimizer, updates=2), kind=kind))
    assert snapshot.version == 2
    assert torch.equal(snapshot.params, params(after))
    undisturbed = results(train(plan(optimizer), kind=kind))
    assert torch.equal(params(finished), params(undisturbed))


@pytest.mark.parametrize(("optimizer", "kind"), CASES, ids=str)
def test_an_average_is_shown_and_never_acts_on_the_run(
    optimizer: RoundOptimizer, kind: Means
) -> None:
    shown, desk = watched_desk()
    requests = 2 if optimizer == Spec(Newton) else 3

    finished = results(
        train(
            plan(optimizer, average=AllIterates()),
            kind=kind,
            desks={0: desk},
            oracle=on_one(0, 2 * requests + 2, desk.show.set),
        )
    )

    iterates: list[Tensor] = []
    expected = alone(optimizer, on_round=lambda runner: iterates.append(runner.x))
    (snapshot,) = shown
    assert isinstance(snapshot, Snapshot)
    assert snapshot.version == 2
    mean = (iterates[0] + iterates[1]) / 2
    torch.testing.assert_close(snapshot.params, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(params(finished), expected.x, rtol=0, atol=1e-10)


def test_before_an_average_has_begun_the_parameters_are_shown() -> None:
    shown, desk = watched_desk()
    oracle = on_one(0, MIDDLE_OF_ROUND_3, desk.show.set)

    results(train(plan(average=AllIterates(start=5)), desks={0: desk}, oracle=oracle))

    (snapshot,) = shown
    assert isinstance(snapshot, Snapshot)
    assert torch.equal(snapshot.params, params(results(train(plan(updates=2)))))


def test_a_program_that_cannot_go_on_leaves_the_last_finished_round() -> None:
    desks = {0: Desk(), 1: Desk()}

    def spoil(rank: int) -> Bowls:
        bowls = Bowls()
        watched = Watched(3 * 2 + 1, lambda: bowls_of[rank].c.fill_(math.nan))
        bowls_of[rank] = watched
        return watched if rank == 1 else bowls

    bowls_of: dict[int, Bowls] = {}
    came_out = train(plan(), desks=desks, oracle=spoil)

    for error in came_out:
        assert isinstance(error, CurvatureError)
        assert error.what == "the loss"
    parts = [desk.part(0, timeout_s=0) for desk in desks.values()]
    saved = [part for part in parts if part is not None]
    after_2 = results(train(plan(updates=2)))
    assert [part.position for part in saved] == [after_2[0].part.position] * 2
    assert torch.equal(params(saved), params(after_2))


def test_a_loss_that_fails_is_named_by_its_rank_and_missed_by_the_others() -> None:
    def fail() -> None:
        raise TaskError("no such file")

    came_out = train(plan(), world=3, oracle=on_one(1, MIDDLE_OF_ROUND_3, fail))

    assert isinstance(came_out[1], TaskError)
    for rank in (0, 2):
        error = came_out[rank]
        assert isinstance(error, PeerLostError)
        assert (error.peers, error.step) == ((1,), 3)


def test_ranks_that_differ_stop_the_run() -> None:
    class Odd(Newton):
        def round(self, x: Tensor) -> Round:
            step = yield from super().round(x)
            is_odd = threading.current_thread().name == "rank 1"
            return replace(step, x=step.x + 1e-15 if is_odd else step.x)

    came_out = train(plan(Spec(Odd), compare_every=2))

    for error in came_out:
        assert isinstance(error, ReplicaMismatchError)
        assert error.step == 2


@pytest.mark.parametrize(
    ("size", "batch_size", "world", "pieces"),
    [
        (1000, 32, 2, 4),
        (100, 32, 2, 2),
        (1000, 1000, 2, 2),
        (60_000, 1000, 4, 60),
        (3, 32, 5, 3),
        (1, 1, 1, 1),
    ],
)
def test_a_sample_is_cut_alike_for_all_ranks(
    size: int, batch_size: int, world: int, pieces: int
) -> None:
    drawn, everything = Sample("gradient", size), Sample("all")

    assert pieces_for_all(drawn, 100_000, batch_size, world) == pieces
    assert pieces_for_all(everything, size, batch_size, world) == pieces
    assert MIN_PIECE == 256


def test_more_samples_than_there_are_cannot_be_drawn() -> None:
    class Greedy(Descent):
        def round(self, x: Tensor) -> Round:
            yield Ask("gradient", x, Sample("gradient", EXAMPLES + 1))
            raise AssertionError("it was answered")

    for error in train(plan(Spec(Greedy))):
        assert isinstance(error, ValueError)
        assert "the size of sample 'gradient' must be 1 to 500" in str(error)
