"""A table of each worker's latest gradients, whose mean over the workers is the update.

    worker   sum G_i   of b_i      the update's direction is  (1 / n) Σ_i G_i / b_i
    0        g + g     2
    1        g         1           however many gradients a worker has pushed, it counts once
    2        g + g + g 3

A **round** has two parts. First gradients are gathered until every worker is in the table; then
each worker's next push makes one update, and what is pushed beyond that is kept for the table of
the next round. `async_sgd.rules.ringleader` decides which is which; from its orders this knows as
much: the first push with a step opens the second part, and when every worker of the table has made
its update the round is over.

The total is kept up by what each push changes in it, a few passes instead of n, and made anew in
every round, so that rounding errors do not stay. A shard has one table, of up to two vectors a
worker; what is in it is lost when a run is stopped.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GradientTable:
    """Sums of gradients by worker, for one slice; calls come one at a time."""

    def __init__(self, like: Tensor) -> None:
        """Start empty, for gradients of the shape and dtype of ``like``."""
        self._entries: dict[int, _Entry] = {}
        self._later: dict[int, _Entry] = {}  # of the next round
        self._due: set[int] = set()  # workers that have not made their update in this round
        self._total, self._mean = torch.zeros_like(like), torch.empty_like(like)
        self._free: list[Tensor] = []

    def add(self, worker: int, grad: Tensor, *, step: bool) -> Tensor | None:
        """Take up a gradient; return the direction of the update if this push makes one.

        Args:
            worker: Whose it is.
            grad: Shape ``(n,)``; not kept.
            step: Whether the push makes an update.

        Returns:
            Shape ``(n,)``, to be used until the next call; it may be changed.
        """
        if not step:
            self._entry(self._later if self._due else self._entries, worker).add(grad)
            return None
        if self._due:
            self._total.sub_(self._entries[worker].mean(self._mean))
            self._entries[worker].add(grad)
            self._total.add_(self._entries[worker].mean(self._mean))
        else:
            self._entry(self._entries, worker).add(grad)
            self._due = set(self._entries)
            self._total.zero_()
            for entry in self._entries.values():
                self._total.add_(entry.mean(self._mean))
        torch.div(self._total, len(self._entries), out=self._mean)
        self._done(worker)
        return self._mean

    def forget(self, worker: int) -> None:
        """Take the gradients of ``worker``, which takes part no more, out of the table."""
        for entries in (self._later, self._entries):
            entry = entries.pop(worker, None)
            if entry is None:
                continue
            if entries is self._entries and self._due:
                self._total.sub_(entry.mean(self._mean))
            self._free.append(entry.sum)
        self._done(worker)

    def _done(self, worker: int) -> None:
        """Wait for an update of ``worker`` no more; the round may be over."""
        if worker not in self._due:
            return
        self._due.remove(worker)
        if not self._due:
            self._free += [entry.sum for entry in self._entries.values()]
            self._entries, self._later = self._later, {}

    def _entry(self, entries: dict[int, _Entry], worker: int) -> _Entry:
        entry = entries.get(worker)
        if entry is None:
            room = self._free.pop().zero_() if self._free else torch.zeros_like(self._total)
            entry = entries[worker] = _Entry(room)
        return entry


class _Entry:
    """The sum of a worker's gradients, and how many they are."""

    def __init__(self, zeros: Tensor) -> None:
        self.sum, self._count = zeros, 0

    def add(self, grad: Tensor) -> None:
        self.sum.add_(grad)
        self._count += 1

    def mean(self, out: Tensor) -> Tensor:
        return torch.div(self.sum, self._count, out=out)
