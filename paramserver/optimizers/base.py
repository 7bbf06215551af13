"""What a shard needs of an optimizer: a rule that turns a pushed gradient into a step.

A rule is one of torch's optimizers, or one written like them, with `PushRule` in front of it:

    class AdamRule(PushRule, torch.optim.Adam): ...

torch's kernels, ``state_dict`` and learning-rate schedulers then work as they are. A frozen spec
beside each rule holds its settings; it travels, is stored in the record, and builds the rule.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from paramserver.lean import LeanOptimizer


class PushRule(LeanOptimizer):
    """One step for each gradient it is given.

    The rule holds parameters but never their storage: ``p.data`` may point elsewhere in each call.
    Calls come one at a time.
    """

    elementwise: ClassVar[bool] = True
    """Whether an element's update depends on that element alone, so that any cut into shards
    gives the same result."""

    shows: bool = False
    """Whether workers compute at what `show` writes; if not, at the parameters."""

    _plain_step: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls) -> None:
        """Find the step without torch's wrapping for its profiler and compiler.

        The wrapping takes most of a small step: 67 us of 86 with fused SGD on 1 k elements.
        """
        super().__init_subclass__()
        cls._plain_step = inspect.unwrap(cls.step)

    @property
    def rate(self) -> float | Tensor:
        """The learning rate now, as scheduled; shape ``(n,)`` where elements have their own."""
        lr: float = self.param_groups[0]["lr"]
        return lr

    def came_from(self, worker: int, clock: int, samples: int) -> None:
        """Hear whose push was taken, which of its pushes it is, and of how many samples.

        `apply` comes next, or after several of these where their mean is applied. Where nobody
        calls this, every gradient is worker 0's.
        """

    def left(self, worker: int) -> None:
        """Hear that ``worker`` takes part no more, dead or done; another may come in its place."""

    def show(self, out: Tensor, worker: int = 0) -> None:
        """Write what ``worker``, which takes part, computes its next gradient at.

        Called only if the rule `shows`; there is one parameter then, of shape ``(n,)``.

        Args:
            out: Shape ``(n,)``. Overwritten.
            worker: Who is to read it.
        """

    def told(self, loss: float, norm: float) -> None:
        """Hear of the gradient that `apply` is called with next; most rules don't care.

        The parameters are still those before the step. All shards hear the same numbers.

        Args:
            loss: Mean loss over the samples of the gradient.
            norm: L2 norm of the whole gradient over all shards; NaN if nobody measured it.
        """

    def apply(self, grads: Sequence[Tensor], scale: float = 1.0) -> None:
        """Take one step on ``grads``, made ``scale`` times as long.

        The step is scaled, never the gradient: Adam, RMSProp, AdaGrad and AdaDelta hardly notice a
        gradient's scale, and their moments would hold it for long after.

        Args:
            grads: A gradient for each parameter, in order and of its shape. Not changed.
            scale: Factor on the step, above 0; 1 is the optimizer's own step.

        Raises:
            ValueError: There are more or fewer gradients than parameters; nothing was changed.
        """
        groups = self.param_groups
        params = groups[0]["params"]
        if len(groups) > 1:
            params = [p for group in groups for p in group["params"]]
        if len(grads) != len(params):
            raise ValueError(f"expected {len(params)} gradients, got {len(grads)}")
        rates = None if scale == 1 else [group["lr"] for group in groups]
        try:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            if rates is not None:
                self._set_rates(lr * scale for lr in rates)
            with torch.no_grad():
                self._plain_step()
            self._opt_called = True  # a scheduler warns of updates that it thinks are missing
        finally:
            if rates is not None:
                self._set_rates(rates)
            for p in params:
                p.grad = None

    def _set_rates(self, rates: Iterable[float]) -> None:
        for group, lr in zip(self.param_groups, rates, strict=True):
            group["lr"] = lr


class Optimizer(Protocol):
    """An optimizer's configuration: what the command line names and every shard builds."""

    @property
    def lr(self) -> float:
        """Learning rate, above 0; a schedule changes it from there."""

    def build(self, params: Sequence[nn.Parameter]) -> PushRule:
        """Make the rule that updates ``params``, with fresh state."""


def needs_norm(optimizer: object) -> bool:
    """Whether the rule of ``optimizer`` must be told the norm of each gradient it applies."""
    return bool(getattr(optimizer, "norm_needed", False))


def is_per_worker(optimizer: object) -> bool:
    """Whether the rule of ``optimizer`` must know whose each gradient is: a mean is nobody's."""
    return bool(getattr(optimizer, "per_worker", False))


def has_fused_kernel(params: Iterable[Tensor]) -> bool:
    """Whether torch's fused SGD, Adam, AdamW and Adagrad take ``params``.

    A fused kernel passes over the vectors once a step, a plain one several times. 16-bit parameters
    are left to the plain ones: on CPU, fused SGD skips most of their elements in silence
    (pytorch/pytorch#191763).
    """
    return all(
        p.dtype in (torch.float32, torch.float64) and p.device.type in ("cpu", "cuda")
        for p in params
    )


def check_eps(eps: float, params: Iterable[Tensor]) -> None:
    """Raise ValueError if ``eps`` is lost in the parameters' dtype.

    An element without gradient, such as padding, would then become 0/0: NaN.
    """
    for dtype in {p.dtype for p in params}:
        least = torch.finfo(dtype).smallest_normal
        if eps < least:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"eps must be {least:.2g} or more for {name}, got {eps}")


def check_above_0(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_from_0(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is 0 or more and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def check_below_1(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is 0 or more and below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be 0 or more and below 1, got {value}")
