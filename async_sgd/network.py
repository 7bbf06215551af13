"""What a simulated message takes on its way between a worker and the server."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Gives every worker a link of its own: a message takes ``latency + bytes / bandwidth``.

    One read and one push of all parameters go over it for each gradient.
    """

    latency: float = 0.0
    """Seconds a message takes at least."""

    bandwidth: float = math.inf
    """Bytes a second."""

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"latency must be 0 s or more and finite, got {self.latency}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0 bytes/s, got {self.bandwidth}")

    def seconds(self, num_bytes: int) -> float:
        """Return what a message of ``num_bytes`` takes."""
        return self.latency + num_bytes / self.bandwidth
