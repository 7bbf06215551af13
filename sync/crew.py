"""The processes of a synchronous run, and the group its ranks form.

spawn, choose --> form --> every rank trains --> all have finished
                   ^               |
                   |               +--> one is lost: the others notice, and come back
                   +--- replace <-------+
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from paramserver.checkpoint import Checkpoint
from paramserver.errors import PeerLostError, ResourceError, ServerTimeoutError
from paramserver.packing import Packed, pack
from sync.actor import EvaluatorActor, Group, Kind, RankActor, Start
from sync.desk import Part, Position
from sync.worker import Finished, Plan
from workers.examiner import Examined, Keep, Looks
from workers.reservation import Places
from workers.task import Task

logger = logging.getLogger(__name__)

_LAST_WORD_S = 5.0
"""Seconds for the last words of a rank that the others miss: it may bring the error that ended it.
Ray takes one or two to notice that a process is gone."""

_LOOK_S = 0.2
"""Seconds in which an answer is expected that may also come later."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What is left of a group that broke."""

    ranks: tuple[int, ...]
    """Ranks whose processes are gone or silent; none if only a connection was."""
    reached: int
    """The highest version that the others know of."""


def carrier(nodes: Sequence[int], *, compressed: bool = False) -> Kind:
    """Return what carries gradients best between ranks, of which each is on one of ``nodes``.

    Compressed gradients go from each rank to each: a node's sum of several is not compressed.
    """
    if not sys.platform.startswith("linux"):
        return "gloo"
    num_nodes = len(set(nodes))
    if num_nodes == 1:
        return "shared_memory"
    return "gloo" if compressed or num_nodes == len(nodes) else "nodes"


