"""How stale the states were that a recurrent task's workers carried, told from the ledger.

    worker 0   read 3 |-- window --| state --> read 5 |-- window --|     the state is 2 versions old

A state was made with the parameters of one read and is used with those of the worker's next one, so
it is as stale as the reads are apart. None is carried into a worker's first window, into one that
begins a stream, or from one whose gradient was not finite.
"""

from __future__ import annotations

from typing import Any

from async_sgd.plan import Plan
from paramserver.ledger import Ledger, StalenessStats
from workers.local import Local, steps_of
from workers.windows import Windows


def state_figures(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """Return what the record of a run of ``plan`` says of carried states; nothing if it has none.

    Where states are initial again at each read, all figures are 0.
    """
    recurrent = plan.task.recurrent
    if recurrent is None or plan.windows is None:
        return {}
    found = StalenessStats()
    if recurrent.reset == "never":
        found = state_staleness(ledger, plan.windows, plan.local)
    return {"state_staleness": found.summary()}


def state_staleness(ledger: Ledger, windows: Windows, local: Local | None) -> StalenessStats:
    """Count the states that pushes' first windows began with by how stale they were, in versions.

    Args:
        ledger: Of the run.
        windows: Of any of its workers: their streams begin at the same clocks.
        local: Steps of workers' own; a state from step to step of one push is not counted.
    """
    stats, reasons = StalenessStats(), ledger.reasons()
    before: dict[int, tuple[int, int, int]] = {}  # of a worker: incarnation, clock, version read
    columns = ["worker", "incarnation", "clock", "read_version", "dropped"]
    for worker, incarnation, clock, version, dropped in ledger.rows(0)[columns].tolist():
        begins = windows.span(steps_of(local, worker, clock - 1).start).start
        last_incarnation, last_clock, last_version = before.pop(worker, (-1, -1, -1))
        if begins > 0 and (incarnation, clock - 1) == (last_incarnation, last_clock):
            stats.add(worker, version - last_version)
        if reasons[dropped] != "nonfinite":
            before[worker] = (incarnation, clock, version)
    return stats
