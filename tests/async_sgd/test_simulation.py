"""Simulated runs: identities that hold to the bit, workers that come and go, batched gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from async_sgd import jobs
from async_sgd.damping import DynSGD
from async_sgd.jobs import Job
from async_sgd.samples import Samples, Step
from async_sgd.simulation import Buffers, Change, Simulation
from paramserver.clipping import Clip, ClipNorm, ClipValue
from paramserver.errors import NonFiniteGradientError, ParamServerError, TaskError
from paramserver.optimizers import SGD, AdaGrad, Momentum
from paramserver.recount import recount
from tests.support import small_tasks
from tests.support.small_tasks import Small
from tests.support.virtual import DOUBLE, Learning, Slope, Watch, columns, params, simulation
from workers.batches import Batches, seed_step
from workers.examples import Batch
from workers.task import Data, Task, TensorExamples, build_model
from workers.tasks.digits import Digits
from workers.tasks.quadratic import Quadratic

HEAVY_TAIL = "pareto:alpha=1.5"
LAWS = ["exponential", "constant", HEAVY_TAIL, "gamma:cv=0.3,factors=1/2/0.5/4"]
ALL_RULES = [
    "asp",
    "ssp:bound=1",
    "bsp",
    "softsync:n=2",
    "k-of-n:k=3",
    "k-of-n:k=3,mode=batch-sync",
    "k-of-n:k=3,mode=async",
    "k-of-n:k=3,mode=batch-async",
    "bounded:limit=2",
    "bounded:limit=2,action=damp",
    "ringmaster:limit=3",
    "rennala:batch=5",
    "fedbuff:size=3",
    "sync-switch:after=10",
]
TABLE = np.random.default_rng(0).normal(size=(16, 4000))


def noise(job: Job) -> float:
    """Return a number that depends on the worker and its clock alone."""
    return float(TABLE[job.worker, job.clock])


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("momentum", [0.0, 0.5])  # halves are exact, however they are computed
@pytest.mark.parametrize(
    "rule",
    [
        "asp",
        "ssp:bound=0",
        "bsp",
        "softsync:n=1",
        "k-of-n:k=1",
        "k-of-n:k=1,mode=batch-async",
        "bounded:limit=0",
        "ringmaster:limit=1",
        "rennala:batch=1",
        "fedbuff:size=1",
        "sync-switch:after=50",
    ],
)
def test_one_worker_is_a_plain_loop_to_the_bit(rule: str, momentum: float) -> None:
    run = simulation(
        1,
        updates=100,
        rule=rule,
        optimizer=Momentum(lr=0.1, momentum=momentum),
        gradients=Slope(0.37, noise),
        service="exponential",
        one_way_s=0.1,
    )

    run.run()

    w, velocity = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    for step in range(100):
        velocity = momentum * velocity + (0.37 * w + TABLE[0, step])
        w.add_(velocity, alpha=-0.1)
    assert torch.equal(params(run), w)


@pytest.mark.parametrize("name", ["digits", "dropout"])
def test_one_worker_trains_as_a_plain_loop_to_the_bit(name: str) -> None:
    task = digits() if name == "digits" else Small(lambda: small_tasks.dropout().double()).task
    learning = Learning(task, num_workers=1, batch_size=5)
    run = learning.simulation(learning.gradients(batched=False))

    run.run()

    model = build_model(task, learning.seed)
    batches = Batches(len(learning.data.train), 5, seed=0, worker=0, num_workers=1)
    for step in range(learning.updates):
        seed_step(0, 0, step)
        loss = task.loss(model, learning.data.train.batch(batches.indices(step)))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.data.add_(grad, alpha=-learning.lr)
    assert torch.equal(params(run), learning.layout.flatten(model))


@cache
def digits() -> Task:
    """Return the digits, loaded once."""
    task = Digits(hidden=48).build()
    data = task.data()
    return Task(name="digits", model=task.model, data=lambda: data, loss=task.loss, headline="loss")


@pytest.mark.parametrize("delay", LAWS)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_ledger_alone_tells_the_parameters(rule: str, delay: str) -> None:
    slope = Slope(0.7, noise)
    run = simulation(
        4,
        updates=60,
        rule=rule,
        delay=delay,
        damping=DynSGD(),
        optimizer=SGD(lr=0.2),
        gradients=slope,
    )

    run.run()

    path = replay(columns(run), run.sequencer.version)
    assert len(path) == 61
    assert params(run).item() == pytest.approx(path[-1], abs=1e-13)
    for version, seen in slope.seen.items():
        assert seen.item() == pytest.approx(path[version], abs=1e-13)


def replay(rows: dict[str, NDArray[Any]], num_updates: int) -> list[float]:
    """Return the parameters at each version: w' = w - 0.2 times the mean of scale * (0.7 w + n)."""
    path = [1.0]
    for version in range(1, num_updates + 1):
        taken = np.flatnonzero((rows["version"] == version) & (rows["dropped"] == 0))
        mean = np.mean(
            [
                rows["scale"][i]
                * (
                    0.7 * path[rows["read_version"][i]]
                    + TABLE[rows["worker"][i], rows["clock"][i] - 1]
                )
                for i in taken
            ]
        )
        path.append(path[-1] - 0.2 * float(mean))
    return path


