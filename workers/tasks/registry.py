"""Tasks by name, and a user's own by ``package.module:factory``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from paramserver.errors import PluginError, RecordError, TaskError
from paramserver.registry import Registry
from workers.task import Task, user_code
from workers.tasks.autoencoder import DigitsAutoencoder
from workers.tasks.digits import Digits
from workers.tasks.images import FashionMnist, Mnist
from workers.tasks.logistic import Logistic
from workers.tasks.quadratic import Quadratic
from workers.tasks.text import TinyShakespeare


class TaskSpec(Protocol):
    """A frozen dataclass whose fields are the keys of a task."""

    def build(self) -> Task:
        """Return the task; data is not read yet. What it raises reaches the user as `TaskError`."""


class TaskRegistry(Registry[TaskSpec]):
    """The tasks; ``module:name`` may also name a `Task`, or any callable that returns one."""

    def _load(self, module: str, attribute: str) -> type[TaskSpec]:
        found = _find(module, attribute)
        if isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, "build"):
            return cast(type[TaskSpec], found)
        if isinstance(found, Task):
            return _spec_of(lambda: found, module, attribute)
        if callable(found):
            return _spec_of(found, module, attribute)
        raise PluginError(
            f"task {module}:{attribute} must be a function that returns a Task, got "
            f"{type(found).__name__}"
        )


TASKS = TaskRegistry("task")
TASKS.register("digits", Digits, source="UCI optical digits, as in scikit-learn")
TASKS.register(
    "digits-autoencoder", DigitsAutoencoder, source="UCI optical digits, as in scikit-learn"
)
TASKS.register("mnist", Mnist, source="LeCun et al., Proc. IEEE 86(11), 1998")
TASKS.register("fashion-mnist", FashionMnist, source="Xiao et al., arXiv:1708.07747")
TASKS.register("quadratic", Quadratic)
TASKS.register("tinyshakespeare", TinyShakespeare, source="Karpathy, char-rnn, 2015")
TASKS.register("logistic", Logistic, source="UCI Adult; features as LIBSVM's a9a")


def task(described: Task | TaskSpec | Mapping[str, object] | str) -> Task:
    """Return the task that is meant.

    Args:
        described: A task; a spec; a text such as ``digits:hidden=64`` or
            ``package.module:factory:key=value``; or the same as a mapping with ``name``.

    Raises:
        PluginError: There is no such task, key or value; the message lists what there is.
        TaskError: The user's module or factory failed, its error is the cause; or what it returned
            is not a `Task`.
    """
    if isinstance(described, Task):
        return described
    if isinstance(described, str):
        spec = TASKS.parse(described)
    elif isinstance(described, Mapping):
        spec = TASKS.build(described)
    else:
        spec = described
    name = TASKS.name_of(spec)
    with user_code(f"task {name}"):
        built: object = spec.build()
    if not isinstance(built, Task):
        raise TaskError(f"task {name} must be a Task, got {type(built).__name__}")
    return dataclasses.replace(built, described=TASKS.describe(spec))


def recorded_task(folder: Path, config: Mapping[str, Any], given: Task | None) -> Task:
    """Return what the configuration in the record ``folder`` says was trained, or ``given``.

    Raises:
        RecordError: It does not say.
        PluginError: It names a task that does not exist here.
    """
    if given is not None:
        return given
    described = config.get("task")
    if not isinstance(described, Mapping):
        raise RecordError(f"{folder} does not say how its task {described!r} is made: give it")
    return task(described)


def _find(module: str, attribute: str) -> object:
    """Import ``module`` and return what it calls ``attribute``."""
    if any(entry.name == module for entry in TASKS):
        raise PluginError(f"task {module!r}: {attribute!r} is not key=value")
    try:
        with user_code(f"importing {module}"):
            imported = importlib.import_module(module)
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
            names = ", ".join(entry.name for entry in TASKS)
            raise PluginError(
                f"task {module}:{attribute}: there is no module {cause.name!r}; a task is "
                f"package.module:factory or one of {names}"
            ) from cause
        raise
    if not hasattr(imported, attribute):
        functions = [n for n, f in vars(imported).items() if inspect.isfunction(f) and n[0] != "_"]
        raise PluginError(
            f"task {module}:{attribute}: {module} has no {attribute!r}; its functions are "
            f"{', '.join(functions) or 'none'}"
        )
    found: object = getattr(imported, attribute)
    return found


def _spec_of(factory: Callable[..., object], module: str, attribute: str) -> type[TaskSpec]:
    """Return a spec with the parameters of ``factory`` as fields, so keys are read as everywhere.

    A parameter without an annotation has the type of its default.
    """
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters.values()
    except (NameError, ValueError) as error:
        raise PluginError(
            f"task {module}:{attribute}: its parameters cannot be read: {error}"
        ) from error
    fields: list[tuple[str, Any, Any]] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint, default = parameter.annotation, parameter.default
        if hint is parameter.empty:
            hint = Any if default is parameter.empty or default is None else type(default)
        if default is parameter.empty:
            fields.append((parameter.name, hint, dataclasses.field()))
        else:
            fresh = functools.partial(copy.copy, default)
            fields.append((parameter.name, hint, dataclasses.field(default_factory=fresh)))

    def build(spec: object) -> object:
        return factory(**{name: getattr(spec, name) for name, _, _ in fields})

    spec = dataclasses.make_dataclass(
        attribute, fields, frozen=True, kw_only=True, namespace={"build": build}
    )
    spec.__module__ = module  # `TASKS.name_of` answers what was asked for
    return cast(type[TaskSpec], spec)
