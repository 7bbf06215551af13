"""One round program, three drivers: this process, two ranks, three shards with a slow worker."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from async_sgd.trainer import AsyncTrainer
from paramserver.checkpoint import load_checkpoint
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS
from paramserver.record import Result
from paramserver.rounds import Answer, Ask, RoundOptimizer, minimise
from sync.trainer import SyncTrainer
from tests.support.gate import once_at, slowed
from tests.support.processes import kill_and_wait, titled
from workers.config import RunConfig
from workers.oracles import Oracle
from workers.samples import Piece
from workers.task import Batch, Data, Task, TensorExamples, build_data, build_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]

SEED = 1
ROUNDS = {
    "lbfgs": 8,
    "newton-cg:cg_iterations=8": 3,
    "ksd:vectors=4": 2,
    "natural:kl=0.05,damping=0.1,cg_iterations=8": 3,
}


def data() -> Data:
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 20, generator=noise, dtype=torch.float64)
    scores = inputs[:, :4] + torch.randn(120, 4, generator=noise, dtype=torch.float64)
    classes = scores.argmax(1)  # noisy: the optimum is finite
    examples = TensorExamples(inputs, classes)
    return Data(examples, examples)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def cross_entropy(net: nn.Module, batch: Batch, marker: str | None = None) -> Tensor:
    """The loss; the first process that makes a file at ``marker`` is slow from then on."""
    if marker is not None and _is_slow(marker):
        time.sleep(0.005)  # the slowness is what is tested
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def _is_slow(marker: str) -> bool:
    try:
        with open(marker, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        pass
    return Path(marker).read_text(encoding="ascii") in ("", str(os.getpid()))


def make_task(marker: str | None = None) -> Task:
    loss = partial(cross_entropy, marker=marker)
    return Task(name="small", model=model, data=data, loss=loss, headline="loss")


def alone(optimizer: RoundOptimizer, rounds: int) -> Tensor:
    """Run the program in this process; return its end point."""
    task = make_task()
    net = build_model(task, SEED)
    layout = Layout.of(net)
    oracle = Oracle(task, net, layout, build_data(task).train, SEED)

    def answer(ask: Ask, number: int) -> Answer:
        return Answer(*oracle.answer(ask.kind, ask.at, Piece(ask.on, number, 0, 1), ask.vector))

    x = layout.flatten(net)
    program = optimizer.build([nn.Parameter(x.clone(), requires_grad=False)])
    return minimise(program, x, answer, max_rounds=rounds).x


def end_point(result: Result) -> Tensor:
    assert result.checkpoint is not None
    return load_checkpoint(result.checkpoint, Layout.of(model())).params


def config(rounds: int, out: Path) -> RunConfig:
    return RunConfig(workers=2, updates=rounds, seed=SEED, evaluate_every_s=0, out=out)


EVERY_PROGRAM = [
    name if name == "lbfgs" else pytest.param(name, marks=pytest.mark.long) for name in ROUNDS
]


@pytest.mark.long
@pytest.mark.parametrize("name", ROUNDS)
def test_three_shards_and_a_slow_worker_end_where_one_process_does(
    name: str, tmp_path: Path
) -> None:
    optimizer, rounds = OPTIMIZERS.parse(name), ROUNDS[name]
    task = make_task(marker=str(tmp_path / "slow"))

    result = AsyncTrainer(task, optimizer, config(rounds, tmp_path / "run"), shards=3).fit()

    assert result.record["updates"] == rounds
    assert result.stopped_because == f"{rounds} updates"
    assert result.record["conservation"]["holds"]
    assert set(result.record["dropped"]) <= {"late", "copy", "ended"}
    torch.testing.assert_close(end_point(result), alone(optimizer, rounds), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", EVERY_PROGRAM)
def test_two_ranks_end_where_one_process_does(name: str, tmp_path: Path) -> None:
    optimizer, rounds = OPTIMIZERS.parse(name), ROUNDS[name]

    result = SyncTrainer(make_task(), optimizer, config(rounds, tmp_path / "run")).fit()

    assert result.record["updates"] == rounds
    torch.testing.assert_close(end_point(result), alone(optimizer, rounds), rtol=0, atol=1e-8)


@pytest.mark.long
def test_a_program_goes_on_from_its_record_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    optimizer = OPTIMIZERS.parse("lbfgs")
    first = config(3, tmp_path / "run")
    AsyncTrainer(make_task(), optimizer, first, shards=3).fit()
    rest = RunConfig(workers=2, updates=8, seed=SEED, evaluate_every_s=0, resume=tmp_path / "run")

    result = AsyncTrainer(make_task(), optimizer, rest, shards=2).fit()

    assert result.record["updates"] == 8
    torch.testing.assert_close(end_point(result), alone(optimizer, 8), rtol=0, atol=1e-8)


@pytest.mark.long
def test_a_killed_worker_changes_nothing_about_a_program(tmp_path: Path) -> None:
    optimizer, gate = OPTIMIZERS.parse("lbfgs"), tmp_path / "gate"

    def kill_one() -> None:
        kill_and_wait(titled("ray::Worker.answer")[0])

    result = AsyncTrainer(
        replace(make_task(), loss=slowed(cross_entropy, gate, calls=20, seconds=0.1)),
        optimizer,
        config(20, tmp_path / "run"),
        shards=3,
        progress=once_at(1, gate, kill_one),
    ).fit()

    assert len(result.record["failures"]) == 1
    torch.testing.assert_close(end_point(result), alone(optimizer, 20), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("lbfgs", {"damping": "dynsgd"}, "^lbfgs is a round program: nothing in a round is stale"),
        ("lbfgs", {"clip": "norm:max_norm=1"}, "^lbfgs needs more than gradients: clipping"),
        ("bfgs", {"shards": 2}, "^bfgs needs the whole vector in one place: use 1 shard, not 2"),
        ("sgd", {"rule": "pieces"}, "^rule pieces is for round programs, and sgd is a push rule"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    name: str, keys: dict[str, object], message: str
) -> None:
    from async_sgd.damping import DAMPINGS  # noqa: PLC0415
    from async_sgd.rules import RULES  # noqa: PLC0415
    from paramserver.clipping import CLIPS  # noqa: PLC0415

    read = {"rule": RULES.parse, "damping": DAMPINGS.parse, "clip": CLIPS.parse}
    values = {key: read[key](value) if key in read else value for key, value in keys.items()}  # type: ignore[arg-type]
    run = RunConfig(updates=1, clip=values.pop("clip", None))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=message):
        AsyncTrainer(make_task(), OPTIMIZERS.parse(name), run, **values)  # type: ignore[arg-type]
