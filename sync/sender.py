"""How a rank sends its gradient compressed: for each rank's slice a payload of its own.

    rank i    g_i + e_i  --C-->  slice 0 | slice 1 | ...        e_i: what it has not sent yet
    rank j    sums what comes out of the payloads for slice j, its own included

So every rank adds up the same numbers, and what a rank leaves out of a step it adds to the next.
"""

from __future__ import annotations

from torch import Tensor

from paramserver.compression import Compression, Slice, Traffic, Wire, compressor_of
from paramserver.layout import Layout
from sync.collective import Collective, Sent


class Sender:
    """One rank's end of the wire."""

    def __init__(
        self, collective: Collective, layout: Layout, compression: Compression, seed: int
    ) -> None:
        """Send through ``compression`` to the ranks of ``collective``."""
        self._cuts = collective.cuts
        self._wire = Wire(layout, self._cuts, compression, None, seed=seed, worker=collective.rank)
        self._compressor = compressor_of(compression, Slice.of(layout, collective.cut))

    @property
    def traffic(self) -> Traffic:
        """What was sent."""
        return self._wire.traffic

    def send_(self, grad: Tensor, clock: int) -> Sent:
        """Compress ``grad``, shape ``(numel,)``; leave there what comes out of it."""
        slices = [grad[cut.start : cut.stop] for cut in self._cuts]
        return Sent(self._wire.push_(slices, clock), self._compressor)
