from __future__ import annotations

import socket

import pytest

from paramserver.errors import ResourceError
from paramserver.optimizers import SGD
from sync.interfaces import interface_ip
from sync.trainer import SyncTrainer
from workers.config import RunConfig
from workers.tasks import task


def test_the_loopback_interface_has_the_loopback_address() -> None:
    assert interface_ip("lo") == "127.0.0.1"


def test_an_unknown_interface_is_named_with_those_there_are() -> None:
    known = ", ".join(name for _, name in socket.if_nameindex())
    message = (
        rf" has no network interface 'eth99' \(it has {known}\): name one that every node has$"
    )

    with pytest.raises(ResourceError, match=message):
        interface_ip("eth99")


def test_shared_memory_goes_over_no_interface() -> None:
    with pytest.raises(ValueError, match=r"^network_interface is for gloo, and collective is"):
        SyncTrainer(task("digits"), SGD(lr=0.1), network_interface="lo", collective="shared_memory")


def test_a_synchronous_run_has_no_shards_to_place() -> None:
    config = RunConfig(address="auto", server_labels="role=server")

    with pytest.raises(ValueError, match=r"^server_labels is for shards, and synchronous mode has"):
        SyncTrainer(task("digits"), SGD(lr=0.1), config)
