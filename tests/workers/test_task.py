from __future__ import annotations

from collections.abc import Iterator

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from paramserver.checkpoint import Checkpoint
from paramserver.errors import CheckpointError, DataError, TaskError
from paramserver.layout import Layout
from workers.examiner import Examiner
from workers.task import (
    Batch,
    Data,
    Task,
    TensorExamples,
    as_examples,
    build_data,
    build_model,
    evaluate,
    is_minimised,
    recalibrate_batchnorm,
    trained_model,
)


def line_task(**changes: object) -> Task:
    x = torch.arange(10.0).unsqueeze(1)
    examples = TensorExamples(x, 2 * x)
    fields = {
        "name": "line",
        "model": lambda: nn.Linear(1, 1),
        "data": lambda: Data(examples, examples),
        "loss": lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
        "metrics": lambda model, batch: {"mean_x": batch[0].mean().item()},
        "headline": "mean_x",
    }
    return Task(**{**fields, **changes})


class Pairs(Dataset):
    """Samples as users write them: a tensor and a plain number."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)), index * index


def test_tensors_are_read_by_index_and_transformed_by_batch() -> None:
    seen: list[torch.dtype] = []

    def halve(batch: Batch) -> Batch:
        seen.append(batch[0].dtype)
        return (batch[0].float() / 2, batch[1])

    images, labels = torch.arange(6, dtype=torch.uint8).view(3, 2), torch.tensor([7, 8, 9])
    examples = TensorExamples(images, labels, transform=halve)

    half, picked = examples.batch(torch.tensor([2, 0]))

    assert half.tolist() == [[2.0, 2.5], [0.0, 0.5]]
    assert picked.tolist() == [9, 7]
    assert seen == [torch.uint8]
    assert len(examples) == 3


@pytest.mark.parametrize("tensors", [(), (torch.zeros(2), torch.zeros(3))])
def test_tensors_of_no_common_length_are_refused(tensors: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=r"^tensors must be one or more of one length"):
        TensorExamples(*tensors)


@pytest.mark.parametrize("dataset", [Pairs(), Subset(Pairs(), range(6))])
def test_a_map_style_dataset_is_collated(dataset: Dataset) -> None:
    inputs, targets = as_examples(dataset).batch(torch.tensor([3, 1]))

    assert inputs.tolist() == [[3.0, 3.0], [1.0, 1.0]]
    assert targets.tolist() == [9, 1]


def test_a_tensor_dataset_and_examples_are_taken_as_they_are() -> None:
    examples = as_examples(TensorDataset(torch.arange(4)))

    assert isinstance(examples, TensorExamples)
    assert as_examples(examples) is examples
    assert examples.batch(torch.tensor([1]))[0].tolist() == [1]


def test_a_dataset_without_index_or_tensors_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(1)

        def __len__(self) -> int:
            return 1

    with pytest.raises(TaskError, match=r"^Stream is not a map-style dataset"):
        as_examples(Stream())
    with pytest.raises(TaskError, match=r"^samples of list must be .* got dict"):
        as_examples([{"x": 1}, {"x": 2}]).batch(torch.tensor([0, 1]))


def test_a_dataset_of_single_tensors_gives_batches_of_one() -> None:
    (batch,) = as_examples([torch.tensor(1), torch.tensor(2)]).batch(torch.tensor([1, 0]))

    assert batch.tolist() == [2, 1]


def test_a_task_of_lambdas_travels_by_cloudpickle() -> None:
    copy = cloudpickle.loads(cloudpickle.dumps(line_task()))

    metrics = evaluate(copy, build_model(copy, seed=0), build_data(copy).test)

    assert metrics["mean_x"] == 4.5


def test_evaluation_weighs_batches_by_their_samples() -> None:
    task = line_task()
    model = build_model(task, seed=0)
    examples = build_data(task).test

    whole, pieces = (evaluate(task, model, examples, batch_size=n) for n in (10, 4))

    assert pieces == pytest.approx(whole)
    assert whole["loss"] == pytest.approx(task.loss(model, examples.batch(torch.arange(10))).item())


def test_evaluation_leaves_modes_and_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.9), nn.BatchNorm1d(1).eval())
    modes: list[bool] = []
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    task = line_task(model=lambda: model)

    evaluate(task, model, build_data(task).test)

    assert modes == [False]
    assert [m.training for m in (model, *model)] == [True, True, True, False]
    assert model[0].weight.grad is None


def test_evaluation_names_a_headline_that_is_not_measured() -> None:
    task = line_task(headline="accuracy")

    with pytest.raises(TaskError, match=r"judged by 'accuracy' and has only loss, mean_x"):
        evaluate(task, build_model(task, 0), build_data(task).test)


def test_models_of_one_seed_are_equal_and_the_random_state_is_left() -> None:
    state = torch.get_rng_state()

    one, same, other = (build_model(line_task(), seed).weight for seed in (1, 1, 2))

    assert one.equal(same)
    assert not one.equal(other)
    assert torch.get_rng_state().equal(state)


def test_an_error_in_the_users_code_keeps_its_message_and_traceback() -> None:
    def broken() -> nn.Module:
        raise KeyError("width")

    with pytest.raises(
        TaskError, match=r"^the model of task 'line' failed: KeyError: 'width'"
    ) as e:
        build_model(line_task(model=broken), seed=0)

    assert isinstance(e.value.__cause__, KeyError)
    assert e.value.__cause__.__traceback__ is not None
    task = line_task(loss=lambda model, batch: batch[5])
    with pytest.raises(TaskError, match=r"^evaluating task 'line' failed: IndexError"):
        evaluate(task, build_model(task, 0), build_data(task).test)


def test_missing_data_stays_a_data_error() -> None:
    def missing() -> Data:
        raise DataError("no such file")

    with pytest.raises(DataError, match=r"^no such file"):
        build_data(line_task(data=missing))


def test_what_factories_return_is_checked() -> None:
    none = TensorExamples(torch.zeros(0))

    with pytest.raises(TaskError, match=r"must be a torch.nn.Module, got int"):
        build_model(line_task(model=lambda: 3), seed=0)
    with pytest.raises(TaskError, match=r"must be a Data\(train, test\), got list"):
        build_data(line_task(data=list))
    with pytest.raises(TaskError, match=r"^the train data of task 'line' is empty"):
        build_data(line_task(data=lambda: Data(none, none)))
    with pytest.raises(TaskError, match=r"has no examples to evaluate"):
        evaluate(line_task(), nn.Linear(1, 1), none)


def test_a_task_without_metrics_is_judged_by_its_loss() -> None:
    task = line_task(metrics=None, headline="loss")

    assert evaluate(task, build_model(task, 0), build_data(task).test).keys() == {"loss"}
    with pytest.raises(ValueError, match=r"^headline must be 'loss'"):
        line_task(metrics=None)


def test_losses_errors_and_distances_are_minimised() -> None:
    assert [is_minimised(m) for m in ("loss", "top1_error", "distance", "accuracy")] == [
        True,
        True,
        True,
        False,
    ]


def test_batchnorm_gets_the_statistics_of_the_training_data() -> None:
    x = torch.randn(512, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    examples = TensorExamples(x)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 1))
    task = line_task(model=lambda: model, loss=lambda model, batch: model(batch[0]).mean())
    before = {name: p.clone() for name, p in model.named_parameters()}
    norm = model[1]
    norm.running_mean.fill_(99)

    recalibrate_batchnorm(task, model, examples, seed=3, num_batches=4, batch_size=128)

    torch.testing.assert_close(norm.running_mean, x.mean(0))  # one pass: the exact mean
    torch.testing.assert_close(norm.running_var, x.var(0), rtol=0.1, atol=0.0)
    assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_a_trained_model_is_the_one_that_its_run_evaluated() -> None:
    x = torch.randn(512, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    examples = TensorExamples(x)
    task = line_task(
        model=lambda: nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 1)),
        data=lambda: Data(examples, examples),
        loss=lambda model, batch: model(batch[0]).square().mean(),
        metrics=None,
        headline="loss",
    )
    model = build_model(task, 1)
    layout = Layout.of(model)
    params = layout.flatten(model)
    examiner = Examiner(
        task, build_model(task, 2), task.data(), layout, [range(layout.numel)], seed=5
    )

    again = trained_model(task, Checkpoint(layout, 7, params, {}), seed=5)

    assert evaluate(task, again, examples) == examiner.examine(7, [params]).metrics
    with pytest.raises(CheckpointError, match=r"than task 'line' makes: it has 1\.weight of shape"):
        trained_model(line_task(), Checkpoint(layout, 7, params, {}))


@pytest.mark.parametrize("metric", [torch.tensor(2.0), torch.tensor([2.0]), 2])
def test_a_metric_may_be_a_tensor_of_one_element(metric: object) -> None:
    task = line_task(metrics=lambda model, batch: {"mean_x": metric})

    found = evaluate(task, build_model(task, 0), build_data(task).test)["mean_x"]

    assert found == 2.0
    assert type(found) is float


def test_a_metric_that_is_no_number_is_an_error_of_the_task() -> None:
    task = line_task(metrics=lambda model, batch: {"mean_x": batch[0]})

    with pytest.raises(TaskError, match=r"^evaluating task 'line' failed: "):
        evaluate(task, build_model(task, 0), build_data(task).test)


def test_without_batchnorm_no_data_is_read() -> None:
    class Unreadable:
        def __len__(self) -> int:
            return 5

        def batch(self, indices: Tensor) -> Batch:
            raise AssertionError

    recalibrate_batchnorm(line_task(), nn.Linear(1, 1), Unreadable(), seed=0)
