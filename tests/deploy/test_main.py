"""The command line, with trainers that only record what they got."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from async_sgd.compensation import GapAware
from async_sgd.damping import DynSGD, NoDamping
from async_sgd.rules import SSP, BoundedStaleness
from deploy.listing import KINDS
from deploy.main import main
from deploy.train import TrainFlags
from paramserver.clipping import ClipNorm
from paramserver.errors import ParamServerError, RecordError, RunFailedError
from paramserver.optimizers import SGD, Adam
from paramserver.reach import Reach
from paramserver.record import Result
from paramserver.schedules import MultiStep
from workers.config import RunConfig
from workers.local import LocalAdamW
from workers.task import Task

RECORD: dict[str, Any] = {
    "config": {"rule": {"name": "ssp", "bound": 2}},
    "mode": "async",
    "task": "digits",
    "optimizer": {"name": "adam", "lr": 3e-3, "betas": [0.9, 0.999]},
    "workers": 2,
    "shards": 1,
    "updates": 1125,
    "gradients_per_s": 812.4,
    "seconds": 1.38,
    "final": {"accuracy": 0.9778, "loss": 0.08},
    "best": {"accuracy": 0.98, "loss": 0.07, "version": 900, "seconds": 1.1},
    "staleness": {"mean": 0.999, "max": 3, "p50": 1, "p95": 2},
    "conservation": {"left": 1124, "right": 1124, "holds": True},
    "dropped": {"stale": 2},
    "failures": [{"what": "worker 1", "seconds": 0.7}],
    "gateway": {"workers": 1, "guests": 2, "received_bytes": 1_500_000, "sent_bytes": 3_040_000},
    "stopped_because": "25 epochs done",
}


class FakeTrainer:
    """Keeps what it was made with; `fit` returns `RECORD` or raises."""

    made: list[FakeTrainer]
    raises: BaseException | None
    stopped_because: str
    folder: Path

    def __init__(self, task: Task, optimizer: object, config: RunConfig, **options: Any) -> None:
        self.task, self.optimizer, self.config = task, optimizer, config
        self.progress = options.pop("progress")
        self.options: Mapping[str, Any] = options
        self.made.append(self)

    def fit(self) -> Result:
        self.progress({"updates": 7, "loss": 0.5})
        if self.raises is not None:
            raise self.raises
        record = {**RECORD, "stopped_because": self.stopped_because}
        return Result(
            path=self.folder,
            metrics=record["final"],
            best=record["best"],
            checkpoint=None,
            stopped_because=self.stopped_because,
            record=record,
        )


class FakeAsync(FakeTrainer):
    pass


class FakeSync(FakeTrainer):
    pass


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeTrainer]:
    """Put fakes where the command imports the trainers and the report, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(FakeTrainer, "made", [], raising=False)
    monkeypatch.setattr(FakeTrainer, "raises", None, raising=False)
    monkeypatch.setattr(FakeTrainer, "stopped_because", "25 epochs done", raising=False)
    monkeypatch.setattr(FakeTrainer, "folder", tmp_path / "run", raising=False)
    modules: dict[str, dict[str, Any]] = {
        "async_sgd.trainer": {"AsyncTrainer": FakeAsync},
        "sync.trainer": {"SyncTrainer": FakeSync},
        "deploy.report": {"write_report": lambda folders, out=None: out or folders[0] / "page"},
    }
    for name, contents in modules.items():
        fake = types.ModuleType(name)
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
    return FakeTrainer


def made(trainers: type[FakeTrainer]) -> FakeTrainer:
    assert len(trainers.made) == 1
    return trainers.made[0]


def paramserver(line: str) -> int:
    return main(line.split())


# --- train: what reaches the trainer


def test_without_flags_digits_are_trained_asynchronously_with_two_workers(
    trainers: type[FakeTrainer],
) -> None:
    code = main(["train"])

    trainer = made(trainers)
    assert code == 0
    assert isinstance(trainer, FakeAsync)
    assert trainer.task.name == "digits"
    assert trainer.optimizer == Adam(lr=3e-3)
    assert trainer.config == RunConfig(workers=2, epochs=25.0)
    assert trainer.options == {}


