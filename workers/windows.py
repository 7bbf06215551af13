"""Which steps of a series a worker reads at each of its clocks: windows of contiguous streams.

    the series, cut into 2 streams for each of 2 workers       |-- 0 --|-- 1 --|-- 2 --|-- 3 --|
    worker 0 reads streams 0 and 2 side by side, worker 1      |w0|w1|w|       |w0|w1|w|
    streams 1 and 3; window after window, then anew

All streams are equally long, so those of a worker begin and end together; what is left over, fewer
steps than there are streams, is not read. A stream's last window counts fewer steps if k1 does not
divide its length. Nothing here is random: a window depends on (worker, clock) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from workers.examples import Batch, Examples


@runtime_checkable
class Series(Examples, Protocol):
    """Consecutive steps, read as windows; as examples, they are windows one after the other."""

    @property
    def window(self) -> int:
        """Steps of one example."""

    @property
    def num_steps(self) -> int:
        """Steps in all."""

    def read(self, starts: Tensor, steps: int) -> Batch:
        """Return ``steps`` steps from each of ``starts`` on, int64 of shape ``(n,)``.

        The tensors have shapes ``(n, steps, …)``.
        """

    def part(self, steps: range) -> Series:
        """Return these ``steps`` alone, windows as long."""


class TensorSeries:
    """Steps held in tensors whose first dimension counts them; a `Series`."""

    def __init__(self, *tensors: Tensor, window: int) -> None:
        """Hold ``tensors``, such as inputs and targets; whole examples have ``window`` steps.

        Small integers stay as they are and become int64 a batch at a time.
        """
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(f"tensors must be one or more of one length, got {sorted(sizes)}")
        if window < 1:
            raise ValueError(f"window must be 1 step or more, got {window}")
        self._tensors, self.window = tensors, window

    def __len__(self) -> int:
        """Return the number of whole examples."""
        return self.num_steps // self.window

    @property
    def num_steps(self) -> int:
        """Steps in all."""
        return len(self._tensors[0])

    def batch(self, indices: Tensor) -> Batch:
        """Copy the examples ``indices``, int64 of shape ``(n,)``, in that order."""
        return self.read(indices * self.window, self.window)

    def part(self, steps: range) -> TensorSeries:
        """Return these ``steps`` alone; they are not copied."""
        kept = (tensor[steps.start : steps.stop] for tensor in self._tensors)
        return TensorSeries(*kept, window=self.window)

    def read(self, starts: Tensor, steps: int) -> Batch:
        """Copy ``steps`` steps from each of ``starts`` on."""
        where = starts[:, None] + torch.arange(steps)
        parts = (tensor[where] for tensor in self._tensors)
        return tuple(part if part.is_floating_point() else part.long() for part in parts)


@dataclass(frozen=True, slots=True)
class Span:
    """The steps of one window within its stream."""

    start: int
    """The first one; the state the window begins with is of there, and initial at 0."""
    steps: int
    silent: int
    """The first so many have no gradient."""
    counted: int
    """The last so many have their loss counted."""
    carried: int
    """The next window begins after so many; 0 if it begins where the stream does."""

    def marks(self) -> Sequence[int]:
        """Return the steps before which something ends; the last one is `steps`."""
        ends = {self.silent, self.carried, self.steps - self.counted, self.steps}
        return sorted(ends - {0})


@dataclass(frozen=True, slots=True)
class Window:
    """What a recurrent net reads at once."""

    batch: Batch
    span: Span


class Windows:
    """The windows of one worker, by clock."""

    def __init__(
        self, num_steps: int, batch_size: int, *, k1: int, k2: int, worker: int, num_workers: int
    ) -> None:
        """Cut the streams of ``worker``, ``batch_size`` of them, out of ``num_steps`` steps.

        Raises:
            ValueError: A value out of range, or streams that would be shorter than a window.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 stream or more, got {batch_size}")
        if not 0 <= worker < num_workers:
            raise ValueError(f"worker must be 0 to {num_workers - 1}, got {worker}")
        self.batch_size = batch_size
        self.length = num_steps // (num_workers * batch_size)
        """Steps of a stream."""
        if self.length < k1:
            raise ValueError(
                f"{num_workers} workers with {batch_size} streams each would have {self.length} of "
                f"{num_steps} steps in a stream, less than a window of k1={k1}: use fewer workers, "
                "a smaller batch_size or a smaller k1"
            )
        self.starts = self.length * (worker + num_workers * torch.arange(batch_size))
        """Where the worker's streams begin, int64, shape ``(batch_size,)``."""
        self._k1, self._k2 = k1, k2
        self._per_pass = -(-self.length // k1)

    def span(self, clock: int) -> Span:
        """Return the steps of the window at ``clock``."""
        if clock < 0:
            raise ValueError(f"clock must be 0 or more, got {clock}")
        number = clock % self._per_pass
        start, stop = self._start(number), self._stop(number)
        is_last = number + 1 == self._per_pass
        return Span(
            start,
            stop - start,
            silent=max(0, stop - self._k2 - start),
            counted=min(self._k2, stop - number * self._k1),
            carried=0 if is_last else self._start(number + 1) - start,
        )

    @property
    def follows_version(self) -> bool:
        """Whether a window depends on the version it is for; it never does."""
        return False

    def read(
        self, examples: Examples, clock: int, version: int = 0, size: int | None = None
    ) -> Window:
        """Return the window of ``examples``, a `Series`, at ``clock``, whatever the version."""
        assert size is None, "check_adaptive refuses windows of another number of streams"
        series, span = cast(Series, examples), self.span(clock)
        return Window(series.read(self.starts + span.start, span.steps), span)

    def _stop(self, number: int) -> int:
        return min((number + 1) * self._k1, self.length)

    def _start(self, number: int) -> int:
        """A window begins k2 before its end, or where the stream does, or where the last ended."""
        return min(number * self._k1, max(0, self._stop(number) - self._k2))
