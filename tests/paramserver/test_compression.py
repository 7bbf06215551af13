"""Each compression against what theory says of its error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paramserver.compression import (
    COMPRESSIONS,
    QSGD,
    BFloat16,
    Compression,
    Compressor,
    Feedback,
    Float16,
    Int8,
    Payload,
    PowerSGD,
    RandomK,
    ScaledSign,
    Slice,
    TopK,
)
from paramserver.errors import ProtocolError
from paramserver.layout import Layout, Slot

N = 640
VECTOR = Slice.of(Layout((Slot("x", 0, (N,)),), torch.float32), range(N))


def drawn(seed: int = 0, numel: int = N) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def through(compressor: Compressor, vector: Tensor, seed: int = 0) -> Tensor:
    out = torch.empty_like(vector)
    compressor.decompress(compressor.compress(vector, seed), out)
    return out


def squared(vector: Tensor) -> float:
    return float(vector.double().square().sum())


@pytest.mark.parametrize(
    ("compression", "dtype"), [(BFloat16(), torch.bfloat16), (Float16(), torch.float16)]
)
def test_a_cast_rounds_as_torch_does(compression: Compression, dtype: torch.dtype) -> None:
    x = drawn() * torch.logspace(-4, 3, N)

    out = through(compression.build(VECTOR), x)

    assert torch.equal(out, x.to(dtype).float())


@pytest.mark.parametrize("compression", [BFloat16(), Float16()])
def test_a_cast_makes_no_infinity_of_a_number(compression: Compression) -> None:
    x = torch.full((N,), torch.finfo(torch.float32).max)

    out = through(compression.build(VECTOR), x)

    assert out.isfinite().all()


@pytest.mark.parametrize("block", [8, 64, 100, 256, 10_000])
def test_int8_is_off_by_half_a_step_of_its_block_at_most(block: int) -> None:
    x = drawn() * torch.logspace(-3, 3, N)

    out = through(Int8(block=block).build(VECTOR), x)

    for start in range(0, N, block):
        piece = slice(start, start + block)
        half = float(x[piece].abs().max()) / 127 / 2
        worst = float((out[piece] - x[piece]).abs().max())
        assert 0.5 * half < worst <= half * (1 + 1e-5)


def test_int8_keeps_the_largest_of_each_block() -> None:
    x = drawn()

    out = through(Int8(block=64).build(VECTOR), x)

    places = x.view(-1, 64).abs().argmax(1, keepdim=True)
    torch.testing.assert_close(
        out.view(-1, 64).gather(1, places), x.view(-1, 64).gather(1, places), rtol=1e-6, atol=0
    )


def test_int8_of_numbers_too_small_for_a_step_is_0() -> None:
    x = torch.full((N,), 1e-45)

    out = through(Int8().build(VECTOR), x)

    assert not out.any()


def test_top_k_sends_the_largest_and_nothing_else() -> None:
    x, k = drawn(), 32

    out = through(TopK(share=k / N).build(VECTOR), x)

    order = np.argsort(-x.abs().numpy())
    wanted = np.zeros(N, dtype=np.float32)
    wanted[order[:k]] = x.numpy()[order[:k]]
    assert np.array_equal(out.numpy(), wanted)


@pytest.mark.parametrize("k", [1, 10, 320, 640])
def test_top_k_leaves_out_no_more_than_its_share_of_the_square(k: int) -> None:
    compressor = TopK(share=k / N).build(VECTOR)

    for seed in range(10):
        x = drawn(seed) ** (1 + 2 * (seed % 3))
        assert squared(through(compressor, x) - x) <= (1 - k / N) * squared(x) * (1 + 1e-6)

    flat = torch.ones(N)  # where the bound is attained
    assert squared(through(compressor, flat) - flat) == (1 - k / N) * squared(flat)


def test_a_place_outside_of_the_slice_is_refused() -> None:
    compressor = TopK(share=1 / N).build(VECTOR)
    payload = Payload(
        "top-k", N, torch.float32, (torch.tensor([N], dtype=torch.int32), torch.ones(1))
    )

    with pytest.raises(ProtocolError, match=r"^a place is outside of the slice's 640 elements$"):
        compressor.decompress(payload, torch.empty(N))


@pytest.mark.parametrize("k", [64, 90])
def test_random_k_is_right_on_average_with_the_variance_of_its_share(k: int) -> None:
    compressor, x, runs = RandomK(share=k / N).build(VECTOR), drawn(), 500
    lengths = np.diff(np.arange(k + 1) * N // k)
    scale = torch.from_numpy(np.repeat(lengths, lengths)).float()  # of each element

    outs = torch.stack([through(compressor, x, seed) for seed in range(runs)])

    assert set(np.unique(outs.ne(0).sum(1))) == {k}
    assert torch.equal(torch.where(outs.ne(0), x * scale, 0.0), outs)  # so the mean is exact
    times = outs.ne(0).sum(0).double() / runs  # how often each was sent
    sigma = torch.sqrt((1 / scale) * (1 - 1 / scale) / runs)
    assert float(((times - 1 / scale) / sigma).abs().max()) < 5
    error = (outs - x).double().square().sum(1)
    theory = float(((scale - 1) * x.square()).sum())  # (n/k - 1) ‖x‖² where k divides n
    assert float(error.mean()) == pytest.approx(theory, abs=5 * float(error.std()) / runs**0.5)


def test_random_k_with_feedback_sends_elements_as_they_are() -> None:
    compressor, x, k, runs = RandomK(share=0.1, feedback=True).build(VECTOR), drawn(), 64, 500

    outs = torch.stack([through(compressor, x, seed) for seed in range(runs)])

    assert torch.equal(torch.where(outs.ne(0), x, 0.0), outs)
    error = (outs - x).double().square().sum(1)
    theory = (1 - k / N) * squared(x)
    assert float(error.mean()) == pytest.approx(theory, abs=5 * float(error.std()) / runs**0.5)


def test_the_sign_leaves_out_what_the_norms_say() -> None:
    compressor = ScaledSign().build(VECTOR)

    for seed in range(5):
        x = drawn(seed) * (drawn(seed + 50) > 0)  # half of it is 0
        theory = (1 - float(x.double().abs().sum()) ** 2 / (N * squared(x))) * squared(x)
        assert squared(through(compressor, x) - x) == pytest.approx(theory, rel=1e-5)


def test_the_sign_scales_each_parameter_by_itself() -> None:
    layout = Layout.of(nn.Linear(8, 3))  # 24, padded to 64, and 3
    x = torch.zeros(layout.numel)
    x[:24], x[64:67] = -100, 0.1

    out = through(ScaledSign().build(Slice.of(layout, range(layout.numel))), x)

    torch.testing.assert_close(out, x)


@pytest.mark.parametrize(("levels", "bucket"), [(1, 64), (7, 640), (127, 128), (5, 100)])
def test_qsgd_is_right_on_average_with_the_variance_of_its_levels(levels: int, bucket: int) -> None:
    compressor, x, runs = QSGD(levels=levels, bucket=bucket).build(VECTOR), drawn(), 500

    outs = torch.stack([through(compressor, x, seed) for seed in range(runs)]).double()

    variance = torch.zeros(N, dtype=torch.float64)
    for start in range(0, N, bucket):
        piece = slice(start, start + bucket)
        norm = float(x[piece].double().norm())
        u = levels * x[piece].double().abs() / norm
        fraction = u - u.floor()
        variance[piece] = (norm / levels) ** 2 * fraction * (1 - fraction)
        d = len(u)
        bound = min(d / levels**2, math.sqrt(d) / levels) * norm**2
        assert float(variance[piece].sum()) <= bound
    sigma = torch.sqrt(variance / runs).clamp(min=1e-6)
    assert float(((outs.mean(0) - x) / sigma).abs().max()) < 5
    error = (outs - x).square().sum(1)
    spread = 5 * float(error.std()) / runs**0.5
    assert float(error.mean()) == pytest.approx(float(variance.sum()), abs=spread)


def test_qsgd_rounds_to_one_of_the_two_levels_beside() -> None:
    x, levels = drawn(), 7
    compressor = QSGD(levels=levels, bucket=N).build(VECTOR)

    for seed in range(20):
        off = (through(compressor, x, seed) - x).abs() / (x.norm() / levels)
        assert float(off.max()) < 1 + 1e-5


@pytest.mark.parametrize(("levels", "bits"), [(1, 2), (2, 4), (7, 4), (8, 8), (127, 8)])
def test_qsgd_takes_the_bits_its_levels_need(levels: int, bits: int) -> None:
    compressor = QSGD(levels=levels, bucket=64).build(VECTOR)

    assert compressor.raw_bytes == N * bits // 8 + 4 * N // 64


MATRICES = Layout.of(nn.Sequential(nn.Linear(30, 20), nn.Conv2d(4, 6, 3)))


def of_rank(rank: int, seed: int = 0) -> Tensor:
    """A gradient whose matrices have ``rank``."""
    chance, flat = torch.Generator().manual_seed(seed), torch.zeros(MATRICES.numel)
    for slot in MATRICES.slots:
        rows, columns = slot.shape[0], slot.numel // slot.shape[0]
        left = torch.randn(rows, rank, generator=chance)
        matrix = left @ torch.randn(rank, columns, generator=chance)
        flat[slot.offset : slot.end] = matrix.flatten()
    return flat


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_is_exact_for_matrices_of_its_rank(rank: int, shards: int) -> None:
    g = of_rank(rank)

    for cut in MATRICES.cuts(shards):
        piece = g[cut.start : cut.stop].clone()
        compressor = PowerSGD(rank=rank).build(Slice.of(MATRICES, cut))
        torch.testing.assert_close(through(compressor, piece), piece, rtol=1e-4, atol=1e-4)


def test_powersgd_sends_factors_of_matrices_and_vectors_as_they_are() -> None:
    compressor = PowerSGD(rank=2).build(Slice.of(MATRICES, range(MATRICES.numel)))

    assert compressor.tensors == (
        (torch.float32, 2 * (20 + 6)),
        (torch.float32, 2 * (30 + 36)),
        (torch.float32, 20 + 6),
    )


def test_powersgd_finds_the_leading_directions_of_a_gradient_that_stays() -> None:
    """Subspace iteration: it ends at what the singular value decomposition says is the best."""
    g = of_rank(10)
    compressor = PowerSGD(rank=2).build(Slice.of(MATRICES, range(MATRICES.numel)))

    for step in range(100):
        out = through(compressor, g, seed=step)

    best = 0.0
    for slot in MATRICES.slots:
        if len(slot.shape) > 1:
            s = torch.linalg.svdvals(g[slot.offset : slot.end].view(slot.shape[0], -1).double())
            best += float(s[2:].square().sum())
    assert squared(out - g) == pytest.approx(best, rel=1e-3)


def test_powersgd_comes_back_from_a_gradient_of_0() -> None:
    compressor = PowerSGD(rank=2).build(Slice.of(MATRICES, range(MATRICES.numel)))
    through(compressor, torch.zeros(MATRICES.numel), seed=0)

    out = through(compressor, of_rank(2), seed=1)

    torch.testing.assert_close(out, of_rank(2), rtol=1e-4, atol=1e-4)


def karimireddy(compression: Compression, steps: int) -> float:
    """Return the loss that scaled signs reach on ε |a + b| + |a - b|, from (1, 1).

    Karimireddy et al. 2019, counterexample 2: the sign of every subgradient is (1, -1) or (-1, 1),
    so that without feedback a + b stays 2 for ever.
    """
    of = Slice.of(Layout((Slot("x", 0, (2,)),), torch.float64), range(64))
    x, grad, eps = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64), 0.5
    x[:2] = 1
    compressor = compression.build(of)
    feedback = Feedback(compressor) if compression.feedback else None
    for step in range(steps):
        a, b = x[:2].tolist()
        plus, minus = math.copysign(eps, a + b), math.copysign(1.0, a - b)
        grad[0], grad[1] = plus + minus, plus - minus
        if feedback is None:
            compressor.decompress(compressor.compress(grad, step), grad)
        else:
            feedback.send_(grad, step)
        x.sub_(grad, alpha=0.1 / math.sqrt(step + 1))
    a, b = x[:2].tolist()
    return eps * abs(a + b) + abs(a - b)


def test_scaled_signs_converge_with_feedback_where_they_cannot_without() -> None:
    stuck, converged = (
        karimireddy(ScaledSign(feedback=feedback), steps=600) for feedback in (False, True)
    )

    assert stuck >= 1.0  # ε |a + b|, where it began
    assert converged < 0.05


def test_the_list_tells_every_compression_with_its_source() -> None:
    entries = {entry.name: entry for entry in COMPRESSIONS}

    assert set(entries) == {
        "bf16", "fp16", "int8", "top-k", "random-k", "sign", "qsgd", "powersgd",
    }  # fmt: skip
    assert all(entry.source and entry.summary for entry in entries.values())
