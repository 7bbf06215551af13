"""The shards' end of a wire whose payloads travel, and what a worker's process takes pulls in with.

            worker's process                              beside the shards
    push    `Wire.push_` ------ payloads ---------------> `ShardEnd.pushed`, into the slot
    pull    `PullEnd.pulled` <-- payloads --------------- `ShardEnd.shows`, of the snapshot

What comes of it is what `Wire` does alone, to the bit, where worker and shards share memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paramserver.compression.base import Compression, Compressor, Plain, Slice
from paramserver.compression.payload import Payload
from paramserver.compression.wire import PULL, Shown, compressor_of, seed_of, shown_of
from paramserver.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What a run's workers and shards know of its payloads beforehand."""

    layout: Layout
    cuts: tuple[range, ...]
    """The shards' ranges."""
    push: Compression | None
    pull: Compression | None
    seed: int
    """Of the run."""

    def shard_end(self, shard: int, worker: int) -> ShardEnd:
        """Make the end at ``shard`` of one life of ``worker``."""
        return ShardEnd(self, shard, worker)

    def pull_end(self, shard: int) -> PullEnd | None:
        """Make a worker's end of what it pulls from ``shard``; None if that comes as it is."""
        return None if self.pull is None else PullEnd(self.pull, self.slice_of(shard))

    def slice_of(self, shard: int) -> Slice:
        """Return what ``shard`` has of the parameters."""
        return Slice.of(self.layout, self.cuts[shard])


def agreed_by(
    layout: Layout,
    cuts: tuple[range, ...],
    push: Compression | None,
    pull: Compression | None,
    seed: int,
) -> Agreed | None:
    """Return what is agreed on in a run of ``seed``; None if nothing is compressed."""
    if push is None and pull is None:
        return None
    return Agreed(layout=layout, cuts=cuts, push=push, pull=pull, seed=seed)


class ShardEnd:
    """A shard's end of one life of one worker."""

    def __init__(self, agreed: Agreed, shard: int, worker: int) -> None:
        """Begin as the worker does: with nothing sent."""
        of = agreed.slice_of(shard)
        self._push: Compressor | None = None
        if agreed.push is not None:
            self._push = compressor_of(agreed.push, of)
        self._shown: Shown | None = None if agreed.pull is None else shown_of(agreed.pull, of)
        self.follows = agreed.pull is not None and agreed.pull.feedback
        """Whether what is shown is the difference to what was shown before."""
        self._seed, self._worker, self._shard = agreed.seed, worker, shard

    @property
    def push_bytes(self) -> int | None:
        """Bytes of the tensors of what is pushed; None if that comes as it is."""
        return None if self._push is None else self._push.raw_bytes

    def pushed(self, raw: Tensor, slot: Tensor) -> None:
        """Write to ``slot`` what was pushed as the bytes ``raw``, uint8.

        Raises:
            ProtocolError: They are no payload of this run; ``slot`` was not changed.
        """
        assert self._push is not None, "what is pushed is compressed"
        self._push.decompress(self._push.payload_of(raw), slot)

    @property
    def compresses_pulls(self) -> bool:
        """Whether what is pulled does not come as it is."""
        return self._shown is not None

    def shows(self, params: Tensor, version: int) -> Payload:
        """Return what is sent of ``params``, which are of ``version``."""
        assert self._shown is not None, "pulls are compressed"
        seed = seed_of(self._seed, self._worker, version, self._shard, PULL)
        return self._shown.send(params, seed)


class PullEnd:
    """A worker's end of what it pulls from one shard."""

    def __init__(self, compression: Compression, of: Slice) -> None:
        """Begin with nothing."""
        self._compressor = compressor_of(compression, of)
        self._follows = compression.feedback
        self._next = Plain(of) if self._follows else self._compressor
        self.num_bytes = 0
        """Of the last payload, its header included."""

    @property
    def next_bytes(self) -> int:
        """Bytes of the tensors that come next."""
        return self._next.raw_bytes

    def pulled(self, raw: Tensor, before: Tensor, out: Tensor) -> None:
        """Write to ``out`` what the worker has after the bytes ``raw``, and had as ``before``.

        Raises:
            ProtocolError: They are no payload of this run.
        """
        payload = self._next.payload_of(raw)
        self._next.decompress(payload, out)
        if self._follows and self._next is self._compressor:
            out.add_(before)
        self.num_bytes, self._next = payload.num_bytes, self._compressor