@pytest.mark.parametrize("rule", ["asp", "ssp:bound=2", "ringmaster:limit=8"])
@pytest.mark.parametrize("delay", LAWS)
def test_the_mean_point_of_all_gradients_says_where_the_run_ended(rule: str, delay: str) -> None:
    lr, curvature = 0.02, 0.5
    drawn: list[float] = []

    def kept_noise(job: Job) -> float:
        drawn.append(noise(job))
        return drawn[-1]

    watch = Watch(Slope(curvature, kept_noise))
    run = simulation(
        4, updates=500, rule=rule, delay=delay, optimizer=SGD(lr=lr), gradients=watch, start=3.0
    )

    run.run()

    assert len(watch.points) == 500 + columns(run)["dropped"].sum()
    taken = columns(run)["dropped"] == 0
    mean = torch.cat(watch.points).numpy()[taken].mean()
    ends = -((params(run).item() - 3.0) / lr + np.array(drawn)[taken].sum()) / (curvature * 500)
    assert mean == pytest.approx(ends, abs=1e-10)


@pytest.mark.parametrize("delay", LAWS)
@pytest.mark.parametrize("rule", ["k-of-n:k=4,mode=sync", "k-of-n:k=4,mode=async"])
def test_without_backup_workers_k_of_n_is_bsp_to_the_bit(rule: str, delay: str) -> None:
    check_same(noisy_run("bsp", delay), noisy_run(rule, delay))


@pytest.mark.parametrize("delay", LAWS)
@pytest.mark.parametrize(
    "rule", ["ssp:bound=1000000", "bounded:limit=1000000", "sync-switch:after=0", "k-of-n:k=1"]
)
def test_rules_without_a_limit_are_asp_to_the_bit(rule: str, delay: str) -> None:
    rule = f"{rule},mode=batch-async" if rule == "k-of-n:k=1" else rule

    check_same(noisy_run("asp", delay), noisy_run(rule, delay))


def noisy_run(rule: str, delay: str, updates: int = 150, **options: Any) -> Simulation:
    run = simulation(
        4,
        updates=updates,
        rule=rule,
        delay=delay,
        optimizer=SGD(lr=0.1),
        gradients=Slope(0.7, noise),
        **options,
    )
    run.run()
    return run


def check_same(one: Simulation, other: Simulation) -> None:
    """Check that two runs have the same rows, parameters and time, to the bit."""
    np.testing.assert_equal(columns(other), columns(one))
    assert torch.equal(params(other), params(one))
    assert other.now == one.now


@pytest.mark.parametrize("delay", LAWS)
def test_ssp_0_reads_what_bsp_with_a_step_for_each_worker_reads(delay: str) -> None:
    lock_step = Watch(Slope(0.7, noise))
    ssp = simulation(
        4, updates=400, rule="ssp:bound=0", delay=delay, optimizer=SGD(lr=0.1), gradients=lock_step
    )
    rounds = Watch(Slope(0.7, noise))
    bsp = simulation(
        4, updates=100, rule="bsp", delay=delay, optimizer=SGD(lr=0.4), gradients=rounds
    )

    ssp.run()
    bsp.run()

    torch.testing.assert_close(lock_step.points, rounds.points, rtol=0, atol=1e-12)
    one, other = columns(ssp), columns(bsp)
    for name in ("worker", "clock", "start", "end"):
        np.testing.assert_array_equal(one[name], other[name])
    # But pushes are applied at once, so they count as stale although nothing old was read.
    assert one["staleness"].tolist() == [0, 1, 2, 3] * 100


