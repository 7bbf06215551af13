"""Makes the pieces of an experiment, several at a time, and shows how far it is.

    made in parallel    as Ray tasks, one torch thread each, as many at a time as there are jobs
    made one by one     in this process: with one job, or where a piece starts processes of its own

Whatever ends it, finished pieces are kept. A piece that fails is told of, and the others go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import ray
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.experiment.pieces import Piece, Settings
from workers.session import ray_session
from workers.threads import torch_threads

_Ref: TypeAlias = "ray.ObjectRef[Outcome]"

logger = logging.getLogger(__name__)

_WAIT_S = 1.0
"""Seconds between two looks at what is done."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a piece: a result, or why there is none."""

    piece: Piece
    result: Settings | None
    error: str = ""

    @property
    def done(self) -> Settings:
        """The result of a piece that has not failed."""
        assert self.result is not None, self.error
        return self.result


def make_all(
    pieces: Sequence[Piece], out: Path, *, jobs: int, console: Console, at_once: bool = True
) -> list[Outcome]:
    """Return what came of ``pieces``, in their order; those that are there are not made again.

    Args:
        pieces: All with folders of their own.
        out: The experiment's folder.
        jobs: Pieces made at a time, 1 or more.
        console: Where progress is shown.
        at_once: False makes them one by one, however many jobs there are.

    Raises:
        RecordError: A folder holds a finished piece of other settings; nothing was made.
        ResourceError: Ray cannot be started.
        KeyboardInterrupt: Ctrl-C; what was finished by then is kept.
    """
    assert len({piece.folder for piece in pieces}) == len(pieces), "two pieces share a folder"
    found = {piece.folder: piece.found(out) for piece in pieces}
    missing = [piece for piece in pieces if found[piece.folder] is None]
    errors: dict[str, str] = {}
    if missing:
        jobs = min(jobs, len(missing)) if at_once else 1
        make = _one_by_one if jobs == 1 else _in_parallel
        with _Bar(console, len(pieces), len(missing)) as bar:
            for outcome in make(missing, out, jobs, bar):
                found[outcome.piece.folder] = outcome.result
                errors[outcome.piece.folder] = outcome.error
                bar.ended(outcome)
    return [Outcome(p, found[p.folder], errors.get(p.folder, "")) for p in pieces]


class _Bar:
    """A live bar in a terminal, else a line a piece."""

    def __init__(self, console: Console, num_all: int, num_missing: int) -> None:
        self._console, self._num_all = console, num_all
        self._num_done = num_all - num_missing
        self._num_failed = 0
        self._now: list[str] = []
        self._started: dict[str, float] = {}
        self._progress = Progress(
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_all, completed=self._num_done)
        if self._num_done:
            self._say(f"{self._num_done} of {num_all} are there already")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if kind is KeyboardInterrupt:
            self._say(
                f"{self._num_done} of {self._num_all} are finished and kept: the same command "
                "goes on from here"
            )

    def began(self, piece: Piece) -> None:
        self._started[piece.name] = time.monotonic()
        self._now.append(piece.name)
        self._show()

    def ended(self, outcome: Outcome) -> None:
        name = outcome.piece.name
        self._now.remove(name)
        took = time.monotonic() - self._started[name]
        if outcome.error:
            self._num_failed += 1
            self._say(f"failed: {name}: {outcome.error}")
        else:
            self._num_done += 1
            if not self._console.is_terminal:
                self._say(f"{self._num_done}/{self._num_all}  {name}  {took:.1f} s")
        self._progress.advance(self._task)
        self._show()

    def _show(self) -> None:
        failed = f"{self._num_failed} failed  " if self._num_failed else ""
        self._progress.update(self._task, description=failed + "; ".join(self._now))

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _one_by_one(pieces: Sequence[Piece], out: Path, jobs: int, bar: _Bar) -> Iterator[Outcome]:
    for piece in pieces:
        bar.began(piece)
        yield _made(piece, out)


def _in_parallel(pieces: Sequence[Piece], out: Path, jobs: int, bar: _Bar) -> Iterator[Outcome]:
    make = ray.remote(num_cpus=1, max_retries=0)(_made)
    to_do, under_way = iter(pieces), dict[_Ref, Piece]()
    with ray_session(None, jobs):
        try:
            while True:
                while len(under_way) < jobs and (piece := next(to_do, None)) is not None:
                    bar.began(piece)
                    under_way[make.remote(piece, out.resolve())] = piece
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), timeout=_WAIT_S)
                for ref in ready:
                    yield _fetched(ref, under_way.pop(ref))
        finally:
            _cancel(under_way)


def _fetched(ref: _Ref, piece: Piece) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
    except RayError as error:  # its process was killed, by the system if memory is short
        logger.debug("a process was lost", exc_info=True)
        return Outcome(piece, None, str(error).strip().partition("\n")[0])
    return outcome


def _cancel(under_way: Mapping[_Ref, Piece]) -> None:
    for ref in under_way:
        ray.cancel(ref, force=True)


def _made(piece: Piece, out: Path) -> Outcome:
    """Make ``piece``, in whichever process; an error is part of what comes of it."""
    try:
        with torch_threads(1):
            result = piece.make(piece.settings, piece.begin(out))
        piece.finish(out, result)
    except Exception as error:
        logger.debug("%s failed", piece.name, exc_info=True)
        said = str(error).strip().partition("\n")[0]
        return Outcome(piece, None, said or type(error).__name__)
    return Outcome(piece, result)
