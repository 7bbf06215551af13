"""`paramserver bench`: measures this machine; the benchmarks are in `deploy.bench`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from deploy.flags import Parser, UsageError

_NAMES = ("pushpull", "train", "allreduce", "simulate", "remote")


def run(argv: Sequence[str]) -> int:
    """Run one benchmark and return its exit code."""
    parser = Parser("paramserver bench", f"Measure this machine: {', '.join(_NAMES)}.")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(_NAMES)}")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="measure public peers beside it",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument(
        "--loopback",
        action="store_true",
        help="remote: over this machine's loopback, where it cannot make networks",
    )
    given = parser.read(argv)
    if given.name not in _NAMES:
        raise UsageError(f"there is no benchmark {given.name!r}; there are {', '.join(_NAMES)}")
    if given.loopback and given.name != "remote":
        raise UsageError(f"--loopback is of the benchmark remote; {given.name} uses no network")
    bench = importlib.import_module("deploy.bench")  # here: torch and Ray take seconds
    code: int = bench.run(
        given.name,
        json=given.json,
        peers=given.peers,
        quick=given.quick,
        loopback=given.loopback,
    )
    return code
