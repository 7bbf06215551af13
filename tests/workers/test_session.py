from __future__ import annotations

import socket

import pytest

from paramserver.errors import ResourceError
from workers.session import ray_session


def test_an_address_where_no_ray_is_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray would be taken
    with socket.socket() as bound:  # bound, and nobody listens
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"

        refused = pytest.raises(ResourceError, match=f"^no Ray at {address}: Connection refused")
        with refused, ray_session(address, 1):
            pass
