"""Where a run's processes go on a cluster: what each asks of a node, and what is still missing.

Nothing here knows Ray; see `workers.reservation`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_MOST_LISTED = 6
"""Nodes whose free resources are listed one by one; those of more are added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a run's processes ask of a cluster's nodes; at home they ask nothing."""

    placement: Literal["spread", "pack"] = "spread"
    """Workers on as many nodes as there are, or on as few as hold them; cluster only."""

    server_placement: Literal["spread", "pack"] = "spread"
    """Shards on as many nodes as there are, which all send and take then, or on one; cluster
    only."""

    worker_cpus: float = 1.0
    """CPUs each worker asks of Ray; cluster only."""

    worker_gpus: float = 0.0
    """GPUs each worker asks of Ray, for what the task itself does with them; cluster only."""

    worker_resources: str | None = None
    """Other resources each worker asks of Ray, such as ``ssd=1,license=0.5``; cluster only."""

    worker_labels: str | None = None
    """Labels of the nodes that workers may be on, such as ``role=worker``; cluster only."""

    server_cpus: float = 0.0
    """CPUs each shard asks of Ray; cluster only."""

    server_resources: str | None = None
    """Other resources each shard asks of Ray, such as ``ssd=1``; cluster only."""

    server_labels: str | None = None
    """Labels of the nodes that shards may be on, such as ``role=server``; cluster only."""

    resources_timeout_s: float = 120.0
    """Seconds to wait for the cluster to have what all processes ask."""

    address: str | None = None
    """Ray cluster to join, ``HOST:6379`` or ``auto``; None starts Ray on this machine for the time
    of the run."""

    def __post_init__(self) -> None:
        for name in ("placement", "server_placement"):
            if (way := getattr(self, name)) not in ("spread", "pack"):
                raise ValueError(f"{name} must be 'spread' or 'pack', got {way!r}")
        for name in ("worker_cpus", "worker_gpus", "server_cpus"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if self.address is not None and self.address.startswith(("http://", "https://")):
            raise ValueError(
                f"address {self.address} takes jobs, not runs: `ray job submit --address "
                f"{self.address} -- python -m deploy train`, or give HOST:6379"
            )
        if not self.resources_timeout_s > 0:
            raise ValueError(
                f"resources_timeout_s must be above 0 s, got {self.resources_timeout_s}"
            )
        _ = self.worker_needs, self.server_needs  # raise what cannot be read
        if self.address is not None:
            return
        for name, default in _DEFAULTS.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} is for a cluster, and this run starts Ray on this machine: give "
                    "address, too"
                )

    @property
    def asked_of_servers(self) -> list[str]:
        """Names of the fields that ask something for shards."""
        names = ("server_placement", "server_cpus", "server_resources", "server_labels")
        return [name for name in names if getattr(self, name) != _DEFAULTS[name]]

    @property
    def worker_needs(self) -> Needs:
        """What each worker asks of its node."""
        resources = {"CPU": self.worker_cpus, "GPU": self.worker_gpus}
        resources |= _amounts("worker_resources", self.worker_resources)
        return Needs(resources, _pairs("worker_labels", self.worker_labels))

    @property
    def server_needs(self) -> Needs:
        """What each shard asks of its node."""
        resources = {"CPU": self.server_cpus}
        resources |= _amounts("server_resources", self.server_resources)
        return Needs(resources, _pairs("server_labels", self.server_labels))


_DEFAULTS: Mapping[str, object] = {
    "placement": "spread",
    "server_placement": "spread",
    "worker_cpus": 1.0,
    "worker_gpus": 0.0,
    "worker_resources": None,
    "worker_labels": None,
    "server_cpus": 0.0,
    "server_resources": None,
    "server_labels": None,
}
"""What only a cluster can give."""


class Needs:
    """What one process asks of the node it is on."""

    def __init__(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> None:
        """Ask for an amount of each of ``resources`` on a node with all ``labels``."""
        self.resources = {name: amount for name, amount in resources.items() if amount > 0}
        self.labels = dict(labels)

    def __str__(self) -> str:
        asked = " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        where = ",".join(f"{key}={value}" for key, value in self.labels.items())
        return (asked or "no CPU") + (f" on a node labelled {where}" if where else "")


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of the cluster has free."""

    free: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Processes of one kind."""

    kind: str
    """What one is called, such as ``worker``."""
    count: int
    needs: Needs
    placed: int = 0
    """Those of them that have a place, and hold what they need."""

    @property
    def plural(self) -> str:
        """Return what they are called together."""
        return self.kind if self.count == 1 else f"{self.kind}s"


def shortage(wanted: Sequence[Wanted], nodes: Sequence[Node], *, one_node: bool) -> str:
    """Say what ``nodes`` lack for all of ``wanted``, such as ``3 of 4 workers: each needs …``.

    With ``one_node`` all must be on the same one.
    """
    missing = (
        min((_missing(wanted, [node]) for node in nodes), key=sum, default=None)
        if one_node
        else None
    ) or _missing(wanted, nodes)
    parts = [
        f"{lacking} of {group.count} {group.plural}: "
        f"{'each needs' if group.count > 1 else 'it needs'} {group.needs}"
        for group, lacking in zip(wanted, missing, strict=True)
        if lacking
    ]
    if not parts:
        parts = [f"Ray to place {', '.join(f'{w.count} {w.plural}' for w in wanted)}"]
    together = ", all on one node" if one_node and len(nodes) > 1 else ""
    named = dict.fromkeys(name for group in wanted for name in group.needs.resources)
    free = " and ".join(_free(name, nodes) for name in named) or "nothing that was asked for"
    have = "node has" if len(nodes) == 1 else f"{len(nodes)} nodes have"
    return f"{'; '.join(parts)}{together}; the cluster's {have} {free} free"


def _missing(wanted: Sequence[Wanted], nodes: Sequence[Node]) -> list[int]:
    """Put the processes on the first node that holds each; return how many of each kind are left.

    Ray may find a way where this finds none: it is for a message only.
    """
    left = [dict(node.free) for node in nodes]
    missing = []
    for group in wanted:
        needs, lacking = group.needs, group.count - group.placed
        for node, free in zip(nodes, left, strict=True):
            if any(node.labels.get(key) != value for key, value in needs.labels.items()):
                continue
            while lacking and all(free.get(n, 0) >= a for n, a in needs.resources.items()):
                for name, amount in needs.resources.items():
                    free[name] -= amount
                lacking -= 1
        missing.append(lacking)
    return missing


def _free(name: str, nodes: Sequence[Node]) -> str:
    amounts = [node.free.get(name, 0) for node in nodes]
    if not amounts or len(amounts) > _MOST_LISTED:
        return f"{sum(amounts):g} {name}"
    return f"{' + '.join(f'{amount:g}' for amount in amounts)} {name}"


def _amounts(field: str, text: str | None) -> dict[str, float]:
    amounts = {}
    for name, value in _pairs(field, text).items():
        try:
            amounts[name] = float(value)
        except ValueError:
            amounts[name] = 0.0
        if not 0 < amounts[name] < math.inf:
            raise ValueError(f"{field}: {name} must be a number above 0, got {value!r}")
        if name in ("CPU", "GPU"):
            kind = field.partition("_")[0]
            raise ValueError(f"{field}: ask for {name}s with {kind}_{name.lower()}s")
    return amounts


def _pairs(field: str, text: str | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in text.split(",") if text is not None else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{field} must be like name=value,name=value, got {text!r}")
        pairs[key] = value
    return pairs
