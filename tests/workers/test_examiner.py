from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from paramserver.layout import Layout
from paramserver.packing import unpack
from workers.examiner import Examiner, Keep, Looks
from workers.examples import Batch, Data, TensorExamples
from workers.task import Task


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(()))


def distance(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(model, Number)
    return (model.at - batch[0]).square().mean()


def examiner(data: Data, *, train: bool = False) -> tuple[Examiner, Layout]:
    task = Task(name="number", model=Number, data=lambda: data, loss=distance, headline="loss")
    model = task.model()
    layout = Layout.of(model)
    looks = Looks(train=train)
    return Examiner(task, model, data, layout, [range(layout.numel)], seed=0, looks=looks), layout


def at(value: float, layout: Layout) -> list[Tensor]:
    vector = torch.zeros(layout.numel)
    vector[0] = value
    return [vector]


def of(*values: float) -> TensorExamples:
    return TensorExamples(torch.tensor(values))


def test_every_part_of_the_data_has_its_metrics() -> None:
    look, layout = examiner(Data(of(5, 5, 5), of(1, 3), of(4, 4)), train=True)

    found = look.examine(7, at(2.0, layout))

    assert found.version == 7
    assert found.metrics == {"loss": 1.0, "validation_loss": 4.0, "train_loss": 9.0}
    assert found.params is None


def test_as_many_training_samples_as_the_validation_data_has_and_the_same_ones() -> None:
    train = of(1, 10, 100, 1000)
    look, layout = examiner(Data(train, of(0), of(0, 0)), train=True)

    first, second = (look.examine(0, at(0.0, layout)).metrics["train_loss"] for _ in range(2))

    squares = 2 * first  # the sum of two different powers of 100
    assert first == second
    assert sorted(str(round(squares))).count("1") == 2
    assert set(str(round(squares))) <= {"0", "1"}


def test_parameters_are_brought_if_they_are_better() -> None:
    look, layout = examiner(Data(of(0), of(0), of(1, 1)))

    better = look.examine(1, at(2.0, layout), Keep("validation_loss", 1.5))
    no_better = look.examine(2, at(2.0, layout), Keep("validation_loss", 1.0))

    assert better.params is not None
    assert torch.equal(unpack(better.params, torch.float32), at(2.0, layout)[0])
    assert no_better.params is None


@pytest.mark.parametrize(
    ("metric", "best", "value", "is_better"),
    [
        ("loss", None, 3.0, True),
        ("loss", None, math.nan, False),
        ("loss", 3.0, 2.9, True),
        ("loss", 3.0, 3.0, False),
        ("loss", 3.0, math.nan, False),
        ("validation_accuracy", 0.5, 0.6, True),
        ("validation_accuracy", 0.5, 0.4, False),
    ],
)
def test_what_is_better(metric: str, best: float | None, value: float, is_better: bool) -> None:
    assert Keep(metric, best).better(value) == is_better


@pytest.mark.parametrize(("always", "kept"), [(True, True), (False, False)])
def test_a_trajectory_keeps_what_is_no_better_and_what_is_not_a_number(
    always: bool, kept: bool
) -> None:
    look, layout = examiner(Data(of(0), of(0), of(1, 1)))

    worse = look.examine(1, at(2.0, layout), Keep("validation_loss", 0.1, always))
    broken = look.examine(1, at(math.nan, layout), Keep("validation_loss", 0.1, always))

    assert (worse.params is not None, broken.params is not None) == (kept, kept)
