from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from paramserver.lean import LeanOptimizer
from paramserver.optimizers import OPTIMIZERS

METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")

BUILD_EVERY_OPTIMIZER = """
import sys
import torch
import async_sgd.trainer, paramserver.actor, sync.actor, sync.trainer, workers.actor
from paramserver.optimizers import OPTIMIZERS
from workers.tasks import task

task("digits").data()
for entry in OPTIMIZERS:
    keys = {} if entry.name != "torch" else {"algorithm": "Adamax", "lr": 0.1}
    spec = OPTIMIZERS.build({"name": entry.name, **keys})
    built = spec.build([torch.nn.Parameter(torch.ones(64))])
    built.load_state_dict(built.state_dict())
    if hasattr(built, "apply"):
        built.told(1.0, 8.0)
        built.apply([torch.ones(64)])
print([name for name in ("torch._dynamo", "sklearn", "matplotlib") if name in sys.modules])
"""


def test_nothing_a_process_does_not_need_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD_EVERY_OPTIMIZER], capture_output=True, text=True, check=False
    )

    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", [entry.name for entry in OPTIMIZERS])
def test_no_optimizer_of_torch_that_is_built_on_has_methods_of_its_own(name: str) -> None:
    """They would be hidden: `LeanOptimizer` comes first."""
    keys = {} if name != "torch" else {"algorithm": "Adamax", "lr": 0.1}
    built = OPTIMIZERS.build({"name": name, **keys}).build([torch.nn.Parameter(torch.ones(64))])

    own = [c for c in type(built).__mro__ if c.__module__.startswith("torch.optim")]
    assert isinstance(built, LeanOptimizer)
    for torchs in own:
        if torchs is not torch.optim.Optimizer:
            assert not set(METHODS) & set(vars(torchs))
