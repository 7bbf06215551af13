"""How a training loop gets its gradients: by reverse mode, forward mode, or random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor

from paramserver.clipping import Clip
from workers.examples import Batch
from workers.forward import ForwardGradient
from workers.gradients import BoundModel
from workers.recurrent import Carried
from workers.spread import ChunkedGradient
from workers.task import Task, user_code
from workers.windows import Window

GradientMode: TypeAlias = Literal["reverse", "forward", "random"]

Given: TypeAlias = Batch | Window
"""What a gradient is computed over: of a recurrent task, a window."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """A gradient that is in the slots, ready to be pushed; or what takes its place."""

    loss: float
    norm: float
    """2-norm before it was clipped; NaN if the gradient or the loss is not finite."""
    layer: str = ""
    """The first parameter whose gradient is not finite, ``loss`` if only the loss is not."""
    steps: int = 1
    """Batches it took: several where a worker takes steps of its own."""
    keeps: bool = False
    """Whether the worker will not take over what it reads next, but go on where it is."""
    noise: float = 0.0
    """Estimate of tr(S), S the covariance of one sample's gradient, if it was measured."""


def remeasured(done: Estimated, bound: BoundModel) -> Estimated:
    """Return ``done`` with the norm of what is in the slots of ``bound`` now."""
    norm = bound.gradient_norm()
    if math.isfinite(norm):
        return replace(done, norm=norm)
    return replace(done, norm=math.nan, layer=bound.nonfinite_layer())


class Estimator:
    """Computes gradients into slots, and clips them."""

    def __init__(
        self,
        mode: GradientMode,
        task: Task,
        bound: BoundModel,
        cuts: Sequence[range],
        slots: Sequence[Tensor],
        *,
        seed: int,
        clip: Clip | None = None,
        num_chunks: int = 1,
        look: Callable[[], None] | None = None,
    ) -> None:
        """Compute gradients of the loss of ``task``.

        Args:
            mode: How.
            task: Gives the loss.
            bound: The model whose parameters the gradient is taken at.
            cuts: The shards' ranges.
            slots: Where gradients go, one vector a shard.
            seed: Of the run.
            clip: Applied to each gradient.
            num_chunks: Parts of a batch whose spread tells the noise; 1 does not measure it.
            look: Called between forward and backward, to raise an error that ends both.

        Raises:
            LayoutError: ``mode`` is ``forward`` and the model has too many parameters for it.
        """
        self._task, self._bound, self._slots, self._clip = task, bound, slots, clip
        self._seed, self._look = seed, look
        self._forward: ForwardGradient | None = None
        bound.write_gradients_to(slots)  # it looks at what forward mode writes there, too
        self._in_chunks: ChunkedGradient | None = None
        if num_chunks > 1:
            self._in_chunks = ChunkedGradient(task, bound, slots, num_chunks, look)
        if mode == "reverse":
            return
        directions = 1 if mode == "random" else None
        self._forward = ForwardGradient(
            task, bound.model, bound.layout, cuts, directions=directions
        )
        self._forward.write_gradients_to(slots)

    def __call__(
        self, batch: Given, worker: int, clock: int, carried: Carried | None = None
    ) -> Estimated:
        """Compute the gradient over ``batch`` into the slots.

        Torch was seeded for the step with `workers.batches.seed_step`. A recurrent task goes on
        from the state in ``carried``, and leaves the next one there; none if the loss or the
        gradient is not finite.
        """
        noise = 0.0
        if isinstance(batch, Window):
            assert carried is not None, "a recurrent task's workers carry a state"
            loss, norm = self._unroll(batch, clock, carried)
        elif self._in_chunks is not None:
            loss, norm, noise = self._in_chunks(batch)
        else:
            loss, norm = self._compute(batch, worker, clock)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            if carried is not None:
                carried.reset()
            return Estimated(loss, math.nan, self._bound.nonfinite_layer() or "loss")
        if self._clip is not None:
            for slot in self._slots:
                self._clip.apply_(slot, norm)
        return Estimated(loss, norm, noise=noise)

    def _compute(self, batch: Batch, worker: int, clock: int) -> tuple[float, float]:
        if self._forward is not None:
            return self._forward.gradient(batch, seed=self._seed, worker=worker, clock=clock)
        with user_code(f"the loss of task {self._task.name!r}"):
            loss = self._task.loss(self._bound.model, batch)
        if self._look is not None:
            self._look()
        with user_code(f"the gradient of task {self._task.name!r}"):
            norm = self._bound.backward(loss)
        return loss.item(), norm

    def _unroll(self, window: Window, clock: int, carried: Carried) -> tuple[float, float]:
        recurrent = self._task.recurrent
        assert recurrent is not None, "only recurrent tasks read windows"
        with user_code(f"the recurrent loss of task {self._task.name!r}"):
            loss, state = recurrent.unroll(self._bound.model, window, carried.at(clock))
        if self._look is not None:
            self._look()
        with user_code(f"the gradient of task {self._task.name!r}"):
            norm = self._bound.backward(loss)
        carried.keep(clock + 1, state)
        return loss.item(), norm
