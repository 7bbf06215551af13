from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paramserver.errors import LayoutError
from paramserver.layout import BLOCK, Layout, layout_from_json, overlaps


class Model(nn.Module):
    """Has parameters of the given shapes, all with other values."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            count = torch.Size(shape).numel()
            values = torch.arange(1, count + 1, dtype=dtype).reshape(shape) + 1000 * i
            self.register_parameter(f"p{i}", nn.Parameter(values))


SHAPES = st.lists(st.lists(st.integers(1, 12), max_size=3).map(tuple), min_size=1, max_size=6)
MODELS = st.builds(Model, SHAPES, st.sampled_from([torch.float32, torch.float64]))
TWO = Model([(70,), (2, 3)])
"""Two blocks, then one."""


@given(MODELS)
def test_parameters_lie_one_after_another_on_blocks(model: Model) -> None:
    layout = Layout.of(model)

    names = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert [(slot.name, slot.shape) for slot in layout.slots] == names
    assert all(slot.offset % BLOCK == 0 for slot in layout.slots)
    ends = [0, *(slot.end for slot in layout.slots)]
    gaps = [slot.offset - end for slot, end in zip(layout.slots, ends, strict=False)]
    assert all(0 <= gap < BLOCK for gap in gaps)
    assert layout.numel % BLOCK == 0
    assert 0 <= layout.numel - ends[-1] < BLOCK


@given(MODELS)
def test_sizes_count_padding_or_not(model: Model) -> None:
    layout = Layout.of(model)

    assert layout.num_parameters == sum(p.numel() for p in model.parameters())
    assert layout.num_bytes == layout.flatten(model).nbytes


@given(MODELS, st.data())
def test_cuts_cover_the_vector_in_balanced_blocks(model: Model, data: st.DataObject) -> None:
    layout = Layout.of(model)
    num_shards = data.draw(st.integers(1, layout.numel // BLOCK))

    cuts = layout.cuts(num_shards)

    assert len(cuts) == num_shards
    assert [i for cut in cuts for i in cut] == list(range(layout.numel))
    assert all(cut.start % BLOCK == 0 and cut.stop % BLOCK == 0 for cut in cuts)
    sizes = [len(cut) for cut in cuts]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= BLOCK


@given(MODELS, st.data())
def test_overlaps_cut_a_range_at_the_shards(model: Model, data: st.DataObject) -> None:
    layout = Layout.of(model)
    cuts = layout.cuts(data.draw(st.integers(1, layout.numel // BLOCK)))
    lo, hi = sorted(data.draw(st.tuples(*[st.integers(0, layout.numel)] * 2)))

    parts = list(overlaps(lo, hi, cuts))

    assert [i for _, start, stop in parts for i in range(start, stop)] == list(range(lo, hi))
    assert all(i in cuts[shard] for shard, start, stop in parts for i in (start, stop - 1))


@given(MODELS)
def test_a_model_loads_what_was_flattened(model: Model) -> None:
    layout = Layout.of(model)
    blank = copy.deepcopy(model)
    for p in blank.parameters():
        p.data.zero_()

    layout.load(blank, layout.flatten(model))

    for p, expected in zip(blank.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, expected)


@given(MODELS)
def test_padding_is_zero(model: Model) -> None:
    layout = Layout.of(model)

    flat = layout.flatten(model)

    assert int(flat.count_nonzero()) == layout.num_parameters  # no parameter of a Model is 0
    for slot, p in zip(layout.slots, model.parameters(), strict=True):
        assert torch.equal(flat[slot.offset : slot.end], p.detach().flatten())


def test_flatten_fills_a_vector_it_is_given() -> None:
    layout = Layout.of(TWO)
    out = torch.zeros(layout.numel)

    flat = layout.flatten(TWO, out)

    assert flat is out
    assert torch.equal(out, layout.flatten(TWO))


def test_views_share_the_vector() -> None:
    layout = Layout.of(TWO)
    flat = torch.zeros(layout.numel)

    first, second = layout.views(flat)
    second[1, 2] = 7.0

    assert (first.shape, second.shape) == ((70,), (2, 3))
    assert flat[128 + 5] == 7.0


def test_frozen_parameters_are_left_out() -> None:
    model = Model([(3,), (4,)])
    model.p0.requires_grad_(False)

    assert [slot.name for slot in Layout.of(model).slots] == ["p1"]


@given(MODELS)
def test_a_layout_survives_its_manifest(model: Model) -> None:
    layout = Layout.of(model)

    found = layout_from_json(json.loads(json.dumps(layout.to_json())))

    assert found == layout
    assert found.fingerprint == layout.fingerprint


@given(MODELS, MODELS)
def test_layouts_differ_in_fingerprint_as_they_differ(model: Model, other: Model) -> None:
    a, b = Layout.of(model), Layout.of(other)

    assert (a.fingerprint == b.fingerprint) == (a == b) == (a.difference(b) is None)


def test_a_fingerprint_stays_what_old_records_hold() -> None:
    assert Layout.of(TWO).fingerprint == "266cdc84d1f016fb"


def renamed(model: Model, *order: str) -> nn.Module:
    """Return ``model`` with its parameters in another order, by name."""
    out = nn.Module()
    for name in order:
        out.register_parameter(name, nn.Parameter(torch.zeros_like(getattr(model, name))))
    return out


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (TWO, None),
        (Model([(70,), (2, 3)], torch.float64), "dtype torch.float64 instead of torch.float32"),
        (Model([(70,), (3, 2)]), "p1: (3, 2) instead of (2, 3)"),
        (Model([(70,)]), "p1: absent instead of (2, 3)"),
        (Model([(70,), (2, 3), (1,)]), "p2: (1,) instead of absent"),
        (renamed(TWO, "p1", "p0"), "another order of the parameters"),
    ],
    ids=["equal", "dtype", "shape", "missing", "extra", "order"],
)
def test_a_difference_is_named(other: nn.Module, difference: str | None) -> None:
    mine, theirs = Layout.of(TWO), Layout.of(other)

    assert mine.difference(theirs) == difference
    assert (mine.fingerprint == theirs.fingerprint) == (difference is None)


# errors


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"^the model has no trainable parameter \(requires_grad"):
        Layout.of(nn.ReLU())


def test_a_model_whose_shapes_are_not_known_yet_is_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"^parameter 1\.weight has no shape yet: let the model's"
    ):
        Layout.of(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_a_model_of_two_dtypes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64))

    with pytest.raises(
        LayoutError,
        match=r"^trainable parameters must share one float dtype, got torch\.float32: 0\.weight, "
        r"0\.bias; torch\.float64: 1\.weight, 1\.bias$",
    ):
        Layout.of(model)


def test_a_complex_model_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"one float dtype, got torch\.complex64: weight, bias$"):
        Layout.of(nn.Linear(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("num_shards", [0, 4])
def test_more_shards_than_blocks_are_refused(num_shards: int) -> None:
    with pytest.raises(
        LayoutError,
        match=rf"^num_shards must be 1 to 3 for 76 parameters \(a shard .*\), got {num_shards}$",
    ):
        Layout.of(TWO).cuts(num_shards)


@pytest.mark.parametrize(
    ("flat", "got"),
    [
        (torch.zeros(191), r"\(191,\) torch\.float32"),
        (torch.zeros(192, dtype=torch.float64), r"\(192,\) torch\.float64"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(flat: Tensor, got: str) -> None:
    with pytest.raises(LayoutError, match=rf"^expected a vector of 192 torch\.float32, got {got}$"):
        Layout.of(TWO).views(flat)


@pytest.mark.parametrize(
    "described", [{"dtype": "float33", "parameters": []}, {"dtype": "float32", "parameters": "p0"}]
)
def test_a_manifest_that_cannot_be_read_is_refused(described: dict[str, object]) -> None:
    with pytest.raises(LayoutError, match=r"^the layout in the manifest is not readable$"):
        layout_from_json(described)
