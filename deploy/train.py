"""`paramserver train`: joins a task, an optimizer and a mode into a run, and shows how it went.

Also the script of `ray submit deploy/cluster.yaml deploy/train.py -- FLAGS`, on a cluster's head.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.flags import Flags, Parser
from deploy.launch import check_folders, defaults, ended_in_order
from deploy.running import DEFAULT_EPOCHS, PLUGINS, RunFlags, Tell, Trainer, make_run
from paramserver.compensation import Compensation
from paramserver.measures import measures_of
from paramserver.reach import Reach, Transport
from paramserver.rules import Damping, RuleSpec
from workers.local import Local

_REACH = tuple(field.name for field in dataclasses.fields(Reach))

_ONLY_IN: Mapping[str, Literal["async", "sync"]] = {
    "rule": "async",
    "damping": "async",
    "compensation": "async",
    "local": "async",
    "measure": "async",
    "shards": "async",
    **dict.fromkeys(_REACH, "async"),
    "reduce": "sync",
    "collective": "sync",
    "network_interface": "sync",
}


@dataclass(frozen=True, kw_only=True)
class TrainFlags(RunFlags):
    """What `paramserver train` can be told."""

    mode: Literal["async", "sync"] = "async"
    """Each worker at its own pace on a parameter server, or all in step by all-reduce."""

    rule: RuleSpec | None = None
    """Who waits for whom, one of `paramserver list rules`; async only, where it is asp unless
    given, or pieces for a round program, which any other rule runs in its push form."""

    damping: Damping | None = None
    """Shortens the steps of stale gradients, one of `paramserver list dampings`; async only, where
    it is none unless given."""

    compensation: Compensation | None = None
    """Corrects stale gradients by what has changed since they were computed, one of `paramserver
    list compensations`; async only, where it is none unless given."""

    local: Local | None = None
    """Steps a worker takes by itself between a read and a push, one of `paramserver list locals`;
    async only, where it is none unless given: each gradient is pushed."""

    measure: str | None = None
    """What is measured of each push beside its staleness, some of ``gap,cosine,step``: how far the
    parameters have moved since the read, whether it goes on the way of the last update, and how far
    its own update moves them; async only, where it is none unless given. Costs passes over memory.
    """

    shards: int | None = None
    """Server processes the parameters are cut over; async only, where it is 1 unless given."""

    transport: Transport | None = None
    """What workers reach the shards by: with auto shared memory on the shards' node and gRPC on
    others; async only, where it is auto unless given."""

    listen: str | None = None
    """Address for gRPC, ``host:port``; async only. Unless given, a run on one machine listens on
    Unix sockets alone, and one over several nodes at a free port of this one."""

    guests: int | None = None
    """Places for clients that join by `paramserver.Client.connect`, without Ray; async only, where
    it is 0 unless given. The run's folder tells them how, in ``connect.json``."""

    tls_certificate: Path | None = None
    """PEM file with the certificate that is shown to whoever connects; async only."""

    tls_key: Path | None = None
    """PEM file with its private key; async only."""

    tls_ca: Path | None = None
    """PEM file with the authority that signed it, and that everybody who connects needs a
    certificate of; async only."""

    clear_text: bool | None = None
    """Whether to listen without TLS where other machines can connect: everybody on the way can then
    read the run's token and parameters, and change them; async only, where it is false unless
    given."""

    reduce: Literal["mean", "sum"] | None = None
    """How the workers' gradients become one; sync only, where it is mean unless given."""

    collective: Literal["auto", "shared_memory", "gloo"] | None = None
    """What carries gradients between workers; sync only, where it is auto unless given."""

    network_interface: str | None = None
    """Network interface of each node that gloo is to use, such as ``eth0``; sync only, where it is
    $GLOO_SOCKET_IFNAME, else the one whose address Ray knows the node by."""

    def __post_init__(self) -> None:
        RunFlags.__post_init__(self)
        for name, mode in _ONLY_IN.items():
            if getattr(self, name) is not None and self.mode != mode:
                instead = "; rule bsp averages local steps there" if name == "local" else ""
                raise ValueError(
                    f"{name} is for mode {mode} only, and this run's is {self.mode}{instead}"
                )
        measures_of(self.measure)
        self.reach()
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards must be 1 or more, got {self.shards}")

    def reach(self) -> Reach:
        """Return how the run can be reached."""
        given = {name: getattr(self, name) for name in _REACH}
        return Reach(**{name: value for name, value in given.items() if value is not None})

    def only_mine(self) -> dict[str, Any]:
        """Return the options of this run's mode that were given."""
        mine = {name: getattr(self, name) for name, mode in _ONLY_IN.items() if mode == self.mode}
        given = {name: value for name, value in mine.items() if value is not None}
        if [name for name in _REACH if given.pop(name, None) is not None]:
            given["reach"] = self.reach()
        return {**given, "measure": measures_of(given["measure"])} if "measure" in given else given


def run(argv: Sequence[str]) -> int:
    """Train as ``argv`` says, print the outcome, and return the exit code."""
    parser = Parser(
        "paramserver train",
        "Train a task with several worker processes, on this machine or on a Ray cluster.\n"
        f"Without epochs, updates or until a run takes {DEFAULT_EPOCHS:g} epochs.",
        "For example:\n"
        "  paramserver train --rule ssp:bound=4 --workers 4 --until accuracy=0.97\n"
        "  paramserver train --mode sync --optimizer momentum:lr=0.05 --epochs 10\n"
        "  paramserver train --local adamw:steps=20 --optimizer nesterov:lr=0.7 --rule bsp\n"
        "  paramserver train --task mymodule:my_task --config run.toml",
    )
    flags = Flags(TrainFlags, PLUGINS).parse(argv, parser, defaults)
    check_folders(flags.out, flags.resume)
    workers = f"{flags.workers} worker{'s' if flags.workers > 1 else ''}"
    starting = f"{flags.title(flags.mode)}: starting {workers} …"
    with ended_in_order():
        return make_run(starting, lambda progress: trainer(flags, _told(flags, progress)))


def _told(flags: TrainFlags, progress: Tell) -> Tell:
    """Return what shows a run: a person at home, a person and a cluster's metrics elsewhere."""
    if flags.address is None:
        return progress
    from deploy.metrics import Metrics  # noqa: PLC0415  # Ray takes a second

    metrics = Metrics(flags.mode)

    def both(status: Mapping[str, Any]) -> None:
        progress(status)
        metrics(status)

    return both


def trainer(flags: TrainFlags, progress: Tell) -> Trainer:
    """Return the trainer of the run that ``flags`` describe."""
    what, config, mine = flags.built_task(), flags.run_config(), flags.only_mine()
    # A mode imports its own half alone: Ray takes a second, torch.distributed half of one.
    if flags.mode == "sync":
        from sync.trainer import SyncTrainer  # noqa: PLC0415

        return SyncTrainer(what, flags.optimizer, config, progress=progress, **mine)
    from async_sgd.trainer import AsyncTrainer  # noqa: PLC0415

    return AsyncTrainer(what, flags.optimizer, config, progress=progress, **mine)


if __name__ == "__main__":
    from deploy.main import main

    os.environ.setdefault("RAY_ADDRESS", "auto")  # of the cluster whose head this is
    sys.exit(main(["train", *sys.argv[1:]]))
