"""`paramserver simulate`: an asynchronous run in virtual time, with any number of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_sgd.calibration import calibrate
from async_sgd.delays import DELAYS, DelayLaw, Exponential
from async_sgd.network import Network
from async_sgd.recorded import recorded_setup
from async_sgd.simulation import Change
from async_sgd.simulator import REAL_ONLY, Simulator
from deploy.flags import Flags, Parser, UsageError, spell
from deploy.running import DEFAULT_EPOCHS, PLUGINS, RunFlags, Tell, make_run
from paramserver.compensation import Compensation
from paramserver.measures import measures_of
from paramserver.record import read_record
from paramserver.rules import Damping, RuleSpec
from workers.config import RunConfig
from workers.local import Local
from workers.tasks import TASKS

_DEFAULT_DELAY = Exponential()


@dataclass(frozen=True, kw_only=True)
class SimulateFlags(RunFlags):
    """What `paramserver simulate` can be told. All seconds are virtual."""

    delay: DelayLaw = _DEFAULT_DELAY
    """Seconds a worker takes for a gradient, one of `paramserver list delays`."""

    rule: RuleSpec | None = None
    """Who waits for whom, one of `paramserver list rules`; asp unless given."""

    damping: Damping | None = None
    """Shortens the steps of stale gradients, one of `paramserver list dampings`."""

    compensation: Compensation | None = None
    """Corrects stale gradients by what has changed since they were computed, one of `paramserver
    list compensations`."""

    local: Local | None = None
    """Steps a worker takes by itself between a read and a push, one of `paramserver list locals`;
    each takes a delay."""

    measure: str | None = None
    """What is measured of each push beside its staleness, some of ``gap,cosine,step``: how far the
    parameters have moved since the read, whether it goes on the way of the last update, and how far
    its own update moves them; none unless given."""

    service: DelayLaw | None = None
    """Seconds the server takes for a push, one after the other; none unless given."""

    latency: float = 0.0
    """Seconds of each message between a worker and the server."""

    bandwidth: float | None = None
    """Bytes a second of each worker's link; as many as you like unless given."""

    changes: str | None = None
    """Workers that come or go on the way, such as ``crash:2@7.5,join:2@9,leave:0@20``; one that
    joins before it does anything else does not take part from the start."""

    batched: bool = False
    """Compute gradients in flight together, which is faster for small models and has other bits."""

    like: Path | None = None
    """Record of a real run: simulate the same, with delays fitted to its own; other flags win."""

    seeds: int = 1
    """Runs that differ by their seed alone, from ``seed`` on, one after the other in this process;
    with more than one, what is told is their spread. Finished ones are not made again."""

    evaluate_every_s: float = 10.0
    """Seconds between evaluations on the test data; 0 evaluates only at the end."""

    def __post_init__(self) -> None:
        RunFlags.__post_init__(self)
        if self.seeds < 1:
            raise ValueError(f"seeds must be 1 or more, got {self.seeds}")
        if self.seeds > 1 and self.like is not None:
            raise ValueError(
                "seeds: a run like a recorded one is compared with that record alone: leave out "
                "seeds or like, or give the delays that a run with like has told of"
            )
        self.network()
        measures_of(self.measure)
        self.parsed_changes()

    def network(self) -> Network:
        """Return what is between the workers and the server."""
        if self.bandwidth is None:
            return Network(latency=self.latency)
        return Network(latency=self.latency, bandwidth=self.bandwidth)

    def parsed_changes(self) -> tuple[Change, ...]:
        """Return who comes and goes."""
        return tuple(map(Change.parse, filter(None, (self.changes or "").split(","))))


def run(argv: Sequence[str]) -> int:
    """Simulate as ``argv`` says, print the outcome, and return the exit code."""
    parser = Parser(
        "paramserver simulate",
        "Train a task asynchronously in virtual time, in one process: the rules, optimizers and\n"
        "policies of a real run, with delays of your choice. The same flags give the same bits.\n"
        f"Without epochs, updates or until a run takes {DEFAULT_EPOCHS:g} epochs.",
        "For example:\n"
        "  paramserver simulate --workers 64 --delay gamma:mean=1,cv=0.3 --damping dynsgd\n"
        "  paramserver simulate --workers 8 --rule ssp:bound=2 --delay straggler:probability=0.05\n"
        "  paramserver simulate --workers 4 --rule bsp --changes crash:2@30,join:2@60\n"
        "  paramserver simulate --workers 8 --damping dynsgd --seeds 20\n"
        "  paramserver simulate --like runs/today",
    )
    flags = Flags(SimulateFlags, PLUGINS, without=REAL_ONLY).parse(argv, parser, _like)
    if flags.seeds > 1:
        from deploy.experiment import replicas  # noqa: PLC0415  # it makes runs by this module

        return replicas.run(flags)
    starting = (
        f"simulated {flags.title('async')}: {flags.workers} workers, "
        f"{spell(DELAYS, flags.delay)} delays …"
    )
    return make_run(starting, lambda progress: simulator(flags, progress))


def _like(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record in ``given["like"]`` says of a run."""
    if "like" not in given:
        return {}
    record = read_record(given["like"])
    if record.config.get("mode") != "async" or record.result is None:
        raise UsageError(
            f"--like needs the record of an asynchronous run that has ended, and {record.path} is "
            f"{'unfinished' if record.result is None else record.config.get('mode')}"
        )
    setup = recorded_setup(record.path, record.config, None)
    if setup.local is not None:
        raise UsageError(
            f"--like fits a delay to each push, and those of {record.path} are of several local "
            "steps, which take a delay each: give --local and --delay instead"
        )
    if setup.cancels:
        raise UsageError(
            f"--like fits a delay to each push, and in {record.path} those that took long were "
            "cancelled: give --delay instead"
        )
    config = setup.config
    return {
        **{name: getattr(config, name) for name in RunConfig.__dataclass_fields__},
        "task": TASKS.build(record.config["task"]),
        "optimizer": setup.optimizer,
        "rule": setup.rule,
        "damping": setup.damping,
        "compensation": setup.compensation,
        "measure": ",".join(setup.measure) or None,
        "delay": calibrate(record.path).resampled,
        "epochs": None,
        "updates": record.result["updates"],
        "evaluate_every_s": 0.0,
    }


def simulator(flags: SimulateFlags, progress: Tell) -> Simulator:
    """Return the simulator of the run that ``flags`` describe."""
    return Simulator(
        flags.built_task(),
        flags.optimizer,
        flags.run_config(),
        delay=flags.delay,
        rule=flags.rule,
        damping=flags.damping,
        compensation=flags.compensation,
        local=flags.local,
        measure=measures_of(flags.measure),
        network=flags.network(),
        service=flags.service,
        changes=flags.parsed_changes(),
        batched=flags.batched,
        like=None if flags.like is None else calibrate(flags.like),
        progress=progress,
    )
