"""Local steps in simulated runs: what they converge to, and what they agree with."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from async_sgd.compensation import DCASGD
from async_sgd.damping import DynSGD
from async_sgd.delays import DELAYS, Constant
from async_sgd.jobs import Batched, Gradients, OneByOne
from async_sgd.replay import Replay, WhatIf
from async_sgd.rules import BSP, RULES, Asynchronous
from async_sgd.samples import Samples
from async_sgd.simulation import Change, Simulation
from async_sgd.simulator import Simulator
from async_sgd.trainer import AsyncTrainer
from paramserver.clipping import Clip, ClipNorm
from paramserver.errors import RecordError, ResourceError
from paramserver.ledger import Ledger
from paramserver.optimizers import OPTIMIZERS, SGD
from paramserver.progress import Budget
from paramserver.record import Result
from paramserver.schedules import CosineOnce
from tests.support.clusters import MemoryCluster
from tests.support.virtual import DOUBLE, Learning, columns, params
from workers.batches import Batches, step_seed
from workers.config import RunConfig
from workers.local import LOCALS, Local, LocalSGD, steps_of
from workers.loop import train
from workers.task import Batch, Data, Task, TensorExamples, build_model
from workers.tasks import task

DIGITS = task("digits:hidden=8")
LAWS = ("sgd:steps=3,lr=0.05", "adamw:steps=3,lr=0.01", "downpour:push=3,lr=0.05",
        "elastic:steps=3,lr=0.05,alpha=0.2,momentum=0.5")  # fmt: skip


def walking(
    learning: Learning, local: Local, *, batched: bool = False, clip: Clip | None = None
) -> Gradients:
    """Return what computes the jobs of ``learning`` by local steps."""
    make = Batched if batched else OneByOne
    model = build_model(learning.task, learning.seed)
    return make(learning.task, model, learning.layout, learning.samples(), clip=clip, local=local)


def simulated(
    learning: Learning,
    local: Local,
    *,
    batched: bool = False,
    clip: Clip | None = None,
    **options: Any,
) -> Simulation:
    """Simulate to the end."""
    gradients = walking(learning, local, batched=batched, clip=clip)
    run = learning.simulation(gradients, **{"optimizer": SGD(lr=1.0), **options})
    run.run()
    return run


# ---------------------------------------------------------------- what they converge to


class Scalar(nn.Module):
    """One number, starting at 5."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([5.0], dtype=DOUBLE))


def bowls(curvatures: tuple[float, ...], minima: tuple[float, ...]) -> Task:
    """Make a task with a sample c (w - b)^2 / 2 for each worker, which owns one."""
    rows = TensorExamples(torch.tensor(list(zip(curvatures, minima, strict=True)), dtype=DOUBLE))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        c, b = batch[0].unbind(1)
        assert isinstance(model, Scalar)
        return (c * (model.w - b) ** 2 / 2).mean()

    return Task(name="bowls", model=Scalar, data=lambda: Data(rows, rows), loss=loss,
                headline="loss", batch_size=1)  # fmt: skip


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("num_steps", [1, 20])
def test_local_descent_on_unequal_data_converges_beside_the_optimum(
    num_steps: int, batched: bool
) -> None:
    """The fixed point is sum k b / sum k with k = 1 - (1 - lr c)^H: a steep worker counts less.

    Of H = 20, lr = 0.1, c = 1 and 0.2 around 1 and -1 it is 0.45096; the optimum, 2/3, is that of
    a single step.
    """
    updates = {1: 150, 20: 40}[num_steps]
    learning = Learning(
        bowls((1.0, 0.2), (1.0, -1.0)), num_workers=2, batch_size=1, updates=updates
    )

    run = simulated(
        learning, LocalSGD(steps=num_steps, lr=0.1), batched=batched, rule="bsp", delay="gamma"
    )

    expected = {1: 2 / 3, 20: 0.45096}[num_steps]
    assert float(params(run)[0]) == pytest.approx(expected, abs=5e-6 if num_steps == 20 else 1e-3)


