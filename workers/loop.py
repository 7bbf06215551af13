"""What an asynchronous worker does: read, compute a gradient, push, until the run has ended.

A rule may cancel what a worker computes: the server then grants it another read at once, and the
worker looks for that

    read --- forward --- backward --- push
                     ^            ^         and between local steps

and begins the same step anew, on the same samples unless a curriculum has gone on since, or on more
or fewer of them if their number follows the noise. A backward pass, and a gradient by forward mode,
is not interrupted; it is thrown away when it is done. A push that was on its way when its read was
cancelled is dropped as ``cancelled``, and answered by one more read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from paramserver.client import Client, Ended, Reading
from paramserver.clipping import Clip
from paramserver.compression import Compression, Traffic, Wire
from paramserver.layout import Layout
from workers.batches import Batches, seed_step
from workers.estimate import Estimator, Given, GradientMode
from workers.examples import Examples
from workers.gradients import BoundModel
from workers.local import Local, steps_of
from workers.own import Kept, Work
from workers.task import Task
from workers.windows import Windows


class Cancelled(Exception):  # noqa: N818  # nothing went wrong
    """The server has no use any more for what the worker computes; it goes on with ``reading``."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self.reading = reading


@dataclass(frozen=True, slots=True)
class Finished:
    """How a worker's part of a run ended."""

    reason: str
    clock: int
    """Iterations it has ended, over all its incarnations."""
    traffic: Traffic | None = None
    """What it has pushed and read in this one, if that is compressed."""


def train(
    task: Task,
    model: nn.Module,
    layout: Layout,
    cuts: tuple[range, ...],
    client: Client,
    examples: Examples,
    batches: Batches | Windows,
    *,
    seed: int,
    gradient: GradientMode = "reverse",
    clip: Clip | None = None,
    num_chunks: int = 1,
    local: Local | None = None,
    compress: Compression | None = None,
    compress_pull: Compression | None = None,
    looks: bool = False,
    before_push: Callable[[int], None] | None = None,
) -> Finished:
    """Train until the server says that the run has ended.

    Args:
        task: Gives the loss.
        model: The task's model; its parameters are shown those of the server.
        layout: Describes ``model``.
        cuts: The shards' ranges.
        client: A connected client that has joined.
        examples: The training data.
        batches: Which samples are read at each clock.
        seed: Of the run; seeds what is random in each step.
        gradient: How it is computed.
        clip: Applied to each gradient before it is pushed.
        num_chunks: Parts of a batch whose spread tells the noise; 1 does not measure it.
        local: Steps of the worker's own between a read and a push; None pushes each gradient.
        compress: What is pushed is sent through it; None sends it as it is.
        compress_pull: Parameters are read through it; None reads them as they are.
        looks: Whether the rule may cancel what the worker computes, and it looks whether it has.
        before_push: Called with the clock before each push; for faults and tests.

    Raises:
        ParamServerError: What ended the run early, as the server says it.
    """
    bound = BoundModel(model, layout, cuts)

    def look() -> None:
        """Raise `Cancelled` if another read was granted in the place of the one that is used."""
        newer = client.newer_read()
        if newer is not None:
            raise Cancelled(newer)

    between = look if looks else None
    compute = Estimator(
        gradient,
        task,
        bound,
        cuts,
        client.slots,
        seed=seed,
        clip=clip,
        num_chunks=num_chunks,
        look=between,
    )
    work = Work(compute, bound, client.slots, look=between)
    wire: Wire | None = None
    if compress is not None or compress_pull is not None:
        carrier = client if client.carries else None
        wire = Wire(
            layout, cuts, compress, compress_pull, seed=seed, worker=client.worker, carrier=carrier
        )
    kept = Kept.at_first(task, None if local is None else local.build, wire)
    model.train()

    def prepare(step: int, version: int, size: int | None) -> Given:
        """Seed torch for a step from ``version``, and return what is read at it."""
        seed_step(seed, client.worker, step)
        return batches.read(examples, step, version, size)

    reading = client.first_read()
    steps = steps_of(local, client.worker, client.clock)
    batch: Given | None = None
    while not isinstance(reading, Ended):
        size = reading.samples or None
        read_at = functools.partial(prepare, version=reading.version, size=size)
        batch = batch or read_at(steps.start)
        try:
            done = work(kept, reading.params, reading.version, client.worker, steps, batch, read_at)
            if looks:
                look()
        except Cancelled as cancelled:
            reading, batch = cancelled.reading, None
            continue
        done = work.send(kept, steps, done)
        if before_push is not None:
            before_push(client.clock)
        client.begin_push(
            loss=done.loss,
            norm=done.norm,
            samples=done.steps * (size or batches.batch_size),
            layer=done.layer,
            keeps=done.keeps,
            noise=done.noise,
        )
        steps = steps_of(local, client.worker, client.clock + 1)
        # While the shard works, unless what is to be read depends on what comes of it.
        depends = batches.follows_version or size is not None
        batch = None if depends else prepare(steps.start, reading.version, None)
        reading = client.end_push()
    return Finished(reading.reason, client.clock, None if wire is None else wire.traffic)