def test_flags_reach_the_asynchronous_trainer(trainers: type[FakeTrainer]) -> None:
    text = (
        "train --workers 4 --optimizer sgd:lr=0.1 --rule ssp:bound=2 --damping dynsgd --shards 3 "
        "--compensation gap-aware:decay=0.99 --local adamw:steps=5,speeds=1/1/1/0.5 "
        "--measure gap,step --clip norm:max_norm=1 --schedule multistep:milestones=10/20 "
        "--updates 100 --seed 7 --batch-size 16 --on-nan drop --out here --until accuracy=0.97 "
        "--evaluate-every-s 0.5"
    )

    assert paramserver(text) == 0

    trainer = made(trainers)
    assert trainer.optimizer == SGD(lr=0.1)
    assert trainer.options == {
        "rule": SSP(bound=2),
        "damping": DynSGD(),
        "compensation": GapAware(decay=0.99),
        "local": LocalAdamW(steps=5, speeds=(1.0, 1.0, 1.0, 0.5)),
        "measure": ("gap", "step"),
        "shards": 3,
    }
    assert trainer.config == RunConfig(
        workers=4,
        clip=ClipNorm(max_norm=1),
        schedule=MultiStep(milestones=(10, 20)),
        updates=100,
        seed=7,
        batch_size=16,
        on_nan="drop",
        out=Path("here"),
        until="accuracy=0.97",
        evaluate_every_s=0.5,
    )


def test_a_flag_of_several_values_is_given_several_times(
    trainers: type[FakeTrainer], tmp_path: Path
) -> None:
    (tmp_path / "groups.toml").write_text(
        'freeze = ["decoder"]\n[[group]]\nname = "encoder"\nlr_factor = 0.5\n'
    )
    argv = ["train", "--task", "digits-autoencoder"]

    main([*argv, "--group", "encoder:lr_factor=0.1", "--group", "*.bias:weight_decay=0"])
    main([*argv, "--config", str(tmp_path / "groups.toml")])

    flags, file = (made.config for made in trainers.made)
    assert [(g.name, g.lr_factor, g.weight_decay) for g in flags.group] == [
        ("encoder", 0.1, None),
        ("*.bias", 1.0, 0.0),
    ]
    assert [(g.name, g.lr_factor) for g in file.group] == [("encoder", 0.5)]
    assert (flags.freeze, file.freeze) == ((), ("decoder",))


def test_a_truth_that_a_mode_may_not_have_is_a_switch_as_others_are(
    trainers: type[FakeTrainer],
) -> None:
    assert paramserver("train --clear-text --listen 10.0.0.7:0") == 0

    assert made(trainers).options["reach"] == Reach(clear_text=True, listen="10.0.0.7:0")


def test_flags_reach_the_synchronous_trainer(trainers: type[FakeTrainer]) -> None:
    assert paramserver("train --mode sync --reduce sum --collective gloo --epochs 2") == 0

    trainer = made(trainers)
    assert isinstance(trainer, FakeSync)
    assert trainer.options == {"reduce": "sum", "collective": "gloo"}
    assert trainer.config == RunConfig(epochs=2)


@pytest.mark.parametrize("end", ["--updates 5", "--epochs 5", "--until loss<=0.1"])
def test_a_run_with_an_end_gets_no_other(trainers: type[FakeTrainer], end: str) -> None:
    assert paramserver(f"train {end}") == 0

    config = made(trainers).config
    ends = [config.updates, config.epochs, config.until]
    assert sum(value is not None for value in ends) == 1


def test_flags_win_over_the_file(trainers: type[FakeTrainer], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'workers = 3\nepochs = 4\nseed = 9\nout = "there"\nmode = "async"\n'
        'optimizer = {name = "adam", lr = 1, betas = [0.8, 0.9]}\n'
        'task = "digits:hidden=8"\nclip = "norm:max_norm=2"\n'
        '[rule]\nname = "bounded"\nlimit = 5\n'
    )

    assert paramserver("train --config run.toml --workers 5 --clip none --damping none") == 0

    trainer = made(trainers)
    assert trainer.optimizer == Adam(lr=1.0, betas=(0.8, 0.9))
    assert trainer.options == {"rule": BoundedStaleness(limit=5), "damping": NoDamping()}
    assert trainer.config == RunConfig(workers=5, epochs=4.0, seed=9, out=Path("there"))