@pytest.mark.parametrize("rule", ["bsp", "k-of-n:k=3", "k-of-n:k=3,mode=async"])
def test_local_sgd_under_bsp_is_federated_averaging(rule: str) -> None:
    """Three workers at one speed; nobody reads before the mean is made."""
    learning, local = Learning(DIGITS, num_workers=3, updates=5), LocalSGD(steps=4, lr=0.1)

    run = simulated(learning, local, rule=rule, delay="constant")

    w = learning.start()
    for clock in range(5):
        w = torch.stack([trained(learning, w, worker, clock, 4) for worker in range(3)]).mean(0)
    torch.testing.assert_close(params(run), w, rtol=1e-5, atol=1e-6)


def trained(learning: Learning, w: Tensor, worker: int, clock: int, num_steps: int) -> Tensor:
    """Return where plain SGD leads from ``w`` on the batches of ``worker`` at ``clock``."""
    model = build_model(learning.task, 0).train()
    learning.layout.load(model, w)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Batches(
        len(learning.data.train), learning.batch_size, seed=0, worker=worker, num_workers=3
    )
    for step in range(clock * num_steps, (clock + 1) * num_steps):
        sgd.zero_grad()
        torch.manual_seed(step_seed(0, worker, step))
        batch = learning.data.train.batch(batches.indices(step))
        learning.task.loss(model, batch).backward()
        sgd.step()
    return learning.layout.flatten(model)


@pytest.mark.parametrize("delay", ["constant", "exponential"])
def test_elastic_workers_and_their_centre_agree_in_the_end(delay: str) -> None:
    """On one bowl the force dies out, and everybody is at its minimum."""
    learning = Learning(bowls((0.7,) * 4, (2.0,) * 4), batch_size=1, updates=600)

    run = simulated(learning, LOCALS.parse("elastic:steps=2,lr=0.4,alpha=0.2"), delay=delay)

    assert float(params(run)[0]) == pytest.approx(2.0, abs=1e-6)


# ---------------------------------------------------------------- the same by several ways


@pytest.mark.parametrize("name", LAWS)
def test_a_simulated_worker_is_a_real_one_bit_for_bit(name: str) -> None:
    local, learning = LOCALS.parse(name), Learning(DIGITS, num_workers=1, updates=7)
    model = build_model(learning.task, 0)
    cluster = MemoryCluster(
        learning.start(), optimizer=SGD(lr=1.0), readers=1, budget=Budget(updates=7)
    )
    batches = Batches(len(learning.data.train), 8, seed=0, worker=0, num_workers=1)

    run = simulated(learning, local)

    with cluster.join(0) as client:
        train(learning.task, model, learning.layout, cluster.cuts, client, learning.data.train,
              batches, seed=0, local=local)  # fmt: skip
    assert torch.equal(params(run), cluster.params())
    assert columns(run)["loss"].tolist() == cluster.column("loss")
    assert columns(run)["samples"].tolist() == cluster.column("samples") == [24] * 7