class Crew:
    """Ranks and an evaluator; used by the driver's one thread."""

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        looks: Looks,
        world: int,
        threads: int,
        places: Places,
        network_interface: str | None,
        compressed: bool,
        wait_timeout_s: float,
        call_timeout_s: float,
    ) -> None:
        """Describe the processes; `start` makes them.

        Args:
            task: What they train.
            seed: Of the run.
            looks: At what evaluations look, beside the test and validation data.
            world: Ranks.
            threads: torch threads in each.
            places: Where they go; `close` gives them back.
            network_interface: Of each node, that gloo is to use; None takes Ray's.
            compressed: Whether ranks send their gradients compressed.
            wait_timeout_s: Seconds a rank waits for others.
            call_timeout_s: Seconds an answer of a process may take.
        """
        self._task, self._seed, self._world = ray.put(task), seed, world
        self._looks = looks
        self._threads, self._places = threads, places
        self._network_interface, self._compressed = network_interface, compressed
        self._wait_timeout_s, self._call_timeout_s = wait_timeout_s, call_timeout_s
        self.kind: Kind = "shared_memory"
        """What carries gradients between the ranks."""
        self._collective: Literal["auto", "shared_memory", "gloo"] = "auto"
        self._nodes: tuple[int, ...] = ()  # of each rank
        self._ranks: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}  # the train() call of each rank
        self._status: Any = None  # the status() call that is under way
        self._finished: dict[int, Finished] = {}  # what those calls came back with, by rank
        self._errors: dict[int, BaseException] = {}
        self._evaluator: Any = None
        self._evaluation: Any = None  # the evaluate() call that is under way
        self._num_saves = 0

    def start(self, collective: Literal["auto", "shared_memory", "gloo"]) -> None:
        """Start every process, all at once, and choose what carries gradients.

        Raises:
            ResourceError: The cluster has no place for them, or the ranks are not on one node and
                are to share memory, or a node has no such network interface.
            ServerTimeoutError: They did not start in time.
        """
        self._places.take()
        self._spawn_evaluator()
        for rank in range(self._world):
            self._spawn(rank)
        self._collective = collective
        self._look_at_nodes("starting ranks")
        self._get([self._evaluator.ready.remote()], "starting the evaluator")

    def _look_at_nodes(self, doing: str) -> None:
        """Look where the ranks are, and choose what carries gradients between them."""
        interface = self._network_interface
        ids = self._get([rank.node.remote(interface) for rank in self._ranks.values()], doing)
        numbers = {node: number for number, node in enumerate(dict.fromkeys(ids))}
        self._nodes = tuple(numbers[node] for node in ids)
        if self._collective == "shared_memory" and len(numbers) > 1:
            raise ResourceError(
                f"the workers are on {len(numbers)} nodes, which share no memory: use "
                "collective='auto' or fewer workers"
            )
        best = carrier(self._nodes, compressed=self._compressed)
        self.kind = best if self._collective == "auto" else self._collective

    def close(self) -> None:
        """End every process, whatever it does."""
        for actor in (*self._ranks.values(), self._evaluator):
            if actor is not None:
                ray.kill(actor)
        self._places.free()

    def form(self, plan: Plan, start: Checkpoint, position: Position) -> None:
        """Form a group of all ranks and let it train from ``start``.

        Raises:
            RayActorError: A rank was lost meanwhile; `replace` it and try again.
            ServerTimeoutError: A rank did not answer.
            ResourceError: A node was lost, and the others have no place for what was on it.
        """
        self._places.wait()
        self._look_at_nodes("looking where the ranks are")
        group = Group(
            kind=self.kind,
            layout=plan.layout,
            world=self._world,
            nodes=self._nodes,
            token=secrets.token_hex(16),
            timeout_s=self._wait_timeout_s,
            network_interface=self._network_interface,
        )
        self._status, self._num_saves = None, 0
        self._runs, self._finished, self._errors = {}, {}, {}
        ready = [actor.prepare.remote(rank, group) for rank, actor in self._ranks.items()]
        try:
            address = self._get(ready, "preparing the ranks")[0]
        except ServerTimeoutError:
            self._places.wait()  # Ray learns late of a node that is lost
            raise
        params = ray.put(pack(start.params))
        begin = ray.put(Start(position, start.state))
        self._runs = {
            actor.train.remote(rank, group, address, plan, begin, params): rank
            for rank, actor in self._ranks.items()
        }

    def has_ended(self, timeout_s: float) -> bool:
        """Wait until a rank has come back, for whatever reason; all will then."""
        return not self._runs or bool(ray.wait(list(self._runs), timeout=timeout_s)[0])

    def collect(self) -> list[Finished] | Lost:
        """Wait for every rank to come back; return what they bring, or who does not.

        The same again until the next `form`.

        Raises:
            ParamServerError: What a rank broke with, other than the loss of another rank.
        """
        self._wait_for_all()
        for error in self._errors.values():
            if not isinstance(error, PeerLostError | ray.exceptions.RayActorError):
                raise error
        if len(self._finished) == self._world:
            return [self._finished[rank] for rank in range(self._world)]
        survivors = {r for r, error in self._errors.items() if isinstance(error, PeerLostError)}
        survivors |= self._finished.keys()
        reached = max((self._version(rank) for rank in survivors), default=0)
        return Lost(tuple(sorted(set(range(self._world)) - survivors)), reached)

    def replace(self, ranks: Sequence[int]) -> None:
        """Put a new process in the place of each of ``ranks``; the old ones are ended."""
        for rank in ranks:
            ray.kill(self._ranks[rank])
            self._spawn(rank)

    def replace_dead(self) -> list[int]:
        """Put a new process in the place of each rank that is gone; return which were."""
        gone = []
        for rank, actor in self._ranks.items():
            try:
                self._get([actor.node.remote(None)], "looking for lost ranks")
            except ray.exceptions.RayActorError:
                gone.append(rank)
        self.replace(gone)
        return gone

    def stop(self) -> None:
        """Let the ranks end the run after the step they are in; may be said again."""
        self._ranks[0].stop.remote()

    def status(self) -> dict[str, Any] | None:
        """Return where the run stands, as rank 0 knows it; None if it does not say so now."""
        if self._status is None:
            self._status = self._ranks[0].status.remote()
        if not ray.wait([self._status], timeout=_LOOK_S)[0]:
            return None
        ref, self._status = self._status, None
        try:
            status: dict[str, Any] = ray.get(ref, timeout=self._call_timeout_s)
        except ray.exceptions.RayActorError:  # its call comes back and says so
            return None
        return status

    def save(self) -> list[Part] | None:
        """Return every rank's share of the state at the end of a step; None if that fails."""
        self._num_saves += 1
        self._ranks[0].begin_save.remote(self._num_saves)
        return self.parts(self._num_saves)

    def parts(self, number: int) -> list[Part] | None:
        """Return every rank's share of save ``number``; None if one has none."""
        timeout_s = self._call_timeout_s
        refs = [rank.saved.remote(number, timeout_s) for rank in self._ranks.values()]
        try:
            parts: list[Part | None] = ray.get(refs, timeout=2 * timeout_s)
        except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("the state is not saved: %s", getattr(error, "cause", error))
            return None
        except ray.exceptions.RayActorError:  # its call comes back and says so
            return None
        there = [part for part in parts if part is not None]
        return there if len(there) == self._world else None

    def begin_evaluation(
        self, keep: Keep | None, snapshot: tuple[int, Packed] | None = None
    ) -> None:
        """Have a version evaluated, and kept if it is better; `evaluation` brings what came of it.

        Without ``snapshot`` it is the version at the end of the step the ranks are in.
        """
        given = snapshot or self._ranks[0].snapshot.remote(self._call_timeout_s)
        self._evaluation = self._evaluator.evaluate.remote(given, keep)

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation was begun and its metrics were not taken yet."""
        return self._evaluation is not None

    def evaluation(self, timeout_s: float) -> Examined | None:
        """Take what came of the version that was evaluated; None if there is nothing (yet).

        Raises:
            RayActorError: The evaluator is lost, or rank 0 is.
            ParamServerError: The task's metrics failed.
        """
        if self._evaluation is None or not ray.wait([self._evaluation], timeout=timeout_s)[0]:
            return None
        ref, self._evaluation = self._evaluation, None
        try:
            found: Examined | None = ray.get(ref, timeout=self._call_timeout_s)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, TimeoutError):
                raise error.cause from None
            logger.warning("an evaluation is left out: %s", error.cause)
            return None
        return found

    def revive_evaluator(self) -> bool:
        """Put a new process in the evaluator's place if it is gone; return whether it was."""
        try:
            self._get([self._evaluator.ready.remote()], "looking for the evaluator")
        except ray.exceptions.RayActorError:
            self._spawn_evaluator()
            return True
        return False

    def _wait_for_all(self) -> None:
        """Take what each rank's call comes back with; a rank the others miss may stay away."""
        # A rank waits for rank 0 twice as long as rank 0 for the others; see sync.star.
        deadline = time.monotonic() + 2 * self._wait_timeout_s + self._call_timeout_s
        missed: set[int] = set()
        while self._runs and time.monotonic() < deadline:
            done, _ = ray.wait(list(self._runs), timeout=_LOOK_S)
            for ref in done:
                rank = self._runs[ref]
                try:
                    self._finished[rank] = ray.get(ref, timeout=self._call_timeout_s)
                except ray.exceptions.RayTaskError as error:
                    self._errors[rank] = error.cause
                    missed |= set(getattr(error.cause, "peers", ()))
                except ray.exceptions.RayActorError as error:
                    self._errors[rank] = error
                del self._runs[ref]
            if done and missed.issuperset(self._runs.values()):
                deadline = min(deadline, time.monotonic() + _LAST_WORD_S)
        self._runs = {}

    def _version(self, rank: int) -> int:
        """Return the version a rank that came back had reached."""
        with contextlib.suppress(ray.exceptions.RayError):  # it is lost by now as well
            status = ray.get(self._ranks[rank].status.remote(), timeout=_LAST_WORD_S)
            return int(status["updates"])
        return 0

    def _spawn(self, rank: int) -> None:
        # One call trains; a few others can be answered meanwhile.
        options = RankActor.options(**self._places.worker(rank), max_concurrency=6)
        self._ranks[rank] = options.remote(self._task, self._seed, self._threads)

    def _spawn_evaluator(self) -> None:
        self._evaluator = EvaluatorActor.options(num_cpus=0).remote(
            self._task, self._seed, 1, self._looks
        )

    def _get(self, refs: Sequence[Any], doing: str) -> list[Any]:
        """Get answers within the deadline; errors say what was being done."""
        try:
            return list(ray.get(list(refs), timeout=self._call_timeout_s))
        except ray.exceptions.GetTimeoutError as error:
            raise ServerTimeoutError(0, doing, self._call_timeout_s) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
