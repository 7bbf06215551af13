"""One round program over every transport, one shard and several: the same end point as alone.

The program is steepest descent with exact steps on a sum of quadratics, small enough to see through
and asking for everything a program can: gradients, products, losses and sums.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from async_sgd.rules import Pieces
from paramserver.client import Client, Ended
from paramserver.errors import CurvatureError
from paramserver.rounds import Answer, Ask, Round, RoundProgram, Sample, Step, dots, minimise
from tests.support.clusters import (
    Cluster,
    GrpcCluster,
    MemoryCluster,
    SharedMemoryCluster,
    SpreadCluster,
)
from workers.pieces import answer
from workers.samples import Piece, indices

NUMEL, EXAMPLES, ROUNDS = 64 * 5, 40, 6
DOUBLE = torch.float64


class SteepestDescent(RoundProgram):
    """x - (g.g / g.Hg) g, and stops when the loss does not fall."""

    def round(self, x: Tensor) -> Round:
        everything = Sample("all")
        at_x: Answer = yield Ask("gradient", x, everything)
        g = at_x.vector
        product: Answer = yield Ask("hvp", x, everything, g)
        gg, ghg = (yield from dots((g, g), (g, product.vector))).tolist()
        new = x - gg / ghg * g
        trial: Answer = yield Ask("loss", new, everything)
        self.memory["steps"] = self.memory.get("steps", 0) + 1
        stop = None if trial.loss < at_x.loss else "the loss does not fall"
        return Step(new, at_x.loss, stop)


@dataclass(frozen=True)
class Spec:
    lr: float = 1.0

    def build(self, params: Sequence[nn.Parameter]) -> SteepestDescent:
        return SteepestDescent(params, {"lr": self.lr})


class Quadratics:
    """Example i is 1/2 (x - c_i)' diag(a_i) (x - c_i); an oracle of their means."""

    def __init__(self, *, poison: str = "", slow: threading.Event | None = None) -> None:
        noise = torch.Generator().manual_seed(0)
        self.a = 1 + torch.rand(EXAMPLES, NUMEL, generator=noise, dtype=DOUBLE)
        self.c = torch.randn(EXAMPLES, NUMEL, generator=noise, dtype=DOUBLE)
        self.poison, self.slow, self.answers = poison, slow, threading.Event()

    def best(self) -> Tensor:
        return (self.a * self.c).sum(0) / self.a.sum(0)

    def answer(
        self, kind: str, point: Tensor, piece: Piece, vector: Tensor | None
    ) -> tuple[int, float, Tensor]:
        of = indices(piece, EXAMPLES, seed=0)
        a, off = self.a[of], point - self.c[of]
        self.answers.set()
        if self.slow is not None:
            assert self.slow.wait(30)
        if self.poison == kind:
            return len(of), float("nan"), torch.full((1, NUMEL), float("nan"), dtype=DOUBLE)
        loss = float((a * off * off).sum(1).mean() / 2)
        if kind == "loss":
            return len(of), loss, point.new_zeros(0, NUMEL)
        if kind == "gradient":
            return len(of), loss, (a * off).mean(0, keepdim=True)
        assert kind == "hvp"
        assert vector is not None
        return len(of), float("nan"), (a * vector).mean(0, keepdim=True)


def alone() -> Tensor:
    oracle = Quadratics()

    def whole(ask: Ask, number: int) -> Answer:
        samples, loss, rows = oracle.answer(
            ask.kind, ask.at, Piece(ask.on, number, 0, 1), ask.vector
        )
        return Answer(samples, loss, rows)

    program = Spec().build([nn.Parameter(torch.zeros(NUMEL, dtype=DOUBLE))])
    return minimise(program, torch.zeros(NUMEL, dtype=DOUBLE), whole, max_rounds=ROUNDS).x


def cluster(make: type[Cluster], shards: int, **keys: Any) -> Cluster:
    keys.setdefault("rounds", ROUNDS)
    rule = Pieces(**keys.pop("pieces", {})).build(2)
    return make(
        torch.zeros(NUMEL, dtype=DOUBLE), shards=shards, optimizer=Spec(), rule=rule,
        num_examples=EXAMPLES, on_nan="pass", **keys,
    )  # fmt: skip


def work(run: Cluster, worker: int, oracle: Quadratics, failures: list[BaseException]) -> None:
    client: Client
    try:
        with run.join(worker) as client:
            answer(oracle, run.cuts, client)  # type: ignore[arg-type]  # what it uses of an Oracle
    except BaseException as error:
        failures.append(error)


def together(run: Cluster, oracles: Sequence[Quadratics]) -> list[BaseException]:
    """Let a worker with each oracle answer until the end, each on a thread."""
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=work, args=(run, worker, oracle, failures))
        for worker, oracle in enumerate(oracles)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return failures


@pytest.mark.parametrize("shards", [1, 3, 5])
def test_one_worker_in_one_process_ends_where_the_program_alone_does(shards: int) -> None:
    with cluster(MemoryCluster, shards) as run:
        failures: list[BaseException] = []

        work(run, 0, Quadratics(), failures)

        assert not failures
        torch.testing.assert_close(run.params(), alone(), rtol=0, atol=1e-12)
        assert run.sequencer.ended == f"{ROUNDS} updates"
        assert run.sequencer.conservation.holds
        assert set(run.column("staleness")) == {0}


