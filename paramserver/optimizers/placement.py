"""Where momentum is kept when gradients are stale: a velocity for each worker, or one that waits.

With w the parameters, g a gradient that worker i has computed at what it was shown, v_i its
velocity, μ the momentum, η the learning rate and N a number of pushes:

                        a push                                          workers are shown
    momentum            v ← μ v + g         w ← w - η v                 w
    local-momentum      v_i ← μ v_i + g     w ← w - η v_i               w
    dana                v_i ← μ v_i + g     w ← w - η v_i               w - η μ Σ_j v_j
    dana-slim           v_i ← μ v_i + g     w ← w - η (g + μ v_i)       w
    delayed-nesterov    w ← w - η g / N; with every N-th of them        w
                        m ← μ m + (mean of the N gradients)   w ← w - η μ m

Momentum makes staleness worse: while a worker computes, all velocities go on moving w. Where M
workers take turns, on a quadratic of curvature λ, this is the largest η λ that is stable at μ = 0.9
(of M linear maps, applied in turn, the spectral radius is 1 there):

    M                   1                            2             4        8
    plain SGD           2                            1             0.445    0.209
    momentum            2 (1 + μ)             3.8    1 - μ  0.1    0.035    0.016
    local-momentum      2 (1 + μ)             3.8    1 - μ² 0.19   0.065    0.028
    dana, dana-slim     2 (1+μ) / (1+2μ)      1.36   0.56          0.220    0.097

**dana** shows workers where w will be once each of them has pushed a gradient of 0, so that what
the velocities add to the staleness is taken into account. **dana-slim** is dana in other variables:
under dana a push moves the point that is shown, s = w - η μ Σ_j v_j, by -η (g + μ v_i), v_i being
the velocity after it. While η stays as it is, workers see the same points under both, and what is
evaluated and kept is w under dana and s under dana-slim. In the paper dana-slim's workers keep
their velocities, push g + μ v_i, and the server is plain SGD. That is the same: v_i changes with
worker i's own pushes only, in their order. Here it stays on the server, a replaced worker goes on
with it, and a push that is dropped has not changed it.

**With one worker**, and so in synchronous mode, where all ranks together are one, local-momentum is
momentum, dana-slim is nesterov, and dana is Nesterov's method as it was first written, with the
gradient at the look-ahead point: v ← μ v + g(w - η μ v), w ← w - η v. To the bit: each velocity is
torch's momentum buffer, and the sum over one velocity is that velocity.

**Schedules and damping** act as on momentum. Velocities are sums of gradients and know nothing of
η; the point that is shown is made with η as it is then. Damping makes the step of a push shorter,
and leaves velocities and the point that is shown alone. Weight decay is added to g at w as it is
when the push is applied, never at an older or another point. A compensation is told what the
worker was shown, so under dana it corrects a fresh gradient too: with ``dc-asgd`` it is DANA-DC.

**Who leaves** keeps its velocity for whoever comes in its place. Until then dana's sum does not
count it: nobody will push it, and gradients at a point that is displaced by it would lead w as far
away from the optimum, for good. Who joins, or goes on in a resumed run, counts from its first read.

Source: Hakimi, Barkai, Gabel & Schuster, "Taming Momentum in a Distributed Asynchronous
Environment", 2019, arXiv:1907.11612 (dana, dana-slim). Hermans & Louppe, "Gradient Energy
Matching", 2018, arXiv:1805.08469, eq. 24 (local-momentum). Liu et al., "Asynchronous Local-SGD
Training for Language Modeling", 2024, arXiv:2401.09135 (delayed-nesterov, whose c is 0 here). The
papers were not at hand: dana is as in a public implementation of DANA-DC, which keeps up the sum by
differences too, delayed-nesterov as in that of HALoS, dana-slim what dana becomes in s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paramserver.optimizers.base import (
    PushRule,
    check_above_0,
    check_below_1,
    check_from_0,
    has_fused_kernel,
)
from paramserver.optimizers.momentum import SGDRule

_MAX_CHANGES = 1000
"""Pushes after which a sum of velocities is made anew, which takes a pass over each of them."""


class LocalMomentumRule(SGDRule):
    """torch's SGD with the velocity of the worker that pushes, made at its first push."""

    _worker = 0

    def came_from(self, worker: int, clock: int, samples: int) -> None:
        """Keep whose push comes next."""
        self._worker = worker

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step with the worker's velocity where torch has its one."""
        key = f"velocity.{self._worker}"
        states = [self.state[p] for group in self.param_groups for p in group["params"]]
        for state in states:
            if key in state:
                state["momentum_buffer"] = state.pop(key)
        try:
            super()._plain_step()
        finally:
            for state in states:
                if "momentum_buffer" in state:
                    state[key] = state.pop("momentum_buffer")


