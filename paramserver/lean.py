"""torch's optimizer base class without torch's compiler.

torch wraps four methods of every optimizer for `torch.compile`, and the first call of one imports
the compiler: 1.4 s and 70 MiB in each process, for wrappers that do nothing in a run that is not
compiled. Servers and workers are such runs, and there are many of them.
"""

from __future__ import annotations

import inspect

import torch


class LeanOptimizer(torch.optim.Optimizer):
    """An optimizer whose methods are torch's own, unwrapped."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
