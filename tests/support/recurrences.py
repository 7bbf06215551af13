"""A recurrence whose states, losses and gradients are known in closed form, as a task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.recurrent import Recurrent, State
from workers.task import Batch, Data, Task
from workers.windows import TensorSeries

DOUBLE = torch.float64


class LinearRecurrence(nn.Module):
    """``h_t = a h_{t-1} + b x_t``, a scalar; the loss of a step is ``(h_t - y_t)² / 2``."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=DOUBLE))
        self.b = nn.Parameter(torch.tensor(b, dtype=DOUBLE))

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the states after each step, shape ``(n, steps)``, and the last one."""
        (h,) = state
        states = []
        for x in inputs.unbind(1):
            h = self.a * h + self.b * x
            states.append(h)
        return torch.stack(states, 1), (h,)


def zero(model: nn.Module, num_streams: int) -> State:
    return (torch.zeros(num_streams, dtype=DOUBLE),)


def half_squares(model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, State]:
    inputs, targets = batch
    states, state = model(inputs, state)
    return (states - targets).square().mean() / 2, state


def series(num_steps: int, window: int, seed: int = 0) -> TensorSeries:
    """Return random inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(num_steps, generator=generator, dtype=DOUBLE) for _ in range(2))
    return TensorSeries(inputs, targets, window=window)


def recurrence_task(
    k1: int, k2: int | None = None, *, num_steps: int = 24, a: float = 0.9, b: float = 0.5,
    batch_size: int = 1, **recurrent: Any,
) -> Task:  # fmt: skip
    """Return the task of a `LinearRecurrence` on random numbers."""
    how = Recurrent(initial=zero, loss=half_squares, k1=k1, k2=k2, **recurrent)
    train, test = series(num_steps, k1), series(2 * k1, k1, seed=1)
    return Task(
        name="recurrence",
        model=partial(LinearRecurrence, a, b),
        data=lambda: Data(train, test),
        loss=how.whole,
        headline="loss",
        batch_size=batch_size,
        recurrent=how,
    )


def by_hand(
    a: float, b: float, x: Sequence[float], y: Sequence[float], start: int, counted: range,
    state: float = 0.0, *, detached_before: int | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the mean loss over the steps ``counted``, and its derivatives by a and by b.

    ``h_t = a^(t-s) h_s + b Σ_j a^(t-j) x_j``, so what lies before step ``detached_before`` counts
    as the number it is: ``dh_t/da = Σ_j a^(t-j) h_(j-1)`` and ``dh_t/db = Σ_j a^(t-j) x_j`` go over
    the steps j from there on.

    Args:
        a: The recurrence's.
        b: Likewise.
        x: Inputs.
        y: Targets.
        start: The step that ``state`` was made before.
        counted: Steps whose loss counts.
        state: ``h_(start-1)``.
        detached_before: The first step with a gradient; ``start`` if it is None.
    """
    first = start if detached_before is None else detached_before
    h = {start - 1: state}
    for t in range(start, counted.stop):
        h[t] = a * h[t - 1] + b * x[t]
    loss = by_a = by_b = 0.0
    for t in counted:
        off = h[t] - y[t]
        loss += off**2 / 2
        by_a += off * sum(a ** (t - j) * h[j - 1] for j in range(first, t + 1))
        by_b += off * sum(a ** (t - j) * x[j] for j in range(first, t + 1))
    return loss / len(counted), by_a / len(counted), by_b / len(counted)


def trained_by_hand(
    task: Task, updates: int, *, lr: float, num_streams: int = 1,
    fresh_at: Collection[int] = (), lost: Collection[int] = (),
) -> list[float]:  # fmt: skip
    """Train by the closed form with plain SGD, windows of k2 = k1; return the losses.

    Args:
        task: From `recurrence_task`.
        updates: Windows in all.
        lr: Learning rate.
        num_streams: Read side by side; a gradient is the mean over them.
        fresh_at: Windows that begin with the initial state, beside those that begin a stream.
        lost: Windows without a step; their loss is left out.
    """
    how, data = task.recurrent, task.data().train
    assert how is not None
    assert isinstance(data, TensorSeries)
    length = data.num_steps // num_streams
    inputs, targets = data.read(length * torch.arange(num_streams), length)
    model = task.model()
    a, b = (float(p.detach()) for p in model.parameters())
    losses, states = [], [0.0] * num_streams
    for update in range(updates):
        start = update * how.k1 % length
        counted = range(start, start + how.k1)
        if start == 0 or update in fresh_at or how.reset == "pull":
            states = [0.0] * num_streams
        found = []
        for stream, (x, y) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
            found.append(by_hand(a, b, x, y, start, counted, states[stream]))
            for step in counted:
                states[stream] = a * states[stream] + b * x[step]
        if update not in lost:
            loss, by_a, by_b = (sum(part) / num_streams for part in zip(*found, strict=True))
            a, b = a - lr * by_a, b - lr * by_b
            losses.append(loss)
    return losses
