"""When a run opens a door, and which doors it does not open; Ray itself is not started."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import RayActorError

from async_sgd import door
from async_sgd.door import Door
from paramserver.errors import ResourceError
from paramserver.reach import Reach

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
    ("reach", "cluster", "share"),
    [
        (Reach(clear_text=True), CLUSTER, "servers"),
        (Reach(transport="grpc", clear_text=True), CLUSTER, "servers"),
        (Reach(transport="shared-memory"), CLUSTER, "all"),
        # Guests come in, but workers still share the shards' memory.
        (Reach(transport="shared-memory", guests=1), CLUSTER, "all"),
        (Reach(transport="grpc"), None, "all"),
    ],
)
def test_workers_share_the_shards_node_unless_they_may_come_over_grpc(
    reach: Reach, cluster: str | None, share: str
) -> None:
    assert Door(reach, cluster).share == share


def test_a_gateway_whose_process_has_ended_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Door(Reach(clear_text=True), CLUSTER)
    assert not opened.is_lost(timeout_s=1.0)
    opened._actor = Mock()

    def get(ref: object, timeout: float) -> Any:
        raise RayActorError

    monkeypatch.setattr(door.ray, "get", get)

    assert opened.is_lost(timeout_s=1.0)
