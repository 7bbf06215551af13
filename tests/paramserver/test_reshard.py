from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import CheckpointError, LayoutError
from paramserver.layout import Layout
from paramserver.optimizers import OPTIMIZERS
from paramserver.reshard import OptimizerState, gather_state, scatter_state

LAYOUT = Layout.of(nn.Linear(30, 17))  # 9 blocks of 64 elements

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

TORCH: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9)),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": torch.optim.Adadelta,
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
}
OURS: dict[str, Make] = {
    f"our {text}": lambda p, text=text: OPTIMIZERS.parse(text).build(p)  # type: ignore[misc]
    for text in (
        *("sgd", "momentum", "nesterov", "adagrad", "adadelta", "rmsprop", "adam", "adamw"),
        *("local-momentum", "dana", "dana-slim", "delayed-nesterov:every=2"),
    )
}
EVERY = TORCH | OURS


def shards(make: Make, vector: Tensor, cuts: Sequence[range]) -> list[torch.optim.Optimizer]:
    return [make([nn.Parameter(vector[cut.start : cut.stop].clone())]) for cut in cuts]


def step(optimizers: Sequence[torch.optim.Optimizer], gradient: Tensor) -> Tensor:
    """Step every shard on its part of ``gradient``; return the parameters then."""
    at, params = 0, []
    for optimizer in optimizers:
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = gradient[at : at + len(param)].clone()
        optimizer.step()
        params.append(param.detach())
        at += len(param)
    return torch.cat(params)


