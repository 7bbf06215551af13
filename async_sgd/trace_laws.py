"""Delay laws that are records: of what real processes took, in their order or drawn from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from async_sgd.traces import Recorded, read_delays, read_own_delays


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Delays that were measured, in their order, again and again.

    They are those of a run's record, or of a text file in one of two forms:

        updates.npz       of each row of the ledger, dropped ones too, its end less its start
        worker,seconds    under this first line, a worker's number and a delay on each line
        a delay a line    the same list for all; of M workers, worker w starts w / M into it
    """

    path: str
    """The folder of the record, or the text file."""

    _recorded: Recorded | None = field(default=None, init=False, repr=False, compare=False)
    """Delays by worker, or one list for all, once they are read."""

    def check(self, num_workers: int) -> None:
        """Read the delays if they are not yet; refuse if a worker has none.

        Raises:
            ValueError: Workers 0 to ``num_workers`` - 1 are not all in the trace.
            RecordError: The file is missing, or does not hold delays.
        """
        if self._recorded is None:
            object.__setattr__(self, "_recorded", read_delays(Path(self.path)))
        recorded = self._recorded
        if not isinstance(recorded, dict):
            return
        missing = next((worker for worker in range(num_workers) if worker not in recorded), None)
        if missing is not None:
            raise ValueError(
                f"the trace {self.path} has delays of {len(recorded)} workers and "
                f"{num_workers} are needed: there is none of worker {missing}"
            )

    def draws(
        self, worker: int, num_workers: int, generator: Generator
    ) -> Callable[[int], NDArray[np.float64]]:
        """Return what reads on in the delays of ``worker``; ``generator`` is not used."""
        assert self._recorded is not None, "draws came before check"
        if isinstance(self._recorded, dict):
            delays, place = self._recorded[worker], 0
        else:
            delays = self._recorded
            place = worker * len(delays) // num_workers

        def read_on(n: int) -> NDArray[np.float64]:
            nonlocal place
            places = np.arange(place, place + n)
            place += n
            return delays.take(places, mode="wrap")

        return read_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampled:
    """Delays of a run's record, each drawn from those around its place.

    A worker's i-th delay is one of its recorded ones from i - around to i + around, all equally
    likely; after the last one it begins again. So delays have whatever distribution the run's had,
    also where that changed on the way, and their order among workers is made up anew. What slowed
    all workers at once is left out, see `async_sgd.traces.read_own_delays`.
    """

    path: str
    """The folder of an asynchronous run's record."""

    around: int = 5
    """How far from its place a delay may be, 0 or more; 0 keeps each worker's order."""

    _recorded: dict[int, NDArray[np.float64]] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    """Delays by worker, once they are read."""

    def __post_init__(self) -> None:
        if self.around < 0:
            raise ValueError(f"around must be 0 places or more, got {self.around}")

    def check(self, num_workers: int) -> None:
        """Read the delays if they are not yet; refuse if a worker has none.

        Raises:
            ValueError: Workers 0 to ``num_workers`` - 1 are not all in the record.
            RecordError: There is no record of delays, or too little in it.
        """
        if self._recorded is None:
            object.__setattr__(self, "_recorded", read_own_delays(Path(self.path)))
        assert self._recorded is not None
        if num_workers > len(self._recorded):
            raise ValueError(
                f"the record {self.path} has delays of {len(self._recorded)} workers and "
                f"{num_workers} are needed"
            )

    def draws(
        self, worker: int, num_workers: int, generator: Generator
    ) -> Callable[[int], NDArray[np.float64]]:
        """Return what draws from the delays of ``worker``."""
        assert self._recorded is not None, "draws came before check"
        delays, place = self._recorded[worker], 0

        def draw(n: int) -> NDArray[np.float64]:
            nonlocal place
            places = np.arange(place, place + n) % len(delays)
            place += n
            drawn = places + generator.integers(-self.around, self.around + 1, size=n)
            return delays.take(drawn, mode="clip")

        return draw
