"""What round programs, recurrent tasks and adaptive batches cannot be combined with."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from paramserver.optimizers import SGD, AnyOptimizer, Momentum, Nesterov
from workers.config import RunConfig
from workers.task import Task


def check_config(name: str, config: RunConfig) -> None:
    """Raise ValueError for what optimizer ``name``, a round program, cannot be run with."""
    if config.clip is not None:
        raise ValueError(
            f"{name} needs more than gradients: clipping would break its searches and products"
        )
    if config.compress is not None or config.compress_pull is not None:
        raise ValueError(
            f"{name} needs more than gradients, each exact and at the point it names: compress and "
            "compress_pull are for push rules, such as sgd or adam"
        )
    if config.curriculum is not None:
        raise ValueError(
            f"{name} draws its samples by name, the same for all requests of a round, and a "
            "curriculum would draw others: use a push rule, such as sgd or adam"
        )
    if config.gradient != "reverse":
        raise ValueError(f"{name} needs exact gradients: use gradient=reverse")


def check_recurrent(task: Task, config: RunConfig, program: str | None) -> None:
    """Raise ValueError for what ``task`` cannot be trained with, if it is recurrent.

    ``program`` is the optimizer's name if that is a round program, which is answered on samples of
    the training data by name: windows without a window before.
    """
    recurrent = task.recurrent
    if recurrent is None:
        return
    if config.curriculum is not None:
        raise ValueError(
            f"task {task.name} reads windows that follow each other, and a curriculum would draw "
            "them by difficulty: leave it out"
        )
    if config.gradient != "reverse":
        raise ValueError(
            f"task {task.name} goes back through time, which gradient={config.gradient} does not: "
            "use gradient=reverse"
        )
    if program is not None and not (recurrent.reset == "pull" and recurrent.back == recurrent.k1):
        raise ValueError(
            f"{program} is a round program, answered on windows of task {task.name} in any order, "
            "to which no state can be carried: use reset=pull and no k2, or a push rule"
        )


def check_adaptive(task: Task, config: RunConfig, optimizer: AnyOptimizer, name: str) -> None:
    """Raise ValueError for what an adaptive batch cannot be combined with, in either mode.

    ``name`` is the optimizer's; ``task`` has the groups it is trained with.
    """
    if config.adaptive_batch is None:
        return
    if not isinstance(optimizer, SGD | Momentum | Nesterov):
        raise ValueError(
            f"adaptive_batch goes by a step that is the rate times the gradient, which that of "
            f"{name} is not: use sgd, momentum or nesterov"
        )
    if task.recurrent is not None:
        raise ValueError(
            f"task {task.name} reads streams side by side, each with a state of its own, and "
            "adaptive_batch would draw more or fewer of them: leave it out"
        )
    if config.gradient != "reverse":
        raise ValueError(
            "adaptive_batch measures the noise of samples by the gradients of parts of a batch, "
            f"and those of gradient={config.gradient} differ by more: use gradient=reverse"
        )
    for group in task.groups:
        if group.lr_factor != 1 or group.schedule is not None:
            raise ValueError(
                f"group {group.name} has a learning rate of its own, and adaptive_batch goes by "
                "one for all parameters: leave out lr_factor and schedule of the group"
            )


def check_samples(name: str, spec: Any, num_train: int) -> None:
    """Raise ValueError if ``spec`` draws more samples than the ``num_train`` there are."""
    for field in fields(spec):
        size = getattr(spec, field.name)
        if field.name.endswith("batch") and size is not None and size > num_train:
            raise ValueError(
                f"{name}: {field.name}={size} is more than the {num_train} training samples"
            )