class DANARule(LocalMomentumRule):
    """Local momentum that shows workers where it will take them: w - η μ Σ_j v_j.

    The sum is kept up by what each push changes in it, as the velocities of all workers are too
    many to be read each time. First the old velocity is taken from it, then the new one is added,
    so that the sum over a single velocity has that one's bits. It is made anew now and then: its
    rounding errors would stay, and be 1e-4 of it after 3e5 pushes of 16 workers in float32.

    `apply` without `show` is local momentum: the look-ahead is made by who computes at it.
    """

    shows = True

    _counted: frozenset[int] = frozenset()  # workers whose velocity is in the sum
    _sum: Tensor
    _num_changes = 0  # of the sum, since it was made

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Count nobody: it is another state, and who takes part will read."""
        super().__setstate__(state)
        self._counted = frozenset()

    def show(self, out: Tensor, worker: int = 0) -> None:
        """Write the look-ahead point, and count ``worker`` from now on."""
        if worker not in self._counted:
            self._count(self._counted | {worker})
        (group,) = self.param_groups
        ahead = -group["lr"] * group["momentum"]
        torch.add(self._param.data, self._sum, alpha=ahead, out=out)

    def left(self, worker: int) -> None:
        """Count ``worker`` no more."""
        if worker in self._counted:
            self._count(self._counted - {worker})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step with the worker's velocity, and keep up the sum."""
        if self._worker not in self._counted:
            super()._plain_step()
            return
        before = self._velocity(self._worker)
        if before is not None:
            self._sum.sub_(before)
        super()._plain_step()
        after = self._velocity(self._worker)
        if after is not None:
            self._sum.add_(after)
        self._num_changes += 1
        if self._num_changes == _MAX_CHANGES:
            self._count(self._counted)

    def _count(self, workers: frozenset[int]) -> None:
        """Let the sum be that over ``workers``."""
        self._counted, self._num_changes = workers, 0
        self._sum = torch.zeros_like(self._param.data)
        for worker in sorted(workers):
            velocity = self._velocity(worker)
            if velocity is not None:
                self._sum.add_(velocity)

    def _velocity(self, worker: int) -> Tensor | None:
        velocity: Tensor | None = self.state.get(self._param, {}).get(f"velocity.{worker}")
        return velocity

    @property
    def _param(self) -> nn.Parameter:
        """The one parameter there is where somebody is shown something."""
        param: nn.Parameter
        (param,) = self.param_groups[0]["params"]
        return param


class DelayedNesterovRule(PushRule):
    """Plain steps of η g / N, and after every N of them a momentum step by their mean.

    The N-th plain step and the momentum step are made as one, η (g / N + μ m), so that with N = 1
    this has the bits of torch's Nesterov, of its plain kernel.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        every: int,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "every": every, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Take one step on the parameters' gradients."""
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                g = p.grad if decay == 0 else p.grad.add(p, alpha=decay)
                self._update(p, g, group["lr"], group["momentum"], group["every"])

    def _update(self, p: Tensor, g: Tensor, lr: float, momentum: float, every: int) -> None:
        state = self.state[p]
        if not state:
            state["pushes"] = 0
            state["velocity"], state["gathered"] = torch.zeros_like(p), torch.zeros_like(p)
        velocity, gathered = state["velocity"], state["gathered"]
        gathered.add_(g)
        state["pushes"] = (state["pushes"] + 1) % every
        if state["pushes"] > 0:
            p.add_(g, alpha=-lr / every)
            return
        velocity.mul_(momentum).add_(gathered.div_(every))
        step = torch.div(g, every, out=gathered).add_(velocity, alpha=momentum)
        p.add_(step, alpha=-lr)
        gathered.zero_()


@dataclass(frozen=True, slots=True, kw_only=True)
class _PerWorker:
    """What all optimizers with a velocity for each worker have."""

    lr: float = 0.01
    """Learning rate η, above 0. Steps in a lasting direction grow to η / (1 - momentum)."""

    momentum: float = 0.9
    """Decay of a velocity with each push of its worker, 0 to below 1."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * w is added to g."""

    per_worker: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("momentum", self.momentum)
        check_from_0("weight_decay", self.weight_decay)

    def _settings(self, params: Sequence[nn.Parameter]) -> dict[str, Any]:
        return {**asdict(self), "fused": has_fused_kernel(params)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalMomentum(_PerWorker):
    """Momentum with a velocity for each worker, moved by its own gradients only."""

    def build(self, params: Sequence[nn.Parameter]) -> LocalMomentumRule:
        """Make the rule that updates ``params``."""
        return LocalMomentumRule(params, **self._settings(params))


@dataclass(frozen=True, slots=True, kw_only=True)
class DANA(_PerWorker):
    """Local momentum whose workers compute where all velocities together will lead."""

    def build(self, params: Sequence[nn.Parameter]) -> DANARule:
        """Make the rule that updates ``params``."""
        return DANARule(params, **self._settings(params))


@dataclass(frozen=True, slots=True, kw_only=True)
class DANASlim(_PerWorker):
    """DANA that keeps the look-ahead point as its parameters: Nesterov with local velocities."""

    def build(self, params: Sequence[nn.Parameter]) -> LocalMomentumRule:
        """Make the rule that updates ``params``."""
        ahead = self.momentum > 0  # torch has no Nesterov without momentum, which is SGD
        return LocalMomentumRule(params, **self._settings(params), nesterov=ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedNesterov:
    """Nesterov's momentum once in several pushes, which until then are steps of plain SGD."""

    lr: float = 0.01
    """Learning rate η, above 0, for the mean of ``every`` pushes: each of them moves η / every."""

    momentum: float = 0.9
    """Decay of the velocity with every N-th push, 0 to below 1."""

    every: int = 4
    """N: pushes from one momentum step to the next; the number of workers in the paper."""

    weight_decay: float = 0.0
    """L2 penalty, 0 or more: weight_decay * w is added to g."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        check_below_1("momentum", self.momentum)
        if self.every < 1:
            raise ValueError(f"every must be 1 push or more, got {self.every}")
        check_from_0("weight_decay", self.weight_decay)

    def build(self, params: Sequence[nn.Parameter]) -> DelayedNesterovRule:
        """Make the rule that updates ``params``."""
        return DelayedNesterovRule(
            params,
            lr=self.lr,
            momentum=self.momentum,
            every=self.every,
            weight_decay=self.weight_decay,
        )
