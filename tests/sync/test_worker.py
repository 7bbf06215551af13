"""The ranks' loop, each rank on a thread, against one process on the joined batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.averaging import AllIterates, Average, LastIterates
from paramserver.checkpoint import gather_state, scatter_state
from paramserver.clipping import ClipNorm
from paramserver.errors import (
    NonFiniteGradientError,
    PeerLostError,
    ReplicaMismatchError,
    TaskError,
)
from paramserver.layout import Layout
from paramserver.optimizers import DANA, SGD, Adam, Optimizer
from sync.collective import Collective
from sync.desk import Desk, Part, Position, Snapshot
from sync.replicas import fingerprint
from sync.worker import Finished, Plan, Trainee
from tests.support.ranks import KINDS, Kind, group, results
from workers.batches import Batches
from workers.examples import Batch, Data, TensorExamples
from workers.gradients import BoundModel
from workers.task import Task, build_data, build_model

SEED = 3
BATCH = 5


def squares(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(37, 6, generator=generator)
    examples = TensorExamples(inputs, inputs.sin().sum(1, keepdim=True))
    return Data(examples, examples)


TASK = Task(
    name="sines",
    model=lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 1)),
    data=data,
    loss=squares,
    headline="loss",
    batch_size=BATCH,
)
LAYOUT = Layout.of(build_model(TASK, SEED))
START = LAYOUT.flatten(build_model(TASK, SEED))
"""Made once: building a model seeds torch's generator, which the ranks' threads share."""


def plan(optimizer: Optimizer | None = None, **fields: Any) -> Plan:
    fields = {"updates": 20, **fields}
    return Plan(
        layout=LAYOUT, optimizer=optimizer or SGD(lr=0.1), seed=SEED, batch_size=BATCH, **fields
    )


def trainee(collective: Collective, plan: Plan, task: Task = TASK) -> Trainee:
    model = build_model(task, SEED + 1)  # its own parameters are never used
    return Trainee(task, model, build_data(task).train, collective, plan)


def train(
    plan: Plan,
    *,
    world: int = 2,
    kind: Kind = "shared_memory",
    task: Task = TASK,
    desks: dict[int, Desk] | None = None,
    parts: list[Part] | None = None,
) -> list[Finished | BaseException]:
    """Train on every rank, from the start or from what ``parts`` saved."""

    def body(collective: Collective) -> Finished:
        one = trainee(collective, plan, task)
        if parts is None:
            one.load(START)
        else:
            state = gather_state([(part.cut, part.rule) for part in parts])
            one.load(
                torch.cat([part.params for part in parts]),
                parts[0].position,
                scatter_state(state, collective.cut),
                parts[0].scheduler,
            )
        return one.train((desks or {}).get(collective.rank, Desk()))

    return group(kind, LAYOUT, world, body)


def params(finished: list[Finished]) -> Tensor:
    return torch.cat([one.part.params for one in finished])


def on_joined_batch(optimizer: Optimizer, steps: int, world: int) -> Tensor:
    """Train one process on the batches of all ranks together."""
    model = build_model(TASK, SEED)
    flat, slot = START.clone(), torch.zeros(LAYOUT.numel)
    bound = BoundModel(model, LAYOUT, [range(LAYOUT.numel)])
    bound.read([flat])
    bound.write_gradients_to([slot])
    rule = optimizer.build([nn.Parameter(flat, requires_grad=False)])
    examples = data().train
    ranks = [
        Batches(len(examples), BATCH, seed=SEED, worker=rank, num_workers=world)
        for rank in range(world)
    ]
    for clock in range(steps):
        indices = torch.cat([batches.indices(clock) for batches in ranks])
        bound.backward(squares(model, examples.batch(indices)))
        rule.apply([slot])
    return flat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_train_as_one_process_on_the_joined_batch(kind: Kind, world: int) -> None:
    finished = results(train(plan(Adam(lr=0.01)), world=world, kind=kind))

    expected = on_joined_batch(Adam(lr=0.01), 20, world)
    torch.testing.assert_close(params(finished), expected, rtol=0, atol=1e-6)


def test_a_run_is_the_same_every_time() -> None:
    once = params(results(train(plan(Adam(lr=0.01)), world=3)))
    again = params(results(train(plan(Adam(lr=0.01)), world=3)))

    assert torch.equal(once, again)


def test_updates_end_a_run() -> None:
    finished = results(train(plan(updates=7)))

    assert [one.reason for one in finished] == ["7 updates"] * 2
    assert finished[0].part.position == Position(version=7, clock=7, gradients=14, samples=70)


def test_samples_end_a_run_at_the_end_of_a_step() -> None:
    finished = results(train(plan(updates=None, samples=41)))

    assert [one.reason for one in finished] == ["50 samples"] * 2


def test_nothing_is_trained_where_the_budget_is_used_up() -> None:
    done = [one.part for one in results(train(plan(updates=7)))]

    finished = results(train(plan(updates=7), parts=done))

    assert torch.equal(params(finished), torch.cat([part.params for part in done]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_goes_on_as_if_never_stopped(kind: Kind) -> None:
    straight = results(train(plan(Adam(lr=0.01), updates=13), kind=kind))

    saved = [one.part for one in results(train(plan(Adam(lr=0.01), updates=6), kind=kind))]
    resumed = results(train(plan(Adam(lr=0.01), updates=13), kind=kind, parts=saved))

    assert torch.equal(params(resumed), params(straight))
    assert resumed[0].part.position == straight[0].part.position


def with_the_gradient_ahead(optimizer: DANA, steps: int, world: int) -> tuple[Tensor, Tensor]:
    """Train one process on the batches of all ranks; return w and the point it looks ahead to."""
    model = build_model(TASK, SEED)
    w, ahead = START.clone(), START.clone()
    v, slot = torch.zeros_like(START), torch.zeros_like(START)
    bound = BoundModel(model, LAYOUT, [range(LAYOUT.numel)])
    bound.read([ahead])
    bound.write_gradients_to([slot])
    examples = data().train
    ranks = [
        Batches(len(examples), BATCH, seed=SEED, worker=rank, num_workers=world)
        for rank in range(world)
    ]
    for clock in range(steps):
        indices = torch.cat([batches.indices(clock) for batches in ranks])
        bound.backward(squares(model, examples.batch(indices)))
        v.mul_(optimizer.momentum).add_(slot)
        w.sub_(optimizer.lr * v)
        ahead.copy_(w - optimizer.lr * optimizer.momentum * v)
    return w, ahead


AHEAD = DANA(lr=0.05, momentum=0.8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 3])
def test_ranks_compute_where_the_rule_looks_ahead_and_keep_the_parameters(
    kind: Kind, world: int
) -> None:
    seen: dict[int, Tensor] = {}

    def body(collective: Collective) -> Finished:
        one = trainee(collective, plan(AHEAD))
        one.load(START)
        finished = one.train(Desk())
        seen[collective.rank] = collective.params.clone()
        return finished

    finished = results(group(kind, LAYOUT, world, body))

    w, ahead = with_the_gradient_ahead(AHEAD, 20, world)
    torch.testing.assert_close(params(finished), w, rtol=0, atol=1e-6)
    for rank in range(world):
        torch.testing.assert_close(seen[rank], ahead, rtol=0, atol=1e-6)
    assert (w - ahead).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_looks_ahead_goes_on_as_if_never_stopped(kind: Kind) -> None:
    straight = results(train(plan(AHEAD, updates=13), kind=kind))

    saved = [one.part for one in results(train(plan(AHEAD, updates=6), kind=kind))]
    resumed = results(train(plan(AHEAD, updates=13), kind=kind, parts=saved))

    assert torch.equal(params(resumed), params(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_is_of_the_parameters_where_ranks_look_ahead(kind: Kind) -> None:
    shown: list[Part | Snapshot] = []

    class Watched(Desk):
        def lay(self, answer: Part | Snapshot) -> None:
            shown.append(answer)

    desk = Watched()
    looking = plan(AHEAD, updates=5)
    came = results(train(looking, kind=kind, desks={0: desk}, task=on_step(3, desk.show.set)))

    (snapshot,) = shown
    assert isinstance(snapshot, Snapshot)
    w, _ = with_the_gradient_ahead(AHEAD, snapshot.version, 2)
    torch.testing.assert_close(snapshot.params, w, rtol=0, atol=1e-6)
    w, _ = with_the_gradient_ahead(AHEAD, 5, 2)
    torch.testing.assert_close(params(came), w, rtol=0, atol=1e-6)


def on_step(step: int, act: Callable[[], None]) -> Task:
    """Return the task with ``act`` called by each rank in its loss at ``step``, from 1 on."""
    calls = threading.local()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        calls.number = getattr(calls, "number", 0) + 1
        if calls.number == step:
            act()
        return squares(model, batch)

    return replace(TASK, loss=loss)


def test_the_driver_ends_a_run_for_all_at_the_same_step() -> None:
    desks = {0: Desk(), 1: Desk()}

    def stop() -> None:
        desks[0].stop = True

    finished = results(train(plan(), desks=desks, task=on_step(4, stop)))

    assert [one.reason for one in finished] == [None, None]
    assert finished[0].part.position.version in (4, 5)  # rank 1 may say it first, to rank 0's next
    assert finished[0].part.position == finished[1].part.position


def test_every_rank_saves_the_same_version() -> None:
    desks = {0: Desk(), 1: Desk()}

    def save() -> None:
        desks[0].save = 1

    straight = results(train(plan(Adam(lr=0.01))))
    results(train(plan(Adam(lr=0.01)), desks=desks, task=on_step(4, save)))
    parts = [desk.part(1, timeout_s=0) for desk in desks.values()]

    saved = [part for part in parts if part is not None]
    assert saved[0].position == saved[1].position
    assert saved[0].position.version in (4, 5)
    resumed = results(train(plan(Adam(lr=0.01)), parts=saved))
    assert torch.equal(params(resumed), params(straight))


def test_a_snapshot_is_the_parameters_of_one_version() -> None:
    shown: list[Part | Snapshot] = []

    class Watched(Desk):
        def lay(self, answer: Part | Snapshot) -> None:
            shown.append(answer)

    desk = Watched()
    results(train(plan(updates=3), desks={0: desk}, task=on_step(1, desk.show.set)))

    (snapshot,) = shown
    assert isinstance(snapshot, Snapshot)
    assert snapshot.version in (1, 2)
    expected = on_joined_batch(SGD(lr=0.1), snapshot.version, 2)
    torch.testing.assert_close(snapshot.params, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [AllIterates(), LastIterates(n=2), AllIterates(start=9)])
def test_an_average_is_shown_and_never_acts_on_the_run(average: Average, kind: Kind) -> None:
    shown: list[Part | Snapshot] = []

    class Watched(Desk):
        def lay(self, answer: Part | Snapshot) -> None:
            shown.append(answer)

    desk = Watched()
    with_it = plan(updates=5, average=average)
    came = results(train(with_it, kind=kind, desks={0: desk}, task=on_step(3, desk.show.set)))

    (snapshot,) = shown
    assert isinstance(snapshot, Snapshot)
    version = snapshot.version
    assert version in (3, 4)
    first = {AllIterates(): 1, LastIterates(n=2): version - 1}.get(average, version)
    iterates = [on_joined_batch(SGD(lr=0.1), t, 2) for t in range(first, version + 1)]
    torch.testing.assert_close(snapshot.params, torch.stack(iterates).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(params(came), on_joined_batch(SGD(lr=0.1), 5, 2), rtol=0, atol=1e-6)


def test_an_average_goes_on_as_if_never_stopped() -> None:
    def averaging(updates: int) -> Plan:
        return plan(Adam(lr=0.01), updates=updates, average=AllIterates())

    straight = results(train(averaging(9)))

    saved = [one.part for one in results(train(averaging(4)))]
    resumed = results(train(averaging(9), parts=saved))

    for mine, theirs in zip(resumed, straight, strict=True):
        torch.testing.assert_close(mine.part.rule, theirs.part.rule, rtol=0, atol=0)
    assert torch.equal(params(resumed), params(straight))


def spoiled(when: int, who: int, value: float = math.nan) -> Task:
    """Return the task with a loss that one rank spoils at one step, from 1 on."""
    names = threading.local()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        names.number = getattr(names, "number", 0) + 1
        good = squares(model, batch)
        if names.number == when and threading.current_thread().name == f"rank {who}":
            assert isinstance(model, nn.Sequential)
            return good + value * model[2].bias.sum()
        return good

    return replace(TASK, loss=loss)


def test_a_gradient_that_is_not_finite_is_named_by_all() -> None:
    came_out = train(plan(), world=3, task=spoiled(when=4, who=1))

    for error in came_out:
        assert isinstance(error, NonFiniteGradientError)
        assert (error.worker, error.clock, error.layer) == (1, 4, "2.bias")


def test_a_gradient_that_is_not_finite_leaves_the_state_to_be_saved() -> None:
    desks = {0: Desk(), 1: Desk()}

    train(plan(), task=spoiled(when=4, who=1), desks=desks)

    parts = [desk.part(0, timeout_s=0) for desk in desks.values()]
    saved = torch.cat([part.params for part in parts if part is not None])
    torch.testing.assert_close(saved, on_joined_batch(SGD(lr=0.1), 3, 2), rtol=0, atol=1e-6)


def test_a_gradient_that_is_not_finite_can_be_left_out() -> None:
    finished = results(train(plan(on_nan="drop", updates=7), task=spoiled(when=4, who=1)))

    assert finished[0].part.position == Position(version=7, clock=8, gradients=14, samples=70)
    assert finished[0].status.dropped == 2
    assert finished[0].status.figures()["dropped"] == {"nonfinite": 2}
    assert params(finished).isfinite().all()


def test_a_run_of_which_nothing_finite_comes_any_more_ends_and_says_so() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return TASK.loss(model, batch) * math.nan

    finished = results(train(plan(on_nan="drop", updates=7), task=replace(TASK, loss=loss)))

    reason = "the parameters have diverged: none of the last 100 gradients was finite"
    assert [f.reason for f in finished] == [reason] * len(finished)
    assert finished[0].part.position == Position(version=0, clock=50, spoilt=100)


def test_each_rank_may_clip_its_own_gradient() -> None:
    clip = ClipNorm(max_norm=1e-3)

    finished = results(train(plan(SGD(lr=1.0), clip_own=clip, updates=1)))

    moved = float((params(finished) - START).norm())
    assert 0 < moved <= 1e-3 * (1 + 1e-5)


def test_replicas_that_differ_stop_the_run() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if threading.current_thread().name == "rank 1":
            assert isinstance(model, nn.Sequential)
            model[0].weight.data = model[0].weight.data + 1e-3  # no longer the group's
        return squares(model, batch)

    came_out = train(plan(updates=9, compare_every=3), task=replace(TASK, loss=loss))

    for error in came_out:
        assert isinstance(error, ReplicaMismatchError)
        assert error.step == 3
        assert error.hashes.keys() == {0, 1}
        assert error.hashes[0] != error.hashes[1]


def test_a_task_that_fails_is_named_by_its_rank_and_missed_by_the_others() -> None:
    def fail() -> None:
        if threading.current_thread().name == "rank 1":
            raise RuntimeError("no such file")

    came_out = train(plan(), world=3, task=on_step(2, fail))

    assert isinstance(came_out[1], TaskError)
    assert "no such file" in str(came_out[1])
    for rank in (0, 2):
        error = came_out[rank]
        assert isinstance(error, PeerLostError)
        assert (error.peers, error.step) == ((1,), 2)


def test_the_status_tells_the_mean_loss_of_the_joined_batches() -> None:
    finished = results(train(plan(updates=1)))

    examples = data().train
    ranks = [Batches(37, BATCH, seed=SEED, worker=r, num_workers=2).indices(0) for r in range(2)]
    loss = squares(build_model(TASK, SEED), examples.batch(torch.cat(ranks)))
    assert finished[0].status.loss_sum == pytest.approx(loss.item())
    assert finished[1].status.loss_sum == finished[0].status.loss_sum


def test_the_one_the_others_wait_for_is_known() -> None:
    late = threading.Event()

    def dawdle() -> None:
        if threading.current_thread().name == "rank 1":
            late.wait(0.1)

    finished = results(train(plan(updates=2), task=on_step(2, dawdle)))

    waited_s = finished[0].status.waited_s
    assert waited_s[1] > 0.08
    assert waited_s[1] > waited_s[0]


def test_fingerprints_differ_by_a_bit() -> None:
    model = build_model(TASK, SEED)
    same, other = build_model(TASK, SEED), build_model(TASK, SEED)
    with torch.no_grad():
        first = next(other.parameters()).view(-1)
        first[0] = torch.nextafter(first[0], torch.tensor(9.0))

    assert fingerprint(model.parameters()) == fingerprint(same.parameters())
    assert fingerprint(model.parameters()) != fingerprint(other.parameters())
