"""The oracles are plain SGD, loops in numpy, and sequential SGD where the curvature is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_sgd.compensation import ADAG, COMPENSATIONS, DCASGD, FASGD, AdaptiveDCASGD, GapAware
from paramserver.compensation import (
    Compensation,
    Compensator,
    check_compensation,
    without_compensation,
)
from paramserver.errors import CheckpointError, PluginError
from paramserver.messages import Kind
from paramserver.optimizers import SGD, Momentum, Optimizer
from paramserver.reshard import OptimizerState, scatter_state
from paramserver.schedules import Exponential
from tests.support.clusters import MemoryCluster, split
from tests.support.fleet import Fleet

NUMEL, WORKERS = 192, 4
NAMES = [entry.name for entry in COMPENSATIONS]
LR, GAMMA = 0.1, 0.99
CURVATURE = torch.linspace(0.02, 0.6, NUMEL, dtype=torch.float64)

Array = NDArray[np.float64]


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (NUMEL,)), generator=generator, dtype=torch.float64)


def gradient(read: Tensor, seed: int) -> Tensor:
    """Return a noisy gradient of a quadratic around 1."""
    return CURVATURE.to(read.dtype) * (read - 1) + 0.2 * noise(seed).to(read.dtype)


def arrivals(num: int, workers: int = WORKERS) -> list[int]:
    """Return whose pushes arrive, in order."""
    rng = random.Random(0)
    return [rng.randrange(workers) for _ in range(num)]


def fleet_of(
    compensation: Compensation | None,
    params: Tensor | None = None,
    *,
    shards: int = 1,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Fleet:
    params = torch.zeros(NUMEL) if params is None else params
    cuts = None if shards == 1 else split(len(params), shards)
    options = {"workers": WORKERS, "compensation": compensation, "cuts": cuts, **options}
    return Fleet(optimizer or SGD(lr=LR), params, gradient, **options)


@pytest.mark.parametrize("compensation", [DCASGD(strength=0), AdaptiveDCASGD(strength=0)])
def test_without_strength_it_is_plain_asgd_bit_for_bit(compensation: Compensation) -> None:
    order = arrivals(200)

    assert torch.equal(fleet_of(compensation).train(order), fleet_of(None).train(order))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"fasgd"}))
@pytest.mark.parametrize("optimizer", [SGD(lr=LR), Momentum(lr=0.01)])
def test_a_worker_alone_is_plain_sgd_bit_for_bit(name: str, optimizer: Optimizer) -> None:
    order, keys = [0] * 100, {"workers": 1, "optimizer": optimizer}

    compensated = fleet_of(COMPENSATIONS.parse(name), **keys).train(order)

    assert torch.equal(compensated, fleet_of(None, **keys).train(order))


@pytest.mark.parametrize("name", NAMES)
def test_several_workers_are_corrected(name: str) -> None:
    order = arrivals(20)

    assert not torch.equal(
        fleet_of(COMPENSATIONS.parse(name)).train(order), fleet_of(None).train(order)
    )


class ExactCurvature:
    """Adds H (w - r), H the Hessian of the very batch the worker's gradient is of."""

    def __init__(self) -> None:
        self.hessians: dict[int, Tensor] = {}
        self.staleness: list[int] = []

    def build(self, params: Tensor) -> Compensator:
        return self

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: float
    ) -> None:
        grad.add_(self.hessians[worker] @ (params - read))
        self.staleness.append(staleness)

    def on_update(self, params: Tensor) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def test_with_the_exact_hessian_it_is_sequential_sgd_in_order_of_arrival() -> None:
    roots, centres = noise(0, 20, 8, 8), noise(1, 20, 8)
    hessians = roots @ roots.mT / 8
    rng, exact = random.Random(2), ExactCurvature()
    fleet = fleet_of(exact, torch.zeros(8, dtype=torch.float64), workers=6)
    sequential, worst = torch.zeros(8, dtype=torch.float64), 0.0
    batches = {worker: rng.randrange(20) for worker in range(6)}

    for _ in range(500):
        worker = rng.randrange(6)
        batch = batches[worker]
        exact.hessians[worker] = hessians[batch]
        fleet.push(worker, hessians[batch] @ (fleet.seen[worker] - centres[batch]))
        batches[worker] = rng.randrange(20)
        sequential -= LR * hessians[batch] @ (sequential - centres[batch])
        worst = max(worst, float((fleet.params - sequential).abs().max()))

    assert worst < 1e-12
    in_flight = sum(fleet.version - version for version in fleet.read_versions.values())
    assert sum(exact.staleness) == 500 * 5 - in_flight  # staleness is conserved
    assert max(exact.staleness) > 10


