"""Ringleader ASGD: asynchronous, and every worker counts alike however fast it is.

Where workers have data of different kinds, plain asynchronous SGD goes where the fast ones pull it:
it ends at Σ p_i ∇f_i = 0, p_i being worker i's share of the pushes. Here an update is the mean over
the workers of what each has pushed lately, (1 / n) Σ_i G_i / b_i, from a table that the shards keep
(`paramserver.gradient_table`), so it ends where the plain mean of all ∇f_i is 0. A round is

    first part     gradients go into the table until every worker is in it; no update
    second part    n updates, one with the next push of each worker, which joins its entry; what a
                   worker pushes after its own goes into the table of the next round

With n = 3, and worker 2 the slowest:

    worker 0  |-g-|-g-|-g-|-U-|-g+|-g+|-g+|-U-|
    worker 1  |---g---|---g---|---U---|---g+--|
    worker 2  |-------g-------U-------U-------|      U: with an update, g+: for the next round
    version   0               1 2     3       45

Nobody waits and nothing is dropped. A gradient in the table is at most ``2 n - 2`` updates old when
it is used, and so is what arrives, which is checked at every push; a round takes at most ``2 τ_n``
where a gradient takes at most τ_n.

**What differs from the paper.** There a worker goes on at the point it was sent with its own
update, until its next; here every push is answered by a read of the current version, which is that
point or a later one, and the bound holds as well. Where every worker is in the next table already
when a round ends, the next push begins the updates, since every update is some push's here. The
paper has its workers from beginning to end: here one that leaves takes its gradients along, and its
part of the objective with them; one that joins is waited for in the next first part.

Source: Maranjyan & Richtárik, "Ringleader ASGD: The First Asynchronous SGD with Optimal Time
Complexity under Data Heterogeneity", ICLR 2026, arXiv:2509.22860. It was at hand in summaries only:
they agree on the table, the parts, the surplus, the mean and the bound. That the last one to come
into the table makes the first update could not be confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass

from paramserver.rules import Accept, Bound, Push, Rule, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Ringleader:
    """Averages the latest gradients of every worker: fast ones count no more; nobody waits."""

    def build(self, num_workers: int) -> Rule:
        """Make the state machine; it works with any number of workers."""
        return RingleaderRule()


class RingleaderRule:
    """Tells which pushes make updates; a `paramserver.rules.Rule`."""

    name = "ringleader"
    gathers = True
    tabulates = True
    cancel_age: int | None = None

    def __init__(self) -> None:
        self._live: set[int] = set()
        self._missing: set[int] = set()  # not in the table of this round yet
        self._due: set[int] = set()  # in the table, their update still to come; empty at first
        self._later: set[int] = set()  # in the table of the next round
        self._most = 0  # workers that were live at one time

    def on_join(self, worker: int, clock: int) -> None:
        """Let the next first part wait for ``worker``."""
        self._live.add(worker)
        self._most = max(self._most, len(self._live))
        if not self._due:
            self._missing.add(worker)

    def on_push(self, push: Push) -> Verdict:
        """Take ``push`` into the table of this round, with an update or not, or of the next."""
        worker = push.worker
        if self._due and worker not in self._due:
            self._later.add(worker)
            return Accept(step=False)
        if not self._due:
            self._missing.discard(worker)
            if self._missing:
                return Accept(step=False)
            self._due = set(self._live)
        self._done(worker)
        return Accept(step=True)

    def on_leave(self, worker: int) -> bool:
        """Wait for ``worker`` no more; no update is made without a push."""
        for workers in (self._live, self._missing, self._later):
            workers.discard(worker)
        self._done(worker)
        return False

    def waits_for(self, worker: int) -> frozenset[int]:
        """Nobody."""
        return frozenset()

    def bounds(self, push: Push) -> tuple[Bound, ...]:
        """Staleness up to twice the others."""
        return (Bound("staleness", 2 * self._most - 2, push.staleness, push.worker),)

    def _done(self, worker: int) -> None:
        """Wait for the update of ``worker`` no more; the round may be over."""
        if worker not in self._due:
            return
        self._due.remove(worker)
        if not self._due:
            self._missing, self._later = self._live - self._later, set()
