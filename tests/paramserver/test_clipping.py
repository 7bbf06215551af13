"""The oracles are the identities that define clipping, keras' numbers and torch's own clipping."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paramserver.clipping import CLIPS, Clip, ClipNorm, ClipValue

GRADS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200).map(torch.tensor)


def clipped(clip: Clip, grad: Tensor) -> Tensor:
    out = grad.clone()
    clip.apply_(out, norm_of(grad))
    return out


def norm_of(grad: Tensor) -> float:
    return float(torch.linalg.vector_norm(grad, dtype=torch.float64))


def test_value_clips_at_both_bounds() -> None:
    found = clipped(ClipValue(low=-1.0, high=2.0), torch.tensor([-3.0, -1.0, 0.5, 2.0, 5.0]))

    assert found.tolist() == [-1.0, -1.0, 0.5, 2.0, 2.0]


def test_value_may_have_one_bound() -> None:
    found = clipped(ClipValue(low=-math.inf, high=2.0), torch.tensor([-3.0, 5.0]))

    assert found.tolist() == [-3.0, 2.0]


@given(GRADS, st.floats(0.0, 1e6), st.floats(0.015625, 1e6))
def test_value_is_the_minimum_of_the_maximum(grad: Tensor, below: float, above: float) -> None:
    low, high = -below, above

    found = clipped(ClipValue(low=low, high=high), grad)

    expected = torch.minimum(torch.tensor(high), torch.maximum(torch.tensor(low), grad))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_norm_shortens_a_long_gradient_as_keras_does(mode: Any) -> None:
    found = clipped(ClipNorm(max_norm=1.0, mode=mode), torch.tensor([100.0, 100.0]))

    torch.testing.assert_close(found, torch.tensor([0.5**0.5, 0.5**0.5]))


def test_norm_leaves_a_short_gradient_alone() -> None:
    grad = torch.tensor([3.0, 4.0])

    assert torch.equal(clipped(ClipNorm(max_norm=5.0), grad), grad)


def test_normalize_stretches_a_short_gradient() -> None:
    found = clipped(ClipNorm(max_norm=10.0, mode="normalize"), torch.tensor([3.0, 4.0]))

    torch.testing.assert_close(found, torch.tensor([6.0, 8.0]))


@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_a_zero_gradient_stays_zero(mode: Any) -> None:
    grad = torch.zeros(3)

    assert torch.equal(clipped(ClipNorm(max_norm=1.0, mode=mode), grad), grad)


def test_normalize_stretches_the_least_gradient_float32_can_hold() -> None:
    grad = torch.tensor([0.0, 1e-45])

    found = clipped(ClipNorm(max_norm=2.0, mode="normalize"), grad)

    assert found.tolist() == [0.0, 2.0]


@given(GRADS, st.floats(1e-3, 1e6))
def test_norm_is_torchs_clipping_but_for_its_epsilon(grad: Tensor, max_norm: float) -> None:
    # torch divides by norm + 1e-6, so it ends a little short.
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    nn.utils.clip_grad_norm_([p], max_norm)

    found = clipped(ClipNorm(max_norm=max_norm), grad)

    torch.testing.assert_close(found, p.grad, rtol=2e-3, atol=0)


@given(GRADS, st.floats(1e-3, 1e6), st.sampled_from(["clip", "normalize"]))
def test_norm_ends_at_its_length_in_the_same_direction(
    grad: Tensor, max_norm: float, mode: Any
) -> None:
    found = clipped(ClipNorm(max_norm=max_norm, mode=mode), grad)

    norm = norm_of(grad)
    length = max_norm if mode == "normalize" and norm > 0 else min(norm, max_norm)
    assert norm_of(found) == pytest.approx(length, rel=1e-4)
    torch.testing.assert_close(found.double() * norm, grad.double() * length, rtol=1e-4, atol=1e-30)


@given(
    GRADS,
    st.integers(0, 200),
    st.sampled_from(
        [
            ClipValue(low=-1.0, high=2.0),
            ClipNorm(max_norm=3.0),
            ClipNorm(max_norm=3.0, mode="normalize"),
        ]
    ),
)
def test_slices_have_the_bits_of_the_whole(grad: Tensor, cut: int, clip: Clip) -> None:
    parts = [grad[:cut].clone(), grad[cut:].clone()]

    for part in parts:
        clip.apply_(part, norm_of(grad))

    assert torch.equal(torch.cat(parts), clipped(clip, grad))


def test_value_does_not_read_the_norm() -> None:
    clip, grad = ClipValue(low=-1.0, high=1.0), torch.tensor([3.0])
    assert not clip.norm_needed

    clip.apply_(grad, math.nan)

    assert grad.tolist() == [1.0]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_a_norm_that_is_none_is_refused(norm: float, mode: Any) -> None:
    clip, grad = ClipNorm(max_norm=1.0, mode=mode), torch.tensor([3.0])
    assert clip.norm_needed

    with pytest.raises(ValueError, match=rf"^norm must be finite and 0 or more, got {norm}$"):
        clip.apply_(grad, norm)

    assert grad.tolist() == [3.0]


@pytest.mark.parametrize("where", ["auto", "worker", "reduced"])
def test_a_clip_is_what_it_was_after_a_trip_to_another_process(where: Any) -> None:
    for clip in (ClipNorm(max_norm=1.0, where=where), ClipValue(low=-1, high=1, where=where)):
        assert pickle.loads(pickle.dumps(clip)) == clip


def test_the_registry_names_the_clips() -> None:
    found = [(entry.name, entry.factory) for entry in CLIPS]

    assert found == [("value", ClipValue), ("norm", ClipNorm)]


@pytest.mark.parametrize(
    ("clip", "keys", "message"),
    [
        (ClipValue, {"low": 0.1, "high": 1.0}, "low must be 0 or less, got 0.1"),
        (ClipValue, {"low": math.nan, "high": 1.0}, "low must be 0 or less, got nan"),
        (ClipValue, {"low": -1.0, "high": -0.1}, "high must be 0 or more, got -0.1"),
        (
            ClipValue,
            {"low": 0.0, "high": 0.0},
            "low and high must not both be 0: no gradient would be left",
        ),
        (
            ClipValue,
            {"low": -1.0, "high": 1.0, "where": "server"},
            "where must be 'auto', 'worker' or 'reduced', got 'server'",
        ),
        (ClipNorm, {"max_norm": 0}, "max_norm must be above 0, got 0"),
        (ClipNorm, {"max_norm": math.inf}, "max_norm must be above 0, got inf"),
        (
            ClipNorm,
            {"max_norm": 1.0, "mode": "scale"},
            "mode must be 'clip' or 'normalize', got 'scale'",
        ),
        (
            ClipNorm,
            {"max_norm": 1.0, "where": "server"},
            "where must be 'auto', 'worker' or 'reduced', got 'server'",
        ),
    ],
)
def test_a_bad_value_is_refused(clip: type, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        clip(**keys)
