"""A task's loss as a function of its parameters: what derivatives of any order are taken of.

    flat vector --split--> params, one tensor a slot --+
                                                       |--> loss(params, batch, seed)
    batch, seed ---------------------------------------+    = task.loss(model with params, batch)

The user's model lends its code, its buffers and its modes, and is left as it was: buffers are
copied for each call, and what modules do that torch cannot differentiate is off while it is asked
to (`differentiable`). The seed stands for dropout, so the function is the same at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from paramserver.errors import TaskError
from paramserver.layout import Layout
from workers.examples import Batch
from workers.task import Task

Params: TypeAlias = tuple[Tensor, ...]
"""One tensor for each slot of the layout, in its order."""

T = TypeVar("T")


class PureLoss:
    """The loss of a task as a function of parameters, a batch and a seed."""

    def __init__(self, task: Task, model: nn.Module, layout: Layout) -> None:
        """Take the code of ``model``, which ``layout`` describes."""
        self.task, self.model, self.layout = task, model, layout
        self._around = _Around(model)
        self._keys = [f"model.{slot.name}" for slot in layout.slots]

    def split(self, flat: Tensor) -> Params:
        """Return views of flat vectors, shape ``(..., numel)``, one for each slot."""
        lead = flat.shape[:-1]
        return tuple(
            flat[..., slot.offset : slot.end].reshape((*lead, *slot.shape))
            for slot in self.layout.slots
        )

    def join(self, parts: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """Copy ``parts``, one for each slot, into ``out``, shape ``(..., numel)``, and return it.

        Nothing is written where a part is None, nor to padding.
        """
        lead = out.shape[:-1]
        for slot, part in zip(self.layout.slots, parts, strict=True):
            if part is not None:
                out[..., slot.offset : slot.end] = part.reshape(*lead, slot.numel)
        return out

    def call(self, do: Callable[[nn.Module], T], params: Params, seed: int) -> T:
        """Return ``do(model)``, with ``params`` for the model's parameters; seeds torch."""
        torch.default_generator.manual_seed(seed)
        state = {f"model.{name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        state.update(zip(self._keys, params, strict=True))
        result: T = functional_call(self._around, state, (do,))
        return result

    def loss(self, params: Params, batch: Batch, seed: int) -> Tensor:
        """Return the mean loss over ``batch``, a scalar."""
        return self.call(lambda model: self.task.loss(model, batch), params, seed)

    def outputs(self, params: Params, batch: Batch, seed: int) -> Tensor:
        """Return what the model gives the loss; see `outputs_of`."""
        return self.call(lambda model: outputs_of(self.task, model, batch), params, seed)

    def loss_of(self, outputs: Tensor, batch: Batch, seed: int) -> Tensor:
        """Return the loss over ``batch`` if the model gave ``outputs``, a scalar."""
        torch.default_generator.manual_seed(seed)
        return loss_of_outputs(self.task, self.model, outputs, batch)


def outputs_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return what ``model`` gives the task's loss over ``batch``.

    Raises:
        TaskError: The loss does not call the model exactly once, for one float tensor, or reads its
            parameters.
    """
    listener = _StandIn(task.name, model, None)
    task.loss(listener, batch)
    return listener.output()


def loss_of_outputs(task: Task, model: nn.Module, outputs: Tensor, batch: Batch) -> Tensor:
    """Return the task's loss over ``batch`` if ``model`` gave ``outputs``; it is not called."""
    return task.loss(_StandIn(task.name, model, outputs), batch)


def push_forward(of: Callable[[Any], T], at: Any, along: Any) -> tuple[T, T]:
    """Return ``of(at)``, and its derivative along ``along``, by forward mode."""
    value, derivative = jvp(of, (at,), (along,))[:2]
    return value, derivative


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give torch's random state back as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Make the modules of ``model`` do only what torch 2.13 can differentiate twice or forward.

    ====================  ===========================================================
    attention             torch's mathematical implementation, without fused kernels
    `nn.LSTM`             torch's own implementation, not oneDNN's (float32 on CPU)
    BatchNorm in train()  leaves its running statistics alone; the output is the same
    ====================  ===========================================================
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.MultiheadAttention) for module in modules):
            stack.callback(
                torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
            )
            torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.LSTM) for module in modules):
            # not mkldnn.flags(), which warns of Intel GPUs that are not there
            stack.callback(setattr, torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property
        for module in modules:
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                module.track_running_stats = False
                stack.callback(setattr, module, "track_running_stats", True)
        yield


class _Around(nn.Module):
    """Holds the model, so that `functional_call` can run anything with other parameters in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, do: Callable[[nn.Module], Any]) -> Any:
        return do(self.model)


class _StandIn(nn.Module):
    """What the loss gets in place of the model, to tell outputs and loss apart."""

    def __init__(self, task: str, model: nn.Module, given: Tensor | None) -> None:
        """Answer a call with ``given``, or if that is None with what ``model`` gives."""
        super().__init__()
        self.__dict__.update(_task=task, _real=model, _given=given)  # no submodule, no buffer
        self.training = model.training
        self._outputs: list[object] = []

    def forward(self, *args: Any, **kwargs: Any) -> object:
        output = self._real(*args, **kwargs) if self._given is None else self._given
        self._outputs.append(output)
        return output

    def output(self) -> Tensor:
        """Return the one tensor the model gave."""
        if len(self._outputs) != 1:
            raise TaskError(
                f"the loss of task {self._task!r} calls the model {len(self._outputs)} times: a "
                "Gauss-Newton or Fisher matrix takes a loss that calls it exactly once"
            )
        (output,) = self._outputs
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            raise TaskError(
                f"the model of task {self._task!r} gives its loss {type(output).__name__}: a "
                "Gauss-Newton or Fisher matrix takes a model with one float tensor as output"
            )
        return output

    def __getattr__(self, name: str) -> Any:
        """Return what the model has by this name, if no parameter can be in it."""
        value = getattr(self._real, name)
        if callable(value) or (isinstance(value, Tensor) and not self._is_buffer(value)):
            self._refuse()
        return value

    def _is_buffer(self, tensor: Tensor) -> bool:
        return any(tensor is buffer for buffer in self._real.buffers())

    def _refuse(self, *_args: object, **_keys: object) -> NoReturn:
        raise TaskError(
            f"the loss of task {self._task!r} reads parameters or parts of the model: a "
            "Gauss-Newton or Fisher matrix takes a loss that depends on them through the model's "
            "output alone; have the model return all the loss needs"
        )

    named_parameters = named_modules = named_children = state_dict = _refuse
