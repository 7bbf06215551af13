"""The peer of `paramserver bench remote`: Ray's object store, from one raylet to another.

The gradient is put into the near object store and taken by an actor at the far raylet, which
steps and returns the parameters: as many bytes each way as ours, through both object managers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from subprocess import Popen

from deploy.bench.children import child, hear, tell
from deploy.bench.figures import OURS, Report, speedup
from deploy.bench.namespaces import Networks

RAY = "Ray object store"
AIM = 3.0
"""How many times as fast as it ours should be."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray warns where it is unset
    "RAY_AUTH_MODE": "disabled",  # the cable leads nowhere
    "RAY_TMPDIR": "/dev/shm",  # noqa: S108  # of the end alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the other contenders are no nicer than the shell
}
"""What an end's Ray has to know before it is imported."""

Measure = Callable[[int], list[float]]
"""Does so many exchanges; returns the milliseconds of each."""


@contextmanager
def started(report: Report, networks: Networks | None, numel: int) -> Iterator[dict[str, Measure]]:
    """Have the peer for the time of the block, by its name.

    Nobody is there without ``networks``, nor where it could not start, which is then told.
    """
    peers: dict[str, Measure] = {}
    with contextlib.ExitStack() as stack:
        if networks is not None:
            try:
                peers[RAY] = stack.enter_context(_raylets(networks, numel))
            except Exception as error:  # a peer that cannot run must not end the others
                report.failed(RAY, error)
        yield peers


def take_turns(
    report: Report, peers: dict[str, Measure], repeats: int, rounds: dict[str, list[float]]
) -> None:
    """Add a round's median of each peer; one that fails has had its last turn."""
    for name, measure in list(peers.items()):
        try:
            rounds.setdefault(name, []).append(median(measure(repeats)))
        except Exception as error:
            report.failed(name, error)
            del peers[name]


def missed(rounds: Mapping[str, Sequence[float]]) -> str | None:
    """Say that the aim is missed; None if it is not, or the peer did not run."""
    if not rounds.get(RAY):
        return None
    ratio = speedup(median(rounds[OURS]), median(rounds[RAY]), "ms")
    if ratio >= AIM:
        return None
    return f"{OURS} is {ratio:.2f} times as fast as {RAY}; the aim is {AIM:g}"


@contextmanager
def _raylets(networks: Networks, numel: int) -> Iterator[Measure]:
    """Start Ray in both networks; yield what asks the near driver."""
    with _end(networks, "far", numel) as far:
        hear(far)
        with _end(networks, "near", numel) as near:
            hear(near)

            def measure(repeats: int) -> list[float]:
                tell(near, json.dumps(repeats))
                times: list[float] = json.loads(hear(near))
                return times

            yield measure


def _end(networks: Networks, side: str, numel: int) -> AbstractContextManager[Popen[str]]:
    spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
    command = [sys.executable, "-m", "deploy.bench.remote_raylets", side, str(numel)]
    return child(
        networks.inside(side, [*spaces, *command]),
        env=environment(os.environ),
        start_new_session=True,  # Ctrl-C is ours alone; the end of its standard input ends it
    )


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of an end: without what ``own`` says of another Ray."""
    kept = {name: value for name, value in own.items() if not name.startswith("RAY_")}
    return kept | _ENVIRONMENT
