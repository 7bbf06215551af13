"""What a run may still do, how far it is, and what it knows of each worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from paramserver.batch_sizes import Averages

_SPOILT, _SPOILT_A_WORKER = 100, 10
"""Gradients in a row that are not finite until there is no hope, and as many a worker."""


@dataclass(frozen=True, slots=True)
class Budget:
    """When a run has done what it was asked for; None is no limit."""

    updates: int | None = None
    samples: int | None = None


def all_made(updates: int, version: int) -> str | None:
    """Return why a run of ``updates`` ends at ``version``, or None; one resumed may be past it."""
    if version < updates:
        return None
    return f"{version} updates" + (f", past the {updates} asked for" if version > updates else "")


def hopeless(spoilt: int, num_workers: int) -> str | None:
    """Return why a run ends whose last ``spoilt`` gradients were not finite, or None for hope.

    Dropping gradients that are not finite helps while the parameters are. Once they have diverged,
    none is finite ever again, and what counts updates and samples stands still.
    """
    if spoilt < max(_SPOILT, _SPOILT_A_WORKER * num_workers):
        return None
    return f"the parameters have diverged: none of the last {spoilt} gradients was finite"


@dataclass(slots=True)
class Member:
    """A worker, as the sequencer knows it."""

    incarnation: int
    seq: int = 0
    clock: int = 0
    live: bool = True
    read_at: float = 0.0
    """When it was granted its read, in seconds of the run."""
    cancelled: set[int] = field(default_factory=set)
    """Versions of its reads that were cancelled since its last push; it may push them yet."""
    kept: int | None = None
    """Version of the read that its next push will be of as well; None: it takes over a new one."""
    waits_since: float | None = None
    waits_for: frozenset[int] = frozenset()


@dataclass(slots=True)
class Progress:
    """Where a run stands; what a checkpoint keeps of the sequencer."""

    version: int = 0
    gradients: int = 0
    """Gradients accepted."""
    samples: int = 0
    """Samples of the accepted gradients."""
    workers: dict[int, dict[str, int]] = field(default_factory=dict)
    """Incarnation, seq and clock of each worker: the table retries are recognised by."""
    averages: Averages = Averages()  # noqa: RUF009  # frozen
    """What is known of the gradients' noise, where batches follow it."""


@dataclass(slots=True)
class Wait:
    """How often and how long one worker waited for another."""

    count: int = 0
    seconds: float = 0.0
