"""Push a gradient over a network, get the parameters back: gRPC beside a plain TCP socket.

Both go from one process to another between two networks with a cable of this machine, in turns, as
many bytes each way. The socket does nothing with them, nor does a stream of gRPC's, in MiBs; ours
checks and applies them: plain SGD on one shard behind a gateway, the gradient made in its slot.

Then workers train over a link of 1 Gbit/s, with what they push and read as it is, and as int8.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import IO

from deploy.bench import namespaces, remote_peers, remote_training
from deploy.bench.figures import OURS, Report
from deploy.bench.namespaces import ADDRESSES, Networks
from deploy.flags import UsageError

SOCKET, BARE, LINK = "TCP socket", "bare gRPC stream", "the link itself"
LINK_BITS_PER_S = 10**9

SIZES = ((2**23, 5), (2**25, 3))
"""Floats, and repeats a round: 32 MiB and 128 MiB."""

QUICK_SIZES = ((2**16, 2),)
ROUNDS, QUICK_ROUNDS, SHAPED_ROUNDS = 7, 1, 2


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
        end, link = partial(_training_end, networks), f"link of {LINK_BITS_PER_S / 1e9:g} Gbit/s"
        remote_training.run(report, end, ADDRESSES["far"], link, quick=quick)


@contextmanager
def _training_end(
    networks: Networks, side: str, words: Sequence[str]
) -> Iterator[tuple[IO[str], IO[str]]]:
    with _end(networks, side, words, module="remote_trainees") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdin, process.stdout


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
        _ends(networks, numel) as (asking, answers),
    ):
        for _ in range(num_rounds):
            for contender, name in ((OURS, "ours"), (SOCKET, "socket"), (BARE, "bare")):
                print(json.dumps({"contender": name, "repeats": repeats}), file=asking, flush=True)
                rounds[contender].append(median(json.loads(_line(answers))))
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
def _ends(networks: Networks | None, numel: int) -> Iterator[tuple[IO[str], IO[str]]]:
    """Start both ends; yield where the near one is asked and answers."""
    host = "127.0.0.1" if networks is None else ADDRESSES["far"]
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(_end(networks, "far", ("far", host, str(numel))))
        told = _line(far.stdout)
        near = stack.enter_context(_end(networks, "near", ("near", told)))
        assert near.stdin is not None
        assert near.stdout is not None
        yield near.stdin, near.stdout


@contextmanager
def _end(
    networks: Networks | None, side: str, words: Sequence[str], *, module: str = "remote_ends"
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", f"deploy.bench.{module}", *words]
    process = subprocess.Popen(  # noqa: S603  # words of our own
        command if networks is None else networks.inside(side, command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=namespaces.die_with_parent,  # noqa: PLW1509  # asks the kernel for something
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # tells it to end
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise RuntimeError("one of the two ends has failed; what it said is above")
    return line
