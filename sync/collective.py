"""What a synchronous step needs of the group of ranks it runs in.

    rank 0   gradient ---+ exchange +--- reduce slice 0, update it ---+ publish +--- gradient
    rank 1   gradient ---+          +--- reduce slice 1, update it ---+         +--- gradient

Each rank owns one slice of the parameters, and the state of the optimizer for that slice alone.
Whatever has more rows than one is reduced a row at a time: write it to `grad`, exchange, reduce,
publish. A second vector, for products with a matrix, is shared beside the parameters.
`sync.shared` is the group of ranks on one machine, `sync.gloo` of ranks on several, `sync.nodes` of
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paramserver.compression import Compressor, Payload
from paramserver.layout import BLOCK, Layout

Table = list[tuple[float, ...]]
"""What every rank said in an exchange, by rank."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A rank's gradient as it is sent: compressed, slice by slice."""

    payloads: Sequence[Payload]
    """What stands for each rank's slice, by rank."""
    compressor: Compressor
    """Of the own slice, for what the others send of it."""


class Collective(Protocol):
    """The group as one rank sees it; used by one thread.

    Every rank makes the same calls in the same order. A call waits for the others, but never for
    longer than the group's deadline: it then raises PeerLostError, which ends the group. `reduce`
    does not count, it may be left out by all ranks alike.
    """

    @property
    def rank(self) -> int:
        """The number of this rank, from 0 on."""

    @property
    def world(self) -> int:
        """Ranks in the group."""

    @property
    def cut(self) -> range:
        """The slice of the vector that this rank reduces and updates; it may be empty."""

    @property
    def cuts(self) -> tuple[range, ...]:
        """The slices of all ranks, by rank."""

    @property
    def params(self) -> Tensor:
        """The parameters, shape ``(numel,)``, equal on all ranks from a `publish` on.

        Under a rule that shows another point it is that one: where gradients are computed.
        Only the own slice is written, and only from an `exchange` to the next `publish`.
        """

    @property
    def vector(self) -> Tensor:
        """A second vector like `params`, made and zero when it is first used; written as they are.

        Raises:
            ResourceError: There is too little memory for it.
        """

    @property
    def grad(self) -> Tensor:
        """The gradient of this rank, shape ``(numel,)``, its padding 0.

        Written from a `publish` (or an `exchange` nobody reduces after) to the next `exchange`.
        """

    @property
    def waits(self) -> tuple[tuple[int, ...], float]:
        """The ranks a call waits for now, and since when by `time.monotonic`; for other threads."""

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell every rank ``values`` and return what each rank told, this one included.

        No rank returns before all have called: every gradient is complete then, and nobody reads
        the parameters until the next `publish`.

        Args:
            step: The number of the step, the same on all ranks; errors name it.
            values: As many on every rank.

        Raises:
            PeerLostError: A rank is gone or silent.
            ProtocolError: The ranks are not at the same step, or brought more or fewer values.
        """

    def reduce(self, weights: Sequence[float], sent: Sent | None = None) -> Tensor:
        """Return the sum of weight times gradient over the ranks, for the own slice.

        With ``sent``, all ranks' gradients are what comes out of such payloads, and `grad` is that
        already.

        It takes the place of this rank's gradient there and may be changed until `publish`. Its
        bits follow from the gradients, the weights and the cuts alone.
        """

    def publish(self, *, vector: bool = False) -> None:
        """Show every rank the slices as their owners have updated them.

        Args:
            vector: Whether those of `vector` are shown as well; else they need not be.

        Raises:
            PeerLostError: A rank is gone or silent; parameters may be old, new or a mix.
        """

    def close(self) -> None:
        """Leave the group and give its memory back; ranks that still wait for this one are told."""


def fair_cuts(layout: Layout, world: int) -> tuple[range, ...]:
    """Cut the vector of ``layout`` for ``world`` ranks; tiny models leave the last none."""
    num_owners = min(world, layout.numel // BLOCK)
    nothing = range(layout.numel, layout.numel)
    return layout.cuts(num_owners) + (nothing,) * (world - num_owners)


MAX_VALUES = 8000
"""Numbers that all ranks together tell in one exchange."""


def add_up(collective: Collective, step: int, values: Tensor) -> Tensor:
    """Return the sum of ``values`` over the ranks, with the same bits on all of them.

    Args:
        collective: The group; all ranks call this.
        step: As in `Collective.exchange`.
        values: This rank's share, float64, of any shape, the same on all ranks.

    Raises:
        PeerLostError: A rank is gone or silent.
    """
    told = []
    for piece in values.flatten().split(max(1, MAX_VALUES // collective.world)):
        table = collective.exchange(step, piece.tolist())
        total = torch.tensor(table[0], dtype=torch.float64)
        for row in table[1:]:  # in the order of the ranks, and never in another one
            total += torch.tensor(row, dtype=torch.float64)
        told.append(total)
    return torch.cat(told).view(values.shape)


CHUNK = 1 << 16
"""Elements that are reduced at a time, so that a sum stays in the cache between its terms: on two
vectors of 40 MB this took 6 to 9 ms, two passes over whole vectors 12 to 14."""


def weighted_sum_(own: Tensor, weight: float, others: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Make ``own`` the sum of its weighted self and, in order, of the weighted ``others``.

    Args:
        own: Shape ``(n,)``. Overwritten, and returned.
        weight: Factor on ``own``.
        others: Vectors of shape ``(n,)``, each with its factor.
    """
    for start in range(0, len(own), CHUNK):
        chunk = own[start : start + CHUNK]
        chunk.mul_(weight)
        for other, factor in others:
            chunk.add_(other[start : start + CHUNK], alpha=factor)
    return own
