"""Few elements instead of all: the largest ones, or some by chance.

Top-k sends an element and its place. Of random-k the places follow from a seed, so that is all that
is sent of them: one place is drawn from each of k stretches of nearly equal length. Every element
is sent with the probability 1 / (length of its stretch), which is all that mean and variance depend
on, and drawing takes k steps instead of n.

What is sent is closer than nothing by the share that is sent: E ‖C(x) - x‖² <= (1 - k/n) ‖x‖², with
equality for random-k where k divides n, and on the constant vector for top-k.

Source of the bound: Stich, Cordonnier & Jaggi, "Sparsified SGD with Memory", NeurIPS 2018,
arXiv:1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paramserver.compression.base import Compressor, Slice, check_share, num_sent
from paramserver.errors import ProtocolError


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Sends the elements that are largest in absolute value, 4 bytes more for the place of each.

    Source: Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017,
    arXiv:1704.05021; with feedback, Stich et al., NeurIPS 2018, arXiv:1809.07599.
    """

    share: float = 0.01
    """Elements that are sent, of each shard's, above 0 to 1."""

    feedback: bool = True
    """Whether what is left out is added to what is sent next; without, most of it never moves."""

    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share(self.share)

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Largest(of, num_sent(self.share, of.numel))


class _Largest(Compressor):
    def __init__(self, of: Slice, k: int) -> None:
        super().__init__("top-k", of, ((torch.int32, k), (of.dtype, k)))
        self._k = k

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        places = torch.topk(vector.abs(), self._k, sorted=False).indices.sort().values
        return places.to(torch.int32), vector[places]

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        places, values = tensors
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < self.slice.numel:
            raise ProtocolError(f"a place is outside of the slice's {self.slice.numel} elements")
        out.zero_()
        out[places.long()] = values


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomK:
    """Sends elements that are drawn anew for each push; their places follow from a seed.

    Without feedback they are scaled up, so that what comes out is right on average, with a
    variance of (n/k - 1) ‖x‖². With feedback they are sent as they are, and nothing is lost.

    Source: Stich et al., NeurIPS 2018, arXiv:1809.07599; scaled, Konečný et al., 2016,
    arXiv:1610.05492 (random masks).
    """

    share: float = 0.01
    """Elements that are sent, of each shard's, above 0 to 1."""

    feedback: bool = False
    """Whether what is left out is added to what is sent next, and nothing is scaled."""

    remembers: ClassVar[bool] = False
    is_close: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share(self.share)

    def build(self, of: Slice) -> Compressor:
        """Make a compressor."""
        return _Drawn(of, num_sent(self.share, of.numel), scaled=not self.feedback)


class _Drawn(Compressor):
    def __init__(self, of: Slice, k: int, *, scaled: bool) -> None:
        super().__init__("random-k", of, ((torch.int64, 1), (of.dtype, k)))
        edges = torch.arange(k + 1) * of.numel // k
        self._starts, self._lengths = edges[:-1], edges.diff()
        self._scaled = scaled

    def _compressed(self, vector: Tensor, seed: int) -> tuple[Tensor, ...]:
        return torch.tensor([seed]), vector[self._places(seed)]

    def _decompress(self, tensors: tuple[Tensor, ...], out: Tensor) -> None:
        seed, values = int(tensors[0]), tensors[1]
        if seed < 0:
            raise ProtocolError(f"a seed must be 0 or more, got {seed}")
        out.zero_()
        out[self._places(seed)] = values * self._lengths.to(out.dtype) if self._scaled else values

    def _places(self, seed: int) -> Tensor:
        drawn = torch.rand(
            len(self._lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return self._starts + (drawn * self._lengths).long()
