"""`paramserver simulate --seeds`: one configuration many times, and the spread of what came out."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from async_sgd.delays import DELAYS
from deploy.experiment import comparison
from deploy.experiment.findings import file_name, tell
from deploy.experiment.grid import replicas
from deploy.flags import UsageError, spell
from deploy.simulate import SimulateFlags, simulator


def run(flags: SimulateFlags) -> int:
    """Make the runs in this process, one after the other, and return 1 if one of them failed.

    Raises:
        UsageError: A combination that cannot work; nothing was made.
    """
    try:
        simulator(flags, lambda status: None)
    except ValueError as error:  # the simulator's word for a combination that cannot work
        raise UsageError(str(error)) from error
    grid = replicas(flags, range(flags.seed, flags.seed + flags.seeds))
    title = f"{flags.title('async')}, {flags.workers} workers, {spell(DELAYS, flags.delay)} delays"
    out = flags.out or Path("runs") / f"seeds-{file_name(title)}"
    console = Console(stderr=True, highlight=False)
    compared = comparison.compare({"": grid}, out, jobs=1, console=console)[""]
    tell(comparison.findings(compared, f"{len(grid.seeds)} seeds of a simulated {title}"), out)
    return 1 if compared.failed else 0
