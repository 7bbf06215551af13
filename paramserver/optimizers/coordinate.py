"""Coordinate descent: an exact step in a few coordinates, then in the next few.

With block B of coordinates, gradient g and Hessian H at the point as it is when B's turn comes:

    block of one       x_i ← x_i - g_i / H_ii
    block              d = - H_BB⁻¹ g_B                   x_B ← x_B + d
    with penalty l1    d = argmin g_Bᵀd + ½ dᵀ H_BB d + l1 ‖x_B + d‖₁

On a quadratic, blocks of one in turn are the Gauss-Seidel iteration; with ``l1`` on least squares
they are the usual solver of the Lasso. Where H_BB has no positive curvature in a direction, the
step there is a gradient step of length ``lr``. A step that raises the objective on its sample is
halved until it does not.

What it costs: reverse mode returns the whole gradient for the price of one coordinate, and a row of
the Hessian costs two to four gradients. A block that moves takes one gradient and a row for each of
its coordinates; a block that is optimal as it is, padding among them, takes nothing. A sweep is so
the price of three to five gradients *for each coordinate*: right for convex models with few
parameters or mostly zero ones, and a waste for neural networks.

Source: Wright, "Coordinate descent algorithms", Math. Program. 151, 2015, arXiv:1502.04759; for
``l1`` Friedman, Hastie, Höfling & Tibshirani, Ann. Appl. Stat. 1(2), 2007, arXiv:0708.1485. Pushes:
Liu, Wright, Ré, Bittorf & Sridhar, "An Asynchronous Parallel Stochastic Coordinate Descent
Algorithm", JMLR 16, 2015, arXiv:1311.1873.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from paramserver.optimizers.base import check_above_0, check_from_0
from paramserver.optimizers.push_form import PushedRule, PushForm, refuse_set
from paramserver.rounds import Ask, Round, RoundProgram, Sample, Step, Sum, Sums, finite

Order = Literal["cyclic", "random"]

COORDINATES_A_ROUND = 1024
"""A round takes about as many coordinates where nothing else is said."""

HALVINGS = 30
"""Halvings after which a step is given up."""

INNER_SWEEPS = 1000
"""Sweeps over one block's own quadratic at most."""


class BlockOrder:
    """Hands out blocks of consecutive coordinates; every sweep is all of them once.

    Turn ``count`` has the block ``order(seed, count // num_blocks)[count % num_blocks]``, so any
    turn can be asked for at any time and by anyone:

        cyclic     0 1 2 3 | 0 1 2 3 | …
        random     2 0 3 1 | 1 3 0 2 | …      a permutation for each sweep, from the seed
    """

    def __init__(self, num_coordinates: int, block: int, order: Order, seed: int) -> None:
        """Cut ``num_coordinates``, 1 or more, into blocks of ``block``; the last may be shorter."""
        self._num_coordinates, self._block = num_coordinates, block
        self._order, self._seed = order, seed
        self.num_blocks = math.ceil(num_coordinates / block)
        """Blocks in a sweep."""
        self._sweep: tuple[int, Sequence[int]] = (-1, ())  # the latest one and its order

    def at(self, count: int) -> range:
        """Return the coordinates whose turn is number ``count``, from 0."""
        sweep, turn = divmod(count, self.num_blocks)
        index = self._shuffled(sweep)[turn] if self._order == "random" else turn
        start = index * self._block
        return range(start, min(start + self._block, self._num_coordinates))

    def _shuffled(self, sweep: int) -> Sequence[int]:
        if self._sweep[0] != sweep:
            key = np.random.SeedSequence(self._seed, spawn_key=(sweep,))
            shuffle = np.random.Generator(np.random.Philox(key)).permutation(self.num_blocks)
            self._sweep = (sweep, shuffle.tolist())
        return self._sweep[1]


