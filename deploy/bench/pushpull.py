"""Push a gradient, get the parameters back: one client, one server, momentum SGD on every push.

A contender starts with the gradient in the client's memory and ends when the client holds
parameters that it could compute with. Ours is measured twice: with the gradient made in its slot,
as backward can, and copied into it from elsewhere, which is what the peers are compared with.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable
from functools import partial

import torch

from async_sgd.rules import Asynchronous
from deploy.bench.figures import OURS, Report
from deploy.bench.processes import Processes, ask, ray_for_bench, timed
from deploy.bench.pushpull_peers import DOCUMENTED, FLAT, PEERS, RPC, MemoryLimit
from deploy.bench.work import GRADIENT_SEED, OPTIMIZER
from paramserver.actor import ShardActor
from paramserver.client import Client
from paramserver.messages import Kind, Message
from paramserver.packing import pack
from paramserver.sequencer import Sequencer
from paramserver.shard_config import ShardConfig
from paramserver.transports.shared_memory import SharedMemoryConnection

Measure = Callable[[int], list[float]]
"""Does so many push+pulls; returns the milliseconds of each."""

COPIED, IN_PLACE = f"{OURS}, copied in", f"{OURS}, in place"
LIMIT = "memory limit"
SERVER = "our server"

SIZES = ((1024, 200), (2**18, 50), (2**20, 25), (2**23, 10), (2**25, 6))
"""Floats, and repeats a round."""

QUICK_SIZES = ((1024, 5), (2**16, 3))
ROUNDS, QUICK_ROUNDS = 7, 2


def run(report: Report, *, peers: bool, quick: bool) -> None:
    """Measure every size and print a table each."""
    report.note(
        "push+pull, one client and one server process, momentum SGD in the server; medians, least "
        "and most of the rounds' medians"
    )
    with ray_for_bench(quick=quick):
        for numel, repeats in QUICK_SIZES if quick else SIZES:
            rounds = measure(report, numel, repeats, QUICK_ROUNDS if quick else ROUNDS, peers=peers)
            report.show(f"{numel:,} floats", "ms", rounds, yardsticks(rounds))


def yardsticks(rounds: dict[str, list[float]]) -> list[str]:
    """Return whom to compare with: the best published pattern, flat arrays on Ray, the memory."""
    published = [c for c in (DOCUMENTED, RPC) if rounds.get(c)]
    best = min(published, key=lambda c: statistics.median(rounds[c]), default=None)
    return [*([best] if best else []), FLAT, LIMIT]


def measure(
    report: Report, numel: int, repeats: int, num_rounds: int, *, peers: bool
) -> dict[str, list[float]]:
    """Return each contender's median milliseconds, one figure a round."""
    with Processes() as processes:
        contenders: dict[str, Measure] = {}
        starts: list[tuple[str, Callable[[Processes, int], dict[str, Measure]]]] = [
            (OURS, start_ours),
            (LIMIT, _start_limit),
        ]
        starts += [(name, partial(_start_peer, name)) for name in PEERS] if peers else []
        for name, start in starts:
            try:
                contenders |= start(processes, numel)
            except Exception as error:  # a contender that cannot run must not end the others
                report.failed(name, error)
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(-1, num_rounds):  # the first round only warms up: memory, caches
            for name, contender in list(contenders.items()):
                try:
                    median = statistics.median(contender(repeats))
                    if number >= 0:
                        rounds[name].append(median)
                except Exception as error:
                    report.failed(name, error)
                    del contenders[name]
        if SERVER in processes.named:
            report.note(memory_of(ask([processes.named[SERVER].memory.remote()])[0]))
        return rounds


def memory_of(server: dict[str, int]) -> str:
    """Say what a server's process takes beside the vectors that it cannot do without."""
    mib = {name: size / 2**20 for name, size in server.items()}
    # parameters, momentum, and a snapshot for the one client and one more
    beyond = mib["resident"] - 4 * mib["model"]
    return (
        f"the server's process: {mib['resident']:,.0f} MiB resident for a model of "
        f"{mib['model']:,.1f} MiB; {beyond:,.0f} MiB beyond parameters, optimizer state and two "
        f"snapshots"
    )


def start_ours(processes: Processes, numel: int) -> dict[str, Measure]:
    """Start a shard and a client, in two processes, as in a run."""
    address, token = f"bench-{secrets.token_hex(6)}", secrets.token_hex(8)
    config = ShardConfig(
        index=0, address=address, capacity=2, token=token, fingerprint="flat", optimizer=OPTIMIZER
    )
    shard = processes.adopt(
        ShardActor.options(num_cpus=0).remote(config, pack(torch.zeros(numel)), torch.float32)
    )
    processes.named[SERVER] = shard
    ask([shard.lead.remote(Sequencer(Asynchronous().build(1)), [], 30.0)])
    client = processes.start(OurClient, address, numel, f"{token} flat")

    def measure_with(copied: bool) -> Measure:
        return lambda repeats: list(ask([client.measure.remote(repeats, copied)])[0])

    return {COPIED: measure_with(True), IN_PLACE: measure_with(False)}


class OurClient:
    """A worker's connection, without a model."""

    def __init__(self, address: str, numel: int, credentials: str) -> None:
        torch.set_num_threads(1)
        hello = Message(Kind.HELLO, worker=0, incarnation=1, text=credentials)
        connection = SharedMemoryConnection(address, 0, numel, hello)
        self._client = Client([connection], worker=0, incarnation=1)
        self._client.first_read()
        self._gradient = torch.randn(numel, generator=torch.Generator().manual_seed(GRADIENT_SEED))
        self._client.slots[0].copy_(self._gradient)

    def measure(self, repeats: int, copied: bool) -> list[float]:
        """Push and pull; see the module."""
        slot = self._client.slots[0]

        def push_copied() -> None:
            slot.copy_(self._gradient)
            self._client.push()

        return timed(push_copied if copied else self._client.push, repeats)


def _start_limit(processes: Processes, numel: int) -> dict[str, Measure]:
    limit = processes.start(MemoryLimit, numel)
    return {LIMIT: lambda repeats: list(ask([limit.measure.remote(repeats)])[0])}


def _start_peer(name: str, processes: Processes, numel: int) -> dict[str, Measure]:
    client = PEERS[name](processes, numel)
    return {name: lambda repeats: list(ask([client.measure.remote(repeats)])[0])}
