"""Places for a run's processes on a cluster, taken together before any of them starts.

Ray holds a bundle of resources for each process; one that is replaced gets the bundle of the one
before it, and if its node is gone, Ray finds the bundle another node.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from paramserver.errors import ResourceError
from workers.placement import Node, Placement, Wanted, shortage

logger = logging.getLogger(__name__)

_QUIET_S = 2.0
"""Seconds Ray has to find places before a person is told what is waited for."""

_LOOK_S = 0.5
"""Seconds in which Ray's own wait cannot be interrupted."""

_LEAST = {"memory": 1.0}
"""What a process holds that asks for nothing: a bundle may not be empty, every node has a byte."""


class Places:
    """Where each process of one run goes; at home anywhere."""

    def __init__(
        self, config: Placement, *, workers: int, servers: int = 0, one_node: bool = False
    ) -> None:
        """Describe the places; `take` asks the cluster for them.

        Args:
            config: What each process asks.
            workers: Workers.
            servers: Shards.
            one_node: Whether all of them must share a node's memory.
        """
        self._config, self._one_node = config, one_node
        self._servers = Wanted("shard", servers, config.server_needs)
        self._workers = Wanted("worker", workers, config.worker_needs)
        self._groups: list[PlacementGroup] = []

    def take(self) -> None:
        """Take every place; wait until the cluster has them. At home there is nothing to wait for.

        Raises:
            ResourceError: It did not in ``resources_timeout_s``.
        """
        if self._config.address is None:
            return
        if self._one_node:
            self._groups = [_group([self._servers, self._workers], "STRICT_PACK")]
        else:
            servers = {"spread": "SPREAD", "pack": "STRICT_PACK"}[self._config.server_placement]
            workers = self._config.placement.upper()
            self._groups = [
                _group([wanted], way)
                for wanted, way in ((self._servers, servers), (self._workers, workers))
                if wanted.count
            ]
        self.wait()

    def wait(self) -> None:
        """Wait until there is a place for every process, as after the loss of a node.

        Raises:
            ResourceError: There was none in ``resources_timeout_s``.
        """
        limit_s = self._config.resources_timeout_s
        deadline = time.monotonic() + limit_s
        if self._are_there(min(_QUIET_S, limit_s)):
            return
        left_s = deadline - time.monotonic()
        logger.warning("waiting for %s; %.0f s left", self._shortage(), max(0, left_s))
        if not self._are_there(left_s):
            short = self._shortage()
            self.free()
            raise ResourceError(
                f"waited {limit_s:g} s for {short}: use fewer workers, ask for less, add nodes, or "
                "raise resources_timeout_s"
            )

    def lack(self) -> str | None:
        """Say what processes wait for whose node was lost; None while every one has a place."""
        if all(placement_group_table(group)["state"] == "CREATED" for group in self._groups):
            return None
        return self._shortage()

    def worker(self, index: int) -> dict[str, Any]:
        """Return the options of worker ``index``'s actor."""
        if self._config.address is None:
            return {"num_cpus": 0}
        resources = dict(self._workers.needs.resources)
        bundle = index + (self._servers.count if self._one_node else 0)
        return _options(resources, self._groups[-1], bundle)

    def server(self, index: int) -> dict[str, Any]:
        """Return the options of shard ``index``'s actor."""
        if self._config.address is None:
            return {"num_cpus": 0}
        return _options(dict(self._servers.needs.resources), self._groups[0], index)

    def beside(self, index: int) -> dict[str, Any]:
        """Return the options of an actor that asks for nothing, on the node of shard ``index``."""
        if self._config.address is None:
            return {"num_cpus": 0}
        return _options({}, self._groups[0], index)

    def free(self) -> None:
        """Give every place back; processes that still hold one end."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []

    def _are_there(self, timeout_s: float) -> bool:
        """Wait until Ray has found a node for every bundle; Ctrl-C is heard meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not all(group.wait(_LOOK_S) for group in self._groups):
            if time.monotonic() >= deadline:
                return False
        return True

    def _shortage(self) -> str:
        there = available_resources_per_node()
        nodes = [
            Node(there.get(node["NodeID"], {}), node.get("Labels", {}))
            for node in ray.nodes()
            if node["Alive"]
        ]
        places = self._bundles()
        wanted = [
            replace(kind, placed=sum(map(bool, itertools.islice(places, kind.count))))
            for kind in (self._servers, self._workers)
            if kind.count
        ]
        return shortage(wanted, nodes, one_node=self._one_node)

    def _bundles(self) -> Iterator[str]:
        """Return each bundle's node, or nothing if it has none, shards' first."""
        for group in self._groups:
            nodes = placement_group_table(group)["bundles_to_node_id"]
            yield from (nodes[bundle] for bundle in sorted(nodes))


def _group(wanted: Sequence[Wanted], strategy: str) -> PlacementGroup:
    bundles = [dict(w.needs.resources) or dict(_LEAST) for w in wanted for _ in range(w.count)]
    labels = [dict(w.needs.labels) for w in wanted for _ in range(w.count)]
    group: PlacementGroup = placement_group(
        bundles, strategy=strategy, bundle_label_selector=labels if any(labels) else None
    )
    return group


def _options(resources: dict[str, float], group: PlacementGroup, bundle: int) -> dict[str, Any]:
    return {
        "num_cpus": resources.pop("CPU", 0),
        "num_gpus": resources.pop("GPU", 0),
        "resources": resources,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
    }
