"""What a shard is made of, wherever it is: in a process of its own, or in a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from paramserver.averaging import Average
from paramserver.clipping import Clip
from paramserver.compensation import Compensation
from paramserver.measures import Gauge
from paramserver.optimizers import AnyOptimizer, Optimizer
from paramserver.round_shard import RoundShard
from paramserver.rounds import RoundOptimizer
from paramserver.schedules import Schedule
from paramserver.shard import Shard


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """What a shard needs beside the rest to run a round program."""

    cut: range
    """The shard's range of the parameters."""

    num_examples: int
    """Training samples there are."""

    num_workers: int
    """Workers that are expected."""

    finished: int = 0
    """Rounds finished before."""

    last: int | None = None
    """Round after which the run ends; None if rounds do not end it."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What one shard is made of."""

    index: int
    """Number of the shard; 0 leads."""

    address: str
    """Where it listens."""

    capacity: int
    """Snapshot buffers: one a worker and reader, plus one."""

    token: str
    """The run's secret."""

    fingerprint: str
    """The layout's."""

    optimizer: AnyOptimizer
    schedule: Schedule | None = None
    clip: Clip | None = None
    compensation: Compensation | None = None
    average: Average | None = None

    measure: tuple[str, ...] = ()
    """What is measured of each push, some of `paramserver.measures.MEASURES`; push rules only."""

    measured_cuts: tuple[range, ...] | None = None
    """Ranges that are measured apart and added up, as so many shards do; None: all as one."""

    tabulates: bool = False
    """Whether the rule does; push rules only."""

    version: int = 0

    rule_state: dict[str, Any] | None = None
    """The optimizer's saved ``state_dict``; None starts afresh."""

    schedule_state: dict[str, Any] | None = None

    slot_rows: int = 1
    """Rows of a slot; more than one for pushes of several and programs that ask for matrices."""

    threads: int = 1
    """torch threads of the process."""

    rounds: RoundsConfig | None = None
    """Given if the optimizer is a round program."""

    def build(self, params: Tensor, buffers: Sequence[Tensor]) -> Shard | RoundShard:
        """Make the shard, with ``params`` of shape ``(n,)`` copied into the first of ``buffers``.

        It goes on with the saved states, if there are any.
        """
        shard: Shard | RoundShard
        if self.rounds is None:
            shard = Shard(
                params,
                cast(Optimizer, self.optimizer),
                buffers,
                schedule=self.schedule,
                clip=self.clip,
                compensation=self.compensation,
                average=self.average,
                gauge=Gauge(self.measure, params, self.measured_cuts) if self.measure else None,
                tabulates=self.tabulates,
                version=self.version,
                num_rows=self.slot_rows,
            )
        else:
            shard = RoundShard(
                params,
                cast(RoundOptimizer, self.optimizer),
                buffers,
                cut=self.rounds.cut,
                num_rows=self.slot_rows,
                schedule=self.schedule,
                average=self.average,
                version=self.version,
                rounds=self.rounds.finished,
            )
        if self.rule_state is not None:
            shard.restore(self.rule_state, self.schedule_state)
        return shard
