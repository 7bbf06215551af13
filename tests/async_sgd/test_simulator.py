"""The simulator as users call it: records, targets, failures, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from async_sgd import Simulator, simulator
from async_sgd.calibration import Calibration
from async_sgd.delays import Constant, Exponential, Gamma
from async_sgd.network import Network
from async_sgd.rules import RULES
from async_sgd.simulation import Change
from paramserver.averaging import AVERAGES
from paramserver.checkpoint import load_checkpoint
from paramserver.errors import ResourceError, RunFailedError
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.optimizers import OPTIMIZERS, SGD, Adam
from paramserver.record import Result
from tests.support.kept import check_that_the_best_is_kept
from tests.support.looked import check_that_the_net_was_looked_at, saturated
from workers.config import RunConfig
from workers.curriculum import PACINGS
from workers.stopping import EarlyStopping, Overfitting, Patience
from workers.tasks import task

DIGITS = task("digits:hidden=8")


def simulated(out: Path, **options: Any) -> Result:
    """Simulate three workers on digits; ``options`` are the simulator's or the configuration's."""
    what, optimizer = options.pop("task", DIGITS), options.pop("optimizer", Adam(lr=0.01))
    folder = {} if "resume" in options else {"out": out}
    config = {"workers": 3, "updates": 60, "evaluate_every_s": 0, **folder}
    names = {name: options.pop(name) for name in RunConfig.__dataclass_fields__ if name in options}
    return Simulator(what, optimizer, RunConfig(**{**config, **names}), **options).fit()


def params(out: Path) -> torch.Tensor:
    return load_checkpoint(out / "checkpoint").params


def columns(out: Path) -> dict[str, np.ndarray]:
    return Ledger.load(out / "updates.npz").columns()


def test_a_run_leaves_the_record_a_real_one_does(tmp_path: Path) -> None:
    result = simulated(tmp_path / "run", delay=Gamma(cv=0.5), evaluate_every_s=5.0)

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["mode"], record["updates"], record["workers"]) == ("simulate", 60, 3)
    assert record["config"]["delay"]["name"] == "gamma"
    assert record["config"]["task"]["name"] == "digits"
    assert record["conservation"]["holds"]
    assert record["stopped_because"] == result.stopped_because == "60 updates"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    tests = [line for line in map(json.loads, lines) if line["kind"] == "test"]
    seconds = [line["seconds"] for line in tests[:-1]]
    assert seconds == [5.0 * n for n in range(1, int(record["seconds"] / 5) + 1)]
    assert tests[-1]["seconds"] == record["seconds"] == columns(tmp_path / "run")["end"][-1]


def test_the_net_is_looked_at(tmp_path: Path) -> None:
    check_that_the_net_was_looked_at(simulated(tmp_path / "run", task=saturated()))


def test_looking_at_the_net_can_be_left_out(tmp_path: Path) -> None:
    for name, diagnostics in (("with", True), ("without", False)):
        simulated(tmp_path / name, task=saturated(), diagnostics=diagnostics)

    assert '"diagnostics"' not in (tmp_path / "without" / "metrics.jsonl").read_text()
    assert torch.equal(params(tmp_path / "with"), params(tmp_path / "without"))


def test_measures_are_in_the_record_and_leave_the_run_as_it_was(tmp_path: Path) -> None:
    options = {"delay": Gamma(cv=0.5), "batched": True, "rule": RULES.parse("bounded:limit=3")}
    simulated(tmp_path / "plain", **options)

    result = simulated(tmp_path / "measured", measure=("step", "gap", "cosine"), **options)

    ledger = columns(tmp_path / "measured")
    taken = ledger["dropped"] == 0
    gap, step = ledger["gap"][taken], ledger["step"][taken]
    assert torch.equal(params(tmp_path / "plain"), params(tmp_path / "measured"))
    assert np.array_equal(np.isnan(ledger["gap"]), ~taken)
    assert result.record["measures"]["gap"] == {"mean": gap.mean(), "max": gap.max()}
    assert (gap == 0).tolist() == (ledger["staleness"][taken] == 0).tolist()
    one_stale = np.flatnonzero(ledger["staleness"][taken] == 1)
    assert gap[one_stale] == pytest.approx(step[one_stale - 1], rel=1e-5)
    assert result.record["config"]["measure"] == ["step", "gap", "cosine"]


def test_parameters_that_have_diverged_end_a_run_that_drops_what_is_not_finite(
    tmp_path: Path,
) -> None:
    result = simulated(
        tmp_path / "run", optimizer=SGD(lr=1e30), on_nan="drop", updates=None, epochs=100
    )

    assert result.stopped_because.startswith("the parameters have diverged: none of the last 100")
    assert result.record["dropped"]["nonfinite"] >= 100


def test_the_same_run_made_again_has_the_same_bits(tmp_path: Path) -> None:
    for name in ("one", "two"):
        simulated(tmp_path / name, rule=RULES.parse("ssp:bound=1"))

    assert torch.equal(params(tmp_path / "one"), params(tmp_path / "two"))
    one, two = columns(tmp_path / "one"), columns(tmp_path / "two")
    assert all(np.array_equal(one[name], two[name], equal_nan=True) for name in one)


def test_torchs_threads_are_left_as_they_were(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        simulated(tmp_path / "run", updates=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_one_worker_trains_as_sequentially(tmp_path: Path) -> None:
    simulated(tmp_path / "slow", workers=1, delay=Exponential(mean=5.0))
    simulated(tmp_path / "fast", workers=1, delay=Constant(time=0.1))

    assert torch.equal(params(tmp_path / "slow"), params(tmp_path / "fast"))
    assert columns(tmp_path / "slow")["staleness"].max() == 0


@pytest.mark.parametrize("batched", [False, True])
def test_a_target_ends_the_run(tmp_path: Path, batched: bool) -> None:
    result = simulated(
        tmp_path / "run",
        until="accuracy=0.6",
        updates=None,
        evaluate_every_s=2.0,
        batched=batched,
        workers=8,
    )

    assert result.stopped_because == "accuracy=0.6 reached"
    assert result.best["accuracy"] >= 0.6


@pytest.mark.parametrize("stopping", [Patience(n=3), Overfitting(n=3)])
def test_early_stopping_keeps_the_best_version(tmp_path: Path, stopping: EarlyStopping) -> None:
    config = {"updates": 5000, "evaluate_every_s": 10.0, "early_stopping": stopping}

    result = simulated(tmp_path / "run", optimizer=Adam(lr=0.03), **config)

    check_that_the_best_is_kept(result, DIGITS, RunConfig(early_stopping=stopping))


def test_a_curriculum_follows_the_version(tmp_path: Path) -> None:
    paces = {"all": "linear:start=1", "late": "linear:start=0.1,over=1000000"}
    runs = {name: {"curriculum": PACINGS.parse(text)} for name, text in paces.items()}
    for name, config in {"none": {}, **runs, "batched": {**runs["late"], "batched": True}}.items():
        simulated(tmp_path / name, workers=8, updates=100, **config)

    assert torch.equal(params(tmp_path / "all"), params(tmp_path / "none"))
    late, batched = params(tmp_path / "late"), params(tmp_path / "batched")
    assert not torch.equal(late, params(tmp_path / "none"))
    torch.testing.assert_close(batched, late, rtol=1e-3, atol=1e-4)
    losses = [np.nanmean(columns(tmp_path / name)["loss"]) for name in ("late", "none")]
    assert losses[0] < losses[1]  # a tenth of the samples, the easiest ones


def test_an_average_is_what_is_evaluated(tmp_path: Path) -> None:
    plain = simulated(tmp_path / "plain")
    averaged = simulated(tmp_path / "averaged", average=AVERAGES.parse("all"))

    assert torch.equal(params(tmp_path / "plain"), params(tmp_path / "averaged"))
    assert plain.metrics != averaged.metrics


def test_network_and_service_take_their_time(tmp_path: Path) -> None:
    simulated(
        tmp_path / "run",
        workers=1,
        updates=10,
        delay=Constant(time=1.0),
        service=Constant(time=0.25),
        network=Network(latency=0.5),
    )

    assert columns(tmp_path / "run")["end"] == pytest.approx(2.25 * np.arange(1, 11))


def test_bandwidth_counts_every_byte(tmp_path: Path) -> None:
    network = Network(bandwidth=4 * params_of(DIGITS.model()))
    simulated(tmp_path / "run", workers=1, updates=2, delay=Constant(time=1.0), network=network)

    assert columns(tmp_path / "run")["end"] == pytest.approx([3.0, 6.0])


def params_of(model: nn.Module) -> int:
    """Return the length of the model's flat vector, padding included."""
    return Layout.of(model).numel


