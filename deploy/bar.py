"""A bar that shows how far a command is."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """A live bar in a terminal, else nothing; called with how much is done, of how much."""

    def __init__(self, what: str) -> None:
        """Count ``what``."""
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn(what), BarColumn(32), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Bar:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take it away."""
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        self._progress.update(self._task, completed=done, total=total)