def test_fedbuff_of_equal_workers_is_a_mean_with_one_fresh_gradient() -> None:
    workers, lr, curvature = 4, 0.1, 0.7
    slope = Slope(curvature)
    run = simulation(
        workers,
        updates=50,
        rule=f"fedbuff:size={workers}",
        delay="constant",
        optimizer=SGD(lr=lr),
        gradients=slope,
    )

    run.run()

    # All but the last of a round go on before it is applied: only the first update is FedAvg's.
    w = [1.0, 1.0 - lr * curvature]
    for _ in range(49):
        stale = (workers - 1) * w[-2] / math.sqrt(2)
        w.append(w[-1] - lr * curvature * (stale + w[-1]) / workers)
    assert params(run).item() == pytest.approx(w[-1], abs=1e-13)
    assert [slope.seen[v].item() for v in range(50)] == pytest.approx(w[:-1], abs=1e-13)


@pytest.mark.parametrize("delay", LAWS)
def test_steps_of_one_size_lead_as_far_away_as_a_gradient_is_stale(delay: str) -> None:
    step = 0.125  # a power of two: no rounding
    watch = Watch(Slope(0.0, lambda job: 1.0))
    run = simulation(
        4, updates=300, delay=delay, optimizer=SGD(lr=step), gradients=watch, start=64.0
    )

    run.run()

    rows = columns(run)
    before = 64.0 - step * np.arange(300)  # the parameters that each push met
    gap = torch.cat(watch.points).numpy() - before
    np.testing.assert_array_equal(gap, step * rows["staleness"])
    assert rows["staleness"].max() >= 3


def test_adagrad_adds_up_the_same_squares_in_any_order() -> None:
    def whole(job: Job) -> Tensor:
        return torch.tensor([job.worker + 1.0, (job.clock * 7 + job.worker * 3) % 11], dtype=DOUBLE)

    runs = []
    for delay in ("exponential", "lognormal"):
        run = simulation(
            4,
            updates=200,
            rule="ssp:bound=0",  # as many gradients of each worker, in any order within a clock
            delay=delay,
            optimizer=AdaGrad(lr=0.5),
            gradients=Slope(0.0, whole),
            start=torch.ones(2, dtype=DOUBLE),
        )
        run.run()
        runs.append(run)

    one, other = (run.shard.rule.state_dict()["state"][0]["sum"] for run in runs)
    expected = 50 * sum(worker**2 for worker in (1, 2, 3, 4))
    assert one[0].item() == expected  # whole numbers: no rounding
    assert torch.equal(one, other)
    assert not torch.equal(params(runs[0]), params(runs[1]))


@pytest.mark.parametrize("delay", LAWS)
@pytest.mark.parametrize("rule", ["asp", "ssp:bound=3"])
def test_workers_of_disjoint_parts_are_sequential_to_the_bit(rule: str, delay: str) -> None:
    curvature = torch.tensor([0.3, 0.9, 1.4], dtype=DOUBLE)

    def part(worker: int) -> slice:
        return slice(3 * worker, 3 * worker + 3)

    def own(job: Job) -> Tensor:
        grad = torch.zeros(12, dtype=DOUBLE)
        grad[part(job.worker)] = curvature * job.params[part(job.worker)] + noise(job)
        return grad

    run = simulation(
        4,
        updates=300,
        rule=rule,
        delay=delay,
        optimizer=SGD(lr=0.2),
        gradients=Slope(0.0, own),
        start=torch.ones(12, dtype=DOUBLE),
    )

    run.run()

    pushes = np.bincount(columns(run)["worker"])
    assert columns(run)["staleness"].max() > 0
    for worker in range(4):
        w = torch.ones(3, dtype=DOUBLE)
        for clock in range(pushes[worker]):
            w.add_(curvature * w + TABLE[worker, clock], alpha=-0.2)
        assert torch.equal(params(run)[part(worker)], w)


# ---------------------------------------------------------------- the same again


