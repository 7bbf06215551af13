"""Groups of parameters: parts of a model with a learning rate of their own, or that stay frozen.

    Group(name="encoder", lr_factor=0.1)                    all below the module encoder
    Group(name="bias", match="*.bias", weight_decay=0.0)    all that is called bias
    Group(name="embedding", frozen=True)

A group's rate is a *factor* on the optimizer's: which optimizer a run takes, and at which rate, is
the run's to say, and a task need not know. So the ratio between groups stays when the rate is tuned
or another optimizer is taken. A weight decay and a schedule are the group's own and take the place
of the run's.

Parameters in no group, and those in groups that ask for nothing, are the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from paramserver.errors import LayoutError
from paramserver.registry import Entry, Registry
from paramserver.schedules import SCHEDULES, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Some of a model's parameters, and what is theirs alone."""

    name: str
    """How it is called; and what it matches, unless that is said."""

    match: str | None = None
    """A module or parameter by its full name, or a pattern of such with ``*``, ``?`` and ``[…]``;
    with a module comes all that is below it. None is the name."""

    lr_factor: float = 1.0
    """What the optimizer's learning rate is multiplied by, above 0."""

    weight_decay: float | None = None
    """Takes the place of the optimizer's, 0 or more; None leaves that."""

    schedule: Schedule | None = None
    """Takes the place of the run's; None leaves that."""

    frozen: bool = False
    """Whether its parameters stay as they are: no gradient, nothing sent, nothing updated."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set(":,=()"):
            raise ValueError(
                f"a group's name must be one or more of all but :,=(), got {self.name!r}"
            )
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(
                f"lr_factor must be above 0, got {self.lr_factor}"
                + ("; frozen=true keeps parameters as they are" if self.lr_factor == 0 else "")
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if self.frozen and self.own:
            raise ValueError(
                f"group {self.name} is frozen and has {', '.join(self.own)}: leave out one of them"
            )

    @property
    def own(self) -> tuple[str, ...]:
        """What sets its steps apart from those of the rest, by field; empty for none."""
        apart = {
            "lr_factor": self.lr_factor != 1,
            "weight_decay": self.weight_decay is not None,
            "schedule": self.schedule is not None,
        }
        return tuple(name for name, is_apart in apart.items() if is_apart)

    @property
    def pattern(self) -> str:
        """What it matches."""
        return self.match or self.name

    def has(self, parameter: str) -> bool:
        """Whether the parameter of this full name is in the group."""
        pattern = self.pattern
        return fnmatchcase(parameter, pattern) or fnmatchcase(parameter, f"{pattern}.*")


def freeze(model: nn.Module, groups: Iterable[Group]) -> None:
    """Freeze what is in the frozen ones of ``groups``; see that each group has a parameter.

    Raises:
        LayoutError: A group has none, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    frozen = []
    for group in groups:
        members = [name for name in parameters if group.has(name)]
        if not members:
            raise LayoutError(
                f"group {group.name} matches no parameter by {group.pattern!r}; the model has "
                f"{', '.join(parameters)}"
            )
        if group.frozen:
            frozen.append(group.name)
            for name in members:
                parameters[name].requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in parameters.values()):
        raise LayoutError(
            f"nothing is left to train: {', '.join(frozen)} freeze all of {', '.join(parameters)}"
        )


def apart(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Return those of ``groups`` whose steps are not those of the rest."""
    return tuple(group for group in groups if group.own)


def group_of(parameter: str, groups: Sequence[Group]) -> str:
    """Return the name of the one of ``groups`` that has ``parameter``; empty for the rest.

    Raises:
        LayoutError: Two of them have it.
    """
    names = [group.name for group in groups if group.has(parameter)]
    if len(names) > 1:
        raise LayoutError(
            f"parameter {parameter} is in groups {' and '.join(names)}: match it by one of them"
        )
    return names[0] if names else ""


def refuse_groups(
    groups: Iterable[Group], what: str, *, instead: str = "a push rule, such as adam"
) -> None:
    """Raise ValueError if steps of ``what``, which treats all parameters alike, are to differ."""
    for group in apart(groups):
        raise ValueError(
            f"{what} takes one step along all parameters together, and group {group.name} has its "
            f"own {' and '.join(group.own)}: use {instead}, or only freeze parts"
        )


def described_with(optimizer: Mapping[str, object], groups: Iterable[Group]) -> dict[str, object]:
    """Return what a checkpoint says of an optimizer, with the groups it treats apart."""
    own = [GROUPS.describe(group) for group in apart(groups)]
    return {**optimizer, "groups": own} if own else dict(optimizer)


class _GroupEntry(Entry[Group]):
    """A group of any name."""

    def parameters(self) -> dict[str, object]:
        keys = Entry.parameters(self)
        del keys["name"]
        return keys


class GroupRegistry(Registry[Group]):
    """Reads and writes groups as plug-ins; the name is the group's own, and may be a pattern.

    encoder:lr_factor=0.1,schedule=(step:every=100,gamma=0.5)
    """

    def build(self, described: Mapping[str, object]) -> Group:
        """Build a group; its schedule may be a text or a mapping."""
        schedule = described.get("schedule")
        if isinstance(schedule, str):
            schedule = None if schedule == "none" else SCHEDULES.parse(schedule.strip("()"))
        elif isinstance(schedule, Mapping):
            schedule = SCHEDULES.build(schedule)
        return super().build({**described, "schedule": schedule})

    def describe(self, plugin: Group) -> dict[str, object]:
        """Return what `build` reads, in types that JSON has."""
        described: dict[str, Any] = {
            field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin)
        }
        if plugin.schedule is not None:
            described["schedule"] = SCHEDULES.describe(plugin.schedule)
        return described

    def parameters(self, name: str) -> dict[str, object]:
        """Return the keys of every group with their defaults."""
        return self._entry(name).parameters()

    def _named(self, text: str) -> tuple[str, str]:
        name, _, rest = text.partition(":")
        return name, rest

    def _entry(self, name: str) -> Entry[Group]:
        return _GroupEntry(name, Group, "")

    def _made(self, entry: Entry[Group], values: Mapping[str, Any]) -> Group:
        return Group(name=entry.name, **values)


GROUPS = GroupRegistry("group")
