"""Ranks that send their gradients compressed, against a plain loop over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paramserver.compression import COMPRESSIONS, Wire
from paramserver.layout import Layout
from paramserver.optimizers import LBFGS, SGD, Adam
from sync.collective import Collective
from sync.desk import Desk
from sync.trainer import SyncTrainer
from sync.worker import Finished, Plan, Trainee
from tests.support.ranks import Kind, group, results
from workers.batches import Batches
from workers.config import RunConfig
from workers.examples import Batch, Data, TensorExamples
from workers.gradients import BoundModel
from workers.task import Task, build_data, build_model
from workers.tasks import task

SEED, BATCH, STEPS = 3, 5, 6
KINDS: tuple[Kind, ...] = ("shared_memory", "gloo")


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def data() -> Data:
    inputs = torch.randn(37, 6, generator=torch.Generator().manual_seed(0))
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


def trained(name: str, kind: Kind, world: int) -> tuple[Tensor, list[Finished], tuple[range, ...]]:
    """Train a group; return its parameters, what its ranks brought, and its slices."""
    compression, seen = COMPRESSIONS.parse(name), {}
    plan = Plan(
        layout=LAYOUT, optimizer=SGD(lr=0.1), seed=SEED, batch_size=BATCH, updates=STEPS,
        compress=compression,
    )  # fmt: skip

    def body(collective: Collective) -> Finished:
        seen[collective.rank] = collective.cuts
        model = build_model(TASK, SEED + 1)  # its own parameters are never used
        one = Trainee(TASK, model, build_data(TASK).train, collective, plan)
        one.load(START)
        return one.train(Desk())

    finished = results(group(kind, LAYOUT, world, body))
    return torch.cat([one.part.params for one in finished]), finished, seen[0]


def by_hand(name: str, cuts: tuple[range, ...]) -> Tensor:
    """Let one process add up what comes out of every rank's gradient."""
    model, world = build_model(TASK, SEED), len(cuts)
    flat, slot = START.clone(), torch.zeros(LAYOUT.numel)
    bound = BoundModel(model, LAYOUT, [range(LAYOUT.numel)])
    bound.read([flat])
    bound.write_gradients_to([slot])
    compression, examples = COMPRESSIONS.parse(name), data().train
    wires = [Wire(LAYOUT, cuts, compression, None, seed=SEED, worker=r) for r in range(world)]
    for clock in range(STEPS):
        total = torch.zeros_like(slot)
        for rank in range(world):
            batches = Batches(37, BATCH, seed=SEED, worker=rank, num_workers=world)
            bound.backward(squares(model, examples.batch(batches.indices(clock))))
            wires[rank].push_([slot[c.start : c.stop] for c in cuts], clock)
            total += slot / world
        flat -= 0.1 * total
    return flat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int8", "top-k:share=0.1", "random-k:share=0.5", "powersgd"])
def test_ranks_add_up_what_comes_out_of_each_others_gradients(name: str, kind: Kind) -> None:
    reached, finished, cuts = trained(name, kind, world=3)

    torch.testing.assert_close(reached, by_hand(name, cuts), rtol=1e-4, atol=1e-5)
    traffic = [one.traffic for one in finished]
    assert all(t is not None and t.push.count == STEPS for t in traffic)
    plain = STEPS * LAYOUT.num_bytes
    assert all(t is not None and 0 < t.push.num_bytes < plain for t in traffic)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_a_slice_sends_its_gradient_all_the_same(kind: Kind) -> None:
    blocks = LAYOUT.numel // 64
    reached, _, cuts = trained("top-k:share=0.1", kind, world=blocks + 1)

    assert len(cuts[-1]) == 0
    torch.testing.assert_close(reached, by_hand("top-k:share=0.1", cuts), rtol=1e-4, atol=1e-5)


def test_reads_are_not_compressed_in_step() -> None:
    config = RunConfig(updates=1, compress_pull=COMPRESSIONS.parse("bf16"))

    with pytest.raises(ValueError, match=r"^compress_pull is for mode async: in step all ranks"):
        SyncTrainer(task("digits"), Adam(), config)


def test_a_round_program_needs_exact_answers() -> None:
    config = RunConfig(updates=1, compress=COMPRESSIONS.parse("bf16"))

    with pytest.raises(ValueError, match=r"^lbfgs needs more than gradients, each exact and at"):
        SyncTrainer(task("digits"), LBFGS(), config)