CHANGES = tuple(map(Change.parse, ("crash:1@4", "join:1@6.5", "leave:2@9", "join:3@2")))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_run_made_again_is_the_same_to_the_bit(rule: str) -> None:
    options: dict[str, Any] = {
        "service": "exponential:mean=0.1",
        "one_way_s": 0.05,
        "changes": CHANGES,
    }

    check_same(*(noisy_run(rule, "exponential", 40, **options) for _ in range(2)))


def test_another_seed_is_another_run() -> None:
    one, other = noisy_run("asp", "exponential"), noisy_run("asp", "exponential", seed=1)

    assert not np.array_equal(columns(one)["end"], columns(other)["end"])


def test_a_run_in_pieces_is_the_same_to_the_bit() -> None:
    whole = noisy_run("ssp:bound=1", "exponential", service="exponential:mean=0.1")
    pieces = simulation(
        4,
        updates=150,
        rule="ssp:bound=1",
        service="exponential:mean=0.1",
        optimizer=SGD(lr=0.1),
        gradients=Slope(0.7, noise),
    )

    until = 0.0
    while pieces.run(until, num_events=3):
        if pieces.now == until:
            until += 1.7

    check_same(whole, pieces)


def test_a_run_goes_on_to_the_second_it_is_told_and_no_further() -> None:
    run = simulation(2, updates=100, delay="constant")

    assert run.run(until=3.0)
    assert (run.now, run.sequencer.version) == (3.0, 6)
    assert run.run(until=3.5)
    assert (run.now, run.sequencer.version) == (3.5, 6)
    assert run.run(until=10**9, num_events=5)
    assert (run.now, run.sequencer.version) == (6.0, 11)
    assert not run.run()
    assert (run.now, run.sequencer.ended) == (50.0, "100 updates")
    assert not run.run()


def batches_read(delay: str, batched: bool = False) -> dict[tuple[int, int], list[int]]:
    """Return the samples of every batch of a run, by worker and clock."""
    learning = Learning(
        Quadratic(dim=4, num_points=100).build(), num_workers=4, batch_size=7, seed=5
    )
    read: dict[tuple[int, int], list[int]] = {}

    class Recorded(Samples):
        def _indices(self, worker: int, number: int, version: int, samples: int) -> Tensor:
            indices = super()._indices(worker, number, version, samples)
            assert read.setdefault((worker, number), indices.tolist()) == indices.tolist()
            return indices

    samples = Recorded(learning.task, learning.data.train, 7, 4, seed=5)
    run = learning.simulation(
        learning.gradients(batched, samples=samples),
        updates=100,
        delay=delay,
        changes=[Change(3.0, 1, "crash"), Change(6.0, 1, "join")],
    )
    run.run()
    return read


def test_batches_depend_on_worker_and_clock_alone() -> None:
    runs = [batches_read(delay) for delay in ("exponential", HEAVY_TAIL)]
    runs.append(batches_read("exponential", batched=True))

    for read in runs:
        of_worker = [Batches(100, 7, seed=5, worker=w, num_workers=4) for w in range(4)]
        for (worker, clock), indices in read.items():
            assert indices == of_worker[worker].indices(clock).tolist()
    assert runs[0].keys() != runs[1].keys()
    assert runs[0].keys() <= runs[2].keys()  # what is in flight at the end was computed as well


# ---------------------------------------------------------------- batched gradients


def trained(
    learning: Learning, batched: bool, clip: Clip | None = None, **options: Any
) -> Simulation:
    run = learning.simulation(learning.gradients(batched, clip=clip), **options)
    run.run()
    return run


