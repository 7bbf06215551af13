"""A task: a model, its data, its loss, and the metrics it is judged by.

    def my_task() -> Task:
        images, labels = torch.rand(1000, 64), torch.randint(10, (1000,))
        train, test = TensorExamples(images[:800], labels[:800]), TensorExamples(images[800:], ...)

        def accuracy(model: nn.Module, batch: Batch) -> dict[str, float]:
            inputs, targets = batch
            return {"accuracy": (model(inputs).argmax(1) == targets).float().mean().item()}

        return Task(
            name="mine",
            model=lambda: nn.Linear(64, 10),
            data=lambda: Data(train, test),
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            metrics=accuracy,
        )

Tasks travel to workers with cloudpickle, so lambdas and local functions are welcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paramserver.checkpoint import Checkpoint
from paramserver.errors import CheckpointError, ParamServerError, TaskError
from paramserver.groups import Group, freeze
from workers.batches import Batches
from workers.curriculum import Course
from workers.examples import Batch, Data, Examples, TensorExamples, as_examples
from workers.recurrent import Recurrent
from workers.windows import Series, TensorSeries, Windows

__all__ = [
    "Batch",
    "Data",
    "Examples",
    "Recurrent",
    "Series",
    "Task",
    "TensorExamples",
    "TensorSeries",
    "as_examples",
    "batches_of",
    "build_data",
    "build_model",
    "evaluate",
    "is_minimised",
    "modes_of",
    "recalibrate_batchnorm",
    "regrouped",
    "trained_model",
    "user_code",
]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and how it is judged."""

    name: str
    """How records and messages call it."""

    model: Callable[[], nn.Module]
    """Makes the model on the CPU; called under a seed."""

    data: Callable[[], Data]
    """Loads the samples; called once in every process that needs them."""

    loss: Callable[[nn.Module, Batch], Tensor]
    """The mean loss of the model over a batch, a scalar to differentiate."""

    metrics: Callable[[nn.Module, Batch], dict[str, float]] | None = None
    """Other means over a batch, by name, such as ``accuracy``; ``loss`` is always there."""

    headline: str = "accuracy"
    """The metric that decides which parameters are best; see `is_minimised`."""

    batch_size: int = 32
    """Samples in one worker's batch, unless the run says otherwise; of a recurrent task, windows
    of as many streams."""

    recurrent: Recurrent | None = None
    """How the model is unrolled over training data that is a `Series`; None reads samples that have
    nothing to do with each other. Workers train by its loss, and the metrics are by ``loss``."""

    sample_targets: Callable[[Tensor, torch.Generator], Tensor] | None = None
    """Draws targets from the distribution that the model's outputs stand for.

    It gets outputs, one sample a row, and returns what may stand in the place of a batch's last
    tensor. The loss must be the negative logarithm of that distribution's density, up to a
    constant. The Fisher matrix's diagonal takes it; nothing else does.
    """

    groups: tuple[Group, ...] = ()
    """Parts of the model that a run can name; those that ask for it have a learning rate, weight
    decay or schedule of their own, or stay frozen. What is in none is trained as the run says."""

    described: Mapping[str, object] | None = None
    """The name and keys it was made from, ``{"name": …, key: value, …}``, for the record."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 sample or more, got {self.batch_size}")
        if self.metrics is None and self.headline != "loss":
            raise ValueError(
                f"headline must be 'loss' for a task without metrics, got {self.headline!r}"
            )
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups must have different names, got {', '.join(names)}")


def regrouped(task: Task, groups: Sequence[Group]) -> Task:
    """Return ``task`` with ``groups`` as well; one it has by that name is replaced.

    The new one has the match of that in its place, unless it says another.

    Raises:
        ValueError: ``groups`` has a name twice.
    """
    names = [group.name for group in groups]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"group {twice} is given twice: say all that is its own in one place")
    own = {group.name: group for group in task.groups}
    new = {
        group.name: replace(group, match=group.match or own[group.name].match)
        if group.name in own
        else group
        for group in groups
    }
    return replace(task, groups=tuple({**own, **new}.values())) if new else task


def is_minimised(metric: str) -> bool:
    """Whether less of ``metric`` is better: its name ends in loss, error or distance."""
    return metric.endswith(("loss", "error", "distance"))


def build_model(task: Task, seed: int) -> nn.Module:
    """Make the task's model from ``seed``; the process's own random state is left as it was.

    What the task's groups freeze takes no gradient.

    Raises:
        LayoutError: A group has no parameter, or all are frozen.
        TaskError: The task's factory failed; its error is the cause.
    """
    with torch.random.fork_rng(devices=[]), user_code(f"the model of task {task.name!r}"):
        torch.manual_seed(seed)
        model: object = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"the model of task {task.name!r} must be a torch.nn.Module, got {type(model).__name__}"
        )
    freeze(model, task.groups)
    return model


def build_data(task: Task) -> Data:
    """Load the task's data.

    Raises:
        DataError: Data is missing or altered.
        TaskError: The task's factory failed otherwise, or a part of the data is empty.
    """
    with user_code(f"the data of task {task.name!r}"):
        data: object = task.data()
    if not isinstance(data, Data):
        raise TaskError(
            f"the data of task {task.name!r} must be a Data(train, test), got {type(data).__name__}"
        )
    parts = {"train": data.train, "test": data.test, "validation": data.validation}
    for part, examples in parts.items():
        if examples is not None and len(examples) == 0:
            raise TaskError(f"the {part} data of task {task.name!r} is empty")
    return data


def batches_of(
    task: Task,
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    worker: int,
    num_workers: int,
    course: Course | None = None,
) -> Batches | Windows:
    """Return which of the task's training ``examples`` a worker reads at each of its clocks.

    ``course`` paces samples that have nothing to do with each other; a recurrent task has none.

    Raises:
        TaskError: The task is recurrent, and its training data is no series of such windows.
        ValueError: There are too few examples for so many workers.
    """
    recurrent = task.recurrent
    if recurrent is None:
        return Batches(
            len(examples),
            batch_size,
            seed=seed,
            worker=worker,
            num_workers=num_workers,
            course=course,
        )
    assert course is None, "check_recurrent refuses a curriculum"
    if not isinstance(examples, Series):
        raise TaskError(
            f"task {task.name!r} is recurrent, so its training data must be a Series, such as "
            f"TensorSeries, got {type(examples).__name__}"
        )
    if examples.window != recurrent.k1:
        raise TaskError(
            f"task {task.name!r} trains by windows of k1={recurrent.k1} steps, and counts examples "
            f"of {examples.window}: give its TensorSeries window={recurrent.k1}"
        )
    return Windows(
        examples.num_steps,
        batch_size,
        k1=recurrent.k1,
        k2=recurrent.back,
        worker=worker,
        num_workers=num_workers,
    )


def evaluate(
    task: Task, model: nn.Module, examples: Examples, batch_size: int = 1000
) -> dict[str, float]:
    """Return the mean loss and metrics of ``model`` over all ``examples``, each sample once.

    The model runs in eval mode without gradients and gets its training modes back.

    Raises:
        TaskError: No examples, or the task's loss or metrics failed; their error is the cause.
    """
    if len(examples) == 0:
        raise TaskError(f"task {task.name!r} has no examples to evaluate")
    totals: dict[str, float] = {}
    with modes_of(model), user_code(f"evaluating task {task.name!r}"):
        model.eval()
        for start in range(0, len(examples), batch_size):
            indices = torch.arange(start, min(start + batch_size, len(examples)))
            batch = examples.batch(indices)  # a tensor it keeps must stay fit for training
            with torch.inference_mode():
                means = {} if task.metrics is None else task.metrics(model, batch)
                means = {**means, "loss": task.loss(model, batch).item()}
            for name, mean in means.items():  # a metric is often a tensor of one element
                totals[name] = totals.get(name, 0.0) + float(mean) * len(indices)
    if task.headline not in totals:
        raise TaskError(
            f"task {task.name!r} is judged by {task.headline!r} and has only "
            f"{', '.join(sorted(totals))}: return it from metrics, or set headline"
        )
    return {name: total / len(examples) for name, total in totals.items()}


def recalibrate_batchnorm(
    task: Task,
    model: nn.Module,
    examples: Examples,
    *,
    seed: int,
    num_batches: int = 16,
    batch_size: int = 256,
) -> None:
    """Set BatchNorm's running statistics from training batches; all else stays as it is.

    The server holds parameters only, so a model that got its parameters from it has the running
    statistics of no run at all. They become the plain average over the batches that ``seed`` draws;
    dropout is off, as it is when the statistics are used. Without BatchNorm nothing happens.

    Source: `torch.optim.swa_utils.update_bn`, which meets the same problem.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    batches = Batches(len(examples), batch_size, seed=seed, worker=0, num_workers=1)
    momenta = [norm.momentum for norm in norms]
    with modes_of(model), torch.no_grad(), user_code(f"the loss of task {task.name!r}"):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # torch's sign for the plain average
        try:
            for clock in range(num_batches):
                task.loss(model, examples.batch(batches.indices(clock)))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def trained_model(
    task: Task, checkpoint: Checkpoint, *, seed: int = 0, data: Data | None = None
) -> nn.Module:
    """Return the task's model with a checkpoint's parameters, as a run evaluates it.

    The running statistics of BatchNorm, which no checkpoint has, are those that the run's own
    evaluations used, if ``seed`` is the run's and ``data`` are, which are loaded unless given.

    Raises:
        CheckpointError: The checkpoint is of another model.
        TaskError: The task's model or data cannot be made, or its loss failed.
    """
    model = build_model(task, seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for slot in checkpoint.layout.slots:
        if shapes.get(slot.name) != slot.shape:
            raise CheckpointError(
                f"the checkpoint is of another model than task {task.name!r} makes: it has "
                f"{slot.name} of shape {slot.shape}, the model {shapes.get(slot.name, 'none')}"
            )
    checkpoint.layout.load(model, checkpoint.params)
    recalibrate_batchnorm(task, model, (data or build_data(task)).train, seed=seed)
    return model


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Re-raise what a user's function raises as a `TaskError` with its message, and it as cause.

    Errors of our own tree, such as a `DataError`, pass unchanged.
    """
    try:
        yield
    except ParamServerError:
        raise
    except Exception as error:
        raise TaskError(f"{what} failed: {type(error).__name__}: {error}") from error


@contextmanager
def modes_of(model: nn.Module) -> Iterator[None]:
    """Give every module its training mode back, also where some were in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
