"""Named samples: which training samples a request of a round program speaks of.

    all of them, or `size` drawn without replacement      6 1 | 8 3 | 0      cut into 3 pieces
    by a stream of (seed, name, round)

Nothing but names travels: whoever computes a piece, at once or again after a worker was lost, reads
the same samples. The pieces are the sample exactly once, into however many it is cut.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paramserver.rounds import Sample

_SAMPLE = 2
"""First word of the streams' keys; `workers.batches` has others."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a sample, small enough to be computed at once."""

    sample: Sample
    round: int
    """The round the sample is drawn for, from 0."""
    number: int
    """Which piece, from 0."""
    of: int
    """Into how many pieces the sample is cut."""

    def __post_init__(self) -> None:
        if self.round < 0:
            raise ValueError(f"round must be 0 or more, got {self.round}")
        if not 0 <= self.number < self.of:
            raise ValueError(f"number must be 0 to {self.of - 1} of {self.of}, got {self.number}")


def num_pieces(sample: Sample, num_examples: int, piece_size: int) -> int:
    """Return into how many pieces of at most ``piece_size`` samples ``sample`` is cut.

    Raises:
        ValueError: The sample is larger than ``num_examples``, or a size is below 1.
    """
    if piece_size < 1:
        raise ValueError(f"piece_size must be 1 sample or more, got {piece_size}")
    return -(-_size(sample, num_examples) // piece_size)


def indices(piece: Piece, num_examples: int, seed: int) -> Tensor:
    """Return the samples of ``piece`` among ``num_examples``, int64, shape ``(n,)``.

    Pieces differ by one sample at most; with more pieces than samples some are empty.

    Raises:
        ValueError: The sample is larger than ``num_examples``, or a value is below its least.
    """
    size = _size(piece.sample, num_examples)
    start, stop = (size * number // piece.of for number in (piece.number, piece.number + 1))
    if piece.sample.size is None:
        return torch.arange(start, stop)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    key = (_SAMPLE, _number(piece.sample.name.encode(), b"sample"), piece.round)
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
    drawn = stream.choice(num_examples, size, replace=False)
    return torch.from_numpy(drawn[start:stop].astype(np.int64))


def piece_seed(seed: int, piece: Piece, purpose: str = "step") -> int:
    """Return a seed for what is random inside a piece, such as dropout; 63 bits.

    It depends on the sample's name, the round and the number of the piece, so all requests of a
    round on one piece meet the same function. Other purposes have unrelated seeds.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    numbers = struct.pack("<qqq", seed, piece.round, piece.number)
    return _number(numbers + f"{purpose}/{piece.sample.name}".encode(), b"piece") >> 1


def _size(sample: Sample, num_examples: int) -> int:
    if num_examples < 1:
        raise ValueError(f"num_examples must be 1 or more, got {num_examples}")
    if sample.size is None:
        return num_examples
    if not 1 <= sample.size <= num_examples:
        raise ValueError(
            f"the size of sample {sample.name!r} must be 1 to {num_examples}, the training samples "
            f"there are, got {sample.size}"
        )
    return sample.size


def _number(content: bytes, person: bytes) -> int:
    """Return 64 bits that stand for ``content``."""
    digest = hashlib.blake2b(content, digest_size=8, person=person).digest()
    return int.from_bytes(digest)
