"""Rules that average several gradients into one update: BSP, K of N, n-softsync, and kin.

One question each tells them apart: how many gradients make an update, must all of them be computed
on the current version, and does a worker whose gradient was taken wait until the update is applied?

    rule                    gradients in an update      current version only  taken ones wait
    bsp                     one of every live worker    yes                   yes
    k-of-n, sync            the first K                 yes                   yes
    k-of-n, batch-sync      the first K                 yes                   no
    k-of-n, async           the first K                 no                    yes
    k-of-n, batch-async     the first K                 no                    no
    softsync                the first floor(M / n)      no                    no
    rennala                 the first S                 yes                   no
    fedbuff                 the first K, damped         no                    no

The last two are specified in files of their own, `async_sgd.rules.rennala` and `.fedbuff`.

Where only the current version counts, a gradient of an older one is dropped as ``late``: these are
the backup workers of Chen et al. Its worker reads the new version and goes on. With K = 2 of 3:

    worker 0  |---g---|wait|---g---|
    worker 1  |-----g------|-----g------|
    worker 2  |--------g--------|---g---|
    version   0            1    ^ of version 0: late

``cancel=true`` cancels what is under way when an update is complete, as Dutta et al.'s K-sync does,
so that the worker reads the new version at once instead of after a gradient that nobody takes.

Where taken workers wait, a worker is at most once in an update, and the update is also complete
when every live worker is in it: fewer than K are left, and K would never come. Where they do not
wait, K gradients always come, and a fast worker may be in one update several times.

**Joining and leaving.** A worker that joins takes part in the update being gathered: it reads the
current version as everybody did. So the first update averages the workers that joined before it
was complete; let all of them join first where that matters. A gradient that was taken stays in the
update when its worker leaves, and the leave of the last one missing completes the update.

Sources: Valiant, "A Bridging Model for Parallel Computation", CACM 33(8), 1990 (BSP). Chen et al.,
"Revisiting Distributed Synchronous SGD", 2016, arXiv:1604.00981 (backup workers). Dutta et al.,
"Slow and Stale Gradients Can Win the Race", AISTATS 2018, arXiv:1803.01113 (the four K rules).
Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", IJCAI 2016,
arXiv:1511.05950 (n-softsync).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from async_sgd.damping import NoDamping
from paramserver.rules import Accept, Bound, Damping, Drop, Push, Rule, Verdict

Mode = Literal["sync", "batch-sync", "async", "batch-async"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BSP:
    """Averages one gradient of every live worker at one version; all wait for the slowest."""

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it averages however many workers are live."""
        return Gathering("bsp", needed=None, current_only=True, taken_wait=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class KofN:
    """Averages the first K gradients; by default K workers' at one version, later ones dropped."""

    k: int
    """Gradients in an update."""

    mode: Mode = "sync"
    """``sync`` and ``async``: a worker whose gradient was taken waits for the update; with
    ``batch-``, it goes on. ``sync`` drops gradients of older versions, ``async`` takes them."""

    cancel: bool = False
    """Whether gradients under way are cancelled when an update is complete without them, instead
    of being dropped when they arrive; ``sync`` modes only."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be 1 gradient or more, got {self.k}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.cancel and self.mode not in ("sync", "batch-sync"):
            raise ValueError(
                f"mode {self.mode} takes gradients of older versions, so there is none to cancel: "
                "leave cancel out, or use mode sync or batch-sync"
            )

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; where taken workers wait, K must be at most ``num_workers``."""
        taken_wait = not self.mode.startswith("batch-")
        if taken_wait and self.k > num_workers:
            raise ValueError(
                f"k must be at most the number of workers, {num_workers}, got {self.k}; "
                f"mode batch-{self.mode} takes several gradients of one worker"
            )
        return Gathering(
            "k-of-n",
            needed=self.k,
            current_only=self.mode in ("sync", "batch-sync"),
            taken_wait=taken_wait,
            cancel=self.cancel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NSoftsync:
    """Averages floor(workers / n) gradients of whatever version; nobody waits."""

    n: int = 1
    """Updates in the time the workers take for a gradient each; about the mean staleness."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be 1 update or more, got {self.n}")

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; ``n`` must be at most ``num_workers``.

        The size of an update is fixed here, so that workers that come or go do not change what a
        learning rate means.
        """
        if self.n > num_workers:
            raise ValueError(
                f"n must be at most the number of workers, {num_workers}, got {self.n}"
            )
        return Gathering(
            "softsync", needed=num_workers // self.n, current_only=False, taken_wait=False
        )


class Gathering:
    """Counts gradients until an update is complete; a `paramserver.rules.Rule`."""

    gathers = True
    tabulates = False

    def __init__(
        self,
        name: str,
        *,
        needed: int | None,
        current_only: bool,
        taken_wait: bool,
        damping: Damping | None = None,
        cancel: bool = False,
    ) -> None:
        """Start with no members.

        Args:
            name: What errors and records call the rule.
            needed: Gradients that complete an update; None: one of every live worker.
            current_only: Whether gradients of older versions are dropped.
            taken_wait: Whether a worker whose gradient was taken waits for the update.
            damping: Scales each gradient in the mean by its staleness, as part of the rule.
            cancel: Whether what an update leaves behind is cancelled; of the current version only.
        """
        assert current_only or not cancel, "what is late may still be taken"
        assert needed is not None or taken_wait, "without a count, workers must wait for each other"
        self.name = name
        self.cancel_age: int | None = 1 if cancel else None
        self._needed = needed
        self._current_only = current_only
        self._taken_wait = taken_wait
        self._damping = damping or NoDamping()
        self._gathered = 0  # gradients in the update so far
        self._live: frozenset[int] = frozenset()
        self._missing: frozenset[int] = frozenset()  # live, and not in the update so far

    def on_join(self, worker: int, clock: int) -> None:
        """Let ``worker`` take part in the update being gathered."""
        assert worker not in self._live, f"worker {worker} joined twice"
        self._live |= {worker}
        self._missing |= {worker}

    def on_push(self, push: Push) -> Verdict:
        """Take ``push`` into the update, or drop it as late."""
        if self._current_only and push.staleness > 0:
            return Drop("late")
        self._gathered += 1
        self._missing -= {push.worker}
        scale = self._damping.scale(push.staleness, len(self._live))
        return Accept(scale, step=self._close_if_complete())

    def on_leave(self, worker: int) -> bool:
        """Miss ``worker`` no more; the update may be complete without it."""
        self._live -= {worker}
        self._missing -= {worker}
        return self._close_if_complete()

    def waits_for(self, worker: int) -> frozenset[int]:
        """Name the workers missing in the update that ``worker`` is in, if such ones wait."""
        if not self._taken_wait or worker in self._missing:
            return frozenset()
        return self._missing

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """No staleness at all where only the current version counts; else nothing."""
        if not self._current_only:
            return ()
        return (Bound("staleness", 0, push.staleness, push.worker),)

    def _close_if_complete(self) -> bool:
        """Begin the next update if this one is complete; return whether it was."""
        enough = self._gathered == self._needed
        everybody = self._taken_wait and not self._missing and self._gathered > 0
        if not (enough or everybody):
            return False
        self._gathered = 0
        self._missing = self._live
        return True
