"""Peers on Ray's own calls: the parameter server Ray documents, and one that exchanges flat arrays.

The documented one is taken from Ray's ``plot_parameter_server`` example: weights go out as a
``state_dict`` of torch tensors, gradients come in as a list of numpy arrays, a default
(not fused) torch optimizer steps, and in training the driver moves every gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy.bench.processes import STARTUP_S, timed
from deploy.bench.work import Meter, Trainee, momentum_sgd, synthetic_gradient
from workers.task import Task, build_model

Arrays = list[NDArray[np.float32]]


class DocumentedServer:
    """The example's ``ParameterServer``."""

    def __init__(self, make_model: Callable[[], nn.Module]) -> None:
        torch.set_num_threads(1)
        self._model = make_model()
        self._optimizer = momentum_sgd(list(self._model.parameters()), fused=False)

    def apply_gradients(self, *gradients: Arrays) -> dict[str, Tensor]:
        """Apply the sum of the gradients and return the weights."""
        summed = [np.stack(same).sum(axis=0) for same in zip(*gradients, strict=True)]
        self._optimizer.zero_grad()
        for parameter, gradient in zip(self._model.parameters(), summed, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return {name: tensor.cpu() for name, tensor in self._model.state_dict().items()}


class DocumentedClient:
    """Pushes a list of arrays and gets the weights."""

    def __init__(self, server: Any, shapes: list[tuple[int, ...]]) -> None:
        self._server = server
        self._gradients = [synthetic_gradient(shape).numpy() for shape in shapes]

    def measure(self, repeats: int) -> list[float]:
        """Return the milliseconds of each push+pull."""
        return timed(
            lambda: ray.get(
                self._server.apply_gradients.remote(self._gradients), timeout=STARTUP_S
            ),
            repeats,
        )


class DocumentedWorker:
    """The example's ``DataWorker``."""

    def __init__(self, task: Task, worker: int, num_workers: int) -> None:
        self._trainee = Trainee(task, worker, num_workers)

    def compute_gradients(self, weights: dict[str, Tensor]) -> Arrays:
        """Load the weights and compute a gradient on the next batch."""
        model = self._trainee.model
        model.load_state_dict(weights)
        model.zero_grad()
        self._trainee.backward()
        return [p.grad.numpy() for p in model.parameters() if p.grad is not None]


class DocumentedDriver:
    """The example's driver, in an actor so that it is as nice as everybody else."""

    def __init__(self, server: Any, workers: list[Any]) -> None:
        self._server, self._workers = server, workers

    def run_async(self, warm_s: float, measure_s: float) -> float:
        """Apply each gradient as it comes; return gradients a second."""
        meter = Meter(warm_s, measure_s)
        weights = self._server.get_weights.remote()
        gradients = {w.compute_gradients.remote(weights): w for w in self._workers}
        going = True
        while going:
            (ready, *_), _ = ray.wait(list(gradients), timeout=STARTUP_S)
            worker = gradients.pop(ready)
            weights = self._server.apply_gradients.remote(ready)
            gradients[worker.compute_gradients.remote(weights)] = worker
            going = meter.count()
        return meter.rate()

    def run_sync(self, warm_s: float, measure_s: float) -> float:
        """Apply all workers' gradients together; return gradients a second."""
        meter = Meter(warm_s, measure_s)
        weights = self._server.get_weights.remote()
        going = True
        while going:
            gradients = [w.compute_gradients.remote(weights) for w in self._workers]
            weights = self._server.apply_gradients.remote(*gradients)
            # The example waits when it evaluates; without a wait it would only queue calls.
            ray.wait([weights], timeout=STARTUP_S, fetch_local=False)
            going = meter.count(len(gradients))
        return meter.rate()


def model_factory(task: Task) -> Callable[[], nn.Module]:
    """Return what makes the server's model."""
    return lambda: build_model(task, 0)


class FlatServer:
    """A Ray actor that takes and returns one flat array, with the fused step."""

    def __init__(self, numel: int) -> None:
        torch.set_num_threads(1)
        self._params = nn.Parameter(torch.zeros(numel))
        self._optimizer = momentum_sgd([self._params])

    def push_pull(self, gradient: NDArray[np.float32]) -> NDArray[np.float32]:
        """Step, and return the parameters."""
        with warnings.catch_warnings():  # Ray's arrays are read-only, and are only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._params.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        self._params.grad = None
        return self._params.detach().numpy()


class FlatClient:
    """Pushes and pulls flat arrays."""

    def __init__(self, server: Any, numel: int) -> None:
        self._server = server
        self._gradient = synthetic_gradient((numel,)).numpy()

    def measure(self, repeats: int) -> list[float]:
        """Return the milliseconds of each push+pull."""
        return timed(
            lambda: ray.get(self._server.push_pull.remote(self._gradient), timeout=STARTUP_S),
            repeats,
        )
