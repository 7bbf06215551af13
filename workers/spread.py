"""A gradient computed in chunks, whose spread tells how noisy one sample's gradient is.

    batch of m samples    |-- n_1 --|-- n_2 --|- n_3 -|- n_4 -|      nearly equal chunks
    gradient of each          g_1       g_2      g_3     g_4
    gradient of all       g = (n_1 g_1 + … ) / m                     what is pushed
    noise                 tr(S) ≈ (n_1 |g_1 - g|² + … ) / (chunks - 1)

With S the covariance of single samples' gradients, n - 1 of n below the fraction, this is without
bias, for samples drawn without replacement and for chunks that differ in size, too: disjoint means
differ by S (1/n_i + 1/n_j), however many samples there are in all. The gradient is the one that all
samples at once give, but for layers that look at a whole batch, which see a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.examples import Batch
from workers.gradients import BoundModel
from workers.task import Task, user_code


class ChunkedGradient:
    """Computes gradients into slots, chunk by chunk."""

    def __init__(
        self,
        task: Task,
        bound: BoundModel,
        slots: Sequence[Tensor],
        num_chunks: int,
        look: Callable[[], None] | None = None,
    ) -> None:
        """Compute gradients of the loss of ``task``, which ``bound`` writes to ``slots``.

        ``look`` is called between forward and backward, to raise an error that ends both.
        """
        self._task, self._bound, self._slots = task, bound, list(slots)
        self._num_chunks, self._look = num_chunks, look
        self._sums = [torch.empty_like(slot) for slot in slots]

    def __call__(self, batch: Batch) -> tuple[float, float, float]:
        """Return the mean loss, the gradient's 2-norm and the estimate of tr(S)."""
        m = len(batch[0])
        num_chunks = min(self._num_chunks, m)
        loss = squares = 0.0
        torch._foreach_zero_(self._sums)
        for chunk in zip(*(tensor.tensor_split(num_chunks) for tensor in batch), strict=True):
            share = len(chunk[0]) / m
            of_chunk, norm = self._gradient(chunk)
            loss += share * of_chunk
            squares += share * norm**2
            torch._foreach_add_(self._sums, self._slots, alpha=share)
        torch._foreach_copy_(self._slots, self._sums)
        norm = self._bound.gradient_norm()
        return loss, norm, max(0.0, squares - norm**2) * m / (num_chunks - 1)

    def _gradient(self, chunk: Batch) -> tuple[float, float]:
        with user_code(f"the loss of task {self._task.name!r}"):
            loss = self._task.loss(self._bound.model, chunk)
        if self._look is not None:
            self._look()
        with user_code(f"the gradient of task {self._task.name!r}"):
            norm = self._bound.backward(loss)
        return loss.item(), norm
