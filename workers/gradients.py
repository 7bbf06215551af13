"""A model on flat vectors: parameters show what was read, gradients go where they are pushed.

    shard 0's vector  |--- weight 1 ---|b1|--- wei|          |ght 2 ---|b2|  shard 1's vector
                            view        view   copied, because a tensor that is cut is in two places

Reading copies nothing but tensors a cut goes through. Each gradient is moved to its slot as soon as
backward has made it, while it is in the cache, and its memory is used again for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from paramserver.layout import Layout, overlaps


class BoundModel:
    """A model whose parameters and gradients live in the vectors of one or more shards."""

    def __init__(self, model: nn.Module, layout: Layout, cuts: Sequence[range]) -> None:
        """Bind ``model``, which ``layout`` describes, to vectors of the lengths of ``cuts``."""
        self.model = model
        self.layout = layout
        named = dict(model.named_parameters())
        self._parameters = [named[slot.name] for slot in layout.slots]
        # For each parameter, where its pieces lie: (shard, first, last in the shard, first in it).
        self._pieces = [
            [
                (shard, start - cuts[shard].start, stop - cuts[shard].start, start - slot.offset)
                for shard, start, stop in overlaps(slot.offset, slot.end, cuts)
            ]
            for slot in layout.slots
        ]
        self._own: dict[int, Tensor] = {
            i: torch.empty(slot.shape, dtype=layout.dtype)
            for i, slot in enumerate(layout.slots)
            if len(self._pieces[i]) != 1
        }
        self._slots: list[list[Tensor]] = []  # for each parameter, where its gradient's pieces go
        self._arrived: list[bool] = [False] * len(self._parameters)
        for i, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._mover(i))

    def read(self, vectors: Sequence[Tensor]) -> None:
        """Show the parameters in ``vectors``, one a shard; they must stay as they are."""
        both = zip(self._parameters, self.layout.slots, strict=True)
        for i, (parameter, slot) in enumerate(both):
            if i in self._own:
                whole = self._own[i].view(-1)
                for shard, start, stop, at in self._pieces[i]:
                    whole[at : at + stop - start].copy_(vectors[shard][start:stop])
                parameter.data = self._own[i]
            else:
                ((shard, start, stop, _),) = self._pieces[i]
                parameter.data = vectors[shard][start:stop].view(slot.shape)

    def write_gradients_to(self, slots: Sequence[Tensor]) -> None:
        """Move gradients into ``slots``, one vector a shard, from the next backward on."""
        self._slots = [
            [slots[shard][start:stop] for shard, start, stop, _ in pieces]
            for pieces in self._pieces
        ]
        for slot, pieces in zip(self.layout.slots, self._slots, strict=True):
            if len(pieces) == 1:  # the gradient goes there as it is
                pieces[0] = pieces[0].view(slot.shape)

    def backward(self, loss: Tensor) -> float:
        """Run backward from ``loss``; return the 2-norm of the gradient, which is in the slots.

        A parameter the loss does not depend on has gradient 0.
        """
        self._arrived = [False] * len(self._parameters)
        loss.backward()
        for i, arrived in enumerate(self._arrived):
            if not arrived:
                for piece in self._slots[i]:
                    piece.zero_()
        return self.gradient_norm()

    def gradient_norm(self) -> float:
        """Return the 2-norm of the gradient in the slots."""
        norms = torch._foreach_norm([piece for pieces in self._slots for piece in pieces])
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if math.isinf(norm) and not self.nonfinite_layer():  # finite, but its square is not
            pieces = [p.double().view(-1) for pieces in self._slots for p in pieces]
            norm = math.sqrt(sum(float(torch.dot(p, p)) for p in pieces))
        return norm

    def nonfinite_layer(self) -> str:
        """Return the first parameter whose gradient has NaN or infinity; empty if none has."""
        for slot, pieces in zip(self.layout.slots, self._slots, strict=True):
            if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
                return slot.name
        return ""

    def _mover(self, i: int) -> Callable[[Tensor], None]:
        """Make the hook that moves the gradient of parameter ``i`` into its slot."""
        pieces = self._pieces[i]

        def move(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            if len(pieces) == 1:
                parts = [grad]
            else:
                flat = grad.reshape(-1)
                parts = [flat[at : at + stop - start] for _, start, stop, at in pieces]
            for slot, part in zip(self._slots[i], parts, strict=True):
                if self._arrived[i]:  # reentrant checkpointing brings a gradient in several parts
                    slot.add_(part)
                else:
                    slot.copy_(part)
            parameter.grad = None
            self._arrived[i] = True

        return move
