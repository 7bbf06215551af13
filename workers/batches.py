"""Which samples a worker reads at each of its clocks, and the seeds of everything else random.

    a permutation of all samples, made from the seed      3 0 5 | 7 2 6 | 1 4
    worker w of 3 owns every third of it, from w on       w=1:  0 2 4
    its stream: pass after pass, each a fresh shuffle     2 4 0   0 2 4   4 2 0 ...
    batch c is the c-th piece of batch_size of it         [2 4] [0 0] [2 4] [4 2] ...

So a worker sees each of its samples once a pass, and a batch depends on (seed, worker, clock)
alone: a worker that takes over at any clock reads what the lost one would have read. Under a
curriculum it depends on the version as well; see `workers.curriculum`. Where the number of samples
follows the noise, batch_size is the largest, and of each batch the first so many are read.
"""

from __future__ import annotations

import functools
import hashlib
import struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.curriculum import Course, Lessons
from workers.examples import Batch, Examples

_PARTITION, _PASS = range(2)
"""First word of a random stream's key; it keeps the streams of one seed apart."""

_AT_ONCE = 256
"""Samples that are shuffled with one generator, at least: as many passes as that takes.

A generator takes 70 us to make: 43 % of the time of 256 simulated workers that share 1,437 samples
and so have passes of 5 or 6 (`paramserver bench simulate`)."""


class Batches:
    """The batches of one worker, by clock."""

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int,
        worker: int,
        num_workers: int,
        course: Course | None = None,
    ) -> None:
        """Cut the part of ``worker`` out of ``num_examples`` samples; ``course`` paces it.

        Raises:
            ValueError: A value out of range, or fewer samples than it takes for this worker to
                own one.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 sample or more, got {batch_size}")
        if not 0 <= worker < num_workers:
            raise ValueError(f"worker must be 0 to {num_workers - 1}, got {worker}")
        if worker >= num_examples:
            raise ValueError(
                f"worker {worker} of {num_workers} would own no sample of {num_examples}: "
                "use fewer workers or more data"
            )
        everything = _partition(seed, num_examples)
        self.part = torch.from_numpy(everything[worker::num_workers].copy())
        """Indices this worker owns, int64; together the workers' parts are every sample once."""
        self.batch_size = batch_size
        self._seed, self._worker = seed, worker
        self._num_passes = max(1, _AT_ONCE // len(self.part))
        self._shuffled = (-1, self.part)  # the latest block of passes, and their orders
        self._lessons = None if course is None else Lessons(course, self.part)

    @property
    def follows_version(self) -> bool:
        """Whether a batch depends on the version it is for; if not, it may be read ahead."""
        return self._lessons is not None

    def indices(self, clock: int, version: int = 0, size: int | None = None) -> Tensor:
        """Return the samples of the batch at ``clock``, int64, shape ``(batch_size,)``; read them.

        Any clock may be asked for, in any order; going on to the next one is cheap. A batch that
        reaches over the end of a pass, or is larger than the part, goes on with the next pass.
        ``version`` is that of the parameters the batch is for: a curriculum goes by it. With
        ``size`` it is the first so many samples of the batch, so no other clock's depend on it.
        """
        if clock < 0:
            raise ValueError(f"clock must be 0 or more, got {clock}")
        if size is not None and not 1 <= size <= self.batch_size:
            raise ValueError(f"size must be 1 to {self.batch_size} samples, got {size}")
        start = clock * self.batch_size
        stop = start + (self.batch_size if size is None else size)
        length = len(self.part) * self._num_passes
        pieces = []
        while start < stop:
            number, offset = divmod(start, length)
            piece = self._passes(number)[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
        drawn = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return drawn if self._lessons is None else self._lessons.drawn(drawn, version)

    def read(
        self, examples: Examples, clock: int, version: int = 0, size: int | None = None
    ) -> Batch:
        """Return the batch of ``examples`` at ``clock``, for ``version``; see `indices`."""
        return examples.batch(self.indices(clock, version, size))

    def _passes(self, block: int) -> Tensor:
        """Return the orders of all passes of a block, one after the other."""
        if self._shuffled[0] != block:
            generator = _generator(self._seed, _PASS, self._worker, block)
            orders = np.tile(np.arange(len(self.part)), (self._num_passes, 1))
            order = generator.permuted(orders, axis=1).ravel()
            self._shuffled = (block, self.part[torch.from_numpy(order)])
        return self._shuffled[1]


def seed_step(seed: int, worker: int, clock: int) -> None:
    """Seed torch for what is random inside one step, such as dropout.

    Does what `torch.manual_seed` does, which takes 100 to 800 us to look for absent devices.
    """
    number = step_seed(seed, worker, clock)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def step_seed(seed: int, worker: int, clock: int) -> int:
    """Return a seed for what is random inside one step; 63 bits."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    key = struct.pack("<qqq", seed, worker, clock)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"step").digest()) >> 1


@functools.lru_cache(maxsize=1)  # thousands of simulated workers share it
def _partition(seed: int, num_examples: int) -> NDArray[np.int64]:
    """Return the order whose every ``num_workers``-th sample one worker owns."""
    return _generator(seed, _PARTITION).permutation(num_examples).astype(np.int64)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(_sequence(seed, *key)))


def _sequence(seed: int, *key: int) -> np.random.SeedSequence:
    """Mix a seed and a stream's key, so that near seeds and clocks give unrelated streams."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return np.random.SeedSequence(seed, spawn_key=key)