def test_the_comparison_with_a_recorded_run_is_in_the_record(tmp_path: Path) -> None:
    like = Calibration(tmp_path, Exponential(), Exponential(), 2.5, {0: 1, 2: 3})

    record = simulated(tmp_path / "run", like=like).record

    histogram = record["staleness"]["histogram"]
    shares = {s: n / 60 for s, n in histogram.items()}
    away = sum(abs({0: 0.25, 2: 0.75}.get(s, 0) - shares.get(s, 0)) for s in {0, 2, *shares}) / 2
    assert record["like"]["distance"] == pytest.approx(away)
    assert record["like"]["gradients_per_s"] == 2.5


def test_ctrl_c_ends_the_run_in_order(tmp_path: Path) -> None:
    def interrupt(status: Mapping[str, Any]) -> None:
        if status["updates"] > 20:
            raise KeyboardInterrupt

    result = simulated(
        tmp_path / "run", updates=10_000, evaluate_every_s=2.0, progress=once(interrupt)
    )

    assert result.stopped_because == "interrupted"
    assert 20 < result.record["updates"] < 10_000
    assert load_checkpoint(tmp_path / "run" / "checkpoint").version == result.record["updates"]


def once(progress: Any) -> Any:
    """Call ``progress`` until it has raised."""
    raised: list[bool] = []

    def call(status: Mapping[str, Any]) -> None:
        if not raised:
            try:
                progress(status)
            except KeyboardInterrupt:
                raised.append(True)
                raise

    return call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": SGD(lr=1e30)}, r"worker \d at clock \d+: the gradient of .* is not finite"),
        (
            {"rule": RULES.parse("bsp"), "changes": [Change.parse("crash:0@2")], "workers": 1},
            r"no worker is left after .* virtual seconds",
        ),
    ],
)
def test_a_run_that_breaks_says_why_and_leaves_its_record(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunFailedError, match=message):
        simulated(tmp_path / "run", **options)

    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["stopped_because"].startswith("error: ")
    assert (tmp_path / "run" / "updates.npz").exists()


