"""Delay compensation, as a shard sees it: a stale gradient is corrected when it is taken.

    worker 1 reads r (v7) ----- computes g ----- pushes g
    others push          v8    v9                   |
                                           w (v9)   v   g is corrected by w - r, then applied: v10

What a worker has read stays in its snapshot buffer until its push is taken (`paramserver.shard`),
so the copy of the parameters for each worker, which the papers keep on the server or send along
with each push, is there already and takes no more memory.

A correction comes after the worker's clipping and before anything else: gathered gradients are
corrected one by one as they arrive, and their mean is clipped and applied. Damping is apart from
it: that scales the step, by staleness alone. Implementations: `async_sgd.compensation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from paramserver.companion_state import with_companion, without_companion
from paramserver.errors import CheckpointError
from paramserver.reshard import OptimizerState, scatter_state

_NAME = "compensation"

Rate: TypeAlias = float | Tensor
"""A learning rate for all elements, or one for each."""


class Compensator(Protocol):
    """Corrects the gradients of one slice, in the order in which they are taken; one call a time.

    It sees its own slice only, and any cut into shards must give the same result.
    """

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: Rate
    ) -> None:
        """Change ``grad`` in place. Called once for each push that is taken; not for dropped ones.

        Args:
            grad: What was pushed, shape ``(n,)``: a gradient at ``read``.
            params: The parameters now, shape ``(n,)``. Not to be changed.
            read: What the worker read, shape ``(n,)``. Not to be changed. With staleness 0 it is
                equal to ``params``, and may be the same memory, unless the optimizer's rule shows
                workers something else (`paramserver.optimizers.base.PushRule.shows`).
            worker: Whose push it is.
            staleness: Updates that were applied between the read and now, 0 or more.
            lr: The optimizer's learning rate now, as scheduled, before damping; shape ``(n,)``
                where groups of parameters have their own.
        """

    def on_update(self, params: Tensor) -> None:
        """Hear of the parameters after each update, shape ``(n,)``; they are not to be kept."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors whose last dimension is ``n``, and numbers; maybe empty.

        The tensors are the compensator's own: copy them before the next push.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which is copied.

        Raises:
            CheckpointError: It is of another compensation or size; nothing was changed.
        """


class Compensation(Protocol):
    """A compensation's configuration: what the command line names and every shard builds."""

    def build(self, params: Tensor) -> Compensator:
        """Make the compensator for the slice that is at ``params`` now, which are not kept.

        Raises:
            ValueError: A setting is too small for the parameters' dtype.
        """


def with_compensation(rule: Mapping[str, Any], compensator: Compensator | None) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` with the state of its compensator, if there is one.

    Nothing is copied but the dictionaries.
    """
    return with_companion(rule, _NAME, {} if compensator is None else compensator.state_dict())


def without_compensation(rule: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Undo `with_compensation`: return the ``state_dict`` and the compensator's, maybe empty."""
    return without_companion(rule, _NAME)


def check_compensation(
    state: OptimizerState | None, params: Tensor, compensation: Compensation | None
) -> None:
    """Check that a run can go on from ``state`` with ``compensation``.

    Those without a state of their own can come, go and change, as dampings can.

    Args:
        state: What was saved; None before the first update.
        params: The parameters, of which only the dtype is looked at.
        compensation: What corrects gradients from now on, if anything does.

    Raises:
        CheckpointError: The state is of another compensation.
    """
    if state is None:
        return
    _, saved = without_compensation(scatter_state(state, range(0)))
    if compensation is not None:
        compensation.build(params[:0]).load_state_dict(saved)
    elif saved:
        raise CheckpointError(
            f"the run had a compensation that keeps {', '.join(sorted(saved))}: resume with it"
        )
