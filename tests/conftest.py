"""Set-up for every test: one torch thread, and a Ray that leaves the home folder alone.

Tests that start Ray stay in one process (`-n 2 --dist loadgroup`): they share one Ray, and look for
processes that are left.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home folder

# torch's store asks the name server for the name of every address it connects, 127.0.0.1 too: one
# that does not answer costs five seconds each, more than the deadlines tested here.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("system") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))
    # one process has them all, and most of the work: it begins with them
    items.sort(key=lambda item: item.get_closest_marker("system") is None)
