from __future__ import annotations

from typing import Any

import pytest

from workers.config import RunConfig
from workers.placement import Needs, Node, Wanted, shortage

CPU = Needs({"CPU": 1.0}, {})


def workers(count: int, needs: Needs = CPU) -> Wanted:
    return Wanted("worker", count, needs)


def node(cpus: float, **labels: str) -> Node:
    return Node({"CPU": cpus}, labels)


def test_what_is_short_is_told_with_what_is_free_on_each_node() -> None:
    said = shortage([workers(5)], [node(2), node(1)], one_node=False)

    assert said == ("2 of 5 workers: each needs 1 CPU; the cluster's 2 nodes have 2 + 1 CPU free")


def test_a_process_is_not_cut_in_two_to_fit_nodes() -> None:
    said = shortage([workers(1, Needs({"CPU": 2}, {}))], [node(1), node(1)], one_node=False)

    assert said.startswith("1 of 1 worker: it needs 2 CPU; ")


def test_labels_say_which_nodes_count() -> None:
    needs = Needs({"CPU": 1}, {"role": "worker"})

    said = shortage([workers(3, needs)], [node(8, role="server"), node(2, role="worker")],
                    one_node=False)  # fmt: skip

    assert said.startswith("1 of 3 workers: each needs 1 CPU on a node labelled role=worker; ")


def test_kinds_share_what_is_free() -> None:
    shards = Wanted("shard", 2, CPU)

    said = shortage([shards, workers(2)], [node(3)], one_node=False)

    assert said == "1 of 2 workers: each needs 1 CPU; the cluster's node has 3 CPU free"


def test_all_on_one_node_is_said_where_there_are_several() -> None:
    said = shortage([workers(4)], [node(3), node(2)], one_node=True)

    assert said == (
        "1 of 4 workers: each needs 1 CPU, all on one node; the cluster's 2 nodes have "
        "3 + 2 CPU free"
    )


def test_a_resource_that_no_node_has_is_named() -> None:
    said = shortage([workers(1, Needs({"ssd": 1}, {}))], [node(4)], one_node=False)

    assert said == "1 of 1 worker: it needs 1 ssd; the cluster's node has 0 ssd free"


def test_free_resources_of_many_nodes_are_added_up() -> None:
    said = shortage([workers(9)], [node(1) for _ in range(8)], one_node=False)

    assert said.endswith("the cluster's 8 nodes have 8 CPU free")


def test_what_fits_is_for_ray_to_place() -> None:
    said = shortage([workers(2)], [node(2)], one_node=False)

    assert said.startswith("Ray to place 2 workers; ")


def test_needs_are_read_from_flags() -> None:
    config = RunConfig(
        address="auto",
        worker_cpus=2,
        worker_gpus=0.5,
        worker_resources="ssd=1, license=0.5",
        worker_labels="role=worker,zone=a",
        server_labels="role=server",
    )

    assert config.worker_needs.resources == {"CPU": 2, "GPU": 0.5, "ssd": 1, "license": 0.5}
    assert config.worker_needs.labels == {"role": "worker", "zone": "a"}
    assert config.server_needs.resources == {}
    assert config.asked_of_servers == ["server_labels"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"placement": "scatter"}, "^placement must be 'spread' or 'pack', got 'scatter'$"),
        ({"server_placement": "one"}, "^server_placement must be 'spread' or 'pack', got 'one'$"),
        ({"worker_cpus": -1}, "^worker_cpus must be 0 or more, got -1$"),
        ({"server_cpus": float("nan")}, "^server_cpus must be 0 or more, got nan$"),
        ({"resources_timeout_s": 0}, "^resources_timeout_s must be above 0 s, got 0$"),
        ({"worker_resources": "ssd"}, "^worker_resources must be like name=value,name=value, got"),
        ({"worker_resources": "ssd=many"}, "^worker_resources: ssd must be a number above 0, got"),
        ({"worker_resources": "CPU=2"}, "^worker_resources: ask for CPUs with worker_cpus$"),
        ({"server_labels": "role="}, "^server_labels must be like name=value,name=value, got"),
        ({"address": "http://h:8265"}, "^address http://h:8265 takes jobs, not runs: `ray job sub"),
    ],
)
def test_what_cannot_be_asked_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"address": "auto", **values})


@pytest.mark.parametrize(
    "values",
    [
        {"worker_cpus": 2},
        {"placement": "pack"},
        {"server_placement": "pack"},
        {"server_labels": "role=server"},
    ],
)
def test_at_home_there_is_nothing_to_ask(values: dict[str, Any]) -> None:
    (name,) = values

    with pytest.raises(ValueError, match=rf"^{name} is for a cluster, and this run starts Ray on"):
        RunConfig(**values)


def test_threads_are_those_a_worker_asks_of_the_cluster() -> None:
    assert RunConfig(address="auto", worker_cpus=3.5).worker_threads == 3
    assert RunConfig(address="auto", worker_cpus=0.5).worker_threads == 1
    assert RunConfig(address="auto", worker_cpus=3, threads=2).worker_threads == 2
