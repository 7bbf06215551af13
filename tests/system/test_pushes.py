"""Push forms with real workers: each reaches the optimum that a closed form knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from async_sgd.damping import DAMPINGS
from async_sgd.rules import SSP, Asynchronous
from async_sgd.trainer import AsyncTrainer
from paramserver.checkpoint import load_checkpoint
from paramserver.errors import CheckpointError, LayoutError, RunFailedError
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.optimizers import OPTIMIZERS
from paramserver.record import Result
from tests.support.gate import Loss, once_at, slowed
from tests.support.processes import kill_and_wait, titled
from workers.config import RunConfig
from workers.task import Batch, Data, Task, TensorExamples
from workers.tasks import task

pytestmark = [pytest.mark.system, pytest.mark.timeout(120), pytest.mark.usefixtures("cluster")]

DOUBLE = torch.float64
INPUTS, EXAMPLES = 150, 401
"""Three shards of 64 elements, padding included; shares of 200 and 201 samples."""


def examples(noise: float) -> TensorExamples:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES, INPUTS, generator=random, dtype=DOUBLE)
    slope = torch.randn(INPUTS, 1, generator=random, dtype=DOUBLE)
    off = torch.randn(EXAMPLES, 1, generator=random, dtype=DOUBLE)
    return TensorExamples(inputs, inputs @ slope + noise * off)


def squares(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(net(batch[0]), batch[1])


def model() -> nn.Module:
    return nn.Linear(INPUTS, 1, bias=False).double()


def regression(noise: float, loss: Loss) -> Task:
    """Least squares; without noise each worker's share has the optimum of all."""
    return Task(
        name="regression",
        model=model,
        data=lambda: Data(examples(noise), examples(noise)),
        loss=loss,
        headline="loss",
    )


def optimum(noise: float) -> Tensor:
    inputs, targets = examples(noise).batch(torch.arange(EXAMPLES))
    return torch.linalg.lstsq(inputs, targets).solution[:, 0]


def end_point(result: Result) -> Tensor:
    assert result.checkpoint is not None
    return load_checkpoint(result.checkpoint, Layout.of(model())).params[:INPUTS]


def run(
    optimizer: str, out: Path | None, *, noise: float = 1.0, loss: Loss = squares, **keys: Any
) -> Result:
    trainers = {k: keys.pop(k) for k in ("shards", "rule", "progress", "damping") if k in keys}
    values = {"workers": 2, "evaluate_every_s": 0, "out": out, **keys}
    trainers.setdefault("rule", Asynchronous())
    spec = OPTIMIZERS.parse(optimizer)
    return AsyncTrainer(regression(noise, loss), spec, RunConfig(**values), **trainers).fit()


@pytest.mark.long
def test_newton_is_exact_however_old_pushes_are_and_whoever_is_lost(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    result = run(
        "newton",
        tmp_path / "run",
        loss=slowed(squares, gate, calls=8, seconds=0.1),
        updates=40,
        progress=once_at(4, gate, lambda: kill_and_wait(titled("ray::Worker.push")[0])),
    )

    columns = Ledger.load(tmp_path / "run" / "updates.npz").columns()
    assert len(result.record["failures"]) == 1
    assert result.record["conservation"]["holds"]
    assert columns["staleness"].max() >= 1
    torch.testing.assert_close(end_point(result), optimum(1.0), rtol=0, atol=1e-9)


@pytest.mark.long
def test_coordinates_on_three_shards_reach_the_optimum(tmp_path: Path) -> None:
    result = run(
        "coordinate:block=7",  # some blocks lie on two shards
        tmp_path / "run",
        updates=1000,
        shards=3,
        rule=SSP(bound=1),
    )

    torch.testing.assert_close(end_point(result), optimum(1.0), rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "updates"),
    [("lbfgs:lr=0.1", 1200), ("bfgs:lr=0.1", 1200), ("saddle-free:floor=1e-9", 60)],
)
def test_other_forms_reach_the_optimum_that_all_shares_have(
    tmp_path: Path, optimizer: str, updates: int
) -> None:
    result = run(optimizer, tmp_path / "run", noise=0.0, updates=updates)

    torch.testing.assert_close(end_point(result), optimum(0.0), rtol=0, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "updates", "damping"),
    [
        ("lbfgs:lr=0.3,batch=256", 300, "dynsgd"),
        ("newton:lr=0.3,damping=1", 40, None),
        ("saddle-free:lr=0.3,damping=0.1", 40, None),
        ("natural:metric=diagonal,lr=0.5,batch=128", 300, None),
        ("natural:metric=dense,lr=0.5,batch=256", 40, None),
        ("natural:metric=diagonal,kl=none,lr=0.05,damping=0.01,batch=128", 300, "dynsgd"),
    ],
)
def test_forms_train_digits(
    tmp_path: Path, optimizer: str, updates: int, damping: str | None
) -> None:
    config = RunConfig(workers=2, updates=updates, evaluate_every_s=0, out=tmp_path / "run")

    result = AsyncTrainer(
        task("digits:hidden=16"),
        OPTIMIZERS.parse(optimizer),
        config,
        rule=Asynchronous(),
        damping=None if damping is None else DAMPINGS.parse(damping),
    ).fit()

    assert result.metrics["accuracy"] > 0.85


