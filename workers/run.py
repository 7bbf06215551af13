"""What every driver does beside driving: timers, the best version, early stopping, the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from paramserver.averaging import AVERAGES
from paramserver.batch_sizes import ADAPTIVE_BATCHES
from paramserver.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from paramserver.clipping import CLIPS
from paramserver.compression import COMPRESSIONS
from paramserver.groups import GROUPS
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.packing import unpack
from paramserver.record import Result, RunFolder, versions
from paramserver.registry import Registry
from paramserver.schedules import SCHEDULES
from paramserver.trajectory import Trajectory
from workers.config import RunConfig, Target
from workers.curriculum import PACINGS
from workers.diagnostics import Diagnosis
from workers.difficulty import DIFFICULTIES
from workers.examiner import Examined, Keep
from workers.stopping import STOPPINGS, Stopper
from workers.task import Task, build_model

logger = logging.getLogger(__name__)

_TRAIN_LINE_S = 1.0
"""Seconds between two lines of training figures in metrics.jsonl."""

_FIGURES = ("loss", "staleness_mean", "staleness_max", "batch_size")
"""What such a line holds of a status, where there is such a thing."""


_PLUGINS: Mapping[str, Registry[Any]] = {
    "adaptive_batch": ADAPTIVE_BATCHES,
    "average": AVERAGES,
    "clip": CLIPS,
    "compress": COMPRESSIONS,
    "compress_pull": COMPRESSIONS,
    "curriculum": PACINGS,
    "difficulty": DIFFICULTIES,
    "early_stopping": STOPPINGS,
    "group": GROUPS,
    "schedule": SCHEDULES,
}


def _plain(name: str, value: Any) -> Any:
    """Return a field's value as a record holds it."""
    if isinstance(value, tuple):
        return [_plain(name, one) for one in value]
    if value is not None and name in _PLUGINS:
        return _PLUGINS[name].describe(value)
    return value if isinstance(value, int | float | str | None) else str(value)


