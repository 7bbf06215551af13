"""Push a gradient over a network, get the parameters back: gRPC beside a plain TCP socket.

Both go from one process to another between two networks with a cable of this machine, in turns, as
many bytes each way. The socket does nothing with them, nor does a stream of gRPC's, in MiBs; ours
checks and applies them: plain SGD on one shard behind a gateway, the gradient made in its slot.

Then workers train over a link of 1 Gbit/s: with what they push and read as it is, and as int8; and
in lock-step, with one pull for all of them, and one each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import median
from subprocess import Popen

from deploy.bench import namespaces, remote_peers, remote_training
from deploy.bench.children import child, hear, tell
from deploy.bench.figures import OURS, Report
from deploy.bench.namespaces import ADDRESSES, Networks
from deploy.flags import UsageError

SOCKET, BARE, LINK = "TCP socket", "bare gRPC stream", "the link itself"
LINK_BITS_PER_S = 10**9

SIZES = ((2**23, 5), (2**25, 3))
"""Floats, and repeats a round: 32 MiB and 128 MiB."""

QUICK_SIZES = ((2**16, 2),)
ROUNDS, QUICK_ROUNDS, SHAPED_ROUNDS = 7, 1, 5


def run(report: Report, *, peers: bool, quick: bool, loopback: bool) -> None:
    """Measure every size, on the bare cable and on one shaped to 1 Gbit/s, and print a table each.

    Peers are measured on the bare cable alone.

    Raises:
        UsageError: Networks cannot be made here, and ``loopback`` is not asked for.
    """
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if quick else (SIZES, ROUNDS)
    if loopback:
        report.note("over this machine's loopback, not between two networks")
        if peers:
            report.note(f"no {remote_peers.RAY}: its two raylets need the two networks")
        for numel, repeats in sizes:
            _measure(report, None, numel, repeats, rounds)
        return
    if (reason := namespaces.why_not()) is not None:
        raise UsageError(
            f"bench remote makes two networks on this machine, and cannot: {reason}; measure over "
            "loopback instead with --loopback"
        )
    for numel, repeats in sizes:
        with namespaces.networks() as networks:
            _measure(report, networks, numel, repeats, rounds, peers=peers)
    if not namespaces.can_shape():
        report.note("no shaped link: tc is not installed (it is iproute2's)")
        return
    for numel, repeats in sizes:
        with namespaces.networks() as networks:
            networks.shape(LINK_BITS_PER_S)
            few = (1, QUICK_ROUNDS) if quick else (min(repeats, 2), SHAPED_ROUNDS)
            _measure(report, networks, numel, *few, bits_per_s=LINK_BITS_PER_S)
    with namespaces.networks() as networks:
        networks.shape(LINK_BITS_PER_S)
        end, link = (
            partial(_end, networks, "remote_trainees"),
            f"link of {LINK_BITS_PER_S / 1e9:g} Gbit/s",
        )
        remote_training.run(report, end, ADDRESSES["far"], link, quick=quick)


def _measure(
    report: Report,
    networks: Networks | None,
    numel: int,
    repeats: int,
    num_rounds: int,
    *,
    peers: bool = False,
    bits_per_s: int | None = None,
) -> None:
    """Let the contenders take turns, and print their medians' table."""
    rounds: dict[str, list[float]] = {OURS: [], SOCKET: [], BARE: []}
    with (
        # first, since Ray starts slowly, and the others' connection would be idle meanwhile
        remote_peers.started(report, networks if peers else None, numel) as others,
        _ends(networks, numel) as near,
    ):
        for _ in range(num_rounds):
            for contender, name in ((OURS, "ours"), (SOCKET, "socket"), (BARE, "bare")):
                tell(near, json.dumps({"contender": name, "repeats": repeats}))
                rounds[contender].append(median(json.loads(hear(near))))
            remote_peers.take_turns(report, others, repeats, rounds)
    size, yardsticks = f"{numel * 4 / 2**20:g} MiB each way", [SOCKET, BARE, remote_peers.RAY]
    if bits_per_s is not None:
        size += f", link of {bits_per_s / 1e9:g} Gbit/s"
        rounds[LINK] = [2 * 4 * 8 * numel / bits_per_s * 1e3]
        yardsticks.insert(0, LINK)
    report.show(size, "ms", rounds, yardsticks)
    if miss := remote_peers.missed(rounds):
        report.note(miss)


@contextmanager
def _ends(networks: Networks | None, numel: int) -> Iterator[Popen[str]]:
    """Start both ends; yield the near one, which is asked and answers."""
    host = "127.0.0.1" if networks is None else ADDRESSES["far"]
    start = partial(_end, networks, "remote_ends")
    with (
        start("far", ("far", host, str(numel))) as far,
        start("near", ("near", hear(far))) as near,
    ):
        yield near


def _end(
    networks: Networks | None, module: str, side: str, words: Sequence[str]
) -> AbstractContextManager[Popen[str]]:
    """Start a process of ``module`` at a side."""
    command = [sys.executable, "-m", f"deploy.bench.{module}", *words]
    return child(command if networks is None else networks.inside(side, command))
