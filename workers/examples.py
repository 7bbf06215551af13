"""Samples that a worker reads by index, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from paramserver.errors import TaskError

Batch: TypeAlias = tuple[Tensor, ...]
"""What a loss gets, most often inputs and targets; the first dimension counts samples."""


@runtime_checkable
class Examples(Protocol):
    """A fixed number of samples with random access."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batch(self, indices: Tensor) -> Batch:
        """Return the samples ``indices``, int64 of shape ``(n,)``, in that order."""


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on, and what the metrics are measured on."""

    train: Examples
    test: Examples
    validation: Examples | None = None
    """What early stopping decides by; None if the task sets none apart."""
    difficulty: Tensor | None = None
    """A score for each training sample, the higher the harder, for curricula that are to go by it;
    shape ``(len(train),)``."""


class TensorExamples:
    """Samples held in tensors whose first dimension counts them."""

    def __init__(self, *tensors: Tensor, transform: Callable[[Batch], Batch] | None = None) -> None:
        """Hold ``tensors``; ``transform`` sees each batch.

        Images can so stay uint8, a quarter of the memory, and be normalised a batch at a time.
        """
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise ValueError(f"tensors must be one or more of one length, got {sorted(sizes)}")
        self._tensors, self._transform = tensors, transform

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._tensors[0])

    def batch(self, indices: Tensor) -> Batch:
        """Copy the samples ``indices``, int64 of shape ``(n,)``, in that order."""
        batch = tuple(tensor.index_select(0, indices) for tensor in self._tensors)
        return batch if self._transform is None else self._transform(batch)


class DatasetExamples:
    """Samples of a map-style `torch.utils.data.Dataset`, collated as a DataLoader does."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        by_index = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not by_index or isinstance(dataset, IterableDataset):
            raise TaskError(
                f"{type(dataset).__name__} is not a map-style dataset: samples are read by index, "
                "so it needs __len__ and __getitem__"
            )
        self._dataset, self._num_samples = dataset, len(cast(Sized, dataset))

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._num_samples

    def batch(self, indices: Tensor) -> Batch:
        """Read and collate the samples ``indices``, int64 of shape ``(n,)``, in that order.

        Raises:
            TaskError: The samples do not collate to a tensor or a sequence of tensors.
        """
        read_many = getattr(self._dataset, "__getitems__", None)  # torch's own name for it
        wanted = indices.tolist()
        samples = read_many(wanted) if read_many else [self._dataset[index] for index in wanted]
        batch = default_collate(samples)
        if isinstance(batch, Tensor):
            return (batch,)
        if isinstance(batch, list | tuple) and all(isinstance(item, Tensor) for item in batch):
            return tuple(batch)
        raise TaskError(
            f"samples of {type(self._dataset).__name__} must be a tensor or a tuple of tensors and "
            f"numbers, got {type(samples[0]).__name__}: wrap the dataset in one that returns such"
        )


def as_examples(dataset: Examples | Dataset[Any]) -> Examples:
    """Adapt any map-style torch dataset.

    Raises:
        TaskError: The dataset cannot be read by index.
    """
    if isinstance(dataset, Examples):
        return dataset
    if type(dataset) is TensorDataset:
        return TensorExamples(*dataset.tensors)
    return DatasetExamples(dataset)
