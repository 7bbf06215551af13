"""A parameter server on ``torch.distributed.rpc``, as PyTorch's tutorials build one.

Stronger than theirs in two ways: tensors travel, not pickled modules, and the step is fused.
The server's state is global in its process, because RPC calls functions by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import rpc

from deploy.bench.processes import STARTUP_S, Processes, ask, free_port, timed
from deploy.bench.work import Meter, Trainee, momentum_sgd, synthetic_gradient
from workers.task import Task, build_model

_SERVER = "server"


class RpcServer:
    """Parameters, their optimizer, and the pushes of a round that is being gathered."""

    def __init__(self, parameters: list[nn.Parameter], round_of: int) -> None:
        """Step when ``round_of`` pushes are there, on their mean; 1 is asynchronous."""
        self._parameters, self._round_of = parameters, round_of
        self._optimizer = momentum_sgd(parameters)
        self._lock = threading.Lock()  # calls come on several threads
        self._answer: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._pushed = 0
        self.meter: Meter | None = None

    def exchange(self, gradients: list[Tensor]) -> torch.futures.Future[list[Tensor]]:
        """Take a push; the answer is the parameters after its step, or nothing at the end."""
        with self._lock:
            answer = self._answer
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
            self._pushed += 1
            if self._pushed == self._round_of:
                self._step()
                self._answer, self._pushed = torch.futures.Future(), 0
                go_on = self.meter is None or self.meter.count(self._round_of)
                answer.set_result([p.detach() for p in self._parameters] if go_on else [])
            return answer

    def _step(self) -> None:
        if self._round_of > 1:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad /= self._round_of
        self._optimizer.step()
        self._optimizer.zero_grad()


_served: RpcServer | None = None


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _exchange(gradients: list[Tensor]) -> torch.futures.Future[list[Tensor]]:
    assert _served is not None
    return _served.exchange(gradients)


class RpcProcess:
    """A process of the group; rank 0 serves."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        torch.set_num_threads(1)
        self._rank, self._world, self._port = rank, world, port
        self._trainee: Trainee | None = None

    def join(self) -> None:
        """Join the group; returns when all have."""
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=f"tcp://127.0.0.1:{self._port}", rpc_timeout=STARTUP_S
        )
        name = _SERVER if self._rank == 0 else f"worker{self._rank}"
        rpc.init_rpc(name, rank=self._rank, world_size=self._world, rpc_backend_options=options)

    def serve(self, make: Callable[[], list[nn.Parameter]], round_of: int) -> None:
        """Serve these parameters from now on."""
        global _served  # noqa: PLW0603  RPC calls a function, which must find the server
        _served = RpcServer(make(), round_of)

    def meter(self, warm_s: float, measure_s: float) -> None:
        """Count pushes, and end the training loops after the time."""
        assert _served is not None
        _served.meter = Meter(warm_s, measure_s)

    def rate(self) -> float:
        """Return gradients a second."""
        assert _served is not None
        assert _served.meter is not None
        return _served.meter.rate()

    def prepare(self, task: Task) -> None:
        """Load a worker's model and data."""
        self._trainee = Trainee(task, self._rank - 1, self._world - 1)

    def train(self) -> None:
        """Train until the server says that it is enough."""
        assert self._trainee is not None
        parameters = list(self._trainee.model.parameters())
        while True:
            self._trainee.backward()
            weights = rpc.rpc_sync(_SERVER, _exchange, args=([p.grad for p in parameters],))
            if not weights:
                return
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.data = weight
                parameter.grad = None

    def begin(self, numel: int) -> None:
        """Make the gradient for `measure`."""
        self._gradient = synthetic_gradient((numel,))

    def measure(self, repeats: int) -> list[float]:
        """Return the milliseconds of each push+pull."""
        return timed(lambda: rpc.rpc_sync(_SERVER, _exchange, args=([self._gradient],)), repeats)


def start(processes: Processes, world: int) -> list[Any]:
    """Start and join ``world`` processes; the first is the server."""
    port = free_port()
    group = [processes.start(RpcProcess, rank, world, port) for rank in range(world)]
    ask([p.join.remote() for p in group])
    return group


def start_client(processes: Processes, numel: int) -> Any:
    """Start a server of ``numel`` floats and return its client."""
    server, client = start(processes, 2)
    ask([server.serve.remote(lambda: [nn.Parameter(torch.zeros(numel))], 1)])
    ask([client.begin.remote(numel)])
    return client


def train_rate(
    task: Task, num_workers: int, *, synchronous: bool, warm_s: float, measure_s: float
) -> float:
    """Return gradients a second of ``num_workers`` workers."""
    with Processes() as processes:
        server, *workers = start(processes, num_workers + 1)
        round_of = num_workers if synchronous else 1
        ask([server.serve.remote(lambda: list(build_model(task, 0).parameters()), round_of)])
        ask([w.prepare.remote(task) for w in workers])
        ask([server.meter.remote(warm_s, measure_s)])
        ask([w.train.remote() for w in workers], STARTUP_S + warm_s + measure_s)
        return float(ask([server.rate.remote()])[0])