class CoordinateDescentProgram(RoundProgram):
    """Coordinate descent in rounds of many blocks.

    A block's numbers are shared with all owners, so that each solves the same small problem and
    moves those coordinates that are its own. The state holds ``turns``, the blocks that have had
    theirs, and ``moved``, the largest move of a coordinate in this sweep so far.
    """

    def round(self, x: Tensor) -> Round:
        """Give the next blocks their turn, at most to the end of the sweep; all on one sample."""
        s, memory, l1 = self.settings, self.memory, self.settings["l1"]
        num_coordinates = int((yield Sum(torch.tensor([len(x)], dtype=torch.float64))))
        order = BlockOrder(num_coordinates, s["block"], s["order"], s["seed"])
        turns = memory.get("turns", 0)
        left = order.num_blocks - turns % order.num_blocks
        moved = 0.0 if left == order.num_blocks else memory["moved"]
        wanted = s["blocks_per_round"] or math.ceil(COORDINATES_A_ROUND / s["block"])
        blocks = [torch.tensor(order.at(turns + i)) for i in range(min(left, wanted))]
        coords = torch.cat(blocks)

        sample, y = Sample("block", s["batch"]), x.clone()
        answer = yield Ask("gradient", y, sample)
        first = loss = finite(answer.loss, "the loss")
        g, v = yield from self._shared(coords, answer.vector, y)  # v: y at coords, as all know it
        for places in torch.arange(len(coords)).split([len(b) for b in blocks]):
            if is_optimal(g[places], v[places], l1):
                continue
            # Padding is 0 and has no gradient; like anything that rests so, it is left out.
            at = places[(g[places] != 0) | (v[places] != 0)]
            h = yield from self._curvature(y, coords[at], sample)
            d = minimise_block(h, g[at], v[at], l1=l1, lr=s["lr"], eps=torch.finfo(x.dtype).eps)
            old = v[at]
            for halvings in range(HALVINGS + 1):
                new = (old + d / 2**halvings).to(x.dtype).double()
                if torch.equal(new, old):
                    break
                self._put(y, coords[at], new)
                answer = yield Ask("gradient", y, sample)
                (there,) = yield from self._shared(coords, answer.vector)
                paid = l1 * float(new.abs().sum() - old.abs().sum())
                rise = answer.loss - loss + paid
                slope = float((g[at] + there[at]) @ (new - old)) / 2 + paid
                # A rise of rounding alone is told by the slopes, which are exact for a quadratic.
                rounding = max(1e-6 * abs(loss), 10 * torch.finfo(x.dtype).eps)
                if rise <= 0 or (rise <= rounding and slope <= 0):
                    moved = max(moved, float((new - old).abs().max()))
                    loss, g, v[at] = answer.loss, there, new
                    break
            else:
                self._put(y, coords[at], old)

        memory["turns"], memory["moved"] = turns + len(blocks), moved
        if len(blocks) == left and moved <= s["tolerance"] and s["tolerance"] > 0:
            return Step(y, first, stop=f"no parameter moved by more than {moved:.3g} in a sweep")
        return Step(y, first)

    def _shared(self, coords: Tensor, *vectors: Tensor) -> Sums:
        """Return what all owners' ``vectors`` hold at ``coords``, float64, one row a vector."""
        own = (coords >= self.cut.start) & (coords < self.cut.stop)
        share = torch.zeros(len(vectors), len(coords), dtype=torch.float64)
        for row, vector in zip(share, vectors, strict=True):
            row[own] = vector[coords[own] - self.cut.start].double()
        return (yield Sum(share))

    def _curvature(
        self, y: Tensor, coords: Tensor, sample: Sample
    ) -> Generator[Ask | Sum, Any, Tensor]:
        """Return the Hessian at ``y`` between ``coords``."""
        rows = []
        for coord in coords.tolist():
            unit = torch.zeros_like(y)
            if coord in self.cut:
                unit[coord - self.cut.start] = 1
            answer = yield Ask("hvp", y, sample, unit)
            rows.append(answer.vector)
        h = yield from self._shared(coords, *rows)
        finite(float(h.abs().sum()), "the curvature of a block")
        return h.add(h.T).div(2)

    def _put(self, y: Tensor, coords: Tensor, values: Tensor) -> None:
        """Write ``values`` to those of ``coords`` that are its own."""
        own = (coords >= self.cut.start) & (coords < self.cut.stop)
        y[coords[own] - self.cut.start] = values[own].to(y.dtype)


def minimise_block(h: Tensor, g: Tensor, x: Tensor, *, l1: float, lr: float, eps: float) -> Tensor:
    """Return the step d that minimises gᵀd + ½ dᵀHd + l1 ‖x + d‖₁, H made positive.

    Args:
        h: Symmetric matrix, shape ``(b, b)``, float64. In directions where its curvature is zero
            or negative, it is taken as 1 / lr: the step there is a gradient step.
        g: Gradient of the loss without the penalty, shape ``(b,)``.
        x: Where the coordinates are, shape ``(b,)``.
        l1: Weight of the penalty, 0 or more.
        lr: Length of a gradient step, above 0.
        eps: Relative precision of ``h``; curvature below it is rounding.
    """
    curvature, q = torch.linalg.eigh(h)
    flat = curvature <= 10 * len(g) * eps * curvature.abs().max()
    curvature = torch.where(flat, 1 / lr, curvature)
    if l1 == 0:
        d: Tensor = -(q @ ((q.T @ g) / curvature))
        return d
    m = ((q * curvature) @ q.T).numpy()
    z, slope = x.clone().numpy(), g.clone().numpy()  # slope: g + m (z - x)
    for _ in range(INNER_SWEEPS):
        change = 0.0
        for i, (old, mii) in enumerate(zip(z.tolist(), m.diagonal().tolist(), strict=True)):
            to = old - float(slope[i]) / mii
            z[i] = math.copysign(max(abs(to) - l1 / mii, 0.0), to)
            slope += m[i] * (z[i] - old)
            change = max(change, abs(float(z[i]) - old))
        if len(z) == 1 or change <= 1e-14 * float(abs(z).max()):
            break
    return torch.from_numpy(z) - x


