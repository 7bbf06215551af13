"""The delays of a run: each worker's come from a random stream of its own.

    seed, stream, worker    the key of one random stream
    its first number        how slow this worker is, if workers differ by chance (``spread``)
    all the others          its delays, one after another

So a worker's delays depend neither on other workers nor on the order of events, and another law for
one purpose leaves the delays for others, and the batches, as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from async_sgd.delays import DelayLaw

_BLOCK = 64
"""Delays of a worker that are drawn at a time."""


class Stream(IntEnum):
    """What delays are for: first word of a random stream's key, where batches use 0 to 2."""

    COMPUTE = 16
    NETWORK = 17
    SERVICE = 18


class Delays:
    """The delays of all workers of one run, each from a stream of its own.

    Each worker's next delays are drawn ahead, a block at a time, into one array: with 10,000
    workers a draw takes 0.3 to 0.5 us on one core. With a list of floats for each worker it took
    1.2 us and twice the memory, 41 instead of 19 MiB. A worker's first draw makes its generator,
    which takes 40 us.
    """

    def __init__(self, law: DelayLaw, num_workers: int, *, seed: int, stream: int) -> None:
        """Draw from ``law`` for workers 0 to ``num_workers`` - 1.

        Args:
            law: How delays are distributed.
            num_workers: All that will ever take part. When one joins does not change its delays.
            seed: Of the run, 0 or more.
            stream: What the delays are for, one of `Stream`.

        Raises:
            ValueError: A value out of range, or a law that does not fit so many workers.
            RecordError: The law's file cannot be read.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers must be 1 or more, got {num_workers}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        law.check(num_workers)
        self._law, self._num_workers = law, num_workers
        self._seed, self._stream = seed, stream
        self._draws: dict[int, Callable[[int], NDArray[np.float64]]] = {}
        self._ahead = np.zeros(num_workers * _BLOCK)  # a block a worker
        self._read = self._ahead.data  # its items are floats, and come faster than the array's
        self._places = list(range(0, len(self._ahead), _BLOCK))  # of each worker's next delay

    def draw(self, worker: int) -> float:
        """Return the next delay of ``worker``, in seconds."""
        assert worker >= 0, f"there is no worker {worker}"
        place = self._places[worker]
        if place % _BLOCK == 0:  # at the beginning or the end of its block
            place = self._draw_ahead(worker)
        self._places[worker] = place + 1
        return self._read[place]

    def _draw_ahead(self, worker: int) -> int:
        """Fill the block of ``worker`` and return where it begins."""
        if worker not in self._draws:
            key = np.random.SeedSequence(self._seed, spawn_key=(self._stream, worker))
            generator = Generator(np.random.Philox(key))
            self._draws[worker] = self._law.draws(worker, self._num_workers, generator)
        begin = worker * _BLOCK
        self._ahead[begin : begin + _BLOCK] = self._draws[worker](_BLOCK)
        return begin
