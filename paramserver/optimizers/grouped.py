"""Groups of parameters with rates of their own: a rule for each group, side by side in one slice.

    the layout   |---- encoder ----|--------- rest ---------|-- head --|
    shard 0      |== rule ==|======= rule ========|                      two rules on its slice,
    shard 1                                       |= rule =|=== rule ==|  and one on 0 elements

Each rule holds one flat parameter, a view of its group's part of the slice, so torch's fused
kernels run on it; borders are multiples of 64 elements, as cuts are, and any sharding gives the
same bits. A shard has a rule for every group, also for one that has no element there: what is not a
vector, such as a step count or a scheduled rate, is then the same in all shards.

To whoever saves it, the slice has one state: each key's vectors end to end. So a run with groups is
cut anew, averaged and compensated as one without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from paramserver.groups import Group, apart
from paramserver.layout import Layout
from paramserver.optimizers.base import Optimizer, PushRule, is_per_worker, needs_norm
from paramserver.reshard import OptimizerState, gather_state, scatter_state
from paramserver.schedules import Schedule, Scheduler


@dataclass(frozen=True, slots=True)
class Part:
    """One group's part of a slice."""

    name: str
    """The group's; empty for the rest."""
    lr_factor: float
    optimizer: Optimizer
    """The run's, with what is the group's own."""
    schedule: Schedule | None
    cut: range
    """Its elements, counted in the slice; maybe none."""


