"""Groups of parameters: what they match, how they are written, and where they lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paramserver.errors import LayoutError, PluginError
from paramserver.groups import GROUPS, Group, freeze, refuse_groups
from paramserver.layout import BLOCK, Layout, layout_from_json
from paramserver.schedules import CosineOnce, MultiStep, Step
from tests.support.two_modules import TwoModules

NAMES = "encoder.0.weight, encoder.0.bias, middle.weight, middle.bias, head.weight, head.bias"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("encoder", ["encoder.0.weight", "encoder.0.bias"]),
        ("encoder.*", ["encoder.0.weight", "encoder.0.bias"]),
        ("encoder.0.bias", ["encoder.0.bias"]),
        ("*.bias", ["encoder.0.bias", "middle.bias", "head.bias"]),
        ("[hm]*.weight", ["middle.weight", "head.weight"]),
        ("enc", []),
    ],
)
def test_a_name_or_pattern_matches_a_module_with_all_below_it(
    pattern: str, expected: list[str]
) -> None:
    names = NAMES.split(", ")

    assert [name for name in names if Group(name="a", match=pattern).has(name)] == expected
    assert [name for name in names if Group(name=pattern).has(name)] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "a group's name must be one or more of all but :,=()"),
        ({"name": "a:b"}, "a group's name must be"),
        ({"lr_factor": 0.0}, "lr_factor must be above 0, got 0.0; frozen=true keeps"),
        ({"lr_factor": float("inf")}, "lr_factor must be above 0, got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1"),
        (
            {"frozen": True, "lr_factor": 2.0, "weight_decay": 0.0},
            "group a is frozen and has lr_factor, weight_decay: leave out one",
        ),
    ],
)
def test_a_group_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        Group(**{"name": "a", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head", Group(name="head")),
        ("layers.0.*:lr_factor=0.1", Group(name="layers.0.*", lr_factor=0.1)),
        ("slow:match=a.[0-3],frozen=true", Group(name="slow", match="a.[0-3]", frozen=True)),
        ("head:schedule=cosine-once:updates=9", Group(name="head", schedule=CosineOnce(updates=9))),
        (
            "head:schedule=(step:every=10,gamma=0.5),weight_decay=0",
            Group(name="head", schedule=Step(every=10, gamma=0.5), weight_decay=0.0),
        ),
    ],
)
def test_a_group_is_written_as_a_plug_in(text: str, expected: Group) -> None:
    assert GROUPS.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head:lr=1", "group 'head' has no key 'lr'; it has match, lr_factor, weight_decay"),
        ("head:lr_factor=x", "group 'head': lr_factor: expected float, got 'x'"),
        ("head:lr_factor", "group 'head:lr_factor': 'lr_factor' is not key=value"),
        ("head:schedule=stp:every=1", "there is no schedule 'stp'; did you mean 'step'"),
        (":lr_factor=1", "a group's name must be"),
    ],
)
def test_a_group_that_is_written_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message.replace("(", r"\(")):
        GROUPS.parse(text)


def test_what_a_record_holds_of_a_group_is_read_back() -> None:
    group = Group(name="a", match="b.*", schedule=MultiStep(milestones=(1, 2)), weight_decay=0.0)

    assert GROUPS.build(GROUPS.describe(group)) == group


def test_frozen_parameters_take_no_gradient() -> None:
    model = TwoModules()

    freeze(model, [Group(name="middle", frozen=True), Group(name="*.bias", frozen=True)])

    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["encoder.0.weight", "head.weight"]
    assert [slot.name for slot in Layout.of(model).slots] == trained


def test_a_group_without_a_parameter_is_refused_and_the_names_there_are_listed() -> None:
    with pytest.raises(
        LayoutError, match=rf"^group hed matches no parameter by 'x\.\*'.* {NAMES}$"
    ):
        freeze(TwoModules(), [Group(name="hed", match="x.*", lr_factor=2.0)])


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    groups = [Group(name="a", match="[em]*", frozen=True), Group(name="head", frozen=True)]

    with pytest.raises(LayoutError, match=r"^nothing is left to train: a, head freeze all of enc"):
        freeze(TwoModules(), groups)


def test_a_parameter_in_two_groups_is_refused() -> None:
    groups = [Group(name="head", lr_factor=2.0), Group(name="*.bias", weight_decay=0.0)]

    with pytest.raises(LayoutError, match=r"^parameter head\.bias is in groups head and \*\.bias"):
        Layout.of(TwoModules(), groups)


def test_the_parameters_of_a_group_lie_together() -> None:
    layout = Layout.of(TwoModules(), [Group(name="*.bias", weight_decay=0.0)])

    assert [slot.name.partition(".")[2] for slot in layout.slots][-3:] == ["0.bias", "bias", "bias"]
    assert layout.group_ranges == {
        "": range(16 * 32 + 32 * 32 + 32 * 16),
        "*.bias": range(2048, layout.numel),
    }
    assert all(edge.start % BLOCK == 0 for edge in layout.group_ranges.values())
    model = TwoModules()
    other = TwoModules()
    layout.load(other, layout.flatten(model))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_groups_that_ask_for_nothing_leave_the_layout_as_it_is() -> None:
    plain = Layout.of(TwoModules())

    assert Layout.of(TwoModules(), [Group(name="head"), Group(name="*.bias")]) == plain
    assert plain.group_ranges == {}
    assert layout_from_json(plain.to_json()) == plain


def test_the_layout_of_a_model_without_groups_is_described_as_ever() -> None:
    layout = Layout.of(nn.Linear(3, 2))

    assert layout.to_json()["parameters"] == [["weight", 0, [2, 3]], ["bias", 64, [2]]]
    assert layout.fingerprint == "6721bd54b999a263"


def test_a_layout_with_groups_is_another_one_and_says_where() -> None:
    plain = Layout.of(TwoModules())
    head = Layout.of(TwoModules(), [Group(name="head", lr_factor=2.0)])

    assert plain.fingerprint != head.fingerprint
    assert layout_from_json(head.to_json()) == head
    assert plain.difference(head) == "head.weight in group head instead of no group"
    assert head.difference(plain) == "head.weight in no group instead of group head"


def test_what_takes_one_step_refuses_groups_with_their_own_but_not_frozen_ones() -> None:
    refuse_groups([Group(name="a", frozen=True), Group(name="b")], "lbfgs")

    with pytest.raises(
        ValueError, match=r"^lbfgs takes one step .* group a has its own lr_factor:"
    ):
        refuse_groups([Group(name="a", lr_factor=2.0)], "lbfgs")
