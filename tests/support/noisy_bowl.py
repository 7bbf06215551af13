"""A bowl with noise in its gradients alone, and a plain loop that trains on it by CABS.

loss of sample c   |x - 1|² / 2 + c (x - 1)       mean of all c is 0, so F = |x - 1|² / 2
its gradient       x - 1 + c                      S = Cov(c), wherever x is
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paramserver.batch_sizes import CABS
from paramserver.layout import Layout
from workers.batches import Batches
from workers.task import Batch, Data, Task, TensorExamples, build_model

DIM, NUM_EXAMPLES, BATCH = 8, 400, 6


class _Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(DIM))


def noise() -> Tensor:
    """Return c of every sample, shape ``(400, 8)``."""
    drawn = torch.randn(NUM_EXAMPLES, DIM, generator=torch.Generator().manual_seed(0))
    return drawn - drawn.mean(0)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(model, _Point)
    nothing = model.x - model.x.detach()
    mean: Tensor = (model.x - 1).square().sum() / 2 + batch[0].mean(0) @ nothing
    return mean


def _data() -> Data:
    examples = TensorExamples(noise())
    return Data(examples, examples)


TASK = Task(
    name="noisy-bowl", model=_Point, data=_data, loss=_loss, headline="loss", batch_size=BATCH
)


def plain(spec: CABS, lr: float, updates: int, num_workers: int) -> tuple[list[int], Tensor]:
    """Train by SGD in step; return the samples of each worker's batches, and where it ends."""
    model, examples, owned = build_model(TASK, 0), _data().train, NUM_EXAMPLES // num_workers
    most = min(spec.most, owned)
    streams = [
        Batches(NUM_EXAMPLES, most, seed=0, worker=w, num_workers=num_workers)
        for w in range(num_workers)
    ]
    size, sizes, trace, loss = BATCH, [], 0.0, 0.0
    for clock in range(updates):
        sizes.append(size)
        found = []
        for stream in streams:
            (c,) = examples.batch(stream.indices(clock)[:size])
            x = model.get_parameter("x").detach()
            chunks = [part.mean(0) + x - 1 for part in c.tensor_split(spec.chunks)]
            lengths = [len(part) for part in c.tensor_split(spec.chunks)]
            mean = c.mean(0) + x - 1
            spread = sum(
                n * float((g - mean).square().sum()) for n, g in zip(lengths, chunks, strict=True)
            )
            value = float((x - 1).square().sum() / 2)
            found.append((mean, spread / (spec.chunks - 1), value))
        gradients, traces, losses = zip(*found, strict=True)
        model.get_parameter("x").data.sub_(lr * torch.stack(gradients).mean(0))
        trace = spec.decay * trace + (1 - spec.decay) * sum(traces) / num_workers
        loss = spec.decay * loss + (1 - spec.decay) * sum(losses) / num_workers
        size = min(most, max(spec.least, round(lr * trace / loss / num_workers)))
    return sizes, Layout.of(model).flatten(model)
