from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from paramserver.errors import TaskError
from workers.difficulty import Given, Length, Loss, places
from workers.examples import Batch, Data, TensorExamples
from workers.holdout import held_out
from workers.task import Task, build_data

INPUTS = torch.linspace(-1, 1, 20).unsqueeze(1)
SLOPES = 2.0 * INPUTS.squeeze(1)
WRONG = {3: 9.0, 11: -7.0, 17: 5.0}
"""Samples with another target than the line has, and by how much."""


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]).squeeze(1), batch[1])


def line(difficulty: Tensor | None = None) -> Task:
    targets = SLOPES.clone()
    for index, off in WRONG.items():
        targets[index] += off
    train = TensorExamples(INPUTS, targets)
    return Task(
        name="line",
        model=lambda: nn.Linear(1, 1),
        data=lambda: Data(train, train, difficulty=difficulty),
        loss=squares,
        headline="loss",
        batch_size=5,
    )


def test_samples_that_do_not_fit_are_the_hardest() -> None:
    task = line()

    found = places(Loss(epochs=50, lr=0.05), task, build_data(task), "easy", seed=0)

    hardest = torch.argsort(found)[-3:].tolist()
    assert hardest == [17, 11, 3]
    assert sorted(found.tolist()) == list(range(20))


def test_scores_are_the_same_however_many_threads_there_are() -> None:
    task = line()
    before = torch.get_num_threads()

    first = Loss().scores(task, build_data(task), 0)
    torch.set_num_threads(3 - before if before in (1, 2) else 1)
    try:
        second = Loss().scores(task, build_data(task), 0)
        assert torch.get_num_threads() != before
    finally:
        torch.set_num_threads(before)

    assert torch.equal(first, second)


def test_length_counts_what_is_no_padding() -> None:
    sentences = torch.tensor([[5, 0, 0, 0], [1, 2, 3, 4], [9, 9, 0, 0], [7, 1, 2, 0]])
    data = Data(TensorExamples(sentences), TensorExamples(sentences))

    assert places(Length(), line(), data, "easy", 0).tolist() == [0, 3, 1, 2]
    assert places(Length(padding=9), line(), data, "easy", 0).tolist() == [1, 2, 0, 3]


def test_given_scores_order_samples_and_equal_ones_stay_as_they_are() -> None:
    scores = torch.tensor([2.0, 1.0, 2.0, 0.0])
    data = Data(*[TensorExamples(torch.zeros(4))] * 2, difficulty=scores)

    assert places(Given(), line(), data, "easy", 0).tolist() == [2, 1, 3, 0]
    assert places(Given(), line(), data, "hard", 0).tolist() == [0, 2, 1, 3]


def test_no_order_is_a_shuffle_by_the_seed() -> None:
    data = build_data(line())

    first, again, other = (places(Given(), line(), data, "none", seed) for seed in (1, 1, 2))

    assert sorted(first.tolist()) == list(range(20))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scores_that_are_missing_are_named() -> None:
    with pytest.raises(TaskError, match=r"^the data of task 'line' hold no difficulty: return"):
        places(Given(), line(), build_data(line()), "easy", 0)
    short = line(torch.zeros(3))
    with pytest.raises(TaskError, match=r"must have a score for each of the 20 .* shape \(3,\)$"):
        places(Given(), short, build_data(short), "easy", 0)
    partly = line(torch.tensor([float("nan"), *range(19)]))
    with pytest.raises(TaskError, match=r"^1 of 20 training samples of task 'line' have no diffic"):
        places(Given(), partly, build_data(partly), "easy", 0)


def test_a_loss_that_fails_is_the_tasks_error() -> None:
    broken = replace(line(), loss=lambda model, batch: model(batch[0].flatten()).mean())

    with pytest.raises(TaskError, match=r"^the loss of task 'line' failed: RuntimeError"):
        Loss().scores(broken, build_data(broken), 0)


def test_samples_held_out_take_their_scores_with_them() -> None:
    task = held_out(line(torch.arange(20.0)), 0.5, seed=0)

    data = build_data(task)

    (inputs, _) = data.train.batch(torch.arange(10))
    assert data.difficulty is not None
    assert torch.equal(INPUTS[data.difficulty.long()], inputs)


@pytest.mark.parametrize("key", ["epochs", "lr"])
def test_impossible_values_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} must be above 0, got 0$"):
        Loss(**{key: 0})