LEARNINGS: dict[str, Callable[[], Learning]] = {
    "digits": lambda: Learning(digits(), batch_size=20),
    "quadratic": lambda: Learning(Quadratic(dim=40, condition=30.0).build(), batch_size=9),
    **{
        name: lambda make=make: Learning(Small(lambda: make().double()).task)  # type: ignore[misc]
        for name, make in small_tasks.MODELS.items()
        if name in ("mlp", "conv", "tied", "LSTM")
    },
}


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        *((name, None) for name in LEARNINGS),
        *((name, ClipNorm(max_norm=0.05)) for name in ("digits", "quadratic", "tied")),
        ("conv", ClipValue(low=-0.01, high=0.02)),
    ],
)
def test_gradients_computed_together_are_those_computed_one_by_one(
    name: str, clip: Clip | None
) -> None:
    learning = LEARNINGS[name]()
    tolerance = 1e-5 if learning.layout.dtype == torch.float32 else 1e-12

    alone, together = (trained(learning, batched, clip) for batched in (False, True))

    far = torch.dist(params(alone), learning.start())
    assert far > 1e-3
    torch.testing.assert_close(params(together), params(alone), rtol=0, atol=tolerance)
    one, other = columns(alone), columns(together)
    for column in ("loss", "grad_norm"):
        np.testing.assert_allclose(other.pop(column), one.pop(column), rtol=tolerance)
    np.testing.assert_equal(other, one)


def test_a_worker_clips_to_the_norm_and_records_what_it_was() -> None:
    learning = Learning(digits(), lr=1.0, updates=1)

    run = trained(learning, batched=True, clip=ClipNorm(max_norm=0.05))

    assert torch.dist(params(run), learning.start()).item() == pytest.approx(0.05, rel=1e-5)
    free = trained(learning, batched=True)
    norm = columns(free)["grad_norm"][0]
    assert torch.dist(params(free), learning.start()).item() == pytest.approx(norm, rel=1e-5)
    assert columns(run)["grad_norm"][0] == norm > 0.05


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["digits", "quadratic", "dropout"])
def test_a_task_trained_again_has_the_same_bits(name: str, batched: bool) -> None:
    def run() -> Simulation:
        learning = LEARNINGS[name]() if name != "dropout" else dropping_out()
        torch.rand(1)  # whatever the process's own random state is
        return trained(learning, batched, changes=CHANGES, updates=40)

    check_same(run(), run())


def dropping_out() -> Learning:
    return Learning(Small(lambda: small_tasks.dropout().double()).task)


def test_jobs_computed_together_drop_out_each_for_itself() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        dropped: Tensor = nn.functional.dropout(torch.ones(64, dtype=DOUBLE), 0.5)
        kept: Tensor = (dropped * WEIGHTS).sum() + 0 * model(batch[0]).sum()
        return kept

    learning = Learning(task_of(loss), batch_size=1, updates=8)

    together = columns(trained(learning, batched=True))["loss"]

    assert len(set(together.tolist())) == 8
    assert together.min() >= 0
    assert together.max() <= 2 * WEIGHTS.sum()


WEIGHTS = torch.arange(64, dtype=DOUBLE)


def task_of(
    loss: Callable[[Any, Batch], Tensor],
    model: Callable[[], nn.Module] = lambda: nn.Linear(1, 1).double(),
    inputs: Tensor | None = None,
) -> Task:
    """Return a task with this loss on forty samples."""
    rows = torch.linspace(0.5, 1, 40, dtype=DOUBLE) if inputs is None else inputs
    data = Data(TensorExamples(rows[:, None]), TensorExamples(rows[:, None]))
    return Task(name="made up", model=model, data=lambda: data, loss=loss, headline="loss")


@pytest.mark.parametrize("batched", [False, True])
def test_a_loss_in_another_precision_gives_gradients_in_the_models(batched: bool) -> None:
    learning = Learning(task_of(lambda model, batch: model(batch[0]).float().square().mean()))

    run = trained(learning, batched)

    assert params(run).dtype == DOUBLE
    assert columns(run)["loss"][-1] < columns(run)["loss"][0]


def test_a_loss_that_looks_at_numbers_cannot_be_computed_together() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(batch[0]).square().mean()
        return value if value.item() > 1 else 2 * value

    learning = Learning(task_of(loss))
    trained(learning, batched=False)

    with pytest.raises(
        TaskError,
        match=r"^the loss of task 'made up' over many jobs at once \(leave batched out\) failed: ",
    ) as caught:
        trained(learning, batched=True)

    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("batched", [False, True])
def test_whatever_a_loss_raises_is_an_error_of_the_task(batched: bool) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise KeyError("no such column")

    with pytest.raises(TaskError, match=r"^the loss of task 'made up'.* failed.*no such column"):
        trained(Learning(task_of(loss)), batched)