@pytest.mark.parametrize("clip", [None, ClipNorm(max_norm=0.5)], ids=["", "clipped"])
@pytest.mark.parametrize("keys", ["", ",speeds=1/0.5/0.9/0.1"], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", LAWS)
def test_steps_taken_together_are_those_taken_one_by_one(
    name: str, keys: str, clip: Clip | None
) -> None:
    local, learning = LOCALS.parse(name + keys), Learning(DIGITS, updates=40)
    changes = [Change(3.0, 1, "crash"), Change(6.0, 1, "join")]
    alone = simulated(learning, local, clip=clip, changes=changes, optimizer=SGD(lr=0.5))

    together = simulated(
        learning, local, clip=clip, changes=changes, optimizer=SGD(lr=0.5), batched=True
    )

    torch.testing.assert_close(params(together), params(alone), rtol=0, atol=2e-4)
    for name in ("worker", "clock", "samples", "end"):
        assert columns(together)[name].tolist() == columns(alone)[name].tolist()


@pytest.mark.parametrize("batched", [False, True])
def test_workers_read_the_batches_of_their_stream_one_after_the_other(batched: bool) -> None:
    learning, read = Learning(DIGITS, num_workers=2, updates=12), set()

    class Recorded(Samples):
        def _indices(self, worker: int, number: int, version: int, samples: int) -> Tensor:
            read.add((worker, number))
            return super()._indices(worker, number, version, samples)

    learning.samples = partial(  # type: ignore[method-assign]
        Recorded, learning.task, learning.data.train, 8, 2, seed=0
    )
    local = LOCALS.parse("sgd:steps=4,speeds=1/0.5")

    run = simulated(learning, local, batched=batched)

    ended = [int((columns(run)["worker"] == worker).sum()) for worker in range(2)]
    for worker in range(2):
        number = steps_of(local, worker, ended[worker]).start
        assert {(worker, n) for n in range(number)} <= read


# ---------------------------------------------------------------- the simulator


def made(out: Path, **options: Any) -> Result:
    """Simulate three workers on digits; ``options`` are the simulator's or the configuration's."""
    optimizer = options.pop("optimizer", SGD(lr=1.0))
    config = {"workers": 3, "updates": 30, "evaluate_every_s": 0, "out": out, "seed": 3}
    names = {name: options.pop(name) for name in RunConfig.__dataclass_fields__ if name in options}
    return Simulator(DIGITS, optimizer, RunConfig(**{**config, **names}), **options).fit()


def test_a_worker_pushes_when_its_steps_have_taken_their_delays(tmp_path: Path) -> None:
    made(
        tmp_path / "run",
        workers=2,
        updates=8,
        delay=Constant(time=1.0, factors=(1.0, 2.0)),
        local=LOCALS.parse("sgd:steps=4,speeds=1/0.25"),
    )

    found = Ledger.load(tmp_path / "run" / "updates.npz").columns()
    of = {w: found["end"][found["worker"] == w].tolist() for w in range(2)}
    assert of == {0: [4.0, 8.0, 12.0], 1: [2.0, 4.0, 6.0, 8.0, 10.0]}
    samples = {w: set(found["samples"][found["worker"] == w]) for w in range(2)}
    assert samples == {0: {4 * DIGITS.batch_size}, 1: {DIGITS.batch_size}}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": RULES.parse("ssp:bound=1")},
        {"changes": [Change.parse(c) for c in ("crash:1@9", "join:1@20", "leave:0@30")]},
        {"clip": ClipNorm(max_norm=0.5)},
        {"gradient": "random"},
    ],
    ids=str,
)
def test_a_record_replays_to_the_same_bits(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    delay = DELAYS.parse("gamma:cv=0.5,factors=1/1/3")
    result = made(tmp_path / "run", local=LOCALS.parse(name), delay=delay, **options)

    replayed = Replay(tmp_path / "run").run()

    assert replayed.distance == 0.0
    assert replayed.metrics == result.metrics


def test_the_record_says_which_steps_were_taken(tmp_path: Path) -> None:
    local = LOCALS.parse("adamw:steps=4,speeds=1/2/4")
    made(tmp_path / "run", local=local, updates=3)
    made(tmp_path / "plain", updates=3)

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert LOCALS.build(config["local"]) == local
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["local"] is None


@pytest.mark.parametrize(
    ("optimizer", "rule", "local"),
    [
        ("sgd:lr=1", "bsp", "sgd:steps=5,lr=0.1"),
        ("sgd:lr=1", "fedbuff:size=3", "sgd:steps=5,lr=0.1"),
        ("nesterov:lr=0.7,momentum=0.9", "bsp", "adamw:steps=5,lr=0.003"),
        (
            "delayed-nesterov:lr=0.7,every=3,momentum=0.5",
            "asp",
            "adamw:steps=5,lr=0.003,speeds=1/1/0.3",
        ),
        ("adagrad:lr=0.05", "asp", "downpour:push=5,lr=0.1"),
        ("sgd:lr=1", "asp", "elastic:steps=5,lr=0.1,alpha=0.3"),
    ],
)
def test_every_algorithm_of_the_table_learns(
    tmp_path: Path, optimizer: str, rule: str, local: str
) -> None:
    result = made(
        tmp_path / "run",
        optimizer=OPTIMIZERS.parse(optimizer),
        rule=RULES.parse(rule),
        local=LOCALS.parse(local),
        updates=None,
        epochs=12,
        batched=True,
        delay=DELAYS.parse("gamma:cv=0.3"),
    )

    assert result.metrics["accuracy"] > 0.8


def test_what_workers_keep_needs_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_sgd.simulator._available_bytes", lambda: 20_000)

    made(tmp_path / "run", local=LOCALS.parse("sgd"), updates=1)
    with pytest.raises(ResourceError, match=r"at once and keep 2 vectors each, 0\.0 GiB"):
        made(tmp_path / "other", local=LOCALS.parse("adamw"), updates=1)


# ---------------------------------------------------------------- what they are refused with


@pytest.mark.parametrize("made_by", [AsyncTrainer, Simulator])
@pytest.mark.parametrize(
    ("local", "options", "message"),
    [
        ("sgd", {"optimizer": "lbfgs"}, "^lbfgs asks workers for more than a gradient, .* local"),
        ("sgd", {"optimizer": "newton", "rule": Asynchronous()}, "^newton asks workers for more"),
        ("sgd", {"compensation": DCASGD()}, "^local sgd pushes how far .* compensation dc-asgd"),
        ("adamw:speeds=1/2", {}, "^speeds must be one for each of the 3 workers, got 2"),
        ("elastic", {"optimizer": "momentum"}, "^local elastic .*, and optimizer momentum changes"),
        ("elastic", {"optimizer": "sgd:lr=0.5"}, "^local elastic .*, and optimizer sgd changes"),
        ("elastic", {"rule": BSP()}, "^local elastic .*, and rule bsp changes"),
        ("elastic", {"damping": DynSGD()}, "^local elastic .*, and a damping changes"),
        ("elastic", {"schedule": CosineOnce(updates=9)}, ", and a schedule changes"),
        (
            "elastic",
            {"clip": ClipNorm(max_norm=1.0, where="reduced")},
            ", and a clip with where=reduced changes",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    made_by: Any, local: str, options: dict[str, Any], message: str
) -> None:
    names = {name: options[name] for name in ("clip", "schedule") if name in options}
    others = {name: options[name] for name in options if name not in (*names, "optimizer")}
    optimizer = OPTIMIZERS.parse(options.get("optimizer", "sgd:lr=1"))

    with pytest.raises(ValueError, match=message):
        made_by(
            DIGITS, optimizer, RunConfig(workers=3, **names), local=LOCALS.parse(local), **others
        )


@pytest.mark.parametrize(
    ("name", "what_if", "message"),
    [
        ("sgd", WhatIf(compensation=DCASGD()), "local steps, sgd: .* cannot be compensated"),
        ("elastic", WhatIf(damping=DynSGD()), "local steps, elastic: .* cannot be damped"),
    ],
)
def test_no_other_policy_is_one_that_local_steps_refuse(
    tmp_path: Path, name: str, what_if: WhatIf, message: str
) -> None:
    made(tmp_path / "run", local=LOCALS.parse(name), updates=3)

    with pytest.raises(RecordError, match=message):
        Replay(tmp_path / "run", what_if=what_if)


def test_momentum_of_a_worker_is_lost_with_it(tmp_path: Path) -> None:
    """Without it the next one takes the same steps as one that never was."""
    local = LocalSGD(steps=2, lr=0.05, momentum=0.9)
    learning = Learning(DIGITS, num_workers=1, updates=6)
    gone = [Change(7.0, 0, "crash"), Change(8.0, 0, "join")]
    crashed = simulated(learning, local, delay="constant:time=2", changes=gone)
    whole = simulated(learning, local, delay="constant:time=2")

    assert not torch.equal(params(crashed), params(whole))
    without = LocalSGD(steps=2, lr=0.05)
    same = [simulated(learning, without, delay="constant:time=2", changes=c) for c in (gone, [])]
    assert torch.equal(params(same[0]), params(same[1]))
