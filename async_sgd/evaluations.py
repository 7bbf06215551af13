"""The process that evaluates consistent snapshots while the workers go on, and its replacement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray

from paramserver.errors import ServerTimeoutError
from workers.actor import EvaluatorActor, Servers
from workers.examiner import Examined, Keep, Looks


class Evaluations:
    """At most one evaluation at a time; an evaluator that is lost is replaced."""

    def __init__(
        self,
        task: Any,
        seed: int,
        servers: Servers,
        *,
        looks: Looks,
        timeout_s: float,
        lost: Callable[[str], None],
        options: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Describe the process; `start` makes it.

        Args:
            task: A reference to the task that Ray holds.
            seed: Of the run.
            servers: Whose parameters are evaluated.
            looks: At what, beside the test and validation data.
            timeout_s: Seconds an answer may take.
            lost: Counts the loss of a process; it may raise.
            options: Return what Ray is to give the process.
        """
        self._task, self._seed, self.servers = task, seed, servers
        self._looks, self._timeout_s, self._lost = looks, timeout_s, lost
        self._options = options
        self.actor: Any = None
        """The evaluator; None before `start`."""
        self._under_way: Any = None  # its evaluate() call
        self._num_connected = 0

    def start(self) -> None:
        """Start the process; `connect` once it and the shards are ready."""
        self.actor = EvaluatorActor.options(**self._options()).remote(
            self._task, self._seed, 1, self._looks
        )

    def connect(self) -> None:
        """Let it read the shards' parameters."""
        self._num_connected += 1
        connected = self.actor.connect.remote(self.servers, self._num_connected)
        self._get(connected, "connecting the evaluator")

    @property
    def is_under_way(self) -> bool:
        """Whether an evaluation was begun and not taken yet."""
        return self._under_way is not None

    def begin(self, keep: Keep | None) -> None:
        """Have the current version evaluated, and kept if it is better."""
        self._under_way = self.actor.evaluate.remote(keep)

    def take_if_there(self) -> Examined | None:
        """Return what came of `begin`; None if there is nothing (yet)."""
        if self._under_way is None or not ray.wait([self._under_way], timeout=0)[0]:
            return None
        return self._take()

    def last(self, keep: Keep | None) -> Examined:
        """Evaluate the current version, however many evaluators it takes."""
        if self.is_under_way:
            self._take()  # of an earlier version
        evaluated = None
        while evaluated is None:
            self.begin(keep)
            evaluated = self._take()
        return evaluated

    def _take(self) -> Examined | None:
        """Wait for what comes of it; None if the evaluator is lost, and another in its place."""
        ref, self._under_way = self._under_way, None
        try:
            found: Examined = self._get(ref, "evaluating")
        except ray.exceptions.RayActorError:
            self._lost("the evaluator")
            self.start()
            self.connect()
            return None
        return found

    def _get(self, ref: Any, doing: str) -> Any:
        try:
            return ray.get(ref, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise ServerTimeoutError(0, doing, self._timeout_s) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