class GroupedRule(PushRule):
    """The rules of all groups in one slice, called as one."""

    def __init__(self, param: nn.Parameter, parts: Sequence[Part]) -> None:
        """Update ``param``, shape ``(n,)``, which ``parts`` cover in order."""
        super().__init__([param], {})
        self._param, self._cuts = param, [part.cut for part in parts]
        self._views = [nn.Parameter(self._of(part.cut), requires_grad=False) for part in parts]
        self.rules = [
            part.optimizer.build([view]) for part, view in zip(parts, self._views, strict=True)
        ]
        self._names = [part.name for part in parts]
        self.shows = any(rule.shows for rule in self.rules)

    @property
    def rate(self) -> Tensor:
        """The learning rate of each element, shape ``(n,)``."""
        lengths = torch.tensor([len(cut) for cut in self._cuts])
        rates = torch.tensor([rule.rate for rule in self.rules], dtype=self._param.dtype)
        return rates.repeat_interleave(lengths)

    def came_from(self, worker: int, clock: int, samples: int) -> None:
        """Tell each rule."""
        for rule in self.rules:
            rule.came_from(worker, clock, samples)

    def left(self, worker: int) -> None:
        """Tell each rule."""
        for rule in self.rules:
            rule.left(worker)

    def show(self, out: Tensor, worker: int = 0) -> None:
        """Let each rule write its part of ``out``."""
        for rule, cut in self._at_their_parts():
            rule.show(out[cut.start : cut.stop], worker)

    def told(self, loss: float, norm: float) -> None:
        """Tell each rule; the norm is that of the whole gradient."""
        for rule, _ in self._at_their_parts():
            rule.told(loss, norm)

    def apply(self, grads: Sequence[Tensor], scale: float = 1.0) -> None:
        """Let each rule take a step on its part of the one gradient."""
        (grad,) = grads
        for rule, cut in self._at_their_parts():
            rule.apply([grad[cut.start : cut.stop]], scale)

    def state_dict(self) -> dict[str, Any]:
        """Return one state for the slice, and the settings of each group by its name."""
        saved = [rule.state_dict() for rule in self.rules]
        vectors = [{"state": one["state"], "param_groups": [{}]} for one in saved]
        joined = gather_state(list(zip(self._cuts, vectors, strict=True)))
        own = {**joined.tensors, **joined.scalars}
        settings = {
            name: {k: v for k, v in one["param_groups"][0].items() if k != "params"}
            for name, one in zip(self._names, saved, strict=True)
        }
        groups = [{"groups": settings, "params": [0]}]
        return {"state": {0: own} if own else {}, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, for the same groups."""
        own, numel = state_dict["state"].get(0, {}), self._param.numel()
        is_vector = {k: isinstance(v, Tensor) and v.shape[-1:] == (numel,) for k, v in own.items()}
        tensors = {k: v for k, v in own.items() if is_vector[k]}
        scalars = {k: v for k, v in own.items() if not is_vector[k]}
        settings = state_dict["param_groups"][0]["groups"]
        for rule, name, cut in zip(self.rules, self._names, self._cuts, strict=True):
            state = OptimizerState(tensors, scalars, settings[name])
            rule.load_state_dict(scatter_state(state, cut))

    def _at_their_parts(self) -> list[tuple[PushRule, range]]:
        """Point each rule's parameter to where the slice is now; return the rules."""
        for view, cut in zip(self._views, self._cuts, strict=True):
            view.data = self._of(cut)
        return list(zip(self.rules, self._cuts, strict=True))

    def _of(self, cut: range) -> Tensor:
        return self._param.data[cut.start : cut.stop]


@dataclass(frozen=True, slots=True)
class GroupedOptimizer:
    """Builds the rules of all groups in one slice; an `Optimizer`."""

    optimizer: Optimizer
    """The run's."""
    parts: tuple[Part, ...]

    @property
    def lr(self) -> float:
        """The run's learning rate."""
        return self.optimizer.lr

    @property
    def norm_needed(self) -> bool:
        """Whether the rules must be told the gradient's norm."""
        return needs_norm(self.optimizer)

    @property
    def per_worker(self) -> bool:
        """Whether the rules must know whose each gradient is."""
        return is_per_worker(self.optimizer)

    def build(self, params: Sequence[nn.Parameter]) -> GroupedRule:
        """Make the rules that update the one parameter in ``params``."""
        (param,) = params
        return GroupedRule(param, self.parts)


class GroupedScheduler:
    """Steps the schedulers of all groups that have one; a `Scheduler`."""

    def __init__(self, schedulers: Mapping[str, Scheduler]) -> None:
        """Step ``schedulers``, by group."""
        self._schedulers = dict(schedulers)

    def step(self) -> None:
        """Set the rates after another update."""
        for scheduler in self._schedulers.values():
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states, by group."""
        return {name: scheduler.state_dict() for name, scheduler in self._schedulers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, for the same groups."""
        for name, state in state_dict.items():
            if name in self._schedulers:
                self._schedulers[name].load_state_dict(state)


@dataclass(frozen=True, slots=True)
class GroupedSchedule:
    """Builds the schedulers of all groups; a `Schedule` for the rule of the same ``parts``."""

    parts: tuple[Part, ...]

    def build(self, optimizer: torch.optim.Optimizer) -> GroupedScheduler:
        """Set the first rate of each group, and return what sets the later ones.

        Raises:
            ValueError: A group has a factor on the rate, and its schedule sets the rate itself.
        """
        schedulers = {}
        for part, rule in zip(self.parts, cast(GroupedRule, optimizer).rules, strict=True):
            if part.schedule is None:
                continue
            schedulers[part.name] = part.schedule.build(rule)
            start = rule.param_groups[0].get("initial_lr", part.optimizer.lr)
            if part.lr_factor != 1 and start != part.optimizer.lr:
                raise ValueError(
                    f"group {part.name} has lr_factor {part.lr_factor:g}, and its schedule starts "
                    f"from {start:g} whatever the rate is: leave out one of them (without eta_max "
                    "a cosine starts from the rate)"
                )
        return GroupedScheduler(schedulers)


def grouped(
    optimizer: Optimizer,
    schedule: Schedule | None,
    groups: Sequence[Group],
    layout: Layout,
    cut: range,
) -> tuple[Optimizer, Schedule | None]:
    """Return what the rule and the scheduler of the slice ``cut`` are built from.

    Without groups in ``layout`` that is what was given.

    Args:
        optimizer: The run's.
        schedule: The run's.
        groups: The task's.
        layout: Of the model, laid out by ``groups``.
        cut: The slice.

    Raises:
        ValueError: A group asks for a weight decay, and the optimizer has none.
    """
    ranges = layout.group_ranges
    if not ranges:
        return optimizer, schedule
    by_name = {group.name: group for group in apart(groups)}
    parts = []
    for name, whole in ranges.items():
        start, stop = (min(max(edge, cut.start), cut.stop) for edge in (whole.start, whole.stop))
        own = range(start - cut.start, stop - cut.start)
        if name:
            group = by_name[name]
            built, its = _of_group(optimizer, group), group.schedule or schedule
            parts.append(Part(name, group.lr_factor, built, its, own))
        else:
            parts.append(Part(name, 1.0, optimizer, schedule, own))
    has_schedule = any(part.schedule is not None for part in parts)
    return (
        GroupedOptimizer(optimizer, tuple(parts)),
        GroupedSchedule(tuple(parts)) if has_schedule else None,
    )


def check_groups(
    optimizer: Optimizer, schedule: Schedule | None, groups: Sequence[Group], layout: Layout
) -> None:
    """Raise ValueError if the groups of ``layout`` cannot have what they ask for."""
    both = grouped(optimizer, schedule, groups, layout, range(0))
    if both[0] is optimizer:
        return
    rule = both[0].build([nn.Parameter(torch.empty(0, dtype=layout.dtype), requires_grad=False)])
    if both[1] is not None:
        both[1].build(rule)


def _of_group(optimizer: Optimizer, group: Group) -> Optimizer:
    """Return ``optimizer`` with the rate and the weight decay of ``group``."""
    settings = cast(Any, optimizer)
    own: dict[str, float] = {"lr": optimizer.lr * group.lr_factor}
    if group.weight_decay is not None:
        if "weight_decay" not in {field.name for field in fields(settings)}:
            raise ValueError(
                f"group {group.name} has weight_decay {group.weight_decay:g}, and optimizer "
                f"{type(optimizer).__name__} has none: leave it out, or use sgd, adam or adamw"
            )
        own["weight_decay"] = group.weight_decay
    return cast(Optimizer, replace(settings, **own))