class Run:
    """One run, as its driver keeps it. Used by one thread."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        layout: Layout,
        described: Mapping[str, Any],
        folder: RunFolder,
        resumed: Checkpoint | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the run that `described` tells of in ``folder``; see `start`."""
        self._clock = clock
        self.folder, self.resumed = folder, resumed
        self.started_at: float | None = None
        self.num_failures = 0
        self._task, self._config, self._described = task, config, dict(described)
        self._layout = layout
        self._gradient_bytes = layout.numel * layout.dtype.itemsize
        self._target = None if config.until is None else Target.parse(config.until)
        extra: Mapping[str, Any] = {} if resumed is None else resumed.extra
        self._seconds_before = float(extra.get("seconds", 0.0))
        stopping = config.early_stopping
        self._stopper = None if stopping is None else Stopper(stopping, extra.get("stopping"))
        self.enough = None if self._stopper is None else self._stopper.enough
        """Why the run that is resumed had ended early, and ends again; None if it goes on."""
        self._best: dict[str, Any] = dict(extra.get("best", {}))
        if folder.best.exists():  # a run that was killed may have got there after its checkpoint
            self._best = dict(load_checkpoint(folder.best, layout).extra["best"])
            if self._stopper is None:  # from here on the last version is kept
                aside = folder.set_best_aside(self._best["version"])
                logger.warning("the best version so far is in %s: none is kept from here on", aside)
        self._trajectory: Trajectory | None = None
        if config.trajectory is not None:
            self._trajectory = Trajectory(folder.trajectory, layout, config.trajectory)
        self._final: dict[str, float] = {}
        self._failures: list[dict[str, Any]] = []
        self._warnings: dict[str, str] = {}  # what diagnostics found wrong, by what it is about
        self._wrong_now: Mapping[str, str] = {}  # at the version that was looked at last
        self._last_evaluation = self._last_checkpoint = self._last_line = 0.0
        self._counts = (0, 0.0)  # updates and seconds at the last line
        self._result: Result | None = None

    @classmethod
    def start(
        cls,
        task: Task,
        config: RunConfig,
        layout: Layout,
        described: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> Run:
        """Make the run's folder, or open the one that is resumed and load its checkpoint.

        ``clock`` gives the seconds the run is timed in.

        Raises:
            RecordError: The folder cannot be used.
            CheckpointError: There is nothing to resume, or it is of another model.
        """
        if config.resume is not None:
            folder = RunFolder.reopen(config.resume)
            resumed = load_checkpoint(folder.checkpoint, layout)
            folder.rewind(resumed.version)
            return cls(task, config, layout, described, folder, resumed, clock)
        folder = RunFolder.create(config.out, f"{task.name}-{described['mode']}")
        run = cls(task, config, layout, described, folder, None, clock)
        folder.write_config(run.configuration())
        if run._trajectory is not None:
            run._trajectory.add(0, layout.flatten(build_model(task, config.seed)))
        return run

    def configuration(self) -> dict[str, Any]:
        """Return everything the run was asked for."""
        config = {name: getattr(self._config, name) for name in self._config.__dataclass_fields__}
        plain = {name: _plain(name, value) for name, value in config.items()}
        task = self._task.described or self._task.name
        return {"task": task, **plain, **self._described}

    def started(self) -> None:
        """Start the clock: the workers go."""
        self.started_at = self._clock()
        self._last_checkpoint = self._last_line = self.started_at
        self._last_evaluation = self.started_at

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        since = 0.0 if self.started_at is None else self._clock() - self.started_at
        return self._seconds_before + since

    def evaluation_is_due(self) -> bool:
        """Whether to start an evaluation now."""
        return self._is_due("_last_evaluation", self._config.evaluate_every_s)

    def checkpoint_is_due(self) -> bool:
        """Whether to write a checkpoint now."""
        return self._is_due("_last_checkpoint", self._config.checkpoint_every_s)

    @property
    def keep(self) -> Keep | None:
        """When the next evaluation is to bring the parameters with it; None if never."""
        if self._stopper is None and self._trajectory is None:
            return None
        return self._judge

    def evaluated(self, examined: Examined, status: Mapping[str, Any]) -> str | None:
        """Record what came of an evaluation; return why to stop, if it says so."""
        metrics, version = examined.metrics, examined.version
        self._final = metrics
        self.folder.log({"kind": "test", **self._axes(status), "version": version, **metrics})
        if examined.diagnosis is not None:
            self._diagnosed(examined.diagnosis, status)
        # first, as it says what the metrics lack
        enough = None if self._stopper is None else self._stopper.evaluated(metrics)
        params = examined.params
        kept = None if params is None else unpack(params, self._layout.dtype)
        judge = self._judge
        if judge.better(metrics[judge.metric]):
            self._best = {**metrics, "version": version, "seconds": self.seconds}
            if self._stopper is not None and kept is not None:
                self._save_best(version, kept)
        if self._trajectory is not None and kept is not None:
            self._trajectory.add(version, kept)
        if self._target is None:
            return enough
        if self._target.metric not in metrics:
            raise ValueError(
                f"until names {self._target.metric!r}; task {self._task.name!r} has "
                f"{', '.join(sorted(metrics))}"
            )
        return f"{self._config.until} reached" if self._target.reached(metrics) else enough

    def tell(
        self, status: Mapping[str, Any], progress: Callable[[Mapping[str, Any]], None] | None
    ) -> None:
        """Show where the run stands, and write a line of it once a second."""
        now = self._clock()
        updates, before = self._counts
        rate = (status["updates"] - updates) / max(now - before, 1e-9) if before else 0.0
        figures = {
            **{k: status[k] for k in _FIGURES if k in status},
            "updates_per_s": rate,
        }
        if now - self._last_line >= _TRAIN_LINE_S and "loss" in status:
            self.folder.log({"kind": "train", **self._axes(status), **figures})
            self._last_line = now
        self._counts = (status["updates"], now)
        if progress is not None:
            progress(
                {
                    **status,
                    **figures,
                    "run": self.folder.path.name,
                    "gradient_bytes": status["gradients"] * self._gradient_bytes,
                    "metrics": self._final,
                    "warnings": list(self._wrong_now.values()),
                    "seconds": self.seconds,
                    "failures": self.num_failures,
                }
            )

    def failed(self, what: str) -> int:
        """Count the loss of a process; return how many were lost."""
        self.num_failures += 1
        self._failures.append({"what": what, "seconds": self.seconds})
        logger.warning("%s was lost after %.1f s and is replaced", what, self.seconds)
        return self.num_failures

    def save(self, checkpoint: Checkpoint, ledger: Ledger | None = None) -> None:
        """Write a checkpoint, and the ledger up to it."""
        checkpoint.extra.update(seconds=self.seconds, best=self._best)
        if self._stopper is not None:
            checkpoint.extra["stopping"] = self._stopper.state()
        if ledger is not None:
            ledger.save(self.folder.updates)  # first: a ledger may be ahead of its checkpoint
        save_checkpoint(self.folder.checkpoint, checkpoint)

    def finish(self, reason: str, status: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Write the record's result."""
        seconds = self.seconds
        record = {
            "config": self.configuration(),
            "versions": versions(),
            **{k: self._described[k] for k in ("mode", "optimizer")},
            "task": self._task.name,
            "workers": self._config.workers,
            "shards": self._described.get("shards", 1),
            "updates": status["updates"],
            "gradients": status["gradients"],
            "samples": status["samples"],
            "seconds": seconds,
            "updates_per_s": status["updates"] / max(seconds, 1e-9),
            "gradients_per_s": status["gradients"] / max(seconds, 1e-9),
            "final": self._final,
            "best": self._best,
            "failures": self._failures,
            "warnings": list(self._warnings.values()),
            "stopped_because": reason,
            **summary,
        }
        has_best = self.folder.best.exists()
        record["kept"] = "best" if has_best else "last"
        self.folder.write_result(record)
        checkpoint = self.folder.best if has_best else self.folder.checkpoint
        is_metric = {name: value for name, value in self._best.items() if name in self._final}
        self._result = Result(
            path=self.folder.path,
            metrics=is_metric if has_best else self._final,
            best=self._best,
            checkpoint=checkpoint if checkpoint.exists() else None,
            stopped_because=reason,
            record=record,
        )

    def result(self) -> Result:
        """Return the finished run's result."""
        assert self._result is not None, "the run has not finished"
        return self._result

    def _diagnosed(self, diagnosis: Diagnosis, status: Mapping[str, Any]) -> None:
        """Record what the net looks like; warn once of everything that is wrong."""
        line = {"version": diagnosis.version, **diagnosis.line()}
        self.folder.log({"kind": "diagnostics", **self._axes(status), **line})
        self._wrong_now = diagnosis.warnings
        for about, what in diagnosis.warnings.items():
            if about not in self._warnings:
                self._warnings[about] = f"version {diagnosis.version:,}: {what}"
                logger.warning("%s", self._warnings[about])

    @property
    def _judge(self) -> Keep:
        """What a version must be to be the best so far, or to be kept."""
        metric = self._task.headline if self._stopper is None else self._stopper.metric
        return Keep(metric, self._best.get(metric), always=self._trajectory is not None)

    def _save_best(self, version: int, params: Tensor) -> None:
        optimizer = dict(self._described["optimizer"])
        extra = {"best": self._best}
        save_checkpoint(
            self.folder.best, Checkpoint(self._layout, version, params, optimizer, extra=extra)
        )

    def _axes(self, status: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "gradients": status["gradients"],
            "updates": status["updates"],
            "seconds": self.seconds,
        }

    def _is_due(self, last: str, every_s: float) -> bool:
        now = self._clock()
        if every_s == 0 or now - getattr(self, last) < every_s:
            return False
        setattr(self, last, now)
        return True
