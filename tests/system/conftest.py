"""One Ray for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.session import ray_session


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(None, 6):
        yield
