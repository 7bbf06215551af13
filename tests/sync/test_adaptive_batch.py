"""Batches that follow the noise in step: every rank comes to the same size by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paramserver.batch_sizes import CABS
from paramserver.checkpoint import gather_state, scatter_state
from paramserver.errors import TaskError
from paramserver.layout import Layout
from paramserver.optimizers import SGD
from sync.collective import Collective
from sync.desk import Desk, Part
from sync.trainer import SyncTrainer
from sync.worker import Finished, Plan, Trainee
from tests.support.noisy_bowl import BATCH, NUM_EXAMPLES, TASK, plain
from tests.support.ranks import KINDS, Kind, group, results
from workers.config import RunConfig
from workers.task import Task, build_data, build_model

SPEC = CABS(least=4, most=90, decay=0.9, chunks=4)


def trained(
    world: int,
    updates: int,
    *,
    kind: Kind = "shared_memory",
    parts: list[Part] | None = None,
    what: Task = TASK,
) -> list[Finished]:
    """Train on ``world`` ranks, from the start or from ``parts``."""
    models = [build_model(what, 0) for _ in range(world)]  # threads share torch's generator
    layout = Layout.of(models[0])
    start = layout.flatten(models[0])
    plan = Plan(
        layout=layout,
        optimizer=SGD(lr=0.3),
        seed=0,
        batch_size=BATCH,
        adaptive_batch=SPEC,
        num_owned=NUM_EXAMPLES // world,
        updates=updates,
    )

    def body(collective: Collective) -> Finished:
        one = Trainee(what, models[collective.rank], build_data(what).train, collective, plan)
        if parts is None:
            one.load(start)
        else:
            state = gather_state([(part.cut, part.rule) for part in parts])
            rule = scatter_state(state, collective.cut)
            one.load(whole(parts), parts[0].position, rule, parts[0].scheduler)
        return one.train(Desk())

    return results(group(kind, layout, world, body))


def whole(parts: list[Part]) -> Tensor:
    return torch.cat([part.params for part in parts])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_draw_together_what_a_plain_loop_does(kind: Kind) -> None:
    finished = trained(2, 60, kind=kind)

    sizes, _ = plain(SPEC, 0.3, 61, num_workers=2)
    parts = [one.part for one in finished]
    assert [one.status.batch_size for one in finished] == [sizes[60]] * 2
    assert parts[0].position.samples == 2 * sum(sizes[:60])
    assert {part.position for part in parts} == {parts[0].position}
    assert len(set(sizes)) > 10
    torch.testing.assert_close(whole(parts), plain(SPEC, 0.3, 60, num_workers=2)[1])


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped() -> None:
    straight = [one.part for one in trained(2, 40)]
    first = [one.part for one in trained(2, 15)]

    resumed = [one.part for one in trained(2, 40, parts=first)]

    assert torch.equal(whole(resumed), whole(straight))
    assert resumed[0].position == straight[0].position


def test_a_loss_below_zero_ends_the_run() -> None:
    below = Task(
        name="below", model=TASK.model, data=TASK.data, headline="loss",
        loss=lambda model, batch: TASK.loss(model, batch) - 100,
    )  # fmt: skip

    with pytest.raises(TaskError, match=r"^the loss is -9\d.* on average, and an adaptive batch"):
        trained(2, 5, what=below)


def test_a_sum_of_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^adaptive_batch goes by the rate of a mean gradient"):
        SyncTrainer(TASK, SGD(), RunConfig(adaptive_batch=SPEC), reduce="sum")
