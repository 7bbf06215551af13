"""Where the driver's threads and a rank's loop leave things for each other, without waiting.

The loop looks at the driver's wishes once a step, and lays answers on the desk between two steps.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor


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


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a run's state; nothing in it is shared with the rank."""

    position: Position
    cut: range
    params: Tensor
    """The parameters in the cut."""
    rule: dict[str, Any]
    """The ``state_dict`` of the optimizer of the cut."""
    scheduler: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All parameters at one version, a copy."""

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


Answer = TypeVar("Answer", Part, Snapshot)


class Desk:
    """One rank's desk. Thread-safe."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        """The run is to end after this step."""
        self.save = threading.Event()
        """Every rank is to lay its `Part` on its desk after this step; set at one rank only."""
        self.show = threading.Event()
        """A `Snapshot` is wanted."""
        self.status = Status()
        """Replaced as a whole after every step."""
        self._changed = threading.Condition()
        self._laid: dict[type, Any] = {}
        self._is_closed = False

    def lay(self, answer: Part | Snapshot) -> None:
        """Leave ``answer`` for whoever takes it; an earlier one nobody took is replaced."""
        with self._changed:
            self._laid[type(answer)] = answer
            self._changed.notify_all()

    def take(self, kind: type[Answer], timeout_s: float) -> Answer | None:
        """Wait for an answer of ``kind`` and take it; None if the loop has ended without one.

        Raises:
            TimeoutError: There was none in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: kind in self._laid or self._is_closed, timeout_s):
                raise TimeoutError(f"the rank laid no {kind.__name__} in {timeout_s:.1f} s")
            answer: Answer | None = self._laid.pop(kind, None)
            return answer

    def close(self) -> None:
        """Say that the loop has ended; what has been laid can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
