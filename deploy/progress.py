"""What a person sees while a run goes: one live line in a terminal, else a line now and then.

12.4 s  1,840 updates  151/s  loss 0.142  test accuracy 0.961  staleness 1.0 (max 3)
worker 0 waits 1.2 s for worker 1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

_SHOWN_WAIT_S = 0.5
"""Waits shorter than this are part of the work and are not shown."""

_SHOWN_WAITS = 4
"""Waits that are named; more are counted."""


TRAIN_SAMPLE = "train-sample"
"""How metrics are called that are of some training samples at one version; the train loss is of
those that gradients were computed on, each at its own version."""


def figures(status: Mapping[str, Any]) -> str:
    """Return the figures of ``status`` as one line; what is missing is left out."""
    parts = []
    if "seconds" in status:
        parts.append(f"{status['seconds']:.1f} s")
    if "updates" in status:
        parts.append(f"{status['updates']:,} updates")
    if status.get("updates_per_s"):
        parts.append(f"{rate(status['updates_per_s'])}/s")
    if "loss" in status:
        parts.append(f"loss {status['loss']:.4g}")
    metrics = {metric_label(name): value for name, value in status.get("metrics", {}).items()}
    parts += [f"{label} {metrics[label]:.4g}" for label in sorted(metrics)]
    if "staleness_mean" in status:
        most = f" (max {status['staleness_max']})" if "staleness_max" in status else ""
        parts.append(f"staleness {status['staleness_mean']:.1f}{most}")
    if status.get("warnings"):
        number = len(status["warnings"])
        more = f" (and {number - 1} more)" if number > 1 else ""
        parts.append(f"warning: {status['warnings'][0]}{more}")
    if status.get("dropped"):
        parts.append(f"dropped {counts(status['dropped'])}")
    if status.get("failures"):
        number = status["failures"]
        parts.append(f"{number} {'process' if number == 1 else 'processes'} lost and replaced")
    return "  ".join(parts)


def metric_label(name: str) -> str:
    """Return what people call a metric of an evaluation, such as ``validation loss``."""
    for start, part in (("validation_", "validation"), ("train_", TRAIN_SAMPLE)):
        if name.startswith(start):
            return f"{part} {name.removeprefix(start)}"
    return f"test {name}"


def waits(status: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each worker that has waited long, the longest wait first."""
    waiting: Mapping[int, tuple[list[int], float]] = status.get("waiting") or {}
    by_length = sorted(waiting.items(), key=lambda item: (-item[1][1], item[0]))
    long = [(w, others, s) for w, (others, s) in by_length if s >= _SHOWN_WAIT_S]
    lines = [f"worker {w} waits {s:.1f} s for {_whom(o)}" for w, o, s in long[:_SHOWN_WAITS]]
    if len(long) > _SHOWN_WAITS:
        lines.append(f"and {len(long) - _SHOWN_WAITS} more wait")
    return lines


def rate(value: float) -> str:
    """Return a rate with as many digits as say something."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def counts(by_reason: Mapping[str, int]) -> str:
    """Return ``3 (2 stale, 1 nan)``."""
    listed = ", ".join(f"{number} {reason}" for reason, number in sorted(by_reason.items()))
    return f"{sum(by_reason.values())} ({listed})"


class Progress:
    """Shows the state of a run on ``console`` for the time of a ``with`` block."""

    def __init__(
        self,
        console: Console,
        starting: str,
        *,
        every_s: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show ``starting`` until the first call.

        Args:
            console: A terminal gets a live line; anything else plain lines.
            starting: What happens before the run does.
            every_s: Seconds between two plain lines.
            now: The clock.
        """
        self._console, self._starting, self._every_s, self._now = console, starting, every_s, now
        self._shown_at: float | None = None
        self._unshown: Mapping[str, Any] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            spinner = Spinner("dots", Text(self._starting))
            self._live = Live(spinner, console=self._console, transient=True)
            self._live.start()
        else:
            self._print(self._starting)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._unshown is not None:
            self._print_status(self._unshown)

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Show ``status``, as the trainers tell it."""
        if self._live is not None:
            first = Text(figures(status), overflow="ellipsis", no_wrap=True)
            self._live.update(Group(first, *(Text(line, style="yellow") for line in waits(status))))
            return
        now = self._now()
        if self._shown_at is not None and now - self._shown_at < self._every_s:
            self._unshown = status
            return
        self._shown_at, self._unshown = now, None
        self._print_status(status)

    def _print_status(self, status: Mapping[str, Any]) -> None:
        self._print("; ".join([figures(status), *waits(status)]))

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _whom(others: list[int]) -> str:
    if not others:
        return "more gradients"
    who = [f"worker {other}" for other in sorted(others)]
    return who[0] if len(who) == 1 else f"{', '.join(who[:-1])} and {who[-1]}"
