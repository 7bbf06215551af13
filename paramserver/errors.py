"""What can go wrong at run time, as one tree.

ParamServerError
├── PluginError              an unknown name or key; nothing happened
├── LayoutError              a model or vector that does not fit the layout; nothing happened
├── TaskError                a task that cannot be trained; nothing happened
├── DataError                data that is missing or altered; nothing happened
├── CheckpointError          a checkpoint that cannot be used; nothing was changed
├── RecordError              an output folder that cannot be used; nothing was changed
├── ProtocolError            a message that breaks the contract; it was refused
├── NonFiniteGradientError   a gradient with NaN or infinity; it was not applied
├── CurvatureError           a round program met a number that is not finite; nothing was changed
├── InvariantError           a rule's bound was broken; the run stops
├── StragglerTimeoutError    a worker waited too long; its push was applied, pulling again is safe
├── ServerTimeoutError       no answer in time; a push may have been applied, a retry is safe
├── ServerLostError          a shard's process is gone; a push may have been applied
├── PeerLostError            a rank of the synchronous group is gone; the step was not finished
├── ReplicaMismatchError     synchronous replicas differ; the run stops
├── ResourceError            not enough memory, workers or CPUs; nothing happened
└── RunFailedError           a run ended early; says why and where its record is

A caller's bad value is a `ValueError`; an `assert` marks what cannot happen unless there is a bug
here. Every constructor passes its values to ``super().__init__``: Ray rebuilds an exception from
``args`` in another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class ParamServerError(Exception):
    """Root of the tree."""


class PluginError(ParamServerError, ValueError):
    """An unknown plug-in, an unknown key of one, or a value that does not parse."""


class LayoutError(ParamServerError, ValueError):
    """A model, vector or slice does not fit the layout. Nothing was changed."""


class TaskError(ParamServerError):
    """A task cannot be built or trained. Nothing was started."""


class DataError(ParamServerError):
    """Data is missing, cut short or altered. Nothing was started."""


class CheckpointError(ParamServerError):
    """A checkpoint cannot be used: another model or version, cut short, or altered."""


class RecordError(ParamServerError):
    """An output folder cannot be written or read as the record of a run."""


class ProtocolError(ParamServerError):
    """A message breaks the contract. It was refused and the state is untouched."""


class ResourceError(ParamServerError):
    """There is too little of something: memory, workers' places, CPUs. Nothing was started."""


class NonFiniteGradientError(ParamServerError):
    """A gradient holds NaN or infinity. It was not applied."""

    def __init__(self, worker: int, clock: int, layer: str) -> None:
        super().__init__(worker, clock, layer)
        self.worker, self.clock, self.layer = worker, clock, layer

    def __str__(self) -> str:
        of = f" of {self.layer!r}" if self.layer else ""
        return (
            f"worker {self.worker} at clock {self.clock}: the gradient{of} is not "
            "finite, so it was not applied; lower the learning rate or clip the gradient, or go on "
            "without such gradients with on_nan='drop'"
        )


class CurvatureError(ParamServerError):
    """Curvature is not finite, or not positive where it must be. Nothing was applied."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(what, value)
        self.what, self.value = what, value

    def __str__(self) -> str:
        return (
            f"{self.what} is {self.value}: the round was not applied; the parameters are those of "
            "the last one. Start from a point with a finite loss, add damping or shorten the steps"
        )


class InvariantError(ParamServerError):
    """A rule's bound was broken. The run stops; the push that broke it was applied."""

    def __init__(
        self, rule: str, invariant: str, bound: float, value: float, worker: int, version: int
    ) -> None:
        super().__init__(rule, invariant, bound, value, worker, version)
        self.rule, self.invariant, self.bound = rule, invariant, bound
        self.value, self.worker, self.version = value, worker, version

    def __str__(self) -> str:
        return (
            f"rule {self.rule}: {self.invariant} must be at most {self.bound:g} and was "
            f"{self.value:g} for worker {self.worker} at version {self.version}"
        )


class StragglerTimeoutError(ParamServerError):
    """A worker waited too long for slower ones. Its push was applied; pulling again is safe."""

    def __init__(
        self, worker: int, clock: int, waits_for: Mapping[int, int], waited_s: float
    ) -> None:
        super().__init__(worker, clock, dict(waits_for), waited_s)
        self.worker, self.clock, self.waited_s = worker, clock, waited_s
        self.waits_for = dict(waits_for)

    def __str__(self) -> str:
        who = ", ".join(f"worker {w} (clock {c})" for w, c in sorted(self.waits_for.items()))
        return (
            f"worker {self.worker} at clock {self.clock} waited {self.waited_s:.1f} s for "
            f"{who or 'more gradients'}: raise wait_timeout_s, or choose a rule that waits less"
        )


class ServerTimeoutError(ParamServerError):
    """A shard did not answer in time. A push may have been applied; a retry is safe."""

    def __init__(self, shard: int, doing: str, waited_s: float) -> None:
        super().__init__(shard, doing, waited_s)
        self.shard, self.doing, self.waited_s = shard, doing, waited_s

    def __str__(self) -> str:
        return f"shard {self.shard} did not answer within {self.waited_s:.1f} s while {self.doing}"


class ServerLostError(ParamServerError):
    """A shard's process or connection is gone. A push in flight may have been applied."""

    def __init__(self, shard: int, doing: str) -> None:
        super().__init__(shard, doing)
        self.shard, self.doing = shard, doing

    def __str__(self) -> str:
        return f"lost the connection to shard {self.shard} while {self.doing}"


class PeerLostError(ParamServerError):
    """A rank of the synchronous group is gone or silent. The step in flight was not finished."""

    def __init__(self, rank: int, peers: Iterable[int], step: int, waited_s: float) -> None:
        super().__init__(rank, tuple(peers), step, waited_s)
        self.rank, self.step, self.waited_s = rank, step, waited_s
        self.peers = tuple(self.args[1])

    def __str__(self) -> str:
        who = ", ".join(str(p) for p in self.peers)
        return f"rank {self.rank} at step {self.step} waited {self.waited_s:.1f} s for rank {who}"


class ReplicaMismatchError(ParamServerError):
    """Replicas that must be equal differ. The run stops."""

    def __init__(self, step: int, hashes: Mapping[int, str]) -> None:
        super().__init__(step, dict(hashes))
        self.step, self.hashes = step, dict(hashes)

    def __str__(self) -> str:
        listed = ", ".join(f"rank {r}: {h}" for r, h in sorted(self.hashes.items()))
        return f"after step {self.step} the replicas' parameters differ ({listed})"


class RunFailedError(ParamServerError):
    """A run ended early. Its record, up to then, is complete."""

    def __init__(self, reason: str, record: str | None = None) -> None:
        super().__init__(reason, record)
        self.reason, self.record = reason, record

    def __str__(self) -> str:
        return self.reason if self.record is None else f"{self.reason} (record: {self.record})"
