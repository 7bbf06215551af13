"""Ranks on any machines: each has its own copy of the parameters, and gloo carries the slices.

    reduce    rank i sends slice j of its gradient to rank j, which sums what it got (all-to-all)
    publish   rank j sends slice j of the parameters to every rank                    (all-gather)

That moves as many bytes as a ring all-reduce. Gloo's own all-reduce took about as long (2 ranks,
64 MiB: 60 ms), its reduce-scatter is an all-reduce underneath (113 ms). The sum is made by its
owner in a fixed order, as in `sync.shared`, and replicas are equal by their bits also where the
machines' processors round differently.

Compressed gradients take as many bytes as their payloads have; parameters go as they are, because
replicas are to be equal.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from paramserver.layout import BLOCK, Layout
from sync.collective import Sent, Table, weighted_sum_
from sync.mesh import Mesh


class Gloo:
    """A `sync.collective.Collective` of ranks on any machines."""

    def __init__(self, mesh: Mesh, layout: Layout) -> None:
        """Use ``mesh``, and close it; ``layout`` is the model's, the same on all ranks."""
        self.rank, self.world = mesh.rank, mesh.world
        # Equal slices; the last may be short.
        size = -(-layout.numel // (self.world * BLOCK)) * BLOCK
        mine = range(self.rank * size, (self.rank + 1) * size)
        numel = layout.numel
        self.cuts = tuple(
            range(min(rank * size, numel), min((rank + 1) * size, numel))
            for rank in range(self.world)
        )
        self.cut = self.cuts[self.rank]
        self._params, self._grad, self._received = (
            torch.zeros(self.world * size, dtype=layout.dtype) for _ in range(3)
        )
        self.params: Tensor = self._params[:numel]
        self.grad: Tensor = self._grad[:numel]
        self._mesh, self._mine = mesh, mine
        self._terms = self._received.view(self.world, size)

    @property
    def waits(self) -> tuple[tuple[int, ...], float]:
        """The ranks a call waits for now, and since when."""
        return self._mesh.waits

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell every rank ``values`` and return what each told."""
        return self._mesh.exchange(step, values)

    def reduce(self, weights: Sequence[float], sent: Sent | None = None) -> Tensor:
        """Return the weighted sum of the gradients for the own slice, its own term first."""
        if sent is None:
            self._mesh.scatter(self._received, self._grad, (), ())
        else:
            self._receive(sent)
        terms = list(zip(self._terms, weights, strict=True))
        own, weight = terms.pop(self.rank)
        return weighted_sum_(own, weight, terms)[: len(self.cut)]

    def _receive(self, sent: Sent) -> None:
        """Send every rank the payload of its slice; write what comes out of those received."""
        theirs = [payload.raw for payload in sent.payloads]
        mine = [sent.compressor.raw_bytes] * self.world
        received = torch.empty(sum(mine), dtype=torch.uint8)
        self._mesh.scatter(received, torch.cat(theirs), mine, list(map(len, theirs)))
        for term, raw in zip(self._terms, received.split(mine), strict=True):
            payload = sent.compressor.payload_of(raw)
            sent.compressor.decompress(payload, term[: len(self.cut)])

    def publish(self, *, vector: bool = False) -> None:
        """Bring every rank's slice to all ranks."""
        for whole in (self._params, self._vector) if vector else (self._params,):
            self._mesh.gather(whole, whole[self._mine.start : self._mine.stop])

    def close(self) -> None:
        """Leave the group; ranks that still wait for this one see their connections end."""
        self._mesh.close()

    @functools.cached_property
    def _vector(self) -> Tensor:
        return torch.zeros_like(self._params)

    @property
    def vector(self) -> Tensor:
        """The second vector, this rank's copy of it."""
        return self._vector[: len(self.params)]