def gathered(optimizers: Sequence[torch.optim.Optimizer], cuts: Sequence[range]) -> OptimizerState:
    return gather_state([(c, o.state_dict()) for c, o in zip(cuts, optimizers, strict=True)])


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for mine, theirs in zip(one["state"].values(), other["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)  # shape and dtype too


@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("name", EVERY)
def test_three_shards_go_on_as_any_number_to_the_bit(name: str, num_shards: int) -> None:
    make, noise = EVERY[name], torch.Generator().manual_seed(0)
    vector, *gradients = torch.randn(5, LAYOUT.numel, generator=noise)
    cuts, new_cuts = LAYOUT.cuts(3), LAYOUT.cuts(num_shards)
    never_cut_anew = shards(make, vector, new_cuts)
    before = shards(make, vector, cuts)
    for gradient in gradients[:3]:
        step(never_cut_anew, gradient)
        params = step(before, gradient)

    after = shards(make, params, new_cuts)
    state = gathered(before, cuts)
    for optimizer, cut in zip(after, new_cuts, strict=True):
        optimizer.load_state_dict(scatter_state(state, cut))

    for optimizer, reference in zip(after, never_cut_anew, strict=True):
        assert_same_state(optimizer.state_dict(), reference.state_dict())
    assert torch.equal(step(after, gradients[3]), step(never_cut_anew, gradients[3]))


@pytest.mark.parametrize("name", EVERY)
def test_an_optimizer_that_has_not_stepped_can_be_cut(name: str) -> None:
    cuts = LAYOUT.cuts(3)
    optimizers = shards(EVERY[name], torch.zeros(LAYOUT.numel), cuts)

    state = gathered(optimizers, cuts)

    for optimizer, cut in zip(optimizers, cuts, strict=True):
        assert_same_state(scatter_state(state, cut), optimizer.state_dict())


def test_the_step_of_fused_adam_stays_a_float32_tensor() -> None:
    cuts = LAYOUT.cuts(3)
    optimizers = shards(TORCH["fused adam"], torch.zeros(LAYOUT.numel), cuts)
    step(optimizers, torch.ones(LAYOUT.numel))

    state = gathered(optimizers, cuts)

    assert state.tensors.keys() == {"exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(state.scalars["step"], torch.tensor(1.0))
    assert state.groups["lr"] == 0.1
    assert "params" not in state.groups


def test_a_shard_gets_memory_of_its_own() -> None:
    vector = torch.zeros(LAYOUT.numel)
    state = OptimizerState({"exp_avg": vector}, {"step": torch.tensor(1.0)}, {"lr": 0.1})

    own = scatter_state(state, LAYOUT.cuts(2)[0])["state"][0]

    assert own["exp_avg"].untyped_storage().nbytes() == 4 * len(LAYOUT.cuts(2)[0])
    own["exp_avg"].fill_(1)
    own["step"] += 1
    assert vector.sum() == 0
    assert state.scalars["step"] == 1


def part(cut: range, lr: float = 0.1, **state: Any) -> tuple[range, dict[str, Any]]:
    return cut, {"state": {0: state}, "param_groups": [{"lr": lr, "params": [0]}]}


FIRST, SECOND = range(64), range(64, 128)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [part(FIRST, step=torch.tensor(3.0)), part(SECOND, step=torch.tensor(4.0))],
            r"^step is 4\.0 on shard 1 and 3\.0 on shard 0: save all shards at one version",
        ),
        ([part(FIRST, step=3), part(SECOND, step=4)], r"^step is 4 on shard 1"),
        (
            [part(FIRST, step=torch.tensor(3.0)), part(SECOND, step=torch.tensor(3))],
            r"^step is 3 on shard 1",
        ),
        (
            [part(FIRST, lr=0.1), part(SECOND, lr=0.2)],
            r"^param_groups is \{'lr': 0\.2\} on shard 1",
        ),
        ([part(FIRST, step=3), part(SECOND)], r"^the keys of the optimizer's state is \[\]"),
        ([part(FIRST), part(range(128, 192))], r"gap or overlap at element 64"),
        ([part(SECOND)], r"gap or overlap at element 0"),
        (
            [part(FIRST, rows=torch.zeros(8)), part(SECOND, rows=torch.zeros(8))],
            r"^rows of shard 0 has shape \(8,\): only tensors whose last dimension is the",
        ),
        (
            [part(FIRST, rows=torch.zeros(64, 8)), part(SECOND, rows=torch.zeros(64, 8))],
            r"^rows of shard 0 has shape \(64, 8\): only tensors",
        ),
        (
            [part(range(64), m=torch.zeros(64)), part(range(64, 192), m=torch.zeros(64))],
            r"^m of shard 0 has shape \(64,\): only tensors",
        ),
        (
            [part(FIRST, pairs=torch.zeros(3, 64)), part(SECOND, pairs=torch.zeros(2, 64))],
            r"^the shape of pairs, without its length, is torch\.Size\(\[2\]\) on shard 1",
        ),
        (
            [part(FIRST, pairs=torch.zeros(2, 64)), part(SECOND, pairs=torch.zeros(64))],
            r"^the shape of pairs, without its length, is torch\.Size\(\[\]\) on shard 1",
        ),
        (
            [part(FIRST, m=torch.zeros(64)), part(SECOND, m=torch.zeros(64).double())],
            r"^the dtype of m is torch\.float64 on shard 1 and torch\.float32 on shard 0",
        ),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(
    parts: list[tuple[range, dict[str, Any]]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        gather_state(parts)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3)])
def test_a_history_is_joined_and_cut_along_its_last_dimension(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape) * 192.0).view(*shape, 192)
    cuts, new_cuts = (range(64), range(64, 192)), (range(128), range(128, 192))
    parts = [part(c, pairs=whole[..., c.start : c.stop].clone(), rounds=4) for c in cuts]

    state = gather_state(parts)

    assert torch.equal(state.tensors["pairs"], whole)
    assert state.scalars == {"rounds": 4}
    for cut in new_cuts:
        own = scatter_state(state, cut)["state"][0]
        assert torch.equal(own["pairs"], whole[..., cut.start : cut.stop])
        assert own["pairs"].is_contiguous()
        assert own["pairs"].untyped_storage().nbytes() == 4 * math.prod(shape) * len(cut)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrix_of_a_whole_program_passes_through_in_one_part(transposed: bool) -> None:
    matrix = torch.randn(192, 192, generator=torch.Generator().manual_seed(0))
    matrix = matrix.T if transposed else matrix

    state = gather_state([part(range(192), inverse=matrix, g=torch.ones(192), k=3)])

    own = scatter_state(state, range(192))["state"][0]
    assert torch.equal(own["inverse"], matrix)
    assert torch.equal(own["g"], torch.ones(192))
    assert own["k"] == 3
    own["inverse"].zero_()
    assert state.tensors["inverse"].abs().sum() > 0


def test_a_history_past_the_end_is_refused() -> None:
    state = OptimizerState({"pairs": torch.zeros(192, 64)}, {}, {})

    with pytest.raises(LayoutError, match=r"^pairs has 64 elements, so it cannot be cut at"):
        scatter_state(state, range(64, 128))


def test_a_part_past_the_end_is_refused() -> None:
    state = OptimizerState({"exp_avg": torch.zeros(64)}, {}, {})

    with pytest.raises(LayoutError, match=r"^exp_avg has 64 elements, so it cannot be cut at"):
        scatter_state(state, range(64, 128))