def test_a_task_is_found_in_the_current_directory(
    trainers: type[FakeTrainer], tmp_path: Path
) -> None:
    (tmp_path / "my_own_task.py").write_text(
        "import torch\n"
        "from workers.task import Task\n"
        "def factory(width: int = 3) -> Task:\n"
        "    return Task(name=f'mine-{width}', model=lambda: None, data=lambda: None,\n"
        "                loss=lambda m, b: None, headline='loss')\n"
    )

    assert main(["train", "--task", "my_own_task:factory:width=5"]) == 0

    assert made(trainers).task.name == "mine-5"


# --- train: what it shows and how it ends


def test_the_outcome_is_a_short_table(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train"]) == 0

    shown = capsys.readouterr()
    rows = [" ".join(line.split()) for line in shown.out.splitlines() if line.strip()]
    assert rows[:-2] == [
        "mode async",
        "task digits",
        "optimizer adam:lr=0.003",
        "rule ssp:bound=2",
        "workers 2",
        "shards 1",
        "updates 1,125",
        "gradients/s 812",
        "seconds 1.4",
        "over gRPC 1 of 2 workers and 2 guests; 1.5 MB in, 3.0 MB out",
        "final accuracy 0.9778, loss 0.08",
        "best accuracy 0.98, loss 0.07 at version 900 after 1.1 s",
        "staleness mean 0.999, p95 2, max 3",
        "law of staleness holds: 1,124 = 1,124",
        "dropped 2 (2 stale)",
        "failures worker 1 after 0.7 s",
        "stopped because 25 epochs done",
    ]
    assert rows[-2:] == [f"record: {tmp_path}/run", f"report: {tmp_path}/run/page"]
    assert shown.err.splitlines() == [
        "async training of digits with adam:lr=0.003: starting 2 workers …",
        "7 updates  loss 0.5",
    ]


def test_an_interrupted_run_shows_its_outcome_and_exits_with_130(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainers.stopped_because = "interrupted"

    assert main(["train"]) == 130

    shown = capsys.readouterr()
    assert "record:" in shown.out
    assert shown.err.endswith("paramserver: interrupted\n")


def test_ctrl_c_before_the_run_exits_with_130(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainers.raises = KeyboardInterrupt()

    assert main(["train"]) == 130

    assert capsys.readouterr().err.endswith("paramserver: interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RunFailedError("worker 1 broke", "runs/x"), 1, "worker 1 broke (record: runs/x)"),
        (RecordError("runs/x is taken"), 1, "runs/x is taken"),
        (ValueError("until names 'acc'; task 'digits' has accuracy"), 2, "until names 'acc'; "),
    ],
)
def test_a_run_that_fails_is_one_line(
    trainers: type[FakeTrainer],
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
) -> None:
    trainers.raises = error

    assert main(["train"]) == code

    last = capsys.readouterr().err.splitlines()[2:]
    assert len(last) == 1
    assert last[0].startswith(f"paramserver: {line}")


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    trainers: type[FakeTrainer],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(folders: list[Path], out: Path | None = None) -> Path:
        raise ParamServerError("the disk is full")

    monkeypatch.setattr(sys.modules["deploy.report"], "write_report", broken)

    assert main(["train"]) == 0

    assert "report:" not in capsys.readouterr().out


def test_a_users_error_comes_with_their_traceback_and_without_ours(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken_task.py").write_text("def factory():\n    return 1 / 0\n")

    assert main(["train", "--task", "broken_task:factory"]) == 1

    err = capsys.readouterr().err
    assert 'broken_task.py", line 2, in factory' in err
    assert "registry.py" not in err
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1] == (
        "paramserver: task broken_task:factory failed: ZeroDivisionError: division by zero"
    )


def test_a_users_module_that_does_not_import_shows_where(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "unimportable.py").write_text("import a_module_nobody_has\n")

    assert main(["train", "--task", "unimportable:factory"]) == 1

    err = capsys.readouterr().err
    assert 'unimportable.py", line 1, in <module>' in err
    assert "importlib" not in err


# --- usage errors: exit code 2 and one line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "",
            "name a command: train, simulate, replay, list, experiment, report, surface, diagnose, "
            "bench (see `paramserver --help`)",
        ),
        (
            "trian",
            "there is no command 'trian'; did you mean train? "
            "(there are train, simulate, replay, list, experiment, report, surface, diagnose, "
            "bench)",
        ),
        (
            "train --worker 3",
            "there is no flag --worker; did you mean --workers? (see `paramserver train --help`)",
        ),
        ("train digits", "'digits' is one word too many (see `paramserver train --help`)"),
        ("train --workers", "--workers: expected one argument"),
        ("train --workers two", "--workers: expected a whole number, got 'two'"),
        ("train --workers 1.5", "--workers: expected a whole number, got '1.5'"),
        ("train --epochs few", "--epochs: expected a number, got 'few'"),
        ("train --workers 0", "workers must be 1 or more, got 0"),
        ("train --shards 0", "shards must be 1 or more, got 0"),
        ("train --epochs -1", "epochs must be above 0, got -1.0"),
        ("train --until soon", "until must be like accuracy=0.97 or loss<=0.1, got 'soon'"),
        (
            "train --out a --resume b",
            "a resumed run continues in its own folder: give out or resume, not both",
        ),
        ("train --mode asink", "--mode: expected async or sync, got 'asink'"),
        (
            "train --rule spp",
            "--rule: there is no rule 'spp'; did you mean 'ssp'? "
            "(there are asp, bounded, bsp, fedbuff, k-of-n, pieces, rennala, ringleader, "
            "ringmaster, softsync, ssp, sync-switch)",
        ),
        (
            "train --rule ssp:slack=1",
            "--rule: rule 'ssp' has no key 'slack'; it has bound",
        ),
        (
            "train --optimizer sgd:lr=fast",
            "--optimizer: optimizer 'sgd': lr: expected float, got 'fast'",
        ),
        (
            "train --damping inverted",
            "--damping: there is no damping 'inverted'; did you mean 'inverse'? "
            "(there are dynsgd, exponential, hinge, inverse, koloskova, mishchenko, none, "
            "polynomial)",
        ),
        ("train --schedule step", "--schedule: schedule 'step' needs every"),
        (
            "train --mode sync --rule ssp",
            "rule is for mode async only, and this run's is sync",
        ),
        (
            "train --mode sync --damping none",
            "damping is for mode async only, and this run's is sync",
        ),
        (
            "train --compensation dcasgd",
            "--compensation: there is no compensation 'dcasgd'; did you mean 'dc-asgd'? "
            "(there are adag, dc-asgd, dc-asgd-adaptive, fasgd, gap-aware)",
        ),
        (
            "train --mode sync --compensation adag",
            "compensation is for mode async only, and this run's is sync",
        ),
        (
            "train --mode sync --local sgd",
            "local is for mode async only, and this run's is sync; rule bsp averages local steps "
            "there",
        ),
        (
            "train --local sgd:step=3",
            "--local: local 'sgd' has no key 'step'; it has steps, speeds, lr, momentum, "
            "weight_decay",
        ),
        (
            "train --mode sync --measure gap",
            "measure is for mode async only, and this run's is sync",
        ),
        ("train --measure lag", "measure must be some of gap, cosine, step, got 'lag'"),
        ("train --mode sync --shards 2", "shards is for mode async only, and this run's is sync"),
        ("train --reduce sum", "reduce is for mode sync only, and this run's is async"),
        ("train --collective gloo", "collective is for mode sync only, and this run's is async"),
        ("train --config no.toml", "--config no.toml cannot be read: No such file or directory"),
        (
            "list rule",
            "there is no list of 'rule'; there are tasks, optimizers, rules, dampings, "
            "compensations, compressions, locals, delays, averages, batches, schedules, clips, "
            "stoppings, curricula, difficulties",
        ),
        ("report", "the following arguments are required: DIR"),
        (
            "bench speed",
            "there is no benchmark 'speed'; there are pushpull, train, allreduce, simulate, remote",
        ),
        (
            "bench train --jsn",
            "there is no flag --jsn; did you mean --json? (see `paramserver bench --help`)",
        ),
    ],
)
def test_what_does_not_exist_is_one_line_and_exits_with_2(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert paramserver(line) == 2

    shown = capsys.readouterr()
    assert shown.err == f"paramserver: {message}\n"
    assert shown.out == ""
    assert trainers.made == []


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("workers = ", "--config run.toml is not TOML: Invalid value (at end of document)"),
        ("workers = true", "run.toml: workers: expected a whole number, got True"),
        ("workers = 2.5", "run.toml: workers: expected a whole number, got 2.5"),
        ("workers = [1]", "run.toml: workers: expected a whole number, got [1]"),
        ("out = 3", "run.toml: out: expected a text, got 3"),
        ("until = ['loss']", "run.toml: until: expected a text, got ['loss']"),
        ("optimizer = {lr = 1}", "run.toml: optimizer: optimizer needs a name; there are "),
        (
            "optimizer = {name = 'sgd', rate = 1}",
            "run.toml: optimizer: optimizer 'sgd' has no key 'rate'; it has lr, weight_decay",
        ),
        (
            "optimizer = 3",
            'run.toml: optimizer: expected "name:key=value" or {name = …, key = …}, got 3',
        ),
        (
            "worker = 3",
            "run.toml: there is no key 'worker'; did you mean workers? (there are "
            "adaptive_batch, address, average, batch_size, ",
        ),
        ("config = 'b.toml'", "run.toml: there is no key 'config' (there are "),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line_and_exits_with_2(
    trainers: type[FakeTrainer],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    toml: str,
    message: str,
) -> None:
    (tmp_path / "run.toml").write_text(toml)

    assert paramserver("train --config run.toml") == 2

    err = capsys.readouterr().err
    assert err.startswith(f"paramserver: {message}")
    assert err.count("\n") == 1


def test_an_unknown_task_lists_those_there_are(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--task", "digts"]) == 2

    err = capsys.readouterr().err
    assert err.startswith("paramserver: --task: there is no task 'digts'; did you mean 'digits'?")


# --- the other commands


def test_list_holds_every_plug_in_with_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    words = {word for line in lines for word in line.replace("│", " ").split()}
    for registry in KINDS.values():
        for entry in registry:
            assert entry.name in words
            assert {key.partition("=")[0] for key in words} >= set(entry.parameters())


def test_list_of_one_kind_holds_only_that(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "rules"]) == 0

    shown = capsys.readouterr().out
    assert "bound=4" in shown
    assert "limit (needed)" in shown
    assert "adam" not in shown


def test_report_prints_where_the_page_is(
    trainers: type[FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "runs/a", "runs/b", "--out", "both.html"]) == 0

    assert capsys.readouterr().out == "both.html\n"


def test_bench_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, dict[str, bool]]] = []
    fake = types.ModuleType("deploy.bench")

    def run(name: str, **flags: bool) -> int:
        got.append((name, flags))
        return 3

    vars(fake)["run"] = run
    monkeypatch.setitem(sys.modules, "deploy.bench", fake)

    assert main(["bench", "pushpull", "--json", "--peers"]) == 3

    assert got == [("pushpull", {"json": True, "peers": True, "quick": False, "loopback": False})]


def test_help_of_train_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    flags = [n for n, line in enumerate(lines) if line.startswith("  --")]
    assert len(flags) == len(dataclasses.fields(TrainFlags))
    assert all(lines[n + 1].startswith("        ") for n in flags)


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_names_the_commands(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0

    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in ("train", "list", "report", "bench"))


def test_help_needs_neither_torch_nor_ray_nor_matplotlib() -> None:
    code = (
        "import sys; from deploy.main import main; main(['--help']); "
        "sys.exit(bool({'torch', 'ray', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
