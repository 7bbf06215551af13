"""Where the driver's threads and a rank's loop leave things for each other, without waiting.

The loop looks at the driver's wishes once a step, and lays answers on the desk between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paramserver.batch_sizes import Averages
from paramserver.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands between two steps."""

    version: int = 0
    """Updates applied."""
    clock: int = 0
    """Steps taken, those left out included."""
    gradients: int = 0
    """Gradients the updates are made of."""
    samples: int = 0
    """Samples those gradients are made of."""
    spoilt: int = 0
    """Gradients that were left out, as some were not finite, since the last update."""
    averages: Averages = Averages()  # noqa: RUF009  # frozen
    """What is known of the gradients' noise, where batches follow it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Position:
        """Return where the run of ``checkpoint`` stands, also of an asynchronous one."""
        clocks = [table["clock"] for table in checkpoint.workers.values()]
        rounds = checkpoint.extra.get("rounds")  # asynchronous versions count requests as well
        return cls(
            version=checkpoint.version if rounds is None else int(rounds),
            clock=max(clocks, default=0),
            gradients=int(checkpoint.extra.get("gradients", 0)),
            samples=int(checkpoint.extra.get("samples", 0)),
            averages=Averages.of(checkpoint.extra.get("averages")),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a run's state; nothing in it is shared with the rank."""

    number: int
    """The save it answers; 0 if nobody asked."""
    position: Position
    cut: range
    params: Tensor
    """The parameters in the cut."""
    rule: dict[str, Any]
    """The ``state_dict`` of the optimizer of the cut, and of its average if there is one."""
    scheduler: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All parameters at one version, or their average there; a copy."""

    version: int
    params: Tensor


@dataclass(frozen=True, slots=True)
class Status:
    """What there is to tell about a run while it goes."""

    position: Position = Position()
    loss_sum: float = 0.0
    """Sum of the joined batches' mean losses, one an update."""
    dropped: int = 0
    """Gradients that were not used because one of their step was not finite."""
    waited_s: tuple[float, ...] = ()
    """By rank, the seconds all others together have waited for it as the last one."""
    batch_size: int = 0
    """Samples of a rank's next batch, where they follow the noise; else 0."""

    def figures(self) -> dict[str, Any]:
        """Return what is shown and recorded of a run."""
        return {
            "updates": self.position.version,
            "gradients": self.position.gradients,
            "samples": self.position.samples,
            "clock": self.position.clock,
            "waited_s": sum(self.waited_s),
            **({"batch_size": self.batch_size} if self.batch_size else {}),
            "dropped": {"nonfinite": self.dropped} if self.dropped else {},
        }


class Desk:
    """One rank's desk. Thread-safe."""

    def __init__(self) -> None:
        self.stop = False
        """Whether the run is to end after this step."""
        self.save = 0
        """Number of the latest save: every rank lays its `Part` after this step. Set at one rank;
        numbers rise, so that an answer that came too late is not taken for the next one."""
        self.show = threading.Event()
        """A `Snapshot` is wanted."""
        self.status = Status()
        """Replaced as a whole after every step."""
        self._changed = threading.Condition()
        self._part: Part | None = None
        self._snapshot: Snapshot | None = None
        self._is_closed = False

    def lay(self, answer: Part | Snapshot) -> None:
        """Leave ``answer`` for whoever wants it, in place of an earlier one."""
        with self._changed:
            if isinstance(answer, Part):
                self._part = answer
            else:
                self._snapshot = answer
            self._changed.notify_all()

    def part(self, number: int, timeout_s: float) -> Part | None:
        """Wait for the answer to save ``number``; None if the loop has ended without one.

        Raises:
            TimeoutError: There was none in time.
        """

        def is_there() -> bool:
            return self._part is not None and self._part.number == number

        with self._changed:
            self._wait(is_there, "its state", timeout_s)
            return self._part if is_there() else None

    def snapshot(self, timeout_s: float) -> Snapshot | None:
        """Ask for a snapshot and wait for it; None if the loop has ended without one.

        Raises:
            TimeoutError: There was none in time.
        """
        with self._changed:
            self._snapshot = None
            self.show.set()
            self._wait(lambda: self._snapshot is not None, "a snapshot", timeout_s)
            return self._snapshot

    def close(self) -> None:
        """Say that the loop has ended; what has been laid can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait(self, is_there: Callable[[], bool], what: str, timeout_s: float) -> None:
        if not self._changed.wait_for(lambda: is_there() or self._is_closed, timeout_s):
            raise TimeoutError(f"the rank did not give {what} within {timeout_s:.1f} s")
