from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.clipping import CLIPS, ClipNorm, ClipValue
from paramserver.errors import PluginError
from paramserver.optimizers import OPTIMIZERS, SGD, Adam, AdamW, RMSProp, TorchOptimizer
from paramserver.registry import Registry
from paramserver.schedules import SCHEDULES, CosineRestarts, Exponential, MultiStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Has a field of every kind.

    And a longer description.
    """

    whole: int
    real: float = 0.5
    flag: bool = False
    text: str = "a"
    choice: Literal["low", "high"] = "low"
    maybe: float | None = None
    pair: tuple[int, float] = (1, 0.5)
    several: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.whole == 13:
            raise ValueError("whole must not be 13, got 13")


SAMPLES: Registry[Sample] = Registry("sample")
SAMPLES.register("sample", Sample, source="nowhere")

REALS = st.floats(allow_nan=False)
TEXTS = st.text("abz019_./:=-").map(lambda text: "t" + text)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any sample that can be written as text."""
    return Sample(
        whole=draw(st.integers().filter(lambda n: n != 13)),
        real=draw(REALS),
        flag=draw(st.booleans()),
        text=draw(TEXTS),
        choice=draw(st.sampled_from(["low", "high"])),
        maybe=draw(st.none() | REALS),
        pair=(draw(st.integers()), draw(REALS)),
        several=tuple(draw(st.lists(st.integers(), min_size=1))),
    )


def written(sample: Sample) -> str:
    """Return ``sample`` as one writes it on the command line."""

    def value_of(key: str) -> str:
        value = getattr(sample, key)
        if isinstance(value, tuple):
            return "/".join(map(str, value))
        return str(value).lower() if value is None or isinstance(value, bool) else str(value)

    return "sample:" + ",".join(f"{f.name}={value_of(f.name)}" for f in fields(sample))


@given(samples())
def test_a_plugin_is_read_as_it_was_written(sample: Sample) -> None:
    assert SAMPLES.parse(written(sample)) == sample


@given(samples())
def test_a_plugin_is_built_from_its_description(sample: Sample) -> None:
    assert SAMPLES.build(SAMPLES.describe(sample)) == sample


@given(samples())
def test_a_description_survives_a_file(sample: Sample) -> None:
    described = json.loads(json.dumps(SAMPLES.describe(sample)))

    assert SAMPLES.build(described) == sample


@pytest.mark.parametrize(
    ("registry", "text", "plugin"),
    [
        (OPTIMIZERS, "sgd", SGD()),
        (OPTIMIZERS, "adam:lr=0.01,betas=0.8/0.9", Adam(lr=0.01, betas=(0.8, 0.9))),
        (OPTIMIZERS, "rmsprop:eps_inside=false", RMSProp(eps_inside=False)),
        (OPTIMIZERS, "torch:algorithm=NAdam,lr=1", TorchOptimizer(algorithm="NAdam", lr=1.0)),
        (SCHEDULES, "cosine:t_0=10,eta_max=0.1", CosineRestarts(t_0=10, eta_max=0.1)),
        (SCHEDULES, "cosine:t_0=10,eta_max=none", CosineRestarts(t_0=10)),
        (SCHEDULES, "multistep:milestones=10/20", MultiStep(milestones=(10, 20))),
        (SCHEDULES, "exponential: gamma = 0.5 ", Exponential(gamma=0.5)),
        (CLIPS, "value:low=-inf,high=1", ClipValue(low=-math.inf, high=1.0)),
        (CLIPS, "norm:max_norm=1,mode=normalize", ClipNorm(max_norm=1.0, mode="normalize")),
    ],
)
def test_the_projects_plugins_are_read_and_described(
    registry: Registry[Any], text: str, plugin: Any
) -> None:
    found = registry.parse(text)

    assert found == plugin
    assert registry.build(registry.describe(found)) == plugin


