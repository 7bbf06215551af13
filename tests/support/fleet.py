"""Shards that are given their orders directly, and workers that have read from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paramserver.messages import Action, Kind, Message
from paramserver.optimizers import Optimizer
from paramserver.reshard import OptimizerState, gather_state, scatter_state
from paramserver.shard import Lease, Shard


class Fleet:
    """Shards, and workers that have read from them; who pushes reads again."""

    def __init__(
        self,
        optimizer: Optimizer,
        params: Tensor,
        gradient: Callable[[Tensor, int], Tensor],
        *,
        cuts: Sequence[range] | None = None,
        workers: int,
        version: int = 0,
        state: OptimizerState | None = None,
        **shard: Any,
    ) -> None:
        """Start at ``params``, or go on from ``state``; ``shard`` are the shards' own options.

        `train` takes ``gradient(what was read, number of the push)``.
        """
        self.cuts = cuts or (range(len(params)),)
        self._gradient = gradient
        self._buffers = [
            [params.new_zeros(len(cut)) for _ in range(workers + 2)] for cut in self.cuts
        ]
        self.shards = [
            self.make(optimizer, cut, params[cut.start : cut.stop], buffers, version, shard)
            for cut, buffers in zip(self.cuts, self._buffers, strict=True)
        ]
        if state is not None:
            for cut, one in zip(self.cuts, self.shards, strict=True):
                one.restore(scatter_state(state, cut), state.schedule)
        self.seen: dict[int, Tensor] = {}
        """What each reader has read last; it stays as it is until the reader pushes."""
        self.read_versions: dict[int, int] = {}
        for worker in range(workers):
            self.read(worker)

    def make(
        self,
        optimizer: Optimizer,
        cut: range,
        params: Tensor,
        buffers: Sequence[Tensor],
        version: int,
        options: dict[str, Any],
    ) -> Shard:
        """Make the shard of ``cut``."""
        return Shard(params, optimizer, buffers, version=version, **options)

    def order(self, action: Action, reader: int) -> list[Lease | None]:
        """Let all shards execute an order about ``reader``."""
        order = Message(Kind.ORDER, action, reader, version=self.version)
        return [shard.execute(order) for shard in self.shards]

    def read(self, reader: int) -> Tensor:
        """Let ``reader`` read, and return what."""
        both = zip(self._buffers, self.order(Action.READ, reader), strict=True)
        self.seen[reader] = torch.cat([b[lease.buffer] for b, lease in both if lease is not None])
        self.read_versions[reader] = self.version
        return self.seen[reader]

    def push(self, worker: int, grad: Tensor, scale: float = 1.0) -> None:
        """Let the gradient of ``worker`` be applied, and the worker read again."""
        order = Message(
            Kind.ORDER, Action.TAKE, worker, 1, 1, version=self.version + 1, samples=1, step=1,
            scale=scale, staleness=self.version - self.read_versions.get(worker, self.version),
        )  # fmt: skip
        for cut, shard in zip(self.cuts, self.shards, strict=True):
            shard.hold(worker, 1, 1, grad[cut.start : cut.stop].clone())
            shard.execute(order)
        self.read(worker)

    def train(self, order: Sequence[int], seed: int = 0) -> Tensor:
        """Let workers push in ``order``, and return the parameters then."""
        for step, worker in enumerate(order, start=seed):
            self.push(worker, self._gradient(self.seen[worker], step))
        return self.params

    def saved(self) -> OptimizerState:
        """Return the optimizer's state, joined."""
        self.order(Action.SAVE, -1)
        parts = [shard.saved for shard in self.shards if shard.saved is not None]
        rules = [(cut, part.rule) for cut, part in zip(self.cuts, parts, strict=True)]
        return replace(gather_state(rules), schedule=parts[0].scheduler)

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.shards[0].version

    @property
    def params(self) -> Tensor:
        """A copy of the parameters."""
        return torch.cat([shard.snapshots.params for shard in self.shards]).clone()
