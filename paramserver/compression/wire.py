"""One worker's end of the wire: what it pushes and reads, as it comes through.

    push    p = g + e     send C(p)              e ← p - C(p)      with feedback
                          send C(g)                                without
    pull    d = w - r     send C(d)              r ← r + C(d)      with feedback; the first r is w
                          send C(w)              r = C(w)          without

e is what of all gradients has not been sent yet: what was sent and e add up to the gradients. r is
what the worker has of the parameters: it gets nearer to w with every pull, whatever was left out of
the ones before. Both belong to one life of one worker, stay with it from push to push, whatever it
reads, and are lost with it. A push that the server drops takes what it carried with it.

Between workers and shards the vectors still go as they are: what is pushed and read is what would
have come through a wire, compressed and decompressed, and the bytes counted are those of payloads.
Over gloo, in synchronous mode, the payloads of `Wire.push_` are what travels.

Random choices follow from the run's seed, the worker, its clock, the shard and the way alone.

Sources: Karimireddy et al., ICML 2019, arXiv:1901.09847 (feedback). Tang et al., "DoubleSqueeze",
ICML 2019, arXiv:1905.05957 (both ways), and Richtárik, Sokolov & Fatkhullin, "EF21", NeurIPS 2021,
arXiv:2106.05203 (differences to what the other side has).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paramserver.compression.base import Compression, Compressor, Plain, Slice
from paramserver.compression.payload import Payload
from paramserver.layout import Layout

_PUSH, _PULL = 0, 1


class Feedback:
    """What one worker has not sent yet of one slice, and what it sends next."""

    def __init__(self, compressor: Compressor) -> None:
        """Begin with nothing left over."""
        of = compressor.slice
        self.compressor = compressor
        self.residual = torch.zeros(of.numel, dtype=of.dtype)

    def send_(self, vector: Tensor, seed: int) -> Payload:
        """Send ``vector`` and what was left over; leave in it what comes out at the other side."""
        vector.add_(self.residual)
        payload = self.compressor.compress(vector, seed)
        self.residual.copy_(vector)
        self.compressor.decompress(payload, vector)
        self.residual.sub_(vector)
        return payload


class Followed:
    """What a worker has of one slice of the parameters, when differences are sent to it."""

    def __init__(self, compressor: Compressor) -> None:
        """Begin with nothing: the first parameters are sent as they are."""
        self.compressor = compressor
        self.shown: Tensor | None = None
        self._difference: Tensor | None = None

    def show(self, params: Tensor, seed: int) -> tuple[Tensor, Payload]:
        """Bring the worker nearer to ``params``; return what it has then, and what was sent."""
        if self.shown is None or self._difference is None:
            payload = Plain(self.compressor.slice).compress(params, seed)
            (self.shown,), self._difference = payload.tensors, torch.empty_like(params)
            return self.shown, payload
        torch.sub(params, self.shown, out=self._difference)
        payload = self.compressor.compress(self._difference, seed)
        self.compressor.decompress(payload, self._difference)
        self.shown.add_(self._difference)
        return self.shown, payload


@dataclass(slots=True)
class Way:
    """What has gone one way."""

    count: int = 0
    """Pushes, or pulls."""
    num_bytes: int = 0
    """Of their payloads, headers included."""
    plain_bytes: int = 0
    """Of what they stand for."""

    def add(self, other: Way) -> None:
        """Count what ``other`` has counted, too."""
        self.count += other.count
        self.num_bytes += other.num_bytes
        self.plain_bytes += other.plain_bytes

    def figures(self) -> dict[str, int]:
        """Return what a record says of it."""
        return {"count": self.count, "bytes": self.num_bytes, "plain_bytes": self.plain_bytes}


@dataclass(slots=True)
class Traffic:
    """What has gone both ways."""

    push: Way = field(default_factory=Way)
    pull: Way = field(default_factory=Way)

    def add(self, other: Traffic) -> None:
        """Count what ``other`` has counted, too."""
        self.push.add(other.push)
        self.pull.add(other.pull)

    def figures(self) -> dict[str, dict[str, int]]:
        """Return what a record says of it."""
        return {"push": self.push.figures(), "pull": self.pull.figures()}


class Wire:
    """One life of one worker, on the wire to all shards; see the module."""

    def __init__(
        self,
        layout: Layout,
        cuts: Sequence[range],
        push: Compression | None,
        pull: Compression | None,
        *,
        seed: int,
        worker: int,
    ) -> None:
        """Compress pushes by ``push`` and pulls by ``pull``, each shard's slice apart; None: not.

        Args:
            layout: Of the model.
            cuts: The shards' ranges.
            push: Of what is pushed.
            pull: Of what is read.
            seed: Of the run.
            worker: Its number.
        """
        self.traffic = Traffic()
        self._seed, self._worker = seed, worker
        slices = [Slice.of(layout, cut) for cut in cuts]
        self._plain_bytes = sum(of.numel * of.dtype.itemsize for of in slices)
        pushed = [compressor_of(push, of) for of in slices]
        self._pushed: list[Compressor] = [] if push is None else pushed
        self._feedback = [Feedback(c) for c in pushed] if push and push.feedback else []
        pulled = [compressor_of(pull, of) for of in slices]
        self._pulled: list[Compressor] = [] if pull is None or pull.feedback else pulled
        self._followed = [Followed(c) for c in pulled] if pull and pull.feedback else []
        self._shown = [torch.empty(of.numel, dtype=of.dtype) for of in slices if self._pulled]

    @property
    def compresses(self) -> bool:
        """Whether what is pushed comes out changed."""
        return bool(self._pushed)

    def push_(self, slots: Sequence[Tensor], step: int) -> list[Payload]:
        """Send what is in ``slots``, one vector a shard, and leave there what comes out.

        Args:
            slots: Finite numbers.
            step: Number of the worker's step, which stands for the clock.
        """
        payloads = []
        for shard, slot in enumerate(slots):
            seed = self._seed_of(step, shard, _PUSH)
            if self._feedback:
                payloads.append(self._feedback[shard].send_(slot, seed))
            elif self._pushed:
                payload = self._pushed[shard].compress(slot, seed)
                self._pushed[shard].decompress(payload, slot)
                payloads.append(payload)
        self._count(self.traffic.push, payloads)
        return payloads

    def read(self, params: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        """Return what the worker sees of ``params``, one vector a shard, until the next call.

        ``step`` is that of the first gradient computed on it.
        """
        seen, payloads = list(params), []
        for shard, vector in enumerate(params):
            seed = self._seed_of(step, shard, _PULL)
            if self._followed:
                seen[shard], payload = self._followed[shard].show(vector, seed)
                payloads.append(payload)
            elif self._pulled:
                payload = self._pulled[shard].compress(vector, seed)
                self._pulled[shard].decompress(payload, self._shown[shard])
                seen[shard] = self._shown[shard]
                payloads.append(payload)
        self._count(self.traffic.pull, payloads)
        return seen

    def _count(self, way: Way, payloads: Sequence[Payload]) -> None:
        sent = sum(p.num_bytes for p in payloads) if payloads else self._plain_bytes
        way.add(Way(1, sent, self._plain_bytes))

    def _seed_of(self, step: int, shard: int, way: int) -> int:
        key = struct.pack("<qqqqq", self._seed, self._worker, step, shard, way)
        digest = hashlib.blake2b(key, digest_size=8, person=b"compression").digest()
        return int.from_bytes(digest, "little") >> 1


def wire_bytes(layout: Layout, cuts: Sequence[range], compression: Compression | None) -> int:
    """Return the bytes of one push or pull of all parameters; of the first pull, see `Followed`."""
    if compression is None:
        return layout.num_bytes
    return sum(compressor_of(compression, Slice.of(layout, cut)).num_bytes for cut in cuts)


def compressor_of(compression: Compression | None, of: Slice) -> Compressor:
    """Make what compresses ``of``; there is nothing to compress in an empty slice."""
    return Plain(of) if compression is None or of.numel == 0 else compression.build(of)
