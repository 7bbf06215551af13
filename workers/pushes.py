"""What a worker does for a round program's push form: read, compute rows, push; to the end.

A push is of samples of the worker's own: its share of all, the same at every clock, or so many
drawn anew for each clock, of which no other worker has any then. Its rows are computed on them
alone. A block is computed on all samples where nothing else is said: a share has another optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paramserver.client import Client, Ended
from paramserver.layout import Layout
from paramserver.optimizers.coordinate import (
    HALVINGS,
    BlockOrder,
    is_optimal,
    minimise_block,
    pushed_turn,
)
from paramserver.optimizers.push_form import PushForm
from paramserver.rounds import Kind, Sample
from workers.loop import Finished
from workers.oracles import Oracle
from workers.pieces import whole, write_rows
from workers.samples import Piece

_AT_ONCE = 1024
"""Samples computed at once, at most."""


@dataclass(frozen=True, slots=True)
class Push:
    """One push, before it is in the slots."""

    loss: float
    """Mean over the samples, at the parameters read."""
    gradient_norm: float
    samples: int
    rows: Tensor
    """Shape ``(k, m)``."""
    columns: range
    """Which ``m`` elements of the whole vector they are of; the slots' others are not looked at."""


class Maker:
    """Makes one worker's pushes."""

    def __init__(
        self,
        form: PushForm,
        oracle: Oracle,
        layout: Layout,
        num_examples: int,
        worker: int,
        num_workers: int,
    ) -> None:
        """Make pushes of ``form`` as ``worker`` of ``num_workers``, on ``num_examples`` samples."""
        self._form, self._oracle, self._layout = form, oracle, layout
        self._worker, self._num_workers = worker, num_workers
        batch = form.spec.batch
        is_shared = not (form.work == "block" and batch is None)
        self._share, self._shares = (worker, num_workers) if is_shared else (0, 1)
        self._sample = Sample("push", None if batch is None else batch * num_workers)
        self._parts = math.ceil((self._sample.size or num_examples) / self._shares / _AT_ONCE)
        self._last: Tensor | None = None  # the parameters of the push before, for a pair
        self._make: Callable[[Tensor, int], Push] = {
            "block": self._block,
            "pair": self._pair,
            "hessian": self._hessian,
            "fisher_diagonal": self._metric,
            "fisher": self._metric,
        }[form.work]

    def make(self, x: Tensor, clock: int) -> Push:
        """Return the push of ``clock`` at the parameters ``x``, shape ``(n,)``, from 0."""
        return self._make(x, clock)

    def nonfinite_layer(self, push: Push) -> str:
        """Return the first parameter that the push has NaN or infinity for; empty if none has."""
        bad = ~torch.isfinite(push.rows).all(0)
        for slot in self._layout.slots:
            start = max(slot.offset, push.columns.start) - push.columns.start
            stop = min(slot.end, push.columns.stop) - push.columns.start
            if start < stop and bool(bad[start:stop].any()):
                return slot.name
        return ""

    def _answer(
        self, kind: Kind, x: Tensor, clock: int, vector: Tensor | None = None
    ) -> tuple[int, float, Tensor]:
        """Return samples, mean loss and mean rows over the worker's samples at ``clock``."""
        total, loss, rows = 0, 0.0, None
        for number in range(self._share * self._parts, (self._share + 1) * self._parts):
            piece = Piece(self._sample, clock, number, self._shares * self._parts)
            samples, value, part = self._oracle.answer(kind, x, piece, vector)
            total, loss = total + samples, loss + samples * value
            rows = part * samples if rows is None else rows.add_(part, alpha=samples)
        assert rows is not None
        assert total > 0, "every worker has samples"
        return total, loss / total, rows.div_(total)

    def _push(self, samples: int, loss: float, g: Tensor, rows: Tensor) -> Push:
        norm = float(torch.linalg.vector_norm(g))
        return Push(loss, norm, samples, rows, range(self._layout.numel))

    def _pair(self, x: Tensor, clock: int) -> Push:
        """g, s and y; s and y are 0 at the worker's first push."""
        samples, loss, (g,) = self._answer("gradient", x, clock)
        s = y = torch.zeros_like(g)
        if self._last is not None:
            _, _, (before,) = self._answer("gradient", self._last, clock)
            s, y = x - self._last, g - before
        self._last = x.clone()
        return self._push(samples, loss, g, torch.stack([g, s, y]))

    def _hessian(self, x: Tensor, clock: int) -> Push:
        """H, g and x."""
        samples, loss, (g,) = self._answer("gradient", x, clock)
        _, _, h = self._answer("hessian", x, clock)
        return self._push(samples, loss, g, torch.cat([h, g[None], x[None]]))

    def _metric(self, x: Tensor, clock: int) -> Push:
        """g, and the Fisher matrix or its diagonal."""
        samples, loss, (g,) = self._answer("gradient", x, clock)
        kind: Kind = "fisher" if self._form.work == "fisher" else "fisher_diagonal"
        _, _, metric = self._answer(kind, x, clock)
        return self._push(samples, loss, g, torch.cat([g[None], metric]))

    def _block(self, x: Tensor, clock: int) -> Push:
        """Where the coordinates of the block whose turn it is should go, and where they are."""
        spec, order = self._form.spec, self._order
        turn = pushed_turn(clock, self._worker, self._num_workers, order.num_blocks)
        block = order.at(turn)
        coords = torch.arange(block.start, block.stop)
        samples, loss, (g,) = self._answer("gradient", x, clock)
        part, v = g[coords].double(), x[coords].double()
        z = v.clone()
        if not is_optimal(part, v, spec.l1):
            # Padding is 0 and has no gradient; like anything that rests so, it is left out.
            at = torch.nonzero((part != 0) | (v != 0))[:, 0]
            h = torch.stack([self._column(x, clock, int(c), coords[at]) for c in coords[at]])
            if bool(torch.isfinite(h).all() and torch.isfinite(part).all()):
                h, eps = (h + h.T) / 2, torch.finfo(x.dtype).eps
                d = minimise_block(h, part[at], v[at], l1=spec.l1, lr=spec.lr, eps=eps)
                z[at] = self._lower(x, clock, coords[at], d, loss)
            else:
                z[at] = math.nan  # the push is refused, and named
        norm = float(torch.linalg.vector_norm(g))
        return Push(loss, norm, samples, torch.stack([z, v]).to(x.dtype), block)

    def _lower(self, x: Tensor, clock: int, coords: Tensor, d: Tensor, loss: float) -> Tensor:
        """Return where to go along ``d`` from ``x`` at ``coords``, float64: as far as it helps.

        The step is halved until the worker's objective does not rise.
        """
        old, y = x[coords].double(), x.clone()
        rounding = max(1e-6 * abs(loss), 10 * torch.finfo(x.dtype).eps)
        for halvings in range(HALVINGS + 1):
            new: Tensor = old + d / 2**halvings
            y[coords] = new.to(x.dtype)
            _, value, _ = self._answer("loss", y, clock)
            paid = self._form.spec.l1 * float(new.abs().sum() - old.abs().sum())
            if value + paid <= loss + rounding:
                return new
        return old

    @cached_property
    def _order(self) -> BlockOrder:
        spec = self._form.spec
        return BlockOrder(self._layout.numel, spec.block, spec.order, spec.seed)

    def _column(self, x: Tensor, clock: int, coord: int, coords: Tensor) -> Tensor:
        """Return the Hessian between ``coord`` and ``coords``, float64."""
        unit = torch.zeros_like(x)
        unit[coord] = 1
        _, _, rows = self._answer("hvp", x, clock, unit)
        return rows[0, coords].double()


def push(maker: Maker, cuts: Sequence[range], client: Client) -> Finished:
    """Push until the server says that the run has ended.

    Args:
        maker: Computes what is pushed.
        cuts: The shards' ranges.
        client: A connected client that has joined.

    Raises:
        ParamServerError: What ended the run early, as the server says it.
    """
    reading = client.first_read()
    while not isinstance(reading, Ended):
        made = maker.make(whole(reading.params), client.clock)
        layer = maker.nonfinite_layer(made)
        norm = math.nan if layer else made.gradient_norm
        write_rows(client.slots, cuts, made.rows, made.columns)
        reading = client.push(loss=made.loss, norm=norm, samples=made.samples, layer=layer)
    return Finished(reading.reason, client.clock)
