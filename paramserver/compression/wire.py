"""One worker's end of the wire: what it pushes and reads, as it comes through.

    push    p = g + e     send C(p)              e ← p - C(p)      with feedback
                          send C(g)                                without
    pull    d = w - r     send C(d)              r ← r + C(d)      with feedback; the first r is w
                          send C(w)              r = C(w)          without

e is what of all gradients has not been sent yet: what was sent and e add up to the gradients. r is
what the worker has of the parameters: it gets nearer to w with every pull, whatever was left out of
the ones before. Both belong to one life of one worker, stay with it from push to push, whatever it
reads, and are lost with it. A push that the server drops takes what it carried with it.

Where worker and shards share memory the vectors go as they are: what is pushed and read is what
would have come through a wire, compressed and decompressed, and the bytes counted are those of
payloads. Over gRPC the payloads travel, and `ends` are at the other side; over gloo, in synchronous
mode, those of `Wire.push_` do. What is pushed and read is the same to the bit.

Random choices follow from the run's seed, the worker, the shard and the way, and of a push from its
step, of a pull from the version that is read.

Sources: Karimireddy et al., ICML 2019, arXiv:1901.09847 (feedback). Tang et al., "DoubleSqueeze",
ICML 2019, arXiv:1905.05957 (both ways), and Richtárik, Sokolov & Fatkhullin, "EF21", NeurIPS 2021,
arXiv:2106.05203 (differences to what the other side has).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from paramserver.compression.base import Compression, Compressor, Plain, Slice
from paramserver.compression.payload import Payload
from paramserver.layout import Layout

PUSH, PULL = 0, 1


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


class Shown(Protocol):
    """What one worker is shown of one slice of the parameters, pull by pull."""

    def send(self, params: Tensor, seed: int) -> Payload:
        """Return what is sent of ``params``."""

    def seen(self, sent: Payload) -> Tensor:
        """Return what the worker has once the last payload is there, until the next one."""


class Anew:
    """Each pull stands by itself. A `Shown`."""

    def __init__(self, compressor: Compressor) -> None:
        """Send through ``compressor``."""
        of = compressor.slice
        self._compressor = compressor
        self._seen = torch.empty(0, dtype=of.dtype)

    def send(self, params: Tensor, seed: int) -> Payload:
        """Compress ``params``."""
        return self._compressor.compress(params, seed)

    def seen(self, sent: Payload) -> Tensor:
        """Return what comes out."""
        self._seen.resize_(sent.numel)
        self._compressor.decompress(sent, self._seen)
        return self._seen


class Followed:
    """Differences to what the worker has are sent; at first the parameters as they are. A `Shown`.

    So what a pull has left out is part of what the next one sends.
    """

    def __init__(self, compressor: Compressor) -> None:
        """Send through ``compressor``, to a worker that has nothing yet."""
        self._compressor = compressor
        self._shown: Tensor | None = None
        self._difference: Tensor | None = None

    def send(self, params: Tensor, seed: int) -> Payload:
        """Bring the worker nearer to ``params``."""
        if self._shown is None or self._difference is None:
            payload = Plain(self._compressor.slice).compress(params, seed)
            (self._shown,), self._difference = payload.tensors, torch.empty_like(params)
            return payload
        torch.sub(params, self._shown, out=self._difference)
        payload = self._compressor.compress(self._difference, seed)
        self._compressor.decompress(payload, self._difference)
        self._shown.add_(self._difference)
        return payload

    def seen(self, sent: Payload) -> Tensor:
        """Return what all payloads so far have brought the worker to."""
        assert self._shown is not None, "something was sent"
        return self._shown


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


class Carrier(Protocol):
    """Brings a worker's payloads to the shards, and theirs to it."""

    def carry(self, shard: int, payload: Payload) -> None:
        """Take what the next push sends to ``shard``."""

    @property
    def pulled_bytes(self) -> int:
        """Bytes of the payloads that the last read has come as, headers included."""


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
        carrier: Carrier | None = None,
    ) -> None:
        """Compress pushes by ``push`` and pulls by ``pull``, each shard's slice apart; None: not.

        Args:
            layout: Of the model.
            cuts: The shards' ranges.
            push: Of what is pushed.
            pull: Of what is read.
            seed: Of the run.
            worker: Its number.
            carrier: Brings payloads to the other side; None if both share memory.
        """
        self.traffic = Traffic()
        self._seed, self._worker, self._carrier = seed, worker, carrier
        slices = [Slice.of(layout, cut) for cut in cuts]
        self._plain_bytes = sum(of.numel * of.dtype.itemsize for of in slices)
        pushed = [] if push is None else [compressor_of(push, of) for of in slices]
        self._pushed: list[Compressor] = pushed
        self._feedback = [Feedback(c) for c in pushed] if push and push.feedback else []
        self._shown = [] if pull is None else [shown_of(pull, of) for of in slices]

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
            seed = seed_of(self._seed, self._worker, step, shard, PUSH)
            if self._feedback:
                payloads.append(self._feedback[shard].send_(slot, seed))
            elif self._pushed:
                payload = self._pushed[shard].compress(slot, seed)
                self._pushed[shard].decompress(payload, slot)
                payloads.append(payload)
        if self._carrier is not None:
            for shard, payload in enumerate(payloads):
                self._carrier.carry(shard, payload)
        self._count(self.traffic.push, [payload.num_bytes for payload in payloads])
        return payloads

    def read(self, params: Sequence[Tensor], version: int) -> Sequence[Tensor]:
        """Return what the worker sees of ``params``, one vector a shard, until the next call."""
        if self._carrier is not None:  # then they have come through already
            sizes = [self._carrier.pulled_bytes] if self._shown else []
            self._count(self.traffic.pull, sizes)
            return params
        seen, sizes = list(params), []
        for shard, shown in enumerate(self._shown):
            seed = seed_of(self._seed, self._worker, version, shard, PULL)
            payload = shown.send(params[shard], seed)
            seen[shard] = shown.seen(payload)
            sizes.append(payload.num_bytes)
        self._count(self.traffic.pull, sizes)
        return seen

    def _count(self, way: Way, sizes: Sequence[int]) -> None:
        way.add(Way(1, sum(sizes) if sizes else self._plain_bytes, self._plain_bytes))


def wire_bytes(layout: Layout, cuts: Sequence[range], compression: Compression | None) -> int:
    """Return the bytes of one push or pull of all parameters; of the first pull, see `Followed`."""
    if compression is None:
        return layout.num_bytes
    return sum(compressor_of(compression, Slice.of(layout, cut)).num_bytes for cut in cuts)


def compressor_of(compression: Compression | None, of: Slice) -> Compressor:
    """Make what compresses ``of``; there is nothing to compress in an empty slice."""
    return Plain(of) if compression is None or of.numel == 0 else compression.build(of)


def shown_of(compression: Compression, of: Slice) -> Shown:
    """Make what shows ``of`` to one worker through ``compression``."""
    compressor = compressor_of(compression, of)
    return Followed(compressor) if compression.feedback else Anew(compressor)


def seed_of(seed: int, worker: int, number: int, shard: int, way: int) -> int:
    """Return the seed of what is sent one ``way``, `PUSH` or `PULL`, in a run of ``seed``.

    ``number`` is the step's of a push, and the version of a pull.
    """
    key = struct.pack("<qqqqq", seed, worker, number, shard, way)
    digest = hashlib.blake2b(key, digest_size=8, person=b"compression").digest()
    return int.from_bytes(digest, "little") >> 1