def by_dc_asgd() -> Iterator[Array]:
    g, d, _, _ = yield np.empty(0)
    while True:
        g, d, _, _ = yield g + 0.04 * g * g * d


def by_adaptive_dc_asgd() -> Iterator[Array]:
    g, d, _, _ = yield np.empty(0)
    m = np.zeros_like(g)
    while True:
        m = 0.95 * m + 0.05 * g**2
        g, d, _, _ = yield g + 2 / np.sqrt(m + 1e-7) * g * g * d


def by_adag() -> Iterator[Array]:
    g, d, _, lr = yield np.empty(0)
    while True:
        g, d, _, lr = yield g / (d**2 / lr + 1)


def by_fasgd() -> Iterator[Array]:
    g, _, tau, _ = yield np.empty(0)
    m = np.zeros_like(g)
    while True:
        m = m * 0.9 + np.abs(g) * 0.1
        g, _, tau, _ = yield g * (1 / (tau + 1)) * (1 / (m + 0.001))


def by_gap() -> Iterator[Array]:
    g, d, tau, lr = yield np.empty(0)
    squares: list[Array] = []
    while True:
        if tau > 0:
            weights = 0.999 ** np.arange(len(squares) - 1, -1, -1)
            c = np.sqrt(np.average(squares, axis=0, weights=weights))
            g = g / (np.abs(d) / (c + 1e-8) + 1)
        squares.append((lr * g) ** 2)
        g, d, tau, lr = yield g