@pytest.mark.parametrize("make", [SharedMemoryCluster, GrpcCluster, SpreadCluster])
@pytest.mark.parametrize("shards", [1, 3])
def test_two_workers_end_where_the_program_alone_does(make: type[Cluster], shards: int) -> None:
    with cluster(make, shards) as run:
        failures = together(run, [Quadratics(), Quadratics()])

        assert not failures
        torch.testing.assert_close(run.params(), alone(), rtol=0, atol=1e-12)
        assert (run.params() - Quadratics().best()).norm() < 1e-2
        assert run.sequencer.samples == EXAMPLES * ROUNDS


@pytest.mark.parametrize("make", [SharedMemoryCluster, GrpcCluster, SpreadCluster])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_worker_that_stops_answering_is_copied_and_changes_nothing(
    make: type[Cluster], shards: int
) -> None:
    release = threading.Event()
    with cluster(make, shards) as run:
        failures: list[BaseException] = []
        oracle = Quadratics(slow=release)
        stuck = threading.Thread(target=work, args=(run, 0, oracle, failures))
        stuck.start()
        assert oracle.answers.wait(10)  # the other one then does the pieces after which it may copy
        work(run, 1, Quadratics(), failures)

        release.set()
        stuck.join(30)

        assert not failures
        torch.testing.assert_close(run.params(), alone(), rtol=0, atol=1e-12)
        assert run.sequencer.ledger.drop_reasons().keys() <= {"late", "copy", "ended"}


def test_a_worker_that_dies_gives_its_piece_back() -> None:
    with cluster(MemoryCluster, 3) as run:
        dying = run.join(0)
        run.settle()
        assert json.loads(dying.first_read().text)["piece"] == 0  # type: ignore[union-attr]
        dying.close()
        failures: list[BaseException] = []

        work(run, 1, Quadratics(), failures)

        assert not failures
        torch.testing.assert_close(run.params(), alone(), rtol=0, atol=1e-12)


def test_a_reader_sees_the_last_finished_round_and_never_a_trial_point() -> None:
    with cluster(MemoryCluster, 3, rounds=2) as run:
        reader, worker = run.join(-1), run.join(0)
        oracle = Quadratics()
        before = reader.read()
        seen = [(before.version, torch.cat(before.params).clone())]

        class Watching(Quadratics):
            def answer(self, *asked: Any) -> tuple[int, float, Tensor]:
                now = reader.read()
                seen.append((now.version, torch.cat(now.params).clone()))
                return oracle.answer(*asked)

        answer(Watching(), run.cuts, worker)  # type: ignore[arg-type]

        first = dict(seen)
        assert sorted(first) == [0, 1]
        assert all(torch.equal(params, first[version]) for version, params in seen)


def test_curvature_that_is_not_finite_ends_the_run_with_its_name() -> None:
    class Refusing(SteepestDescent):
        def round(self, x: Tensor) -> Round:
            at_x: Answer = yield Ask("gradient", x, Sample("all"))
            raise CurvatureError("the product", at_x.loss)

    @dataclass(frozen=True)
    class RefusingSpec(Spec):
        def build(self, params: Sequence[nn.Parameter]) -> SteepestDescent:
            return Refusing(params, {"lr": 1.0})

    with SharedMemoryCluster(
        torch.ones(NUMEL, dtype=DOUBLE), shards=3, optimizer=RefusingSpec(),
        rule=Pieces().build(1), num_examples=EXAMPLES, on_nan="pass",
    ) as run:  # fmt: skip
        failures = together(run, [Quadratics(poison="gradient")])

        (failure,) = failures
        assert isinstance(failure, CurvatureError)
        assert str(failure).startswith("the product is nan: the round was not applied")
        assert torch.equal(run.params(), torch.ones(NUMEL, dtype=DOUBLE))


def test_a_quorum_asks_the_rest_of_a_round_of_the_pieces_that_answered_first() -> None:
    with cluster(MemoryCluster, 1, rounds=1, pieces={"quorum": 0.5}, readers=2) as run:
        client = run.join(0)
        oracle, asked = Quadratics(), []
        reading = client.first_read()
        while not isinstance(reading, Ended):
            told = json.loads(reading.text)
            asked.append((told["kind"], told["piece"]))
            piece = Piece(Sample(told["sample"], told["size"]), 0, told["piece"], told["of"])
            vector = reading.vectors[0] if reading.vectors else None
            samples, loss, rows = oracle.answer(told["kind"], reading.params[0], piece, vector)
            client.slots[0][: rows.numel()].view(rows.shape).copy_(rows)
            reading = client.push(loss=loss, samples=samples)

        pieces = {k: sorted(p for kind, p in asked if kind == k) for k in ("gradient", "hvp")}
        assert pieces["gradient"] == [0, 1, 2, 3]
        assert set(pieces["hvp"]) <= {0, 1, 2, 3}
