"""How a run can be reached: what is refused, and when a gateway is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paramserver.reach import Reach


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transport": "pigeon"}, "transport must be one of auto, shared-memory, grpc, got 'pig"),
        ({"guests": -1}, "guests must be 0 or more, got -1"),
        ({"tls_key": Path("k")}, "tls_certificate needs tls_key"),
        ({"tls_ca": Path("c")}, "tls_ca is of use with tls_certificate and tls_key only"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Reach(**given)


@pytest.mark.parametrize(
    ("reach", "num_nodes", "needed"),
    [
        (Reach(), 1, False),
        (Reach(), 2, True),
        (Reach(transport="shared-memory"), 2, False),
        (Reach(transport="grpc"), 1, True),
        (Reach(guests=1), 1, True),
        (Reach(listen="127.0.0.1:0"), 1, True),
    ],
)
def test_a_gateway_is_there_for_who_shares_no_memory(
    reach: Reach, num_nodes: int, needed: bool
) -> None:
    assert reach.needs_gateway(num_nodes) is needed
