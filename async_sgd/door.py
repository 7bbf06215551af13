"""The way into a run from other machines and for guests: the gateway's process, if there is one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from paramserver.actor import OWN_ADDRESS, GatewayActor
from paramserver.errors import ResourceError, ServerTimeoutError
from paramserver.reach import Reach
from workers.actor import Servers
from workers.reservation import Share

if TYPE_CHECKING:
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
        self._is_far = nodes > 1 and reach.transport != "shared-memory"
        self.is_needed = reach.needs_gateway(nodes)
        """Whether somebody may come who shares no memory with the shards."""
        if self._is_far:
            self._check_far(nodes)
        self._actor: Any = None
        self._told: Path | None = None
        self._servers: Servers | None = None

    @property
    def share(self) -> Share:
        """Which of the run's processes must be on one node."""
        return "servers" if self._is_far else "all"

    @property
    def num_places(self) -> int:
        """Snapshot buffers that guests may take, and the gateway for its own snapshots."""
        return self._reach.guests + 1 if self.is_needed else 0

    def open(
        self, servers: Servers, num_workers: int, options: Mapping[str, Any], timeout_s: float
    ) -> Servers:
        """Start to listen, if need be; return ``servers`` as workers are told of them.

        ``options`` put the gateway's actor on the shards' node.

        Raises:
            ResourceError: The address cannot be listened at, or not in clear text.
        """
        servers = replace(servers, transport=self._reach.transport)
        if not self.is_needed:
            return servers
        # gRPC is imported by those processes alone that speak it
        from paramserver.transports.gateway import GatewayConfig  # noqa: PLC0415
        from paramserver.transports.remote import Remote  # noqa: PLC0415

        own, theirs = self._identities()
        config = GatewayConfig(
            listen=self._listen(servers),
            shards=servers.addresses,
            cuts=servers.cuts,
            dtype=servers.layout.dtype,
            token=servers.token,
            fingerprint=servers.layout.fingerprint,
            layout=json.dumps(servers.layout.to_json()),
            slot_rows=servers.slot_rows,
            agreed=servers.agreed,
            wait_s=servers.wait_s,
            timeout_s=servers.timeout_s,
            identity=own,
            clear_text=self._reach.clear_text,
            first_guest=num_workers,
            guests=self._reach.guests,
            num_clients=2 * len(servers.cuts) * (num_workers + self._reach.guests + 1),
        )
        self._actor = GatewayActor.options(**options).remote(config)
        try:
            address, machine = ray.get(self._actor.start.remote(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise ServerTimeoutError(0, "starting the gateway", timeout_s) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        remote = Remote(
            address=address,
            token=servers.token,
            identity=theirs,
            clear_text=self._reach.clear_text,
        )
        self._servers = replace(servers, remote=remote, machine=machine)
        return self._servers

    def tell(self, folder: Path) -> None:
        """Write what a guest needs to know into the run's folder, for this user's eyes only."""
        if self._servers is None or self._servers.remote is None:
            return
        remote, ca = self._servers.remote, self._reach.tls_ca or self._reach.tls_certificate
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
        """Return what the run's record says of the gateway; nothing if there is none."""
        if self._servers is None or self._servers.remote is None:
            return {}
        try:
            told = ray.get(self._actor.summary.remote(), timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("the gateway does not say who came: %s", type(error).__name__)
            return {}
        return {"gateway": {"address": self._servers.remote.address, **told}}

    def is_lost(self, timeout_s: float) -> bool:
        """Whether the gateway's process has ended by itself."""
        if self._actor is None:
            return False
        try:
            ray.get(self._actor.summary.remote(), timeout=timeout_s)
        except ray.exceptions.RayActorError:
            return True
        return False

    def close(self) -> None:
        """Stop to listen. Twice is harmless."""
        if self._told is not None:
            self._told.unlink(missing_ok=True)
        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                ray.get(self._actor.close.remote(), timeout=5)
            ray.kill(self._actor)
            self._actor = None

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
        if self._is_far:
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
