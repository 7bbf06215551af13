"""Slow a run down at a step until the driver has looked, however fast the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from workers.task import Batch

Loss = Callable[[nn.Module, Batch], Tensor]
Look = Callable[[Mapping[str, Any]], None]


def slowed(loss: Loss, gate: Path, calls: int, seconds: float = 0.02) -> Loss:
    """Return ``loss``; after ``calls`` calls in a process, each takes ``seconds`` more.

    Until there is a file at ``gate``. A loss that waited for the file instead would keep the driver
    from saving: a rank gives its part between two steps.
    """
    made = 0

    def waiting(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal made
        made += model.training  # the evaluator is as fast as ever
        if made > calls and not gate.exists():
            time.sleep(seconds)
        return loss(model, batch)

    return waiting


def once_at(updates: int, gate: Path | None, act: Callable[[], None]) -> Look:
    """Return a look that calls ``act`` at the first sight of ``updates``, then opens the gate.

    Without a gate the run stays as slow as it is, and does not reach its end before ``act`` tells.
    """
    has_acted = False

    def look(status: Mapping[str, Any]) -> None:
        nonlocal has_acted
        if status["updates"] >= updates and not has_acted:
            has_acted = True
            try:
                act()
            finally:
                if gate is not None:
                    gate.touch()

    return look


def interrupt() -> None:
    """Do what Ctrl-C does to a driver."""
    raise KeyboardInterrupt
