"""When a run opens a door, and which doors it does not open; Ray itself is not started."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import RayActorError
from torch import nn

from async_sgd import door
from async_sgd.door import Door
from paramserver.errors import ResourceError
from paramserver.layout import Layout
from paramserver.reach import Reach
from paramserver.transports.gateway_config import GatewayConfig
from paramserver.transports.remote import Remote
from paramserver.transports.tunnel import Far
from workers.actor import Servers

CLUSTER = "head:6379"
SECRET = Reach(tls_certificate=Path("server.pem"), tls_key=Path("server.key"))


@pytest.fixture(autouse=True)
def _three_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True}, {"Alive": True}, {"Alive": False}, {"Alive": True}]
    monkeypatch.setattr(door.ray, "nodes", lambda: nodes)


def test_a_run_over_nodes_does_not_start_in_clear_text_unless_told_to() -> None:
    with pytest.raises(
        ResourceError,
        match=r"^a run over the cluster's 3 nodes can be reached .* read the token .* "
        r"clear_text=true .* transport=shared-memory",
    ):
        Door(Reach(), CLUSTER)

    assert Door(Reach(clear_text=True), CLUSTER).is_needed
    assert Door(SECRET, CLUSTER).is_needed


def test_an_address_that_no_other_node_reaches_is_refused_on_several() -> None:
    with pytest.raises(ResourceError, match=r"^listen is 127\.0\.0\.1:0, which workers on other"):
        Door(Reach(listen="127.0.0.1:0"), CLUSTER)

    assert Door(Reach(listen="127.0.0.1:0"), None).is_needed


@pytest.mark.parametrize(
    ("reach", "cluster", "is_far"),
    [
        (Reach(clear_text=True), CLUSTER, True),
        (Reach(transport="grpc", clear_text=True), CLUSTER, True),
        (Reach(transport="shared-memory"), CLUSTER, False),
        # Guests come in, but workers still share the shards' memory.
        (Reach(transport="shared-memory", guests=1), CLUSTER, False),
        (Reach(transport="grpc"), None, False),
    ],
)
def test_a_run_is_on_one_node_unless_all_may_come_over_grpc(
    reach: Reach, cluster: str | None, is_far: bool
) -> None:
    assert Door(reach, cluster).is_far == is_far


class Gateways:
    """Stands for the actors: each is where it was put, and listens at an address of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs: list[GatewayConfig] = []
        self.put: list[Any] = []
        monkeypatch.setattr(door.GatewayActor, "options", self._options)
        monkeypatch.setattr(door.ray, "get", lambda ref, timeout: ref)

    def _options(self, **options: Any) -> Any:
        def remote(config: GatewayConfig) -> Any:
            self.configs.append(config)
            self.put.append(options["of"])
            actor = Mock()
            actor.start.remote.return_value = f"10.0.0.{options['of']}:7000"
            return actor

        return Mock(remote=remote)


LAYOUT = Layout.of(nn.Linear(40, 16))


def servers(*machines: str) -> Servers:
    names = tuple(f"run/{i}" for i in range(len(machines)))
    return Servers(
        addresses=names, cuts=LAYOUT.cuts(len(names)), layout=LAYOUT, token="token", timeout_s=1.0,
        wait_s=2.0, machines=machines,
    )  # fmt: skip


def test_each_node_with_shards_has_a_gateway_and_the_first_knows_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateways = Gateways(monkeypatch)
    opened = Door(Reach(clear_text=True, listen="10.0.0.0:80", guests=2), CLUSTER)

    told = opened.open(servers("a", "b", "a", "c", "b"), 3, lambda shard: {"of": shard}, 1.0)

    of_b, of_c, of_a = gateways.configs
    assert gateways.put == [1, 3, 0]
    assert [config.listen for config in gateways.configs] == ["own-node:0"] * 2 + ["10.0.0.0:80"]
    assert of_b.shards == (None, "run/1", None, None, "run/4")
    assert of_c.shards == (None, None, None, "run/3", None)
    b, c = (Remote(address=f"10.0.0.{of}:7000", token="token", clear_text=True) for of in (1, 3))
    assert of_a.shards == (
        "run/0",
        Far(address="run/1/far", remote=b),
        "run/2",
        Far(address="run/3/far", remote=c),
        Far(address="run/4/far", remote=b),
    )
    assert opened.followers == ("run/1/far", "run/2", "run/3/far", "run/4/far")
    assert [remote.address[7] for remote in told.remotes] == list("01031")
    assert len({config.secret for config in gateways.configs}) == 1
    assert len(of_a.secret) == 32
    assert of_a.secret != of_a.token


def test_what_came_to_all_gateways_is_added_up_and_workers_are_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gateways(monkeypatch)
    opened = Door(Reach(clear_text=True, guests=1), CLUSTER)
    opened.open(servers("a", "b"), 3, lambda shard: {"of": shard}, 1.0)
    for actor, came in zip(opened._actors, ({0, 1}, {1, 2, 3}), strict=True):
        actor.summary.remote.return_value = (came, {"messages": 5, "sent_bytes": 7})

    assert opened.summary(timeout_s=1.0) == {
        "gateway": {
            "address": "10.0.0.0:7000",
            "others": ["10.0.0.1:7000"],
            "workers": 3,
            "guests": 1,
            "messages": 10,
            "sent_bytes": 14,
        }
    }


def test_a_run_of_one_node_leads_its_followers_as_they_are() -> None:
    opened = Door(Reach(), None)

    told = opened.open(servers("a", "a"), 3, lambda shard: {}, 1.0)

    assert opened.followers == ("run/1",)
    assert told.remotes == ()
    assert opened.summary(timeout_s=1.0) == {}


def test_a_gateway_whose_process_has_ended_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Door(Reach(clear_text=True), CLUSTER)
    assert not opened.is_lost(timeout_s=1.0)
    opened._actors = [Mock()]

    def get(ref: object, timeout: float) -> Any:
        raise RayActorError

    monkeypatch.setattr(door.ray, "get", get)

    assert opened.is_lost(timeout_s=1.0)
