"""What an asynchronous run is made of: a trainer describes it, processes are built from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from paramserver.batch_sizes import Averages, Rate, Sizer, largest
from paramserver.checkpoint import Checkpoint, gather_state, scatter_state
from paramserver.clipping import Clip
from paramserver.compensation import Compensation
from paramserver.layout import Layout
from paramserver.ledger import Ledger
from paramserver.measures import measured
from paramserver.optimizers import AnyOptimizer, Optimizer
from paramserver.optimizers.grouped import grouped
from paramserver.optimizers.push_form import Place, PushForm
from paramserver.progress import Budget, Progress
from paramserver.rounds import RoundProgram
from paramserver.rules import Damping, RuleSpec
from paramserver.schedules import Schedule
from paramserver.sequencer import Sequencer
from paramserver.shard import Saved
from paramserver.shard_config import RoundsConfig, ShardConfig
from workers.config import RunConfig
from workers.curriculum import Course
from workers.local import Local
from workers.task import Task
from workers.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fleet is to train, and how."""

    task: Task
    optimizer: AnyOptimizer
    program: RoundProgram | None
    """What the optimizer builds, if that is a round program and runs in rounds."""
    form: PushForm | None
    """How it is pushed, if it is a round program and does not."""
    config: RunConfig
    rule: RuleSpec
    damping: Damping | None
    compensation: Compensation | None
    local: Local | None
    """Steps of workers' own between a read and a push."""
    course: Course | None
    """The order and pace of the samples, if there is a curriculum."""
    measure: tuple[str, ...]
    """What is measured of each push, some of `paramserver.measures.MEASURES`."""
    cancels: bool
    """Whether the rule may cancel what a worker computes."""
    tabulates: bool
    """Whether it keeps a table of every worker's gradients."""
    layout: Layout
    cuts: tuple[range, ...]
    num_train: int
    """Training samples."""
    windows: Windows | None
    """Those of worker 0, if the task is recurrent and workers carry a state; all have such ones."""
    described: Mapping[str, object]
    """The optimizer, as the record holds it."""
    progress: Callable[[Mapping[str, Any]], None] | None
    guests: int = 0
    """Places for clients that no trainer starts."""

    @property
    def slot_rows(self) -> int:
        """Rows of a slot: a push form may have several, and a whole program ask for a matrix."""
        if self.form is not None:
            return self.form.num_rows(self.layout.numel)
        return self.layout.numel if self.program is not None and self.program.whole else 1

    @property
    def clip_at_worker(self) -> Clip | None:
        """What workers clip by; None if the averaged gradient is clipped, or nothing."""
        clip = self.config.clip
        return None if clip is None or clip.where == "reduced" else clip

    @property
    def batch_size(self) -> int:
        """Samples of a worker's batch; the largest one's if their number follows the noise."""
        adaptive = self.config.adaptive_batch
        return self._first_batch if adaptive is None else largest(adaptive, self._num_owned)

    @property
    def num_chunks(self) -> int:
        """Parts of a batch that gradients are computed on one by one."""
        adaptive = self.config.adaptive_batch
        return 1 if adaptive is None else adaptive.chunks

    @property
    def _first_batch(self) -> int:
        return self.config.batch_size or self.task.batch_size

    @property
    def _num_owned(self) -> int:
        """Samples that a worker owns, at least."""
        return self.num_train // self.config.workers

    def sequencer(self, start: Checkpoint, ledger: Ledger | None, *, absent: int = 0) -> Sequencer:
        """Return what orders the run from ``start`` on, adding to ``ledger``.

        ``absent`` of the workers do not take part at first.
        """
        c = self.config
        samples = None if c.epochs is None else math.ceil(c.epochs * self.num_train)
        counters: Mapping[str, Any] = start.extra
        progress = Progress(
            version=start.version,
            gradients=int(counters.get("gradients", 0)),
            samples=int(counters.get("samples", 0)),
            workers={int(w): dict(table) for w, table in start.workers.items()},
            averages=Averages.of(counters.get("averages")),
        )
        return Sequencer(
            self.rule.build(c.workers),
            damping=self.damping,
            budget=Budget(updates=None if self.program else c.updates, samples=samples),
            on_nan="pass" if self.program else c.on_nan,
            wait_timeout_s=c.wait_timeout_s,
            progress=progress,
            ledger=ledger,
            expected=c.workers - absent,
            sizer=self._sizer(progress.averages),
        )

    def shard(self, index: int, address: str, token: str, start: Checkpoint) -> ShardConfig:
        """Return what shard ``index`` is made of, which listens at ``address``."""
        cut, state, config = self.cuts[index], start.state, self.config
        optimizer, schedule = self._built_at(cut)
        return ShardConfig(
            index=index,
            address=address,
            capacity=self.capacity,
            token=token,
            fingerprint=self.layout.fingerprint,
            optimizer=optimizer,
            slot_rows=self.slot_rows,
            schedule=schedule,
            clip=None if config.clip == self.clip_at_worker else config.clip,
            compensation=self.compensation,
            average=config.average,
            measure=self.measure,
            tabulates=self.tabulates,
            version=start.version,
            rule_state=None if state is None else scatter_state(state, cut),
            schedule_state=None if state is None else state.schedule,
            rounds=self._rounds(cut, start),
        )

    def checkpoint(self, parts: Sequence[Saved], progress: Progress) -> Checkpoint:
        """Join what the shards saved at one version, in their order."""
        both = zip(self.cuts, parts, strict=True)
        state = gather_state([(cut, part.rule) for cut, part in both])
        return Checkpoint(
            layout=self.layout,
            version=parts[0].version,
            params=torch.cat([part.params for part in parts]),
            optimizer=dict(self.described),
            state=replace(state, schedule=parts[0].scheduler),
            workers={str(w): table for w, table in progress.workers.items()},
            extra={
                "mode": "async",
                "gradients": progress.gradients,
                "samples": progress.samples,
                "rounds": parts[0].rounds,
                "averages": progress.averages.state(),
            },
        )

    def measures(self, parts: Sequence[Saved]) -> dict[str, NDArray[np.float64]]:
        """Join what the shards have measured up to one version, in their order."""
        sums = [part.measured for part in parts if part.measured is not None]
        return measured(self.measure, sums) if self.measure and sums else {}

    @property
    def capacity(self) -> int:
        """Buffers of a shard: for workers, a replacement, the evaluator, and one to write.

        A request of a round program may show two vectors.
        """
        needed = self.config.workers + 3 + self.guests
        return needed if self.program is None else 2 * needed

    def _sizer(self, averages: Averages) -> Sizer | None:
        """Return what sizes the batches, knowing ``averages``; None if nothing does."""
        adaptive = self.config.adaptive_batch
        if adaptive is None:
            return None
        rate = Rate(cast(Optimizer, self.optimizer), self.config.schedule)
        return Sizer(
            adaptive, rate, first=self._first_batch, owned=self._num_owned, averages=averages
        )

    def _built_at(self, cut: range) -> tuple[AnyOptimizer, Schedule | None]:
        """Return what the shard of ``cut`` builds its rule or program, and its schedule, from."""
        schedule = self.config.schedule
        if self.form is not None:
            place = Place(cut, self.layout.numel, self.config.workers)
            return replace(self.form, place=place), schedule
        if self.program is not None:
            return self.optimizer, schedule
        rule = cast(Optimizer, self.optimizer)
        return grouped(rule, schedule, self.task.groups, self.layout, cut)

    def _rounds(self, cut: range, start: Checkpoint) -> RoundsConfig | None:
        if self.program is None:
            return None
        return RoundsConfig(
            cut=cut,
            num_examples=self.num_train,
            num_workers=self.config.workers,
            finished=int(start.extra.get("rounds", 0)),
            last=self.config.updates,
        )
