"""The ways into a run from other machines and for guests: a gateway on each node with shards."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from paramserver.actor import OWN_ADDRESS, GatewayActor
from paramserver.errors import ResourceError, ServerTimeoutError
from paramserver.reach import Reach
from workers.actor import Servers

if TYPE_CHECKING:
    from paramserver.transports.gateway_config import GatewayConfig
    from paramserver.transports.remote import Identity

logger = logging.getLogger(__name__)

_FILE = "connect.json"


class Door:
    """Closed unless the run's reach, or its nodes, ask for it to be open."""

    def __init__(self, reach: Reach, cluster: str | None) -> None:
        """Look how many nodes there are in ``cluster``; None is Ray on this machine.

        Raises:
            ResourceError: Workers on other nodes could not come in, or only in clear text.
        """
        self._reach = reach
        nodes = 1 if cluster is None else sum(bool(node["Alive"]) for node in ray.nodes())
        self.is_far = nodes > 1 and reach.transport != "shared-memory"
        """Whether the run's processes may be on several nodes."""
        self.is_needed = reach.needs_gateway(nodes)
        """Whether somebody may come who shares no memory with the shards."""
        if self.is_far:
            self._check_far(nodes)
        self._actors: list[Any] = []
        self._told: Path | None = None
        self._servers: Servers | None = None
        self._first_guest = 0
        self.followers: tuple[str, ...] = ()
        """Where shard 0 finds the others, once it is open."""

    @property
    def num_places(self) -> int:
        """Snapshot buffers that guests may take, and the gateway for its own snapshots."""
        return self._reach.guests + 1 if self.is_needed else 0

    def open(
        self,
        servers: Servers,
        num_workers: int,
        options: Callable[[int], Mapping[str, Any]],
        timeout_s: float,
    ) -> Servers:
        """Start to listen, if need be; return ``servers`` as workers are told of them.

        ``options`` put an actor on a shard's node.

        Raises:
            ResourceError: The address cannot be listened at, or not in clear text.
        """
        servers = replace(servers, transport=self._reach.transport)
        self.followers = servers.addresses[1:]
        if not self.is_needed:
            return servers
        # gRPC is imported by those processes alone that speak it
        from paramserver.transports.remote import Remote  # noqa: PLC0415
        from paramserver.transports.tunnel import Far  # noqa: PLC0415

        own, theirs = self._identities()
        config, self._first_guest = self._config(servers, num_workers, own), num_workers
        remotes: dict[str, Remote] = {}  # by machines

        def listen(machine: str, at: str, elsewhere: Mapping[str, Far]) -> None:
            """Start the gateway of the shards on ``machine``."""
            shards = tuple(
                address if place == machine else elsewhere.get(address)
                for address, place in zip(servers.addresses, servers.machines, strict=True)
            )
            there = options(servers.machines.index(machine))
            address = self._start(replace(config, listen=at, shards=shards), there, timeout_s)
            remotes[machine] = Remote(
                address=address,
                token=servers.token,
                identity=theirs,
                clear_text=config.clear_text,
            )

        first, *others = dict.fromkeys(servers.machines)
        for machine in others:
            listen(machine, OWN_ADDRESS, {})
        far = {
            address: Far(address=f"{address}/far", remote=remotes[place])
            for address, place in zip(servers.addresses, servers.machines, strict=True)
            if place != first
        }
        listen(first, config.listen, far)  # the last one: it has the ways to all others
        self.followers = tuple(
            far[address].address if address in far else address for address in self.followers
        )
        self._servers = replace(servers, remotes=tuple(remotes[m] for m in servers.machines))
        return self._servers

    def _config(
        self, servers: Servers, num_workers: int, identity: Identity | None
    ) -> GatewayConfig:
        """Return what all gateways have in common."""
        from paramserver.transports.gateway_config import GatewayConfig  # noqa: PLC0415

        return GatewayConfig(
            listen=self._listen(servers),
            shards=(),
            cuts=servers.cuts,
            dtype=servers.layout.dtype,
            token=servers.token,
            fingerprint=servers.layout.fingerprint,
            secret=secrets.token_hex(16),
            layout=json.dumps(servers.layout.to_json()),
            slot_rows=servers.slot_rows,
            agreed=servers.agreed,
            wait_s=servers.wait_s,
            timeout_s=servers.timeout_s,
            identity=identity,
            clear_text=self._reach.clear_text,
            first_guest=num_workers,
            guests=self._reach.guests,
            num_clients=2 * len(servers.cuts) * (num_workers + self._reach.guests + 1),
        )

    def _start(self, config: GatewayConfig, options: Mapping[str, Any], timeout_s: float) -> str:
        """Start a gateway; return its address."""
        actor: Any = GatewayActor.options(**options).remote(config)
        self._actors.append(actor)
        try:
            address: str = ray.get(actor.start.remote(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise ServerTimeoutError(0, "starting the gateway", timeout_s) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return address

    def tell(self, folder: Path) -> None:
        """Write what a guest needs to know into the run's folder, for this user's eyes only."""
        if self._servers is None:
            return
        remote, ca = self._servers.remotes[0], self._reach.tls_ca or self._reach.tls_certificate
        told = {
            "address": remote.address,
            "token": remote.token,
            "ca": None if ca is None else str(Path(ca).resolve()),
        }
        self._told = folder / _FILE
        self._told.unlink(missing_ok=True)
        file = os.open(self._told, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as opened:
            json.dump(told, opened)

    def summary(self, timeout_s: float) -> dict[str, Any]:
        """Return what a run's record says of the gateways; nothing if there are none."""
        if self._servers is None:
            return {}
        came: set[int] = set()
        counted: Counter[str] = Counter()
        try:
            told = ray.get([a.summary.remote() for a in self._actors], timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("a gateway does not say who came: %s", type(error).__name__)
            return {}
        for who, how_much in told:
            came |= who
            counted.update(how_much)
        guests = sum(worker >= self._first_guest for worker in came)
        addresses = list(dict.fromkeys(remote.address for remote in self._servers.remotes))
        return {
            "gateway": {
                "address": addresses[0],
                "others": addresses[1:],
                "workers": len(came) - guests,
                "guests": guests,
                **counted,
            }
        }

    def is_lost(self, timeout_s: float) -> bool:
        """Whether a gateway's process has ended by itself."""
        if not self._actors:
            return False
        try:
            ray.get([actor.summary.remote() for actor in self._actors], timeout=timeout_s)
        except ray.exceptions.RayActorError:
            return True
        return False

    def close(self) -> None:
        """Stop to listen. Twice is harmless."""
        if self._told is not None:
            self._told.unlink(missing_ok=True)
        if not self._actors:
            return
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get([actor.close.remote() for actor in self._actors], timeout=5)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _check_far(self, nodes: int) -> None:
        from paramserver.transports.remote import clear_text_refused, is_local  # noqa: PLC0415

        r = self._reach
        one_node = "transport=shared-memory, which keeps shards and workers on one node"
        if r.listen is not None and is_local(r.listen):
            raise ResourceError(
                f"listen is {r.listen}, which workers on other of the cluster's {nodes} nodes "
                f"cannot reach: leave it out, give an address of the shards' node, or {one_node}"
            )
        if r.tls_certificate is None and not r.clear_text:
            raise clear_text_refused(
                f"a run over the cluster's {nodes} nodes", f", or give {one_node}"
            )

    def _listen(self, servers: Servers) -> str:
        if self._reach.listen is not None:
            return self._reach.listen
        if self.is_far:
            return OWN_ADDRESS
        return f"unix-abstract:{servers.addresses[0]}/gateway"

    def _identities(self) -> tuple[Identity | None, Identity | None]:
        """Return the gateway's identity, and that of the run's own workers."""
        from paramserver.transports.remote import Identity  # noqa: PLC0415

        r = self._reach
        if r.tls_certificate is None:
            return None, None
        own = Identity(certificate=r.tls_certificate, key=r.tls_key, ca=r.tls_ca).inline()
        if r.tls_ca is not None:
            return own, own
        return own, Identity(ca=own.certificate)
