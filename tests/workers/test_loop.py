"""The worker's loop over real shards in one process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from async_sgd.rules import Ringmaster
from paramserver.client import Client
from paramserver.clipping import Clip, ClipNorm, ClipValue
from paramserver.compression import COMPRESSIONS, Compression, Wire
from paramserver.errors import NonFiniteGradientError, TaskError
from paramserver.layout import Layout
from paramserver.messages import Message
from paramserver.optimizers import OPTIMIZERS, SGD, AdamW, Momentum, Optimizer
from paramserver.progress import Budget
from tests.support.clusters import MemoryCluster
from workers.batches import Batches, step_seed
from workers.estimate import GradientMode
from workers.local import LOCALS, Downpour, Local, LocalAdamW, LocalSGD
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
        local: Local | None = None,
        compress: Compression | None = None,
        compress_pull: Compression | None = None,
    ) -> Finished:
        client: Client
        with self.cluster.join(0, incarnation) as client:
            return train(
                self.task, self.model, self.layout, self.cluster.cuts, client,
                build_data(self.task).train, batches(self.task), seed=SEED, clip=clip,
                gradient=gradient, local=local, compress=compress, compress_pull=compress_pull,
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


def test_a_forward_gradient_that_is_not_finite_names_its_layer() -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * math.nan

    task = Task(name="small", model=mlp, data=data, loss=broken, headline="loss")

    with pytest.raises(NonFiniteGradientError, match=r"'0\.weight' is not finite"):
        Training(task, SGD(lr=0.1)).run(gradient="random")


# ---------------------------------------------------------------- steps of the worker's own


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("local", "server", "same"),
    [
        (LocalSGD(steps=1, lr=0.1), SGD(lr=1.0), SGD(lr=0.1)),
        (LocalSGD(steps=3, lr=0.1), SGD(lr=1.0), SGD(lr=0.1)),
        (LocalSGD(steps=2, lr=0.1, momentum=0.9), SGD(lr=1.0), Momentum(lr=0.1, momentum=0.9)),
        (LocalAdamW(steps=3, lr=0.01), SGD(lr=1.0), AdamW(lr=0.01)),
        (Downpour(push=3, lr=0.1), SGD(lr=0.1), SGD(lr=0.1)),
    ],
    ids=["one step", "sgd", "momentum", "adamw", "downpour"],
)
def test_one_workers_steps_are_ordinary_training(
    local: Local, server: Optimizer, same: Optimizer, shards: int
) -> None:
    """But for the rounding of w - (w - x), and of a sum of gradients."""
    num_pushes = STEPS // local.num_steps(0)
    training = Training(TASK, server, shards=shards, updates=num_pushes)

    finished = training.run(local=local)

    assert finished.clock == num_pushes
    torch.testing.assert_close(training.cluster.params(), plain(TASK, same), rtol=1e-5, atol=1e-6)
    assert training.cluster.column("samples") == [8 * local.num_steps(0)] * num_pushes


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_local_steps_have_the_same_bits_on_any_number_of_shards(name: str) -> None:
    runs = [Training(TASK, SGD(lr=0.7), shards=shards, updates=4) for shards in (1, 3)]

    for training in runs:
        training.run(local=LOCALS.parse(f"{name}:steps=3"))

    assert torch.equal(runs[0].cluster.params(), runs[1].cluster.params())


def test_a_push_tells_the_mean_loss_and_the_length_of_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, training = Training(TASK, SGD(lr=0.1)), Training(TASK, SGD(lr=1.0), updates=1)
    before = training.cluster.params().clone()
    alone.run()
    norms: list[float] = []
    on_push = training.cluster.sequencer.on_push

    def heard(push: Message, now: float) -> list[Message]:
        norms.append(push.norm)
        return on_push(push, now)

    monkeypatch.setattr(training.cluster.sequencer, "on_push", heard)

    training.run(local=LocalSGD(steps=STEPS, lr=0.1))

    losses = alone.cluster.column("loss")
    assert training.cluster.column("loss") == pytest.approx([sum(losses) / STEPS])
    way = float(torch.linalg.vector_norm(training.cluster.params() - before))
    assert norms == pytest.approx([way], rel=1e-5)


def test_the_gradient_of_each_step_is_clipped() -> None:
    training = Training(TASK, SGD(lr=1.0), updates=2)

    training.run(clip=ClipNorm(max_norm=0.1), local=LocalSGD(steps=3, lr=0.5))

    expected = plain(TASK, SGD(lr=0.5), clip_norm=0.1)
    torch.testing.assert_close(training.cluster.params(), expected, rtol=1e-5, atol=1e-6)


def test_a_worker_that_takes_over_takes_the_steps_the_lost_one_would_have_taken() -> None:
    local, whole = LocalSGD(steps=3, lr=0.1), Training(TASK, SGD(lr=0.5), updates=4)
    whole.run(local=local)
    calls: list[int] = []

    def dying_loss(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        if len(calls) == 8:  # at its second step of clock 2
            raise RuntimeError("out of memory")
        return cross_entropy(model, batch)

    task = Task(name="small", model=mlp, data=data, loss=dying_loss, headline="loss", batch_size=8)
    training = Training(task, SGD(lr=0.5), updates=4)
    with pytest.raises(TaskError, match="out of memory"):
        training.run(incarnation=1, local=local)
    training.model = build_model(task, SEED)

    finished = training.run(incarnation=2, local=local)

    assert finished.clock == 4
    assert torch.equal(training.cluster.params(), whole.cluster.params())


def test_a_step_that_is_not_finite_ends_the_push_and_names_its_layer() -> None:
    calls: list[int] = []

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return cross_entropy(model, batch) * (math.nan if len(calls) == 2 else 1.0)

    task = Task(name="small", model=mlp, data=data, loss=broken, headline="loss", batch_size=8)
    training = Training(task, SGD(lr=1.0))

    with pytest.raises(NonFiniteGradientError, match=r"worker 0 at clock 1: .*'0\.weight'"):
        training.run(local=LocalSGD(steps=3))

    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_way_that_is_not_finite_names_its_layer() -> None:
    training = Training(TASK, SGD(lr=1.0), updates=1)

    with pytest.raises(NonFiniteGradientError, match=r"'0\.weight'"):
        training.run(local=LocalSGD(steps=1, lr=3e38, weight_decay=3e38))


@pytest.mark.parametrize("mode", ["forward", "random"])
def test_steps_may_follow_forward_gradients(mode: GradientMode) -> None:
    training = Training(TASK, SGD(lr=1.0), updates=3)
    one_by_one = Training(TASK, SGD(lr=0.01))
    one_by_one.run(gradient=mode)

    training.run(gradient=mode, local=LocalSGD(steps=2, lr=0.01))

    expected = one_by_one.cluster.params()
    torch.testing.assert_close(training.cluster.params(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- cancellation


class Overtaken:
    """Worker 0's training under a rule that cancels, and worker 1, which pushes when it is told."""

    def __init__(self, overtake_at: str, shards: int = 2, local: Local | None = None) -> None:
        self.forward: list[int] = []
        self.backward = 0
        self._at, self._local = overtake_at, local
        self.task = replace(TASK, loss=self._loss)
        self.model = build_model(self.task, SEED)
        self.layout = Layout.of(self.model)
        self.cluster = MemoryCluster(
            self.layout.flatten(self.model),
            shards=shards,
            optimizer=SGD(lr=0.1),
            rule=Ringmaster(limit=1, cancel=True).build(2),
            budget=Budget(updates=3),
        )
        self._other = self.cluster.join(1)
        self._other.first_read()

    def run(self) -> Finished:
        with self.cluster.join(0) as client:
            return train(
                self.task, self.model, self.layout, self.cluster.cuts, client,
                build_data(self.task).train, batches(self.task), seed=SEED, looks=True,
                before_push=self._before_push, local=self._local,
            )  # fmt: skip

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.forward.append(int(batch[0].sum() * 1e6))
        loss = cross_entropy(model, batch)
        loss.register_hook(self._count_backward)
        if self._at == "forward":
            self._overtake(2)
        return loss

    def _count_backward(self, grad: Tensor) -> None:
        self.backward += 1
        if self._at == "backward":
            self._overtake(1)

    def _before_push(self, clock: int) -> None:
        if self._at == "push":
            self._overtake(1)

    def _overtake(self, times: int) -> None:
        """Let worker 1 push at the first occasion, so that worker 0 is cancelled."""
        self._at = ""
        for _ in range(times):
            for slot in self._other.slots:
                slot.zero_()
            self._other.push(norm=0.0)


