from __future__ import annotations

import pytest
import torch
from torch import nn

from paramserver.errors import TaskError
from workers.config import RunConfig
from workers.examples import Data, Examples, TensorExamples
from workers.holdout import held_out
from workers.stopping import Patience
from workers.task import Task, build_data


def numbers(start: int, stop: int) -> TensorExamples:
    return TensorExamples(torch.arange(start, stop))


def values(examples: Examples | None) -> list[int]:
    assert examples is not None
    (batch,) = examples.batch(torch.arange(len(examples)))
    found: list[int] = batch.tolist()
    return found


def task_of(data: Data) -> Task:
    return Task(
        name="numbers",
        model=lambda: nn.Linear(1, 1),
        data=lambda: data,
        loss=lambda model, batch: model(batch[0]).mean(),
        headline="loss",
    )


def test_the_parts_are_every_training_sample_once() -> None:
    data = build_data(held_out(task_of(Data(numbers(0, 40), numbers(40, 50))), 0.25, seed=3))

    assert data.validation is not None
    assert len(data.validation) == 10
    assert sorted(values(data.train) + values(data.validation)) == list(range(40))
    assert values(data.test) == list(range(40, 50))


def test_which_are_held_out_depends_on_the_seed_alone() -> None:
    task = task_of(Data(numbers(0, 40), numbers(40, 50)))
    first, again, other = (
        values(build_data(held_out(task, 0.25, seed)).validation) for seed in (3, 3, 4)
    )

    assert first == again != other


def test_at_least_one_is_held_out_and_one_is_left() -> None:
    for share in (0.01, 0.99):
        data = build_data(held_out(task_of(Data(numbers(0, 2), numbers(2, 3))), share, seed=0))
        assert data.validation is not None
        assert len(data.train) == len(data.validation) == 1

    with pytest.raises(TaskError, match=r"^task 'numbers' has 1 training samples, of which none"):
        build_data(held_out(task_of(Data(numbers(0, 1), numbers(2, 3))), 0.5, seed=0))


def test_a_share_is_not_taken_from_a_task_that_sets_its_own_apart() -> None:
    task = task_of(Data(numbers(0, 4), numbers(4, 6), numbers(6, 8)))

    with pytest.raises(TaskError, match=r"^task 'numbers' has validation data of its own: leave"):
        build_data(held_out(task, 0.5, seed=0))


def test_early_stopping_takes_the_tasks_own_part_or_a_tenth() -> None:
    config = RunConfig(early_stopping=Patience())
    own = task_of(Data(numbers(0, 40), numbers(40, 50), numbers(50, 53)))
    none = task_of(Data(numbers(0, 40), numbers(40, 50)))

    assert values(build_data(config.with_validation(own)).validation) == [50, 51, 52]
    assert len(values(build_data(config.with_validation(none)).validation)) == 4
    assert RunConfig().with_validation(none) is none


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^validation must be above 0 and below 1, got 1$"):
        RunConfig(validation=1)
    with pytest.raises(ValueError, match=r"^early stopping decides by evaluations: evaluate_every"):
        RunConfig(early_stopping=Patience(), evaluate_every_s=0)