class TwoParts(nn.Module):
    """Parameters of which the second has an infinite slope where its input is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(3, dtype=DOUBLE))
        self.second = nn.Parameter(torch.ones(2, dtype=DOUBLE))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("loss", "layer"),
    [
        (lambda m, batch: m.first.sum() + (m.second * batch[0]).sqrt().sum(), "second"),
        (lambda m, batch: (m.first.sum() * batch[0]).sqrt().sum() + m.second.sum(), "first"),
        (lambda m, batch: m.first.sum() + m.second.sum() - batch[0].log().sum(), "loss"),
    ],
)
def test_a_gradient_that_is_not_finite_is_named_as_its_worker_names_it(
    loss: Callable[[Any, Batch], Tensor], layer: str, batched: bool
) -> None:
    inputs = torch.ones(40, dtype=DOUBLE)
    inputs[17] = 0.0
    learning = Learning(task_of(loss, TwoParts, inputs), batch_size=1, lr=1e-3, seed=2)
    owner, step = next(
        (worker, clock)
        for worker in range(4)
        for clock in range(10)
        if 17 in Batches(40, 1, seed=2, worker=worker, num_workers=4).indices(clock)
    )

    with pytest.raises(NonFiniteGradientError) as caught:
        trained(learning, batched)

    assert (caught.value.worker, caught.value.clock, caught.value.layer) == (owner, step + 1, layer)


@pytest.mark.parametrize("batched", [False, True])
def test_a_finite_gradient_whose_square_is_not_has_its_norm(batched: bool) -> None:
    learning = Learning(
        task_of(lambda m, batch: 1e30 * m(batch[0].float()).sum(), lambda: nn.Linear(1, 1)),
        batch_size=1,
        updates=10,
        lr=1e-32,
    )

    run = trained(learning, batched)

    assert (columns(run)["grad_norm"] > 1e30).all()


def test_gradients_in_flight_are_computed_in_one_go() -> None:
    learning = Learning(digits(), num_workers=6, updates=30)
    sizes: list[int] = []

    class Counted(Samples):
        def batch(self, steps: Sequence[Step]) -> Batch:
            sizes.append(len(steps))
            return super().batch(steps)

    samples = Counted(learning.task, learning.data.train, learning.batch_size, 6, seed=0)
    run = learning.simulation(
        learning.gradients(batched=True, samples=samples),
        delay="constant",
        changes=[Change(1.5, 2, "crash")],
    )

    run.run()

    assert sizes == [6, 5, 5, 5, 5, 5]  # a push each; what has crashed is not computed


def test_gradients_that_do_not_fit_at_once_are_computed_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learning = Learning(digits(), num_workers=6)
    alone = trained(learning, batched=False)
    monkeypatch.setattr(jobs, "_BATCH_BYTES", 2 * learning.layout.num_bytes)

    in_pairs = trained(learning, batched=True)

    torch.testing.assert_close(params(in_pairs), params(alone), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- workers come and go


def changed(
    *changes: str, num_workers: int = 3, rule: str = "asp", updates: int = 60, **options: Any
) -> tuple[Simulation, Watch]:
    watch = Watch(Slope(0.7, noise))
    run = simulation(
        num_workers,
        updates=updates,
        rule=rule,
        changes=[Change.parse(text) for text in changes],
        gradients=watch,
        optimizer=SGD(lr=0.1),
        **options,
    )
    run.run()
    return run, watch


def rows_of(run: Simulation, worker: int) -> dict[str, list[Any]]:
    rows = columns(run)
    return {name: column[rows["worker"] == worker].tolist() for name, column in rows.items()}


def test_a_late_joiner_reads_what_there_is_then() -> None:
    run, _ = changed("join:2@5.5", delay="constant")

    rows = rows_of(run, 2)
    assert rows["start"][0] == 5.5
    assert rows["read_version"][0] == 10  # two workers, five updates each
    assert rows["seq"] == rows["clock"] == list(range(1, len(rows["seq"]) + 1))
    assert set(rows["incarnation"]) == {1}
    check_same(run, changed("join:2@5.5", delay="constant")[0])


def test_nobody_waits_for_one_who_has_not_joined() -> None:
    run, _ = changed("join:2@5.5", rule="bsp", delay="constant", updates=12)

    versions = columns(run)["version"].tolist()
    # Rounds of two, then of three; the joiner takes part in the sixth, which takes longer by that.
    assert [versions.count(v) for v in range(1, 13)] == [2] * 5 + [3] * 7
    assert update_times(run) == [1, 2, 3, 4, 5, *np.arange(6.5, 13).tolist()]


def update_times(run: Simulation) -> list[float]:
    """Return when the last gradient of each version arrived."""
    rows = columns(run)
    return [rows["end"][rows["version"] == v].max() for v in range(1, run.sequencer.version + 1)]


@pytest.mark.parametrize("rule", ["asp", "bsp", "ssp:bound=1", "k-of-n:k=3"])
def test_the_push_in_flight_of_a_leaver_is_its_last_and_is_applied(rule: str) -> None:
    run, watch = changed("leave:1@4.5", rule=rule, delay="constant", updates=24)

    rows = rows_of(run, 1)
    assert rows["end"] == [1, 2, 3, 4, 5]
    assert rows["dropped"] == [0] * 5
    assert not run.sequencer.is_live(1, 1)
    assert [job.worker for job in watch.abandoned] in ([], [1])  # at most what was granted to it
    assert run.sequencer.num_live == 2
    assert columns(run)["end"][-1] > 8


def test_a_leaver_that_waits_is_gone_at_once() -> None:
    run, watch = changed(
        "leave:0@1.5", rule="bsp", delay="constant:factors=1/2/2", updates=5
    )  # it has pushed at 1 and waits for the others until 2

    assert rows_of(run, 0)["end"] == [1]
    assert rows_of(run, 0)["dropped"] == [0]
    assert watch.abandoned == []
    assert update_times(run) == [2, 4, 6, 8, 10]


def test_the_push_of_a_crashed_worker_is_lost_and_bsp_goes_on() -> None:
    run, watch = changed("crash:1@4.5", rule="bsp", delay="constant", updates=8)

    assert rows_of(run, 1)["end"] == [1, 2, 3, 4]
    assert [job.worker for job in watch.abandoned] == [1]
    assert update_times(run) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [columns(run)["version"].tolist().count(v) for v in (4, 5)] == [3, 2]


def test_the_crash_of_the_last_one_missing_completes_the_update() -> None:
    run, _ = changed("crash:2@2.5", rule="bsp", delay="constant:factors=1/1/10", updates=3)

    # The others waited from 1 on; the update is made when the third crashes, and they read then.
    assert rows_of(run, 0)["start"] == [0, 2.5, 3.5]
    assert rows_of(run, 0)["read_version"] == [0, 1, 2]
    assert rows_of(run, 2)["end"] == []
    assert run.now == 4.5


def test_a_change_comes_before_a_push_at_the_same_second() -> None:
    run, _ = changed(
        "crash:2@1", "crash:1@2", "join:1@2", "leave:0@3", delay="constant", updates=14
    )

    assert rows_of(run, 2)["end"] == []
    assert rows_of(run, 1)["end"][:3] == [1, 3, 4]  # its second push is lost, it begins again
    assert rows_of(run, 1)["incarnation"][:3] == [1, 2, 2]
    assert rows_of(run, 0)["end"] == [1, 2, 3]


def test_a_crash_in_the_servers_queue_loses_the_push_and_a_new_life_begins() -> None:
    run, watch = changed(
        "crash:1@4.25",
        "join:1@4.5",
        num_workers=2,
        delay="constant",
        service="constant:time=1",
        updates=8,
    )

    # Both push at 1. The server serves 0 until 2 and 1 until 3; they push again at 3 and at 4. So 1
    # crashes in the queue, and the server still takes a second for what it has lost.
    rows = rows_of(run, 1)
    assert rows["end"][:3] == [3, 7, 9]
    assert rows["start"][:3] == [0, 4.5, 7]
    assert rows["incarnation"][:3] == [1, 2, 2]
    assert rows["seq"][:3] == [1, 1, 2]
    assert rows["clock"][:3] == [1, 2, 3]
    assert [(job.worker, job.incarnation) for job in watch.abandoned] == [(1, 1)]
    assert rows_of(run, 0)["end"][:3] == [2, 4, 6]


def test_changes_that_say_what_is_so_already_change_nothing() -> None:
    changes = ["crash:2@3", "crash:1@2", "join:1@2.5"]
    plain, _ = changed(*changes)
    run, _ = changed(*changes, "crash:2@4", "leave:2@5", "join:1@3")

    check_same(plain, run)


@pytest.mark.parametrize("what", ["leave", "crash"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_run_that_everybody_has_left_says_so(rule: str, what: str) -> None:
    changes = [Change(2.5 + worker, worker, what) for worker in range(4)]  # type: ignore[arg-type]
    run = simulation(4, updates=1000, rule=rule, delay="constant", changes=changes)

    for _ in range(2):  # the second time as well
        with pytest.raises(
            ParamServerError, match=r"^no worker is left after [567](\.5)? virtual seconds$"
        ):
            run.run()


def test_a_run_that_everybody_has_left_goes_on_with_a_joiner() -> None:
    run, _ = changed("crash:0@2.5", "crash:1@2.5", "join:0@7", num_workers=2, delay="constant")

    assert rows_of(run, 0)["end"][2] == 8
    assert len(rows_of(run, 1)["end"]) == 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ALL_RULES)
def test_whoever_comes_and_goes_every_push_is_accounted_for(rule: str, seed: int) -> None:
    chance = np.random.default_rng([seed, ALL_RULES.index(rule)])
    changes = [
        Change(at, worker, what)
        for at, worker, what in zip(
            np.cumsum(chance.exponential(1.0, 25)).tolist(),
            chance.integers(6, size=25).tolist(),
            chance.choice(["join", "join", "leave", "crash"], size=25).tolist(),
            strict=True,
        )
    ]
    watch = Watch(Slope(0.7, noise))
    run = simulation(
        6,
        updates=80,
        rule=rule,
        service="exponential:mean=0.05",
        one_way_s=0.1,
        seed=seed,
        changes=[*changes, Change(30.0, 0, "join")],
        optimizer=SGD(lr=0.2),
        gradients=watch,
    )

    run.run()

    rows = columns(run)
    assert recount(rows, gathers=run.sequencer.rule.gathers) == []
    assert run.sequencer.conservation.holds
    assert params(run).item() == pytest.approx(replay(rows, 80)[-1], abs=1e-13)
    for worker in range(6):
        mine = rows_of(run, worker)
        assert mine["clock"] == list(range(1, len(mine["clock"]) + 1))
        lives = np.array(mine["incarnation"], int)
        assert (np.diff(lives) >= 0).all()
        for life in set(lives.tolist()):
            seqs = np.array(mine["seq"])[lives == life]
            assert seqs.tolist() == list(range(1, len(seqs) + 1))


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("crash:2@7.5", Change(7.5, 2, "crash")),
        (" join:0@0 ", Change(0.0, 0, "join")),
        ("leave:13@1e3", Change(1000.0, 13, "leave")),
    ],
)
def test_a_change_reads_what_it_writes(text: str, change: Change) -> None:
    assert Change.parse(text) == change
    assert Change.parse(str(change)) == change


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("crash:2", r"^a change must be like crash:2@7\.5, got 'crash:2'"),
        ("crash:2@soon", r"^a change must be like crash:2@7\.5, got 'crash:2@soon'"),
        ("crash:-1@3", r"^a change must be like crash:2@7\.5"),
        ("fall:2@3", r"^a change must be join or leave or crash, got 'fall'"),
        ("crash:2@-3", r"^a change must be at 0 s or later, got -3"),
        ("crash:2@inf", r"^a change must be at 0 s or later, got inf"),
        ("crash:2@nan", r"^a change must be at 0 s or later, got nan"),
    ],
)
def test_a_change_that_cannot_be_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Change.parse(text)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("rule", ALL_RULES)
def test_memory_is_that_of_the_versions_somebody_reads(rule: str) -> None:
    buffers = Buffers(18, 1, DOUBLE)

    _, watch = changed(num_workers=16, rule=rule, updates=60, buffers=buffers)

    assert buffers.num_made <= watch.most_versions + 2


def test_workers_in_lock_step_need_one_buffer_however_many_they_are() -> None:
    buffers = Buffers(17, 1, DOUBLE)

    _, watch = changed(num_workers=15, rule="bsp", updates=20, buffers=buffers)

    assert watch.most_versions == 1
    assert buffers.num_made == 1
