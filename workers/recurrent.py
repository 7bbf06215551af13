"""Truncated backpropagation through time: every k1 steps of a series, back through k2 of them.

    k2 = k1    |--- window ---|--- window ---|      each begins where the last one ended
    k2 > k1    |--- window ----------|              and counts the loss of its last k1 steps
                        |--- window ----------|
    k2 < k1    |- no gradient -|- k2 -|- no gradient -|- k2 -|

A window begins with the state that the one before it left there, detached: what happened earlier is
known, and has no gradient. That state was computed with older parameters, so it is stale, too: by
the version that is read now minus the one that was read for the window that made it. Reset at each
pull, the state is zero instead, and the k2 - k1 steps before those that count only warm it up. Once
k2 covers a stream, each window begins where the stream does and the gradient is the whole one.

Sources: Williams & Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent
Network Trajectories", Neural Computation 2, 1990; Sutskever, "Training Recurrent Neural Networks",
PhD thesis, Toronto 2013, section 2.8.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from workers.examples import Batch
from workers.windows import Window

State: TypeAlias = tuple[Tensor, ...]
"""What a net remembers of each stream, such as ``(h,)`` of a GRU and ``(h, c)`` of an LSTM."""

Reset: TypeAlias = Literal["never", "pull"]
"""When a worker's state is zero again, but for the beginning of a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrent:
    """How a task's model is unrolled over a series, whose steps are the batch's second dimension.

    recurrent = Recurrent(initial=zero_state, loss=loss_and_state, k1=50)
    Task(..., loss=recurrent.whole, recurrent=recurrent, data=lambda: Data(TensorSeries(...)))
    """

    initial: Callable[[nn.Module, int], State]
    """The state before the first step of so many streams."""

    loss: Callable[[nn.Module, Batch, State], tuple[Tensor, State]]
    """The mean loss over all steps of a batch, shapes ``(n, steps, …)``, from a state on; and the
    state after them."""

    k1: int = 50
    """Steps between two gradients."""

    k2: int | None = None
    """Steps a gradient goes back; None is k1."""

    reset: Reset = "never"
    """``pull`` begins at the initial state whenever parameters were read; ``never`` carries it."""

    def __post_init__(self) -> None:
        if self.k1 < 1:
            raise ValueError(f"k1 must be 1 step or more, got {self.k1}")
        if self.k2 is not None and self.k2 < 1:
            raise ValueError(f"k2 must be 1 step or more, got {self.k2}")
        if self.reset not in get_args(Reset):
            raise ValueError(f"reset must be 'never' or 'pull', got {self.reset!r}")

    @property
    def back(self) -> int:
        """Steps a gradient goes back."""
        return self.k1 if self.k2 is None else self.k2

    def whole(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over whole sequences, each from the initial state on."""
        return self.loss(model, batch, self.initial(model, len(batch[0])))[0]

    def unroll(
        self, model: nn.Module, window: Window, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Return the loss of ``window``, to differentiate, and the state the next one begins with.

        A state is None where a stream begins.
        """
        batch, span = window.batch, window.span
        state = self.initial(model, len(batch[0])) if state is None else state
        total: Tensor | None = None
        carried: State | None = None
        at = 0
        for mark in span.marks():
            part = tuple(tensor[:, at:mark] for tensor in batch)
            with torch.set_grad_enabled(torch.is_grad_enabled() and mark > span.silent):
                loss, state = self.loss(model, part, state)
            if mark == span.carried:
                carried = tuple(tensor.detach() for tensor in state)
            if mark > span.steps - span.counted:
                share = (mark - at) / span.counted
                weighted = loss if share == 1 else loss * share
                total = weighted if total is None else total + weighted
            at = mark
        assert total is not None, "a window counts its last step"
        return total, carried


class Carried:
    """The state that one worker carries from window to window; it is lost with the worker."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._step = -1

    def at(self, step: int) -> State | None:
        """Return the state that the window of ``step`` begins with; None if there is none."""
        return self._state if self._step == step else None

    def keep(self, step: int, state: State | None) -> None:
        """Remember what the window of ``step`` will begin with."""
        self._state, self._step = state, step

    def reset(self) -> None:
        """Forget it: the next window begins with the initial state."""
        self._state = None
