"""What the batch-size experiment measures, against sums over all batches there are."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploy.experiment import batch_size
from paramserver.layout import Layout
from workers.examples import Batch, Data, TensorExamples
from workers.oracles import Oracle
from workers.task import Task

NUM, SIZE = 6, 4
DOUBLE = torch.float64


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def test_the_variance_of_a_batch_is_that_over_all_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(NUM, 1, generator=generator, dtype=DOUBLE) for _ in range(2))
    examples = TensorExamples(inputs, targets)
    task = Task(
        name="line",
        model=lambda: nn.Linear(1, 1, dtype=DOUBLE),
        data=lambda: Data(examples, examples),
        loss=squares,
        headline="loss",
    )
    model = task.model()
    layout = Layout.of(model)
    oracle = Oracle(task, model, layout, examples, 0)

    ((drawn, exact),) = batch_size._variances(oracle, layout.flatten(model), [SIZE], NUM, 2000)

    def gradient(rows: tuple[int, ...]) -> Tensor:
        loss = squares(model, (inputs[list(rows)], targets[list(rows)]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    whole = gradient(tuple(range(NUM)))
    off = [float((gradient(s) - whole).square().sum()) for s in combinations(range(NUM), SIZE)]
    assert exact == pytest.approx(sum(off) / comb(NUM, SIZE), rel=1e-12)
    assert drawn == pytest.approx(exact, rel=0.1)