@pytest.mark.parametrize(("at", "backward", "pushes"), [("forward", 1, 2), ("backward", 3, 1)])
def test_a_cancelled_gradient_is_begun_anew_with_the_same_samples(
    at: str, backward: int, pushes: int
) -> None:
    run = Overtaken(at)

    run.run()

    ledger = run.cluster.sequencer.ledger.columns()
    mine = ledger["worker"] == 0
    assert run.forward[0] == run.forward[1]
    assert run.backward == backward
    assert ledger["worker"].tolist() == [1] * pushes + [0] * (3 - pushes)
    assert ledger["staleness"].tolist() == [0] * 3
    assert ledger["clock"][mine].tolist() == list(range(1, 4 - pushes))
    assert not ledger["dropped"].any()


def test_a_push_that_was_on_its_way_is_dropped_and_its_samples_with_it() -> None:
    run = Overtaken("push")

    run.run()

    assert run.cluster.sequencer.ledger.drop_reasons() == {"cancelled": 1}
    assert len(set(run.forward)) == len(run.forward) == 3
    assert run.cluster.sequencer.conservation.holds


def test_local_steps_are_given_up_between_two_of_them() -> None:
    run = Overtaken("backward", local=LocalSGD(steps=4, lr=0.1))

    run.run()

    assert len(run.forward) == 1 + 4 * 2  # one of the first four was taken
    assert run.forward[1] == run.forward[0]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("push", "pull"),
    [("top-k:share=0.1", "bf16"), ("qsgd:levels=7", "int8"), ("powersgd", "top-k:share=0.1")],
)
def test_one_compressed_worker_is_the_loop_that_the_paper_has(
    push: str, pull: str, shards: int
) -> None:
    ways = COMPRESSIONS.parse(push), COMPRESSIONS.parse(pull)
    training = Training(TASK, SGD(lr=0.1), shards=shards)
    cuts = training.cluster.cuts

    finished = training.run(compress=ways[0], compress_pull=ways[1])

    model, examples = build_model(TASK, SEED).train(), build_data(TASK).train
    layout = training.layout
    wire = Wire(layout, cuts, *ways, seed=SEED, worker=0)
    w = nn.Parameter(layout.flatten(model), requires_grad=False)
    rule = SGD(lr=0.1).build([w])
    for clock in range(STEPS):
        layout.load(model, torch.cat(list(wire.read([w[c.start : c.stop] for c in cuts], clock))))
        torch.manual_seed(step_seed(SEED, 0, clock))
        loss = TASK.loss(model, examples.batch(batches(TASK).indices(clock)))
        g = torch.zeros_like(w)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        torch._foreach_copy_(layout.views(g), list(grads))
        wire.push_([g[c.start : c.stop] for c in cuts], clock)
        rule.apply([g])
    assert torch.equal(training.cluster.params(), w)
    assert finished.traffic is not None
    assert finished.traffic.push == wire.traffic.push


def test_a_gradient_that_is_not_finite_leaves_what_was_left_out_as_it_is() -> None:
    """It is not sent, so the server names it, and the feedback has no NaN in it."""

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * math.nan

    training = Training(replace(TASK, loss=broken), SGD())

    with pytest.raises(NonFiniteGradientError, match=r"0\.weight"):
        training.run(compress=COMPRESSIONS.parse("top-k"))
