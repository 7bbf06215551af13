"""One Ray for all system tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.session import ray_session


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with ray_session(None, 6):
        yield
