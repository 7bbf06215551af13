"""What `paramserver diagnose` says of points that are known, and of what cannot be looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from async_sgd.simulator import Simulator
from deploy.diagnose import DiagnoseConfig, Found, diagnose
from deploy.main import FAILED, USAGE, main
from paramserver.checkpoint import load_checkpoint
from paramserver.errors import RecordError, TaskError
from paramserver.optimizers import SGD
from workers.config import RunConfig
from workers.examples import Batch, Data, TensorExamples
from workers.stopping import Patience
from workers.task import Task
from workers.tasks import task as find_task

DOUBLE = torch.float64


def linear() -> Task:
    """Return a linear model with squared loss, whose Hessian is the inputs' second moments."""
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=noise, dtype=DOUBLE)
    examples = TensorExamples(inputs, inputs[:, :2].sin())
    return Task(
        name="linear",
        model=lambda: nn.Linear(5, 2, dtype=DOUBLE),
        data=lambda: Data(examples, examples),
        loss=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
        headline="loss",
        batch_size=60,
    )


class Product(nn.Module):
    """y = u v x, both of which start at 0: a saddle that plain gradients do not leave."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros((), dtype=DOUBLE))
        self.v = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.u * self.v * inputs


def two_layers(loss: Any = None) -> Task:
    inputs = torch.ones(600, 1, dtype=DOUBLE)
    examples = TensorExamples(inputs, inputs)

    def squares(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean() / 2

    return Task(
        name="two-layers",
        model=Product,
        data=lambda: Data(examples, examples),
        loss=loss or squares,
        headline="loss",
        batch_size=8,
    )


def trained(out: Path, task: Task, *, lr: float = 0.1, **options: Any) -> Path:
    config = RunConfig(workers=1, evaluate_every_s=0, out=out, **{"updates": 10, **options})
    Simulator(task, SGD(lr=lr), config).fit()
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "run"
    return trained(out, find_task("digits:hidden=4"), updates=60)


def test_training_that_cannot_leave_a_saddle_is_told_so(tmp_path: Path) -> None:
    """(u v - 1)² / 2 has the Hessian [[0, -1], [-1, 0]] at 0: eigenvalues -1 and 1."""
    folder = trained(tmp_path / "run", two_layers())

    curved = diagnose(folder, task=two_layers(), jobs=1).curvature

    assert curved.is_critical
    assert curved.spectrum.ritz.tolist() == pytest.approx([-1, 1])
    assert curved.spectrum.num_negative == 1
    assert curved.lowest == pytest.approx({"u": 0.5, "v": 0.5})
    assert curved.verdict == "a saddle: the loss falls along 1 of 2 directions"
    assert curved.largest_rate == pytest.approx(2)
    assert curved.loss == 0.5


def test_a_linear_models_minimum_has_the_spectrum_of_its_inputs(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", linear(), lr=0.5, updates=400)
    inputs = torch.cat([linear().data().train.batch(torch.arange(60))[0], torch.ones(60, 1)], dim=1)
    moments = torch.linalg.eigvalsh(inputs.T @ inputs / 60)

    curved = diagnose(folder, task=linear(), jobs=1).curvature

    assert curved.dimensions == 12
    twice = sorted([*moments.tolist(), *moments.tolist()])  # the two outputs share no parameter
    assert curved.spectrum.ritz.tolist() == pytest.approx(twice)
    assert curved.verdict == "a minimum: the loss rises along every direction"


def test_gradient_descent_is_stable_just_below_the_rate_it_names(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", linear(), updates=1)
    limit = diagnose(folder, task=linear(), jobs=1).curvature.largest_rate

    below = trained(tmp_path / "below", linear(), lr=0.98 * limit, updates=1500)
    above = trained(tmp_path / "above", linear(), lr=1.02 * limit, updates=1500, on_nan="stop")

    def loss(folder: Path) -> float:
        return float(json.loads((folder / "result.json").read_text())["final"]["loss"])

    assert loss(below) < 0.1
    assert loss(above) > 10


def test_where_the_gradient_leads_down_is_no_critical_point(digits: Path) -> None:
    found = diagnose(digits, DiagnoseConfig(steps=30), jobs=1)

    assert not found.curvature.is_critical
    assert found.curvature.verdict.startswith("no critical point, the gradient still leads down; ")
    assert list(found.diagnosis.layers) == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_both_ends_are_those_of_the_whole_hessian(digits: Path) -> None:
    """Against every eigenvalue of the Hessian that torch computes itself, a row a parameter."""
    task = find_task("digits:hidden=4")
    model, data = task.model(), task.data()
    kept = load_checkpoint(digits / "checkpoint")
    kept.layout.load(model, kept.params)
    batch = data.train.batch(torch.arange(len(data.train)))
    named = dict(model.named_parameters())

    def loss(*params: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(named, params, strict=True)), batch[:1])
        return functional.cross_entropy(logits, batch[1])

    blocks = torch.autograd.functional.hessian(loss, tuple(named.values()))
    rows = [
        torch.cat([b.reshape(p.numel(), -1) for b in row], dim=1)
        for p, row in zip(named.values(), blocks, strict=True)
    ]
    eigenvalues = torch.linalg.eigvalsh(torch.cat(rows).double())

    ritz = diagnose(digits, DiagnoseConfig(steps=60), jobs=1).curvature.spectrum.ritz

    assert float(ritz[0]) == pytest.approx(float(eigenvalues[0]), abs=1e-4)
    assert ritz[-3:].tolist() == pytest.approx(eigenvalues[-3:].tolist(), rel=1e-3)


def test_what_was_found_is_in_the_record_and_on_the_page(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(digits, tmp_path / "run")

    assert main(["diagnose", str(folder), "--steps", "5", "--jobs", "1"]) == 0

    said = capsys.readouterr().out
    for what in ("version", "smallest eigenvalues", "no critical point", "1.weight", "relu"):
        assert what in said, what
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["kind"], line["version"], line["updates"]) == ("curvature", 60, 60)
    assert len(line["ritz"]) == 5
    assert line["verdict"] in (folder / "report.html").read_text()


def test_the_best_version_is_looked_at_if_it_was_kept(tmp_path: Path) -> None:
    task = find_task("digits:hidden=4")
    stopping = Patience(n=2)
    config = RunConfig(
        workers=1, epochs=9, early_stopping=stopping, evaluate_every_s=20, out=tmp_path / "run"
    )
    Simulator(task, SGD(lr=3.0), config).fit()
    versions = {
        name: load_checkpoint(tmp_path / "run" / name).version for name in ("best", "checkpoint")
    }

    def at(**where: Any) -> Found:
        return diagnose(tmp_path / "run", DiagnoseConfig(steps=1, **where), jobs=1)

    assert versions["best"] < versions["checkpoint"]
    assert at().diagnosis.version == at(at="best").diagnosis.version == versions["best"]
    assert at(at="end").diagnosis.version == versions["checkpoint"]
    assert at(data="validation").curvature.num_samples == 144


def test_progress_is_told_up_to_the_end(digits: Path) -> None:
    told: list[tuple[int, int]] = []

    diagnose(digits, DiagnoseConfig(steps=3), jobs=1, progress=lambda *at: told.append(at))

    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_run_without_a_checkpoint_or_a_best_version_says_so(tmp_path: Path, digits: Path) -> None:
    folder = shutil.copytree(digits, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint")

    with pytest.raises(RecordError, match=r"has no checkpoint: there are no parameters"):
        diagnose(folder, jobs=1)
    with pytest.raises(RecordError, match=r"has no best version: there are no parameters"):
        diagnose(digits, DiagnoseConfig(at="best"), jobs=1)


def test_a_run_without_validation_data_has_no_curvature_of_them(digits: Path) -> None:
    with pytest.raises(ValueError, match=r"has no validation data: look at train or test"):
        diagnose(digits, DiagnoseConfig(data="validation"), jobs=1)


def test_a_loss_that_is_not_finite_has_no_curvature(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", two_layers())

    def infinite(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).square().mean() * torch.inf

    with pytest.raises(TaskError, match=r"'two-layers' or its gradient is not finite here"):
        diagnose(folder, task=two_layers(infinite), jobs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": "middle"}, "at must be end or best, got 'middle'"),
        ({"data": "all"}, "data must be train, test, validation, got 'all'"),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiagnoseConfig(**changes)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], USAGE, "name the folder of a run's record first"),
        (["{run}", "--steps", "0"], USAGE, "steps must be 1 or more, got 0"),
        (["{run}", "--jobs", "0"], USAGE, "jobs must be 1 or more, got 0"),
        (["{run}", "--data", "validation"], USAGE, "has no validation data"),
        (["{run}/nothing"], FAILED, "config.json"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(
    digits: Path, argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *(word.format(run=digits) for word in argv)]) == code

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
