"""Speed beside public peers, in one run: push+pull, gradients/s, synchronous steps/s, a network.

Contenders take turns round by round, so what else the machine does meets all of them alike. All run
in Ray actors: Ray makes its processes nicer than the shell's, and a peer outside would have more of
the processor. One torch thread a process.
"""

from __future__ import annotations

from typing import Literal

from deploy.bench import allreduce, pushpull, remote, simulate, train
from deploy.bench.figures import Report

__all__ = ["run"]


def run(
    name: Literal["pushpull", "train", "allreduce", "simulate", "remote"],
    *,
    json: bool,
    peers: bool,
    quick: bool,
    loopback: bool = False,
) -> int:
    """Run one benchmark and print its figures.

    Args:
        name: Which one.
        json: Print one JSON object a line instead of a table.
        peers: Run the public peers as well.
        quick: Tiny sizes and times, to see that it works; the figures mean nothing.
        loopback: For ``remote``: over loopback instead of between two networks.

    Returns:
        0, or 1 if a contender of ours could not run; one of a peer's is only told of.
    """
    report = Report(name, json=json, quick=quick)
    match name:
        case "pushpull":
            pushpull.run(report, peers=peers, quick=quick)
        case "train":
            train.run(report, peers=peers, quick=quick)
        case "allreduce":
            allreduce.run(report, peers=peers, quick=quick)
        case "simulate":
            simulate.run(report, quick=quick)
        case "remote":
            remote.run(report, peers=peers, quick=quick, loopback=loopback)
        case _:
            raise ValueError(
                f"name must be pushpull, train, allreduce, simulate or remote, got {name!r}"
            )
    return 1 if report.ours_failed else 0