def is_optimal(g: Tensor, x: Tensor, l1: float) -> bool:
    """Whether 0 is in g + l1 ∂‖x‖₁, so that no step could help."""
    return bool(torch.where(x == 0, g.abs() <= l1, g + l1 * torch.sign(x) == 0).all())


def pushed_turn(clock: int, worker: int, num_workers: int, num_blocks: int) -> int:
    """Return the number of the turn that ``worker`` has at ``clock``, from 0.

    Every worker goes round all blocks, each from another one on: a worker that is slow, or whose
    pushes are dropped, keeps no block from being moved.
    """
    return clock + worker * num_blocks // num_workers


class CoordinatePushRule(PushedRule):
    """Moves the coordinates of one block by what a worker found for them; touches nothing else.

    Whose turn it is, `pushed_turn` says. With rows z and v, where the coordinates should go and
    where they were read, x_B ← x_B + z - v, and z itself if nobody has moved x_B meanwhile and the
    step is not damped: the zeros of an l1 penalty are zeros then.

    On a quadratic, blocks that are all computed at one old point are the Jacobi iteration, which
    need not converge where the Gauss-Seidel iteration does; damping the steps helps.
    """

    def touches(self) -> bool:
        """Whether the block has coordinates in this slice."""
        return len(self._own()) > 0

    def update(self, x: Tensor, rows: Tensor, scale: float) -> None:
        """Move the own coordinates of the block."""
        own, start = self._own(), self.place.cut.start
        at = slice(own.start - start, own.stop - start)
        z, v, old = rows[0, at], rows[1, at], x[at].clone()
        x[at] = old + (z - v) * scale
        if scale == 1:
            x[at] = torch.where(old == v, z, x[at])

    @cached_property
    def _order(self) -> BlockOrder:
        s = self.settings
        return BlockOrder(self.place.numel, s["block"], s["order"], s["seed"])

    def _own(self) -> range:
        cut, order = self.place.cut, self._order
        turn = pushed_turn(self.clock - 1, self.worker, self.place.num_workers, order.num_blocks)
        block = order.at(turn)
        start = max(block.start, cut.start)
        return range(start, max(start, min(block.stop, cut.stop)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateDescent:
    """Exact steps in one coordinate, or a few, at a time; solves the Lasso with l1."""

    lr: float = 0.1
    """Length of a gradient step, above 0, where the curvature is not positive."""

    block: int = 1
    """Coordinates that move together, 1 or more; each costs a row of the Hessian."""

    order: Order = "cyclic"
    """Whose turn it is: blocks as they lie, or shuffled anew for each sweep."""

    l1: float = 0.0
    """Weight of the sum of all parameters' sizes, biases too, that is added to the loss; 0 or
    more. The losses that are reported are without it."""

    blocks_per_round: int | None = None
    """Turns in a round, 1 or more; None takes a sweep, or about 1024 coordinates of a longer one.
    A checkpoint is of whole rounds, and a round that is cut off is made again."""

    batch: int | None = None
    """Samples that a round, or a push, looks at, drawn anew for each; None takes all."""

    tolerance: float = 1e-6
    """The run ends after a sweep in which no parameter moved further, 0 or more; 0 goes on."""

    seed: int = 0
    """Of the random order, 0 or more."""

    def __post_init__(self) -> None:
        check_above_0("lr", self.lr)
        for name in ("block", "blocks_per_round", "batch"):
            count = getattr(self, name)
            if count is not None and not (isinstance(count, int) and count >= 1):
                raise ValueError(f"{name} must be a whole number, 1 or more, got {count}")
        if self.order not in ("cyclic", "random"):
            raise ValueError(f"order must be 'cyclic' or 'random', got {self.order!r}")
        check_from_0("l1", self.l1)
        check_from_0("tolerance", self.tolerance)
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def build(self, params: Sequence[nn.Parameter]) -> CoordinateDescentProgram:
        """Make the program for one flat parameter, the own slice."""
        return CoordinateDescentProgram(params, asdict(self))

    def pushes(self) -> PushForm:
        """Return the form in which each worker moves a block of its own.

        Raises:
            ValueError: A key is set that only rounds have.
        """
        refuse_set("coordinate", self, ("blocks_per_round", "tolerance"))
        return PushForm(name="coordinate", spec=self, rule=CoordinatePushRule, work="block")
