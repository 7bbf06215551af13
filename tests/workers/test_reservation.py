"""What a run asks of Ray for its processes' places; Ray itself is not started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from paramserver.errors import ResourceError
from workers import reservation
from workers.placement import Placement
from workers.reservation import Places


@dataclass(frozen=True)
class Group:
    """A placement group as it was asked for."""

    bundles: list[dict[str, float]]
    strategy: str
    labels: list[dict[str, str]] | None
    is_there: bool = True

    def wait(self, timeout_s: float) -> bool:
        return self.is_there


class FakeRay:
    """Remembers the groups that were asked for and not given back."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.has_room = True
        self.lost: tuple[int, ...] = ()
        """Bundles, of those of all groups, whose node was lost."""

    def table(self, group: Group) -> dict[str, Any]:
        before = sum(len(g.bundles) for g in self.groups[: self.groups.index(group)])
        bundles = range(len(group.bundles))
        lost = [i for i in bundles if not group.is_there or before + i in self.lost]
        return {
            "state": "RESCHEDULING" if lost else "CREATED",
            "bundles_to_node_id": {i: "" if i in lost else "n" for i in bundles},
        }

    def ask(
        self,
        bundles: list[dict[str, float]],
        *,
        strategy: str,
        bundle_label_selector: list[dict[str, str]] | None,
    ) -> Group:
        self.groups.append(Group(bundles, strategy, bundle_label_selector, self.has_room))
        return self.groups[-1]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(reservation, "placement_group", fake.ask)
    monkeypatch.setattr(reservation, "placement_group_table", fake.table)
    monkeypatch.setattr(reservation, "remove_placement_group", fake.groups.remove)
    monkeypatch.setattr(reservation, "available_resources_per_node", lambda: {"n": {"CPU": 1.0}})
    monkeypatch.setattr(
        reservation.ray, "nodes", lambda: [{"NodeID": "n", "Alive": True, "Labels": {}}]
    )
    return fake


def taken(ray: FakeRay, *, one_node: bool = False, **placement: Any) -> Places:
    config = Placement(address="head:6379", **placement)
    places = Places(config, workers=3, servers=2, one_node=one_node)
    places.take()
    return places


def place(options: dict[str, Any]) -> tuple[Any, int]:
    """Return the group and the bundle that an actor's options name."""
    strategy = options["scheduling_strategy"]
    return strategy.placement_group, strategy.placement_group_bundle_index


BYTE, CPU = {"memory": 1.0}, {"CPU": 1.0}


def test_those_who_share_all_memory_are_one_group_on_one_node(ray: FakeRay) -> None:
    taken(ray, one_node=True, placement="pack")

    assert ray.groups == [Group([BYTE, BYTE, CPU, CPU, CPU], "STRICT_PACK", None)]


def test_shards_are_on_one_node_if_they_are_to_be_and_workers_on_few(ray: FakeRay) -> None:
    taken(ray, server_placement="pack", placement="pack")

    assert ray.groups == [
        Group([BYTE, BYTE], "STRICT_PACK", None),
        Group([CPU, CPU, CPU], "PACK", None),
    ]


def test_shards_and_workers_are_spread(ray: FakeRay) -> None:
    taken(ray)

    assert ray.groups == [
        Group([BYTE, BYTE], "SPREAD", None),
        Group([CPU, CPU, CPU], "SPREAD", None),
    ]


def test_each_process_asks_for_its_own_labels_and_resources(ray: FakeRay) -> None:
    labels = {"server_labels": "role=server", "worker_labels": "role=worker"}

    taken(ray, one_node=True, server_cpus=0.5, worker_resources="ssd=2", **labels)

    (group,) = ray.groups
    assert group.bundles == [{"CPU": 0.5}] * 2 + [{"CPU": 1.0, "ssd": 2.0}] * 3
    assert group.labels == [{"role": "server"}] * 2 + [{"role": "worker"}] * 3


@pytest.mark.parametrize(("one_node", "workers"), [(True, (0, 3)), (False, (1, 1))])
def test_every_process_has_a_bundle_of_its_own(
    ray: FakeRay, one_node: bool, workers: tuple[int, int]
) -> None:
    places = taken(ray, one_node=one_node, worker_resources="ssd=2")

    second = places.worker(1)

    assert (second["num_cpus"], second["num_gpus"], second["resources"]) == (1.0, 0, {"ssd": 2.0})
    assert place(second) == (ray.groups[workers[0]], workers[1])
    assert place(places.server(1)) == (ray.groups[0], 1)
    assert place(places.beside(1)) == (ray.groups[0], 1)


def test_places_that_are_not_there_in_time_are_given_back_and_told(ray: FakeRay) -> None:
    ray.has_room = False

    with pytest.raises(
        ResourceError, match=r"^waited 0\.01 s for 2 of 3 workers: each needs 1 CPU"
    ):
        taken(ray, resources_timeout_s=0.01)

    assert ray.groups == []


@pytest.mark.parametrize("one_node", [True, False])
def test_those_whose_node_was_lost_are_counted_until_ray_has_found_another(
    ray: FakeRay, one_node: bool
) -> None:
    places = taken(ray, one_node=one_node, worker_cpus=2.0)
    ray.lost = (3, 4)

    lack = places.lack()

    assert lack is not None
    assert lack.startswith("2 of 3 workers: each needs 2 CPU; ")
    ray.lost = ()
    assert places.lack() is None


def test_at_home_nothing_is_asked_for(ray: FakeRay) -> None:
    places = Places(Placement(), workers=3, servers=2, one_node=True)

    places.take()

    assert ray.groups == []
    assert places.worker(0) == places.server(0) == places.beside(0) == {"num_cpus": 0}