@pytest.mark.long
def test_a_form_goes_on_from_its_record_and_not_as_rounds(tmp_path: Path) -> None:
    run("newton", tmp_path / "run", updates=4)

    result = run("newton", None, resume=tmp_path / "run", updates=10)

    assert result.record["updates"] == 10
    torch.testing.assert_close(end_point(result), optimum(1.0), rtol=0, atol=1e-9)
    with pytest.raises(CheckpointError, match="was trained with"):
        AsyncTrainer(
            regression(1.0, squares), OPTIMIZERS.parse("newton"), RunConfig(resume=tmp_path / "run")
        ).fit()


@pytest.mark.long
def test_curvature_that_is_not_finite_is_refused_and_named(tmp_path: Path) -> None:
    def exploding(net: nn.Module, batch: Batch) -> Tensor:
        return squares(net, batch) * float("inf")

    with pytest.raises(RunFailedError, match=r"worker \d at clock 1: the gradient of 'weight'"):
        run("newton", tmp_path / "run", loss=exploding, updates=5)


def test_a_model_too_large_for_a_form_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"^newton holds a .* its limit is 100: use newton-cg"):
        run("newton:limit=100", tmp_path / "run", updates=5)

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optimizer", "keys", "message"),
    [
        ("cg", {}, "^cg is a round program without a push form: it runs under rule pieces, not"),
        ("lbfgs", {"rule": "bsp"}, "^lbfgs keeps what each worker has pushed, and rule bsp avera"),
        ("lbfgs", {"shards": 2}, "^lbfgs needs the whole vector in one place: use 1 shard, not 2"),
        ("newton", {"clip": "norm:max_norm=1"}, "clipping would break"),
        ("newton", {"gradient": "random"}, "needs exact gradients"),
    ],
)
def test_what_a_form_cannot_be_combined_with_is_refused(
    optimizer: str, keys: dict[str, object], message: str
) -> None:
    from async_sgd.rules import RULES  # noqa: PLC0415
    from paramserver.clipping import CLIPS  # noqa: PLC0415

    trainers: dict[str, Any] = {"rule": RULES.parse(str(keys.get("rule", "asp")))}
    if "shards" in keys:
        trainers["shards"] = keys["shards"]
    config: dict[str, Any] = {}
    if "clip" in keys:
        config["clip"] = CLIPS.parse(str(keys["clip"]))
    if "gradient" in keys:
        config["gradient"] = keys["gradient"]
    with pytest.raises(ValueError, match=message):
        AsyncTrainer(task("digits"), OPTIMIZERS.parse(optimizer), RunConfig(**config), **trainers)


def test_a_batch_for_which_there_are_not_enough_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 workers cannot each push 300 of 401 samples"):
        run("lbfgs:batch=300", tmp_path / "run", updates=5)