@pytest.mark.parametrize("registry", [OPTIMIZERS, SCHEDULES, CLIPS], ids=lambda r: r.kind)
def test_no_plugin_has_a_key_called_name(registry: Registry[Any]) -> None:
    # It would take the place of the plug-in's own name in a description.
    assert all("name" not in entry.parameters() for entry in registry)


def test_a_plugin_outside_the_registry_is_named_by_its_class() -> None:
    text = "paramserver.optimizers:AdamW:lr=0.5"

    assert Registry[Any]("optimizer").parse(text) == OPTIMIZERS.parse(text) == AdamW(lr=0.5)


def test_a_plugin_that_is_not_registered_is_described_by_its_class() -> None:
    empty: Registry[SGD] = Registry("optimizer")

    described = empty.describe(SGD(lr=0.5))

    assert described["name"] == "paramserver.optimizers.momentum:SGD"
    assert empty.build(described) == SGD(lr=0.5)


def test_an_entry_says_what_its_plugin_is() -> None:
    (entry,) = SAMPLES

    assert (entry.name, entry.factory, entry.source) == ("sample", Sample, "nowhere")
    assert entry.summary == "Has a field of every kind."
    assert entry.parameters() == {
        "whole": ...,
        "real": 0.5,
        "flag": False,
        "text": "a",
        "choice": "low",
        "maybe": None,
        "pair": (1, 0.5),
        "several": (1,),
    }


def test_a_name_is_taken_once() -> None:
    registry: Registry[SGD] = Registry("optimizer")
    registry.register("sgd", SGD)

    with pytest.raises(PluginError, match=r"^optimizer 'sgd' is registered already$"):
        registry.register("sgd", SGD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampel:whole=1", r"there is no sample 'sampel'; did you mean 'sample'\? \(there are sam"),
        ("xyz", r"there is no sample 'xyz' \(there are sample\)$"),
        ("sample", r"sample 'sample' needs whole$"),
        ("sample:hole=1", r"sample 'sample' has no key 'hole'; it has whole, real, flag, text, "),
        ("sample:whole=1,flag", r".* 'flag' is not key=value; write sample:key=value,key=value$"),
        ("sample:whole=x", r"sample 'sample': whole: expected int, got 'x'$"),
        ("sample:whole=1.5", r"sample 'sample': whole: expected int, got '1\.5'$"),
        ("sample:whole=1,real=x", r"sample 'sample': real: expected float, got 'x'$"),
        ("sample:whole=1,flag=1", r"sample 'sample': flag: expected true or false, got '1'$"),
        ("sample:whole=1,choice=x", r"sample 'sample': choice: 'x' is not one of low, high$"),
        ("sample:whole=1,maybe=x", r"sample 'sample': maybe: expected float, got 'x'$"),
        ("sample:whole=1,pair=1", r".*: pair: expected 2 values separated by '/', got '1'$"),
        ("sample:whole=1,several=1/x", r"sample 'sample': several: expected int, got 'x'$"),
        ("sample:whole=13", r"sample 'sample': whole must not be 13, got 13$"),
        ("no.such:Thing", r"sample no\.such:Thing: No module named 'no'$"),
        ("json:Thing", r"sample json:Thing: module 'json' has no attribute 'Thing'$"),
        ("json:loads", r"sample json:loads is not a dataclass$"),
    ],
)
def test_text_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=f"^{message}"):
        SAMPLES.parse(text)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, r"sample needs a name; there are sample$"),
        ({"name": "sample", "whole": True}, r"sample 'sample': whole: expected int, got True$"),
        ({"name": "sample", "whole": 1.5}, r"sample 'sample': whole: expected int, got 1\.5$"),
        ({"name": "sample", "whole": None}, r"sample 'sample': whole: expected int, got None$"),
        (
            {"name": "sample", "whole": 1, "several": 5},
            r"sample 'sample': several: expected values separated by '/', got 5$",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    described: dict[str, object], message: str
) -> None:
    with pytest.raises(PluginError, match=f"^{message}"):
        SAMPLES.build(described)