def test_more_memory_than_there_is_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99999999 kB\nMemAvailable: 4 kB\n")
    monkeypatch.setattr(simulator, "_MEMINFO", meminfo)

    with pytest.raises(ResourceError, match=r"3 workers may read as many versions of \d+ param"):
        simulated(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": OPTIMIZERS.parse("lbfgs")}, "lbfgs is a round program, whose rounds"),
        ({"resume": Path("x")}, "resume is for real runs"),
        ({"address": "auto"}, "address is for real runs"),
        ({"batched": True, "gradient": "random"}, "batched computes by reverse mode only"),
        ({"delay": Constant(factors=(1.0, 2.0))}, "factors must be one for each of the 3 workers"),
        ({"service": Gamma(factors=(1.0,))}, "factors must be one for each of the 3 workers"),
        ({"changes": [Change.parse("crash:3@1")]}, "there is no worker 3 to crash: with 3"),
        ({"measure": ["gap", "lag"]}, "measure must be some of gap, cosine, step, got 'lag'"),
        ({"workers": 2000}, "2000 workers cannot share 1438 samples"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulated(tmp_path / "run", **options)


@pytest.mark.parametrize("text", ["crash:2", "crash:2@", "fall:2@3", "crash:x@1", "crash:1@-2", ""])
def test_a_change_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a change must be"):
        Change.parse(text)


def test_changes_are_read_as_they_are_written() -> None:
    assert str(Change.parse("join:12@3.5")) == "join:12@3.5"
    assert Change.parse("leave:0@2") == Change(2.0, 0, "leave")
