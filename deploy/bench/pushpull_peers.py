"""The peers of push+pull, and what the memory allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deploy.bench.processes import Processes, timed
from deploy.bench.ray_pattern import DocumentedClient, DocumentedServer, FlatClient, FlatServer
from deploy.bench.work import momentum_sgd, synthetic_gradient

DOCUMENTED = "Ray's documented pattern"
FLAT = "Ray actor, flat numpy"
RPC = "torch RPC server"

Start = Callable[[Processes, int], Any]
"""Starts a server of so many floats and returns its client, an actor with ``measure(repeats)``."""


def layer_shapes(numel: int) -> list[tuple[int, ...]]:
    """Cut ``numel`` floats as a perceptron of three layers would be: big weights, small biases."""
    bias = max(1, math.isqrt(numel) // 8)
    weights = numel - 3 * bias
    first, second = weights // 2, weights * 3 // 8
    third = weights - first - second
    return [(first,), (bias,), (second,), (bias,), (third,), (bias,)]


def layered_model(shapes: list[tuple[int, ...]]) -> nn.Module:
    """Return parameters of these shapes."""
    return nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])


def _documented(processes: Processes, numel: int) -> Any:
    shapes = layer_shapes(numel)
    server = processes.start(DocumentedServer, lambda: layered_model(shapes))
    return processes.start(DocumentedClient, server, shapes)


def _flat(processes: Processes, numel: int) -> Any:
    return processes.start(FlatClient, processes.start(FlatServer, numel), numel)


def _rpc(processes: Processes, numel: int) -> Any:
    # Its import fails where torch was built without RPC: then only this contender does not run.
    from deploy.bench import rpc_pattern  # noqa: PLC0415

    return rpc_pattern.start_client(processes, numel)


PEERS: dict[str, Start] = {DOCUMENTED: _documented, FLAT: _flat, RPC: _rpc}


class MemoryLimit:
    """The fused momentum step and one copy of the result, in one process: nobody can be faster.

    Only a client whose gradient is in its slot already can: its push needs the step alone.
    """

    def __init__(self, numel: int) -> None:
        torch.set_num_threads(1)
        self._params = nn.Parameter(torch.zeros(numel))
        self._params.grad = synthetic_gradient((numel,))
        self._copy = torch.zeros(numel)
        self._optimizer = momentum_sgd([self._params])

    def measure(self, repeats: int) -> list[float]:
        """Return the milliseconds of each step and copy."""

        def step() -> None:
            self._optimizer.step()
            self._copy.copy_(self._params.detach())

        return timed(step, repeats)
