"""Gradients by forward mode: what a loss changes by along a direction, without a backward pass.

    directional derivative    ∇f · v            one pass, carrying the tangent v along
    exact gradient            ∇f · e_i          for every unit vector e_i: one pass a parameter
    random forward gradient   g = (∇f · v) v    v ~ N(0, I): E[g] = ∇f, since E[v vᵀ] = I

The random gradient's variance grows with the number P of parameters: E|g|² = (P + 2) |∇f|² for one
direction; the mean over K directions has 1/K of the variance. Nothing of the forward pass is kept.

Source: Baydin et al., "Gradients without Backpropagation", 2022, arXiv:2202.08587.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from paramserver.errors import LayoutError
from paramserver.layout import Layout
from workers.batches import step_seed
from workers.examples import Batch
from workers.functional import Params, PureLoss, differentiable, kept_random_state, push_forward
from workers.task import Task, user_code

FORWARD_LIMIT = 20_000
"""Parameters up to which the exact gradient is computed by forward mode."""

_AT_ONCE = 64
"""Directions that are carried along at once."""


def directional_derivative(
    pure: PureLoss, params: Params, direction: Params, batch: Batch, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the loss at ``params`` and its derivative along ``direction``, scalars.

    Args:
        pure: The loss.
        params: The point, a tensor for each slot.
        direction: v, likewise; its length counts.
        batch: The samples.
        seed: Of what is random in the loss, such as dropout.
    """
    with differentiable(pure.model):
        return push_forward(lambda p: pure.loss(p, batch, seed), params, direction)


def exact_gradient(pure: PureLoss, params: Params, batch: Batch, seed: int) -> tuple[float, Tensor]:
    """Return the loss and its gradient, shape ``(numel,)``, padding 0, by forward mode alone.

    It takes about as many forward passes as there are parameters.

    Raises:
        LayoutError: More than `FORWARD_LIMIT` parameters.
    """
    layout = pure.layout
    _check_small(layout)
    gradient = params[0].new_zeros(layout.numel)
    loss = math.nan

    def slope(direction: Params) -> tuple[Tensor, Tensor]:
        return directional_derivative(pure, params, direction, batch, seed)

    elements = torch.cat([torch.arange(slot.offset, slot.end) for slot in layout.slots])
    for chosen in elements.split(_AT_ONCE):
        units = gradient.new_zeros(len(chosen), layout.numel)
        units[torch.arange(len(chosen)), chosen] = 1
        losses, slopes = vmap(slope, randomness="same")(pure.split(units))
        # under vmap, torch 2.13 makes the tangent of a float32 scalar times a float a float64
        gradient[chosen] = slopes.to(gradient.dtype)
        loss = losses[0].item()
    return loss, gradient


def random_gradient(
    pure: PureLoss,
    params: Params,
    batch: Batch,
    seed: int,
    *,
    directions: int,
    generator: torch.Generator,
) -> tuple[float, Tensor]:
    """Return the loss and an unbiased estimate of its gradient, shape ``(numel,)``, padding 0.

    Args:
        pure: The loss.
        params: The point.
        batch: The samples.
        seed: Of what is random in the loss.
        directions: K, the number of directions the estimate is the mean over; a pass each.
        generator: Draws the directions.
    """
    estimate = params[0].new_zeros(pure.layout.numel)
    loss = math.nan
    for _ in range(directions):
        drawn = torch.randn(len(estimate), generator=generator, dtype=estimate.dtype)
        v = pure.join(pure.split(drawn), torch.zeros_like(drawn))  # padding stays 0
        value, slope = directional_derivative(pure, params, pure.split(v), batch, seed)
        estimate.add_(v, alpha=slope.item() / directions)
        loss = value.item()
    return loss, estimate


class ForwardGradient:
    """A step's gradient by forward mode, in the place of backward and `BoundModel.backward`.

        forward = ForwardGradient(task, model, layout, cuts)
        forward.write_gradients_to(slots)
        loss, norm = forward.gradient(batch, seed=seed, worker=worker, clock=clock)

    The parameters are those that the model shows at the time, wherever they lie. BatchNorm's
    running statistics stay as they are.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: Layout,
        cuts: Sequence[range],
        *,
        directions: int | None = 1,
    ) -> None:
        """Prepare for vectors of the lengths of ``cuts``.

        Args:
            task: Gives the loss.
            model: The task's model.
            layout: Describes ``model``.
            cuts: The shards' ranges.
            directions: Random directions a step; None takes every unit vector, which is exact.

        Raises:
            LayoutError: ``directions`` is None, and there are over `FORWARD_LIMIT` parameters.
        """
        if directions is None:
            _check_small(layout)
        elif directions < 1:
            raise ValueError(f"directions must be 1 or more, or None for all, got {directions}")
        named = dict(model.named_parameters())
        self._parameters = [named[slot.name] for slot in layout.slots]
        self._pure, self._cuts, self._directions = PureLoss(task, model, layout), cuts, directions
        self._slots: Sequence[Tensor] = ()

    def write_gradients_to(self, slots: Sequence[Tensor]) -> None:
        """Write gradients into ``slots``, one vector a shard, from the next one on."""
        self._slots = slots

    def gradient(self, batch: Batch, *, seed: int, worker: int, clock: int) -> tuple[float, float]:
        """Write the gradient over ``batch`` into the slots; return the loss and the 2-norm.

        The directions, and what is random in the loss, depend on (seed, worker, clock) alone, so a
        step that is made again is the same; dropout is what `seed_step` brings. torch's random
        state is left as it was.

        Raises:
            TaskError: The task's loss failed, or torch has no forward derivative of something in
                it; the error is the cause.
        """
        params = tuple(parameter.detach() for parameter in self._parameters)
        dropout = step_seed(seed, worker, clock)
        what = f"the forward derivative of the loss of task {self._pure.task.name!r}"
        with user_code(what), kept_random_state():
            if self._directions is None:
                loss, gradient = exact_gradient(self._pure, params, batch, dropout)
            else:
                loss, gradient = random_gradient(
                    self._pure,
                    params,
                    batch,
                    dropout,
                    directions=self._directions,
                    generator=torch.Generator().manual_seed(direction_seed(seed, worker, clock)),
                )
        for slot, cut in zip(self._slots, self._cuts, strict=True):
            slot.copy_(gradient[cut.start : cut.stop])
        norm = torch.linalg.vector_norm(gradient)
        if torch.isinf(norm):  # a finite gradient may have a square that is not
            norm = torch.linalg.vector_norm(gradient.double())
        return loss, norm.item()


def direction_seed(seed: int, worker: int, clock: int) -> int:
    """Return a seed for one step's directions, unrelated to that of `step_seed`; 63 bits."""
    key = struct.pack("<qqq", seed, worker, clock)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"direction").digest()) >> 1


def _check_small(layout: Layout) -> None:
    if layout.num_parameters > FORWARD_LIMIT:
        raise LayoutError(
            f"the exact gradient by forward mode takes a pass for each of {layout.num_parameters:,}"
            f" parameters, and its limit is {FORWARD_LIMIT:,}: use random directions or reverse "
            "mode"
        )
