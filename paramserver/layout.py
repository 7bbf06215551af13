"""Where a model's parameters lie in one flat vector, and how that vector is cut into shards.

    layer.weight        pad  layer.bias   pad
    |------------------|....|------------|....|      every parameter starts on a multiple of 64
    0                       ^64k              ^ numel, a multiple of 64
    |-- shard 0 ------------|-- shard 1 ------|      every cut is a multiple of 64

torch's fused kernels work through a vector in blocks; with cuts on multiples of 64 elements they
give the same bits under any sharding. Padding holds zeros and has zero gradients, which every
elementwise rule leaves at zero.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from paramserver.errors import LayoutError
from paramserver.groups import Group, apart, group_of

BLOCK = 64
"""Elements; parameters start and shards are cut on multiples of it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter in the flat vector."""

    name: str
    offset: int
    """First element, a multiple of `BLOCK`."""
    shape: tuple[int, ...]
    group: str = ""
    """The group of parameters it is in; empty for the rest."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.offset + self.numel


@dataclass(frozen=True)
class Layout:
    """A model's parameters, in order, in one flat vector of one dtype."""

    slots: tuple[Slot, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group] = ()) -> Layout:
        """Lay out the trainable parameters of ``model`` in the order it names them.

        Those of a group lie together, so each of ``groups`` whose steps are its own, and the rest,
        are one range; the ranges are in the order of their first parameters.

        Raises:
            LayoutError: No trainable parameter, or parameters of several or non-float dtypes, or
                one that is in two groups.
        """
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise LayoutError(
                "the model has no trainable parameter (requires_grad is False on all)"
            )
        if (lazy := next((n for n, p in named if is_lazy(p)), None)) is not None:
            raise LayoutError(
                f"parameter {lazy} has no shape yet: let the model's factory run it once on a "
                "sample before it returns it"
            )
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, parameter in named:
            by_dtype.setdefault(parameter.dtype, []).append(name)
        if len(by_dtype) > 1 or not named[0][1].dtype.is_floating_point:
            listed = "; ".join(f"{d}: {', '.join(ns[:3])}" for d, ns in by_dtype.items())
            raise LayoutError(f"trainable parameters must share one float dtype, got {listed}")
        own = apart(groups)
        by_group: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            by_group.setdefault(group_of(name, own), []).append((name, parameter))
        slots, offset = [], 0
        for group, members in by_group.items():
            for name, parameter in members:
                slots.append(Slot(name, offset, tuple(parameter.shape), group))
                offset += _round_up(parameter.numel())
        return cls(tuple(slots), named[0][1].dtype)

    @cached_property
    def numel(self) -> int:
        """Elements of the flat vector, padding included; a multiple of `BLOCK`."""
        return _round_up(self.slots[-1].end)

    @cached_property
    def num_parameters(self) -> int:
        """Elements that are parameters, without padding."""
        return sum(slot.numel for slot in self.slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of the flat vector."""
        return self.numel * self.dtype.itemsize

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits; equal only for equal names, shapes, order, groups and dtype."""
        text = json.dumps([_row(slot) for slot in self.slots] + [str(self.dtype)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def group_ranges(self) -> dict[str, range]:
        """The elements of each group, in order, padding included; empty if there are no groups."""
        starts: dict[str, int] = {}
        for slot in self.slots:
            starts.setdefault(slot.group, slot.offset)
        if starts.keys() == {""}:
            return {}
        edges = itertools.pairwise([*starts.values(), self.numel])
        return {group: range(*both) for group, both in zip(starts, edges, strict=True)}

    def cuts(self, num_shards: int) -> tuple[range, ...]:
        """Cut the vector into contiguous ranges of nearly equal size.

        Raises:
            LayoutError: More shards than blocks of 64 elements.
        """
        blocks = self.numel // BLOCK
        if not 1 <= num_shards <= blocks:
            raise LayoutError(
                f"num_shards must be 1 to {blocks} for {self.num_parameters} parameters (a shard "
                f"holds at least {BLOCK} elements), got {num_shards}"
            )
        edges = [blocks * i // num_shards * BLOCK for i in range(num_shards + 1)]
        return tuple(range(a, b) for a, b in itertools.pairwise(edges))

    def flatten(self, model: nn.Module, out: Tensor | None = None) -> Tensor:
        """Copy the parameters of ``model`` into a flat vector, shape ``(numel,)``; padding is 0."""
        flat = torch.zeros(self.numel, dtype=self.dtype) if out is None else out.zero_()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for slot in self.slots:
                view = flat[slot.offset : slot.end].view(slot.shape)
                view.copy_(parameters[slot.name])
        return flat

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return one view of ``flat``, shape ``(numel,)``, for every parameter."""
        if flat.shape != (self.numel,) or flat.dtype != self.dtype:
            raise LayoutError(
                f"expected a vector of {self.numel} {self.dtype}, got {tuple(flat.shape)} "
                f"{flat.dtype}"
            )
        return [flat[s.offset : s.end].view(s.shape) for s in self.slots]

    def load(self, model: nn.Module, flat: Tensor) -> None:
        """Copy a flat vector, shape ``(numel,)``, into the parameters of ``model``."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for slot, view in zip(self.slots, self.views(flat), strict=True):
                parameters[slot.name].copy_(view)

    def to_json(self) -> dict[str, object]:
        """Describe the layout for a manifest."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": [_row(slot) for slot in self.slots],
        }

    def difference(self, other: Layout) -> str | None:
        """Say how ``other`` differs, in one phrase, or None if it does not."""
        if self.dtype != other.dtype:
            return f"dtype {other.dtype} instead of {self.dtype}"
        mine = {s.name: s.shape for s in self.slots}
        theirs = {s.name: s.shape for s in other.slots}
        for name in [*mine, *theirs]:
            if mine.get(name) != theirs.get(name):
                return f"{name}: {theirs.get(name, 'absent')} instead of {mine.get(name, 'absent')}"
        in_groups = {slot.name: slot.group for slot in self.slots}
        for slot in other.slots:
            here, there = (
                f"group {g}" if g else "no group" for g in (in_groups[slot.name], slot.group)
            )
            if here != there:
                return f"{slot.name} in {there} instead of {here}"
        return None if self.slots == other.slots else "another order of the parameters"


def layout_from_json(described: dict[str, object]) -> Layout:
    """Read what `Layout.to_json` wrote."""
    dtype = getattr(torch, str(described["dtype"]), None)
    rows = described["parameters"]
    if not isinstance(dtype, torch.dtype) or not isinstance(rows, list):
        raise LayoutError("the layout in the manifest is not readable")
    slots = (Slot(str(n), int(o), tuple(shape), *group) for n, o, shape, *group in rows)
    return Layout(tuple(slots), dtype)


def overlaps(lo: int, hi: int, cuts: Sequence[range]) -> Iterable[tuple[int, int, int]]:
    """Yield ``(shard, start, stop)`` of the parts of ``[lo, hi)`` that lie in each cut."""
    for shard, cut in enumerate(cuts):
        start, stop = max(lo, cut.start), min(hi, cut.stop)
        if start < stop:
            yield shard, start, stop


def _row(slot: Slot) -> list[object]:
    row: list[object] = [slot.name, slot.offset, list(slot.shape)]
    return [*row, slot.group] if slot.group else row


def _round_up(numel: int) -> int:
    return -(-max(numel, 1) // BLOCK) * BLOCK