LOOPS: dict[str, Callable[[], Any]] = {
    "dc-asgd": by_dc_asgd,
    "dc-asgd-adaptive": by_adaptive_dc_asgd,
    "gap-aware": by_gap,
    "adag": by_adag,
    "fasgd": by_fasgd,
}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_formula_in_a_plain_loop(name: str) -> None:
    order, loop = arrivals(150), LOOPS[name]()
    w = np.zeros(NUMEL)
    reads = dict.fromkeys(range(WORKERS), (w, 0))
    next(loop)
    for version, worker in enumerate(order):
        read, at = reads[worker]
        g = gradient(torch.from_numpy(read), version).numpy()
        lr = LR * GAMMA**version
        w = w - lr * loop.send((g, w - read, version - at, lr))
        reads[worker] = (w, version + 1)

    fleet = fleet_of(
        COMPENSATIONS.parse(name),
        torch.zeros(NUMEL, dtype=torch.float64),
        schedule=Exponential(gamma=GAMMA),
    )
    params = fleet.train(order)

    np.testing.assert_allclose(params.numpy(), w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("staleness", [0, 1, 7, 50])
@pytest.mark.parametrize("num_updates", [50, 3000])
def test_at_constant_velocity_a_gradient_is_divided_by_its_staleness_plus_one(
    staleness: int, num_updates: int
) -> None:
    velocity, start = noise(0), noise(1)
    compensator = GapAware(eps=1e-100).build(start)
    for k in range(1, num_updates + 1):
        compensator.on_update(start + k * velocity)
    grad = noise(2)
    now, read = (start + (num_updates - age) * velocity for age in (0, staleness))

    compensator.correct_(grad, now, read, worker=0, staleness=staleness, lr=LR)

    torch.testing.assert_close(grad, noise(2) / (staleness + 1), rtol=1e-10, atol=0)


def test_a_gap_is_counted_in_the_usual_update_of_each_element_alone() -> None:
    compensator = GapAware().build(torch.zeros(2))
    compensator.on_update(torch.tensor([1.0, 100.0]))
    grad = torch.ones(2)

    compensator.correct_(
        grad, torch.tensor([3.0, 100.0]), torch.zeros(2), worker=0, staleness=1, lr=LR
    )

    torch.testing.assert_close(grad, torch.tensor([1 / 4, 1 / 2]))


def test_a_gap_is_left_alone_before_the_first_update_that_it_could_be_counted_in() -> None:
    compensator, grad = GapAware().build(torch.ones(1)), torch.ones(1)

    compensator.correct_(grad, torch.ones(1), torch.zeros(1), worker=0, staleness=2, lr=LR)

    assert grad == 1


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_shards_gives_the_same_bits(name: str) -> None:
    order = arrivals(200)

    cut = fleet_of(COMPENSATIONS.parse(name), shards=3).train(order)

    assert torch.equal(cut, fleet_of(COMPENSATIONS.parse(name)).train(order))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_run_goes_on_bit_for_bit_on_any_number_of_shards(
    name: str, before: int, after: int
) -> None:
    compensation, order = COMPENSATIONS.parse(name), arrivals(60)
    whole = fleet_of(compensation, shards=before)
    whole.train(order[:30])
    for worker in range(WORKERS):  # as workers do that join the resumed run
        whole.read(worker)
    state, params = whole.saved(), whole.params
    whole.train(order[30:], seed=30)

    resumed = fleet_of(compensation, params, shards=after, version=30, state=state)
    resumed.train(order[30:], seed=30)

    assert torch.equal(resumed.params, whole.params)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_does_not_move(name: str) -> None:
    fleet = fleet_of(COMPENSATIONS.parse(name))
    fleet.train(arrivals(5))
    state = fleet.saved()
    before = {key: tensor.clone() for key, tensor in state.tensors.items()}

    fleet.train(arrivals(5))

    torch.testing.assert_close(state.tensors, before, rtol=0, atol=0)


def saved_by(name: str | None) -> OptimizerState:
    fleet = fleet_of(None if name is None else COMPENSATIONS.parse(name))
    fleet.train(arrivals(3))
    return fleet.saved()


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_run_goes_on_with_the_compensation_it_had(name: str | None) -> None:
    compensation = None if name is None else COMPENSATIONS.parse(name)

    check_compensation(saved_by(name), torch.zeros(NUMEL), compensation)
    check_compensation(None, torch.zeros(NUMEL), compensation)


@pytest.mark.parametrize(("had", "has"), [("dc-asgd", "adag"), ("adag", None), (None, "dc-asgd")])
def test_a_compensation_that_keeps_nothing_can_change(had: str | None, has: str | None) -> None:
    compensation = None if has is None else COMPENSATIONS.parse(has)

    check_compensation(saved_by(had), torch.zeros(NUMEL), compensation)


@pytest.mark.parametrize(
    ("had", "has", "message"),
    [
        ("fasgd", None, "^the run had a compensation that keeps magnitude: resume with it"),
        (None, "fasgd", "^the saved compensation keeps nothing, and this one magnitude: resume"),
        ("dc-asgd", "gap-aware", "^the saved compensation keeps nothing, and this one mean_square"),
        ("gap-aware", "dc-asgd", "^the saved compensation keeps mean_square, updates, and this"),
    ],
)
def test_another_compensation_is_refused_before_anything_starts(
    had: str | None, has: str | None, message: str
) -> None:
    compensation = None if has is None else COMPENSATIONS.parse(has)

    with pytest.raises(CheckpointError, match=message):
        check_compensation(saved_by(had), torch.zeros(NUMEL), compensation)


def test_a_state_of_another_size_is_refused_and_changes_nothing() -> None:
    compensator = FASGD().build(torch.zeros(NUMEL))

    with pytest.raises(CheckpointError, match=r"^the saved magnitude is \(64,\) torch.float32"):
        compensator.load_state_dict({"magnitude": torch.ones(64)})

    assert not compensator.state_dict()["magnitude"].any()


def test_the_state_is_the_compensators_alone() -> None:
    state = scatter_state(saved_by("gap-aware"), range(NUMEL))

    rule, compensation = without_compensation(state)

    assert rule["state"] == {}
    assert compensation.keys() == {"mean_square", "updates"}
    assert compensation["updates"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_padding_stays_0(name: str) -> None:
    compensator, padding = COMPENSATIONS.parse(name).build(torch.zeros(64)), torch.zeros(64)
    compensator.on_update(torch.zeros(64))

    compensator.correct_(padding, torch.zeros(64), torch.zeros(64), worker=0, staleness=3, lr=LR)

    assert torch.equal(padding, torch.zeros(64))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_not_changed(name: str) -> None:
    compensator = COMPENSATIONS.parse(name).build(torch.zeros(NUMEL))
    compensator.on_update(torch.ones(NUMEL))
    params, read = noise(0).float(), noise(1).float()

    compensator.correct_(noise(2).float(), params, read, worker=0, staleness=1, lr=LR)

    assert torch.equal(params, noise(0).float())
    assert torch.equal(read, noise(1).float())


@pytest.mark.parametrize("name", NAMES)
def test_16_bit_parameters_are_corrected_as_wider_ones_are(name: str) -> None:
    values = [noise(seed).bfloat16() for seed in range(4)]

    def corrected(dtype: torch.dtype) -> Tensor:
        grad, params, read, start = (value.to(dtype) for value in values)
        compensator = COMPENSATIONS.parse(name).build(start)
        compensator.on_update(params)
        compensator.correct_(grad.clone(), params, params, worker=0, staleness=0, lr=LR)
        grad = grad.clone()
        compensator.correct_(grad, params, read, worker=1, staleness=1, lr=LR)
        return grad

    torch.testing.assert_close(
        corrected(torch.bfloat16).double(), corrected(torch.float64), rtol=0.02, atol=0.02
    )


def test_a_slow_mean_of_16_bit_gradients_does_not_stand_still() -> None:
    compensator, params = FASGD(decay=0.999).build(torch.zeros(1).half()), torch.zeros(1).half()

    for _ in range(3000):
        compensator.correct_(torch.ones(1).half(), params, params, worker=0, staleness=0, lr=LR)

    magnitude = float(compensator.state_dict()["magnitude"])
    assert magnitude == pytest.approx(1 - 0.999**3000, rel=1e-3)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_push_that_is_sent_twice_is_corrected_once(shards: int) -> None:
    def trained(repeat: bool) -> Tensor:
        with MemoryCluster(torch.zeros(NUMEL), shards=shards, compensation=FASGD()) as cluster:
            cluster.network.repeat = lambda message: repeat and message.kind == Kind.PUSH
            clients = [cluster.join(worker) for worker in range(2)]
            for client in clients:
                client.first_read()
            for step, worker in enumerate([0, 0, 1, 0, 1, 1]):
                client = clients[worker]
                for cut, slot in zip(cluster.cuts, client.slots, strict=True):
                    slot.copy_(noise(step)[cut.start : cut.stop])
                client.push()
                client.retry()
            return cluster.params()

    assert torch.equal(trained(repeat=True), trained(repeat=False))
    assert trained(repeat=True).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_compensation_is_rebuilt_from_what_a_record_stores(name: str) -> None:
    compensation = COMPENSATIONS.parse(name)

    assert COMPENSATIONS.build(COMPENSATIONS.describe(compensation)) == compensation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dc-asgd:strength=-1", "strength must be 0 or more"),
        ("dc-asgd:strength=inf", "strength must be 0 or more"),
        ("dc-asgd-adaptive:strength=nan", "strength must be 0 or more"),
        ("dc-asgd-adaptive:decay=1", "decay must be 0 or more and below 1"),
        ("dc-asgd-adaptive:eps=0", "eps must be above 0"),
        ("gap-aware:decay=1.5", "decay must be 0 or more and below 1"),
        ("gap-aware:eps=-1e-8", "eps must be above 0"),
        ("adag:lr=0.1", "has no key 'lr'"),
        ("fasgd:decay=-0.1", "decay must be 0 or more and below 1"),
        ("fasgd:eps=inf", "eps must be above 0"),
    ],
)
def test_a_bad_setting_is_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        COMPENSATIONS.parse(text)


@pytest.mark.parametrize(
    "compensation", [AdaptiveDCASGD(eps=1e-50), GapAware(eps=1e-50), FASGD(eps=1e-50)]
)
def test_an_epsilon_that_is_lost_in_the_parameters_dtype_is_refused(
    compensation: Compensation,
) -> None:
    with pytest.raises(ValueError, match=r"^eps must be 1.2e-38 or more for float32"):
        compensation.build(torch.zeros(64))


def test_adag_follows_the_schedule() -> None:
    early, late = torch.ones(1), torch.ones(1)
    compensator = ADAG().build(torch.zeros(1))

    compensator.correct_(early, torch.ones(1), torch.zeros(1), worker=0, staleness=1, lr=1.0)
    compensator.correct_(late, torch.ones(1), torch.zeros(1), worker=0, staleness=1, lr=0.1)

    torch.testing.assert_close(torch.cat([early, late]), torch.tensor([1 / 2, 1 / 11]))
