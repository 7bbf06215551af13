"""Downpour with a fetch rarer than a push: as the paper writes it, and what follows from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from async_sgd.jobs import Batched, OneByOne
from async_sgd.replay import Replay
from async_sgd.rules import BSP, RULES, SSP, Ringmaster
from async_sgd.samples import Step
from async_sgd.simulation import Change, Simulation
from async_sgd.simulator import Simulator
from paramserver.optimizers import SGD
from paramserver.progress import Budget
from paramserver.rules import RuleSpec
from tests.support.clusters import MemoryCluster
from tests.support.virtual import Learning, columns, params
from workers.batches import Batches
from workers.config import RunConfig
from workers.local import Downpour
from workers.loop import train
from workers.task import build_model
from workers.tasks import task

DIGITS = task("digits:hidden=8")


def simulated(
    learning: Learning, local: Downpour, *, batched: bool = False, **options: Any
) -> Simulation:
    """Simulate to the end."""
    make = Batched if batched else OneByOne
    model = build_model(learning.task, learning.seed)
    gradients = make(learning.task, model, learning.layout, learning.samples(), local=local)
    run = learning.simulation(gradients, **options)
    run.run()
    return run


def flat_gradient(learning: Learning, x: Tensor, worker: int, step: int) -> Tensor:
    """Return the gradient at ``x`` of one step's batch, computed in the ordinary way."""
    model = build_model(learning.task, learning.seed).train()
    learning.layout.load(model, x)
    learning.task.loss(model, learning.samples().batch([Step(worker, step, 0)])).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    flat = torch.zeros_like(x)
    for slot, view in zip(learning.layout.slots, learning.layout.views(flat), strict=True):
        view.copy_(cast(Tensor, grads[slot.name]))
    return flat


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("push", "fetch"), [(2, 2), (2, 6), (1, 4)])
def test_downpour_pushes_and_fetches_as_the_paper_says(
    push: int, fetch: int, batched: bool
) -> None:
    learning = Learning(DIGITS, num_workers=3, updates=18)
    local = Downpour(push=push, fetch=fetch, lr=0.05)

    run = simulated(learning, local, batched=batched, delay="constant", optimizer=SGD(lr=0.1))

    w = learning.start()
    own, clocks, fetched = [w.clone() for _ in range(3)], [0] * 3, [0] * 3
    staleness = []
    for version in range(18):
        worker = version % 3
        total, first = torch.zeros_like(w), clocks[worker] * push
        for step in range(first, first + push):
            grad = flat_gradient(learning, own[worker], worker, step)
            own[worker] = own[worker] - 0.05 * grad
            total += grad
        w = w - 0.1 * total
        staleness.append(version - fetched[worker])
        clocks[worker] += 1
        if clocks[worker] * push % fetch == 0:
            own[worker], fetched[worker] = w.clone(), version + 1
    torch.testing.assert_close(params(run), w, rtol=1e-5, atol=1e-6)
    assert columns(run)["staleness"].tolist() == staleness
    assert run.sequencer.conservation.holds


def test_one_worker_is_where_the_server_is_however_seldom_it_fetches() -> None:
    learning = Learning(DIGITS, num_workers=1, updates=12)
    runs = [
        simulated(learning, Downpour(push=2, fetch=fetch, lr=0.05), optimizer=SGD(lr=0.05))
        for fetch in (2, 4, 12)
    ]

    often, seldom, once = map(params, runs)

    torch.testing.assert_close(seldom, often, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(once, often, rtol=1e-5, atol=1e-6)


def test_a_real_worker_fetches_as_a_simulated_one_to_the_bit() -> None:
    learning = Learning(DIGITS, num_workers=1, updates=8)
    local = Downpour(push=2, fetch=4, lr=0.05)
    expected = simulated(learning, local, optimizer=SGD(lr=0.1))
    batches = Batches(
        len(learning.data.train), learning.batch_size, seed=0, worker=0, num_workers=1
    )

    with MemoryCluster(
        learning.start(), shards=1, optimizer=SGD(lr=0.1), budget=Budget(updates=8)
    ) as cluster:
        train(
            DIGITS, build_model(DIGITS, 0), learning.layout, cluster.cuts, cluster.join(0),
            learning.data.train, batches, seed=0, local=local,
        )  # fmt: skip

        assert torch.equal(cluster.params(), params(expected))
        assert cluster.column("staleness") == [0, 1] * 4
        assert cluster.sequencer.conservation.holds


def test_downpour_is_replayed_to_the_bit(tmp_path: Path) -> None:
    Simulator(
        DIGITS,
        SGD(lr=0.1),
        RunConfig(workers=3, updates=40, out=tmp_path / "run", evaluate_every_s=0),
        local=Downpour(push=2, fetch=6, lr=0.05),
        rule=Ringmaster(limit=9),
        measure=("cosine", "step"),
        changes=[Change.parse(c) for c in ("crash:1@9", "join:1@14")],
    ).fit()

    assert Replay(tmp_path / "run").run().distance == 0.0


@pytest.mark.parametrize("rule", [BSP(), SSP()])
def test_a_rule_that_counts_on_a_new_read_is_refused(rule: RuleSpec) -> None:
    name = RULES.name_of(rule)

    with pytest.raises(
        ValueError,
        match=rf"^local downpour pushes several times of one read, and rule {name}",
    ):
        Simulator(DIGITS, SGD(lr=0.1), local=Downpour(push=2, fetch=6), rule=rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": ("gap",)}, r"^local downpour goes on from what it fetched some pushes ago"),
        ({"rule": Ringmaster(limit=3, cancel=True)}, r"^local downpour keeps 1 vectors from push"),
    ],
)
def test_what_needs_every_read_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Simulator(DIGITS, SGD(lr=0.1), local=Downpour(push=2, fetch=6), **options)
