"""Where a gateway listens, to whom, for which shards, and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paramserver.compression import Agreed
from paramserver.transports.remote import Identity, check_clear_text
from paramserver.transports.tunnel import Far


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Where a gateway listens, to whom, and for which shards."""

    listen: str
    """``host:port``, where port 0 takes a free one; ``unix:path`` or ``unix-abstract:name``."""

    shards: tuple[str | Far | None, ...]
    """Where each is: its address on this node, or, at the leader's gateway, another node; None if
    it is of no concern here. The first leads."""

    cuts: tuple[range, ...]
    """Their ranges."""

    dtype: torch.dtype
    token: str
    """The run's secret."""

    fingerprint: str
    """The layout's."""

    secret: str = ""
    """Of those who may lead shards from another node; empty if there are none."""

    layout: str = "{}"
    """The layout as JSON, for clients that have no other way to know it."""

    slot_rows: int = 1
    """Rows of a gradient slot."""

    agreed: Agreed | None = None
    """How the run's own workers compress; None if they do not."""

    wait_s: float = 120.0
    """Seconds an answer may take, a rule's waiting included."""

    timeout_s: float = 60.0
    """Seconds a shard may take to answer a hello."""

    identity: Identity | None = None
    """None listens in clear text."""

    clear_text: bool = False
    """Whether clear text may leave this machine."""

    first_guest: int = 0
    """Number of the first worker that no trainer started."""

    guests: int = 1
    """Places for clients that no trainer started, to push and to read."""

    num_clients: int = 64
    """Conversations, one a client and shard, at most."""

    calls_per_s: float = 100.0
    """Calls with the token that are taken; more are refused."""

    frames_per_s: float = 50_000.0
    """Frames that are taken from one client; more wait."""

    linger_s: float = 30.0
    """Seconds a client whose stream broke keeps its place."""

    def __post_init__(self) -> None:
        if self.identity is None or self.identity.certificate is None:
            check_clear_text(self.listen, self.clear_text)
        if self.guests < 0:
            raise ValueError(f"guests must be 0 or more, got {self.guests}")
        for name in ("calls_per_s", "frames_per_s", "linger_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
