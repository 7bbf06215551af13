"""The worker's loop over real shards in one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from paramserver.client import Client
from paramserver.clipping import Clip, ClipNorm, ClipValue
from paramserver.errors import NonFiniteGradientError, TaskError
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS, SGD, Optimizer
from paramserver.sequencer import Budget
from tests.support.clusters import MemoryCluster
from workers.batches import Batches, step_seed
from workers.estimate import GradientMode
from workers.loop import Finished, train
from workers.task import Batch, Data, Task, TensorExamples, build_data, build_model

SEED, STEPS = 3, 6


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 12, generator=generator)
    examples = TensorExamples(inputs, inputs[:, :3].argmax(1))
    return Data(examples, examples)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def mlp() -> nn.Module:
    # Sizes are multiples of 64: in the rest of a tensor beyond its last full vector register the
    # fused kernels round otherwise (Nesterov differs in the last bit), and the server pads.
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64))


TASK = Task(name="small", model=mlp, data=data, loss=cross_entropy, headline="loss", batch_size=8)


class Training:
    """One worker's training, and how to make it."""

    def __init__(self, task: Task, optimizer: Optimizer, *, shards: int = 1, updates: int = STEPS):
        self.task = task
        self.model = build_model(task, SEED)
        self.layout = Layout.of(self.model)
        start = self.layout.flatten(self.model)
        budget = Budget(updates=updates)
        self.cluster = MemoryCluster(start, shards=shards, optimizer=optimizer, budget=budget)

    def run(
        self,
        *,
        incarnation: int = 1,
        clip: Clip | None = None,
        gradient: GradientMode = "reverse",
    ) -> Finished:
        client: Client
        with self.cluster.join(0, incarnation) as client:
            return train(
                self.task, self.model, self.layout, self.cluster.cuts, client,
                build_data(self.task).train, batches(self.task), seed=SEED, clip=clip,
                gradient=gradient,
            )  # fmt: skip


def batches(task: Task) -> Batches:
    return Batches(40, task.batch_size, seed=SEED, worker=0, num_workers=1)


def plain(task: Task, optimizer: Optimizer, clip_norm: float | None = None) -> Tensor:
    """Train in the ordinary way, with one optimizer over ordinary parameters."""
    model = build_model(task, SEED).train()
    rule = optimizer.build(list(model.parameters()))
    examples = build_data(task).train
    for clock in range(STEPS):
        torch.manual_seed(step_seed(SEED, 0, clock))
        task.loss(model, examples.batch(batches(task).indices(clock))).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        rule.apply([p.grad for p in model.parameters() if p.grad is not None])
    return Layout.of(model).flatten(model)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw", "rmsprop"),
        *("local-momentum", "dana-slim", "delayed-nesterov:every=2"),
    ],
)
def test_one_worker_is_ordinary_training_bit_for_bit(name: str, shards: int) -> None:
    optimizer = OPTIMIZERS.parse(name)
    training = Training(TASK, optimizer, shards=shards)

    finished = training.run()

    assert finished == Finished(f"{STEPS} updates", STEPS)
    assert torch.equal(training.cluster.params(), plain(TASK, optimizer))
    assert training.cluster.column("staleness") == [0] * STEPS
    assert training.cluster.column("samples") == [8] * STEPS


def test_a_worker_that_takes_over_goes_on_bit_for_bit() -> None:
    class KilledError(Exception):
        pass

    def dying_loss(model: nn.Module, batch: Batch) -> Tensor:
        if training.cluster.sequencer.version == 2 and not died:
            died.append(True)
            raise KilledError("out of memory")
        return cross_entropy(model, batch)

    died: list[bool] = []
    task = Task(name="small", model=mlp, data=data, loss=dying_loss, headline="loss", batch_size=8)
    training = Training(task, SGD(lr=0.1))
    with pytest.raises(
        TaskError, match="the loss of task 'small' failed: KilledError: out of memory"
    ):
        training.run(incarnation=1)
    training.model = build_model(task, SEED)

    finished = training.run(incarnation=2)

    assert finished.clock == STEPS
    assert torch.equal(training.cluster.params(), plain(TASK, SGD(lr=0.1)))


def test_gradients_are_clipped_as_torch_does() -> None:
    training = Training(TASK, SGD(lr=0.5), shards=3)

    training.run(clip=ClipNorm(max_norm=0.1))

    torch.testing.assert_close(training.cluster.params(), plain(TASK, SGD(lr=0.5), clip_norm=0.1))


def test_no_element_of_a_step_is_longer_than_a_value_clip_allows() -> None:
    training = Training(TASK, SGD(lr=1.0), updates=1)
    before = training.cluster.params().clone()

    training.run(clip=ClipValue(low=-0.01, high=0.01))

    assert (training.cluster.params() - before).abs().max() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("factor", "layer"), [(math.nan, "0.weight"), (math.inf, "0.weight")], ids=["nan", "inf"]
)
def test_a_gradient_that_is_not_finite_names_its_layer(factor: float, layer: str) -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * factor

    task = Task(name="small", model=mlp, data=data, loss=broken, headline="loss")
    training = Training(task, SGD(lr=0.1))
    before = training.cluster.params().clone()

    with pytest.raises(NonFiniteGradientError, match=f"worker 0 at clock 1: .*'{layer}'"):
        training.run()

    assert torch.equal(training.cluster.params(), before)


def test_a_loss_that_is_not_finite_is_named_though_the_gradient_is() -> None:
    def shifted(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) + math.inf

    task = Task(name="small", model=mlp, data=data, loss=shifted, headline="loss")

    with pytest.raises(NonFiniteGradientError, match="'loss' is not finite"):
        Training(task, SGD(lr=0.1)).run()


@pytest.mark.parametrize("shards", [1, 3])
def test_forward_mode_trains_as_reverse_mode_does(shards: int) -> None:
    training = Training(TASK, SGD(lr=0.1), shards=shards)

    training.run(gradient="forward")

    expected = plain(TASK, SGD(lr=0.1))
    torch.testing.assert_close(training.cluster.params(), expected, rtol=1e-4, atol=1e-5)


def test_random_forward_gradients_are_the_same_when_a_run_is_made_again() -> None:
    first, second = Training(TASK, SGD(lr=0.01)), Training(TASK, SGD(lr=0.01))
    start = first.cluster.params().clone()

    first.run(gradient="random")
    second.run(gradient="random")

    assert torch.equal(first.cluster.params(), second.cluster.params())
    assert not torch.equal(first.cluster.params(), start)
