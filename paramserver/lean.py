"""torch's optimizer base class without torch's compiler, and one for a single flat parameter.

torch wraps four methods of every optimizer for `torch.compile`, and the first call of one imports
the compiler: 1.4 s and 70 MiB in each process, for wrappers that do nothing in a run that is not
compiled. Servers and workers are such runs, and there are many of them.
"""

from __future__ import annotations

import inspect
from abc import ABC
from typing import Any

import torch
from torch import nn


class LeanOptimizer(torch.optim.Optimizer):
    """An optimizer whose methods are torch's own, unwrapped."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class FlatOptimizer(LeanOptimizer, ABC):
    """An optimizer of one flat parameter, an owner's slice, which makes its steps by itself."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the parameter group, ``lr`` among them as the schedule has it now."""
        return self.param_groups[0]

    @property
    def memory(self) -> dict[str, Any]:
        """What lasts: tensors whose last dimension is the slice's length, and single numbers."""
        memory: dict[str, Any] = self.state[self._param]
        return memory

    @property
    def _param(self) -> nn.Parameter:
        param: nn.Parameter
        (param,) = self.param_groups[0]["params"]
        return param

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do nothing but tell torch's schedulers, which look for it, that an update was made."""
