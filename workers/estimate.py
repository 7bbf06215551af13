"""How a training loop gets its gradients: by reverse mode, forward mode, or random directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from workers.examples import Batch
from workers.forward import ForwardGradient
from workers.gradients import BoundModel
from workers.task import Task, user_code

GradientMode: TypeAlias = Literal["reverse", "forward", "random"]

Estimate: TypeAlias = Callable[[Batch, int], tuple[float, float]]
"""Takes a batch and the clock; writes the gradient into the slots, and returns the loss and the
gradient's 2-norm. Torch was seeded for the step with `workers.batches.seed_step`."""


def estimate(
    mode: GradientMode,
    task: Task,
    bound: BoundModel,
    cuts: Sequence[range],
    slots: Sequence[Tensor],
    *,
    seed: int,
    worker: int,
) -> Estimate:
    """Make a loop's way to its gradients.

    Args:
        mode: Which.
        task: Gives the loss.
        bound: The model whose parameters the gradient is taken at.
        cuts: The shards' ranges.
        slots: Where gradients go, one vector a shard.
        seed: Of the run.
        worker: Number of the worker or rank.

    Raises:
        LayoutError: ``mode`` is ``forward`` and the model has too many parameters for it.
    """
    if mode != "reverse":
        forward = ForwardGradient(
            task, bound.model, bound.layout, cuts, directions=1 if mode == "random" else None
        )
        forward.write_gradients_to(slots)
        return lambda batch, clock: forward.gradient(batch, seed=seed, worker=worker, clock=clock)
    bound.write_gradients_to(slots)

    def reverse(batch: Batch, clock: int) -> tuple[float, float]:
        with user_code(f"the loss of task {task.name!r}"):
            loss = task.loss(bound.model, batch)
            norm = bound.backward(loss)
        return loss.item(), norm

    return reverse
