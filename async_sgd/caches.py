"""Staleness without a server: each worker has a cache, and updates reach each cache when they may.

    worker p at iteration t      u = what its own optimizer makes of a gradient at its own cache
    u reaches cache q            at the start of t + 1 + r, with r of 0 to s, all equally likely,
                                 drawn for every (p, q, t), also for q = p

So workers differ in what they have seen, an update is s / 2 + 1 iterations on its way on average,
and with s = 0 all caches are one: synchronous steps, whose updates are summed, not averaged. How
fast workers are plays no part. Replicas, which differ by their seeds, are computed side by side.

The mean of all caches on a quadratic of curvature λ follows, for plain SGD of rate η and P workers,

    m_{t+1} = m_t - η P λ (m_t + m_{t-1} + … + m_{t-s}) / (s + 1)

Source: Dai et al., "Toward Understanding the Impact of Staleness in Distributed Machine Learning",
ICLR 2019, arXiv:1810.03264. The recursion follows from its model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from paramserver.optimizers.base import Optimizer, is_per_worker

Gradients = Callable[[Tensor, int], Tensor]
"""Gradients at caches, shape ``(replicas, workers, n)``, at an iteration; of the same shape."""


class Caches:
    """The caches of all workers of all replicas, and what is on its way to them."""

    def __init__(
        self,
        start: Tensor,
        optimizer: Optimizer,
        gradients: Gradients,
        *,
        num_workers: int,
        most: int,
        seeds: Sequence[int],
    ) -> None:
        """Let all workers of a replica begin at the same point.

        Args:
            start: Where each replica begins, shape ``(replicas, n)``.
            optimizer: What each worker has one of its own of; elementwise, without weight decay,
                since updates are made without looking at the parameters.
            gradients: What workers compute.
            num_workers: P, 1 or more.
            most: The most iterations that an update may be late, s, 0 or more.
            seeds: Of the lateness, one a replica.

        Raises:
            ValueError: A value out of range, or an optimizer that cannot be kept so.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers must be 1 or more, got {num_workers}")
        if most < 0:
            raise ValueError(f"most must be 0 iterations or more, got {most}")
        if len(seeds) != len(start):
            raise ValueError(
                f"seeds must be one for each of {len(start)} replicas, got {len(seeds)}"
            )
        if is_per_worker(optimizer) or getattr(optimizer, "weight_decay", 0.0) != 0:
            raise ValueError(
                f"each worker has an optimizer of its own, whose updates do not depend on where it "
                f"is: use one without weight decay and without velocities for workers, not "
                f"{optimizer}"
            )
        self.iteration = 0
        self.caches = start.unsqueeze(1).repeat(1, num_workers, 1)
        """Shape ``(replicas, workers, n)``."""
        self._gradients, self._most = gradients, most
        self._update = torch.zeros_like(self.caches)
        self._rule = optimizer.build([nn.Parameter(self._update.view(-1))])
        if not self._rule.elementwise:
            raise ValueError(f"the optimizer must work element by element, and not so {optimizer}")
        self._on_their_way = torch.zeros((most + 1, *self.caches.shape), dtype=start.dtype)
        self._lateness = [np.random.default_rng([seed, most, num_workers]) for seed in seeds]

    def step(self) -> None:
        """Let every worker compute an update, and let those arrive that are due."""
        grads = self._gradients(self.caches, self.iteration)
        self._update.zero_()  # the rule steps from 0, so this becomes its step
        self._rule.apply([grads.reshape(-1)])
        self._send()
        due = self._on_their_way[self.iteration % (self._most + 1)]
        self.caches += due
        due.zero_()
        self.iteration += 1

    def _send(self) -> None:
        """Put every update on its way, worker 0's first, so that sums have one order."""
        replicas, workers, numel = self.caches.shape
        late = np.stack(
            [g.integers(0, self._most + 1, size=(workers, workers)) for g in self._lateness]
        )  # replica, from, to
        arrives = torch.from_numpy((self.iteration + late) % (self._most + 1))
        caches = torch.arange(replicas * workers).view(replicas, workers)
        slots = self._on_their_way.view(-1, numel)
        for worker in range(workers):
            rows = arrives[:, worker] * (replicas * workers) + caches
            copies = self._update[:, worker, None].expand(-1, workers, -1)
            slots.index_add_(0, rows.view(-1), copies.reshape(-1, numel))
