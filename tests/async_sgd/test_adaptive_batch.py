"""Batches that follow the noise, in simulated runs and in their replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_sgd import Simulator
from async_sgd.delays import Constant, Gamma, Pareto
from async_sgd.replay import Replay
from async_sgd.rules import RULES
from async_sgd.trainer import AsyncTrainer
from paramserver.batch_sizes import CABS
from paramserver.checkpoint import load_checkpoint
from paramserver.ledger import Ledger
from paramserver.optimizers import OPTIMIZERS, SGD
from paramserver.reach import Reach
from paramserver.record import Result
from paramserver.schedules import Step
from tests.support.noisy_bowl import DIM, NUM_EXAMPLES, TASK, noise, plain
from workers.config import RunConfig
from workers.curriculum import Linear
from workers.examples import Batch, Data
from workers.local import LOCALS
from workers.task import Task, build_data
from workers.tasks import task

SPEC = CABS(least=4, most=90, decay=0.9)


def simulated(out: Path, **options: Any) -> Result:
    """Simulate on the noisy bowl; ``options`` are the simulator's or the configuration's."""
    what, optimizer = options.pop("task", TASK), options.pop("optimizer", SGD(lr=0.3))
    config = {
        "workers": 3,
        "updates": 60,
        "adaptive_batch": SPEC,
        "evaluate_every_s": 0,
        "out": out,
    }
    names = {name: options.pop(name) for name in RunConfig.__dataclass_fields__ if name in options}
    return Simulator(what, optimizer, RunConfig(**{**config, **names}), **options).fit()


def columns(out: Path) -> dict[str, np.ndarray]:
    return Ledger.load(out / "updates.npz").columns()


def test_one_worker_draws_what_a_plain_loop_does(tmp_path: Path) -> None:
    simulated(tmp_path / "run", workers=1)

    sizes, x = plain(SPEC, 0.3, 60, num_workers=1)
    assert columns(tmp_path / "run")["samples"].tolist() == sizes
    torch.testing.assert_close(load_checkpoint(tmp_path / "run" / "checkpoint").params, x)
    assert min(sizes) == 4
    assert max(sizes) == 90


def test_batches_grow_as_the_loss_falls(tmp_path: Path) -> None:
    simulated(tmp_path / "run", updates=150, optimizer=SGD(lr=0.05))

    ledger = columns(tmp_path / "run")
    thirds = [part.mean() for part in np.array_split(ledger["samples"], 3)]
    assert thirds == sorted(thirds)
    assert thirds[2] > 4 * thirds[0]
    assert ledger["loss"][-10:].mean() < ledger["loss"][:10].mean() / 20


def test_a_batch_goes_by_the_rate_that_is_scheduled(tmp_path: Path) -> None:
    config = {"adaptive_batch": CABS(least=2, most=400), "schedule": Step(every=40, gamma=0.5)}
    simulated(tmp_path / "run", workers=1, optimizer=SGD(lr=0.2), updates=41, **config)

    sizes = columns(tmp_path / "run")["samples"]
    assert sizes[40] / sizes[39] == pytest.approx(0.5, abs=0.1)


def test_the_same_run_made_again_has_the_same_bits(tmp_path: Path) -> None:
    for name in ("one", "two"):
        simulated(tmp_path / name, delay=Gamma(cv=0.5), rule=RULES.parse("ssp:bound=1"))

    one, two = columns(tmp_path / "one"), columns(tmp_path / "two")
    assert all(np.array_equal(one[name], two[name], equal_nan=True) for name in one)


def test_another_delay_law_leaves_the_order_of_the_samples(tmp_path: Path) -> None:
    seen: dict[str, dict[bytes, bytes]] = {}

    def recorded(name: str) -> Task:
        read = seen[name] = {}

        class Recorded:
            def __len__(self) -> int:
                return NUM_EXAMPLES

            def batch(self, indices: torch.Tensor) -> Batch:
                key = indices[:4].numpy().tobytes()  # the least there are
                read[key] = max(read.get(key, b""), indices.numpy().tobytes(), key=len)
                return build_data(TASK).train.batch(indices)

        examples = Recorded()
        test = build_data(TASK).test
        return Task(
            name="recorded", model=TASK.model, data=lambda: Data(examples, test), loss=TASK.loss,
            headline="loss", batch_size=6,
        )  # fmt: skip

    for name, law in (("even", Constant(time=1.0)), ("wild", Pareto(alpha=1.5))):
        simulated(tmp_path / name, task=recorded(name), delay=law, diagnostics=False)

    both = seen["even"].keys() & seen["wild"].keys()
    assert len(both) > 30
    for key in both:
        short, long = sorted((seen["even"][key], seen["wild"][key]), key=len)
        assert long.startswith(short)
    sizes = [columns(tmp_path / name)["samples"] for name in ("even", "wild")]
    assert not np.array_equal(*sizes)


@pytest.mark.parametrize("rule", ["asp", "ringmaster:limit=1,cancel=true"])
def test_a_replay_sizes_batches_alike(tmp_path: Path, rule: str) -> None:
    config = {"rule": RULES.parse(rule), "delay": Gamma(cv=0.7), "curriculum": Linear(over=25)}
    simulated(
        tmp_path / "run", task=task("digits:hidden=8"), optimizer=SGD(lr=1.0), updates=30, **config
    )

    assert Replay(tmp_path / "run").run().distance == 0
    assert len(set(columns(tmp_path / "run")["samples"].tolist())) > 3


def test_epochs_count_the_samples_that_were_drawn(tmp_path: Path) -> None:
    result = simulated(tmp_path / "run", updates=None, epochs=5.0)

    total = int(columns(tmp_path / "run")["samples"].sum())
    assert result.record["samples"] == total
    assert 5 * NUM_EXAMPLES <= total < 5 * NUM_EXAMPLES + 90


def test_the_record_says_how_it_was_asked_for(tmp_path: Path) -> None:
    result = simulated(tmp_path / "run", updates=5)

    asked = {"name": "cabs", "least": 4, "most": 90, "decay": 0.9, "chunks": 2}
    assert result.record["config"]["adaptive_batch"] == asked
    averages = load_checkpoint(tmp_path / "run" / "checkpoint").extra["averages"]
    assert averages["weight"] == pytest.approx(1 - 0.9**5)
    trace = noise().T.cov().trace().item()
    assert averages["noise"] / averages["weight"] == pytest.approx(trace, rel=0.5)
    assert trace == pytest.approx(DIM, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": RULES.parse("k-of-n:k=2")}, "rule k-of-n averages several gradients into one"),
        ({"local": LOCALS.parse("sgd:steps=2")}, "local sgd takes several steps for a push"),
        ({"optimizer": OPTIMIZERS.parse("adam")}, "adaptive_batch goes by a step that is the rate"),
        ({"optimizer": OPTIMIZERS.parse("lbfgs")}, "adaptive_batch goes by a step that is the"),
    ],
)
def test_what_cannot_be_combined_is_refused(options: dict[str, Any], message: str) -> None:
    optimizer = options.pop("optimizer", SGD())

    with pytest.raises(ValueError, match=f"^{message}"):
        AsyncTrainer(TASK, optimizer, RunConfig(adaptive_batch=SPEC), **options)


def test_jobs_side_by_side_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batched computes gradients of equally many samples"):
        Simulator(TASK, SGD(), RunConfig(adaptive_batch=SPEC), batched=True)


def test_workers_that_own_too_few_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^adaptive_batch: least=16 is more than the 13 samples"):
        simulated(tmp_path / "run", workers=30, adaptive_batch=CABS())


def test_guests_who_measure_no_noise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^adaptive_batch goes by the noise that workers measure"):
        AsyncTrainer(TASK, SGD(), RunConfig(adaptive_batch=SPEC), reach=Reach(guests=1))
