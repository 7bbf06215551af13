"""What a run's shards listen on beside Unix sockets, and what its workers reach them by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Transport = Literal["auto", "shared-memory", "grpc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How a run can be reached. As it is, by processes of this machine and user only."""

    transport: Transport = "auto"
    """What workers reach the shards by: shared memory on their node, gRPC on others."""

    listen: str | None = None
    """``host:port`` to listen at for gRPC; None is a Unix socket, or a free port of the node's
    own address if workers are on other nodes."""

    guests: int = 0
    """Places for clients that join from outside, by `paramserver.Client.connect`."""

    tls_certificate: Path | None = None
    """PEM file with the certificate that is shown to whoever connects."""

    tls_key: Path | None = None
    """PEM file with its private key."""

    tls_ca: Path | None = None
    """PEM file with the authority that signed it, and that everybody who connects needs a
    certificate of; None takes those who know ``tls_certificate`` itself."""

    clear_text: bool = False
    """Whether clear text may leave this machine: everybody on the way can then read the token and
    the parameters, and change them."""

    def __post_init__(self) -> None:
        if self.transport not in get_args(Transport):
            listed = ", ".join(get_args(Transport))
            raise ValueError(f"transport must be one of {listed}, got {self.transport!r}")
        if self.guests < 0:
            raise ValueError(f"guests must be 0 or more, got {self.guests}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate needs tls_key, and that the certificate: give both")
        if self.tls_ca is not None and self.tls_certificate is None:
            raise ValueError(
                "tls_ca is of use with tls_certificate and tls_key only: give both, too"
            )

    def needs_gateway(self, num_nodes: int) -> bool:
        """Whether somebody may come who shares no memory with the shards."""
        if self.listen is not None or self.guests or self.transport == "grpc":
            return True
        return self.transport == "auto" and num_nodes > 1
