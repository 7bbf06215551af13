"""The oracles are means in exact arithmetic and the variance that Polyak and Juditsky proved."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paramserver.averaging import (
    AVERAGES,
    AllIterates,
    Average,
    Averager,
    LastIterates,
    MeanOfAll,
    MeanOfLast,
)
from paramserver.errors import CheckpointError, LayoutError, PluginError, ResourceError
from paramserver.reshard import gather_state, scatter_state

SPECS: dict[str, Average] = {
    "all": AllIterates(),
    "all from 70 on": AllIterates(start=70),
    "last": LastIterates(n=7),
}


def iterates(num: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    return (1 + torch.randn(num, length, generator=noise, dtype=torch.float64)).to(dtype)


def averaged(averager: Averager, rows: Tensor | Sequence[Tensor]) -> Tensor:
    for row in rows:
        averager.update(row)
    average = averager.average()
    assert average is not None
    return average


def exact_mean(rows: Tensor) -> Tensor:
    """The correctly rounded sum of each column, over their number."""
    means = [math.fsum(column) / len(rows) for column in rows.T.tolist()]
    return torch.tensor(means, dtype=torch.float64)


@pytest.mark.parametrize("num", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-8)]
)
def test_all_is_the_mean_of_every_iterate(num: int, dtype: torch.dtype, error: float) -> None:
    rows = iterates(num, 30, dtype)

    average = averaged(AllIterates().build(rows[0]), rows)

    assert average.dtype == dtype
    torch.testing.assert_close(average.double(), exact_mean(rows), rtol=error, atol=error)


@pytest.mark.parametrize("start", [1, 5, 64, 99])
def test_all_can_start_after_some_updates(start: int) -> None:
    rows = iterates(100, 30)

    average = averaged(AllIterates(start=start).build(rows[0]), rows)

    torch.testing.assert_close(average, exact_mean(rows[start:]).float())


@pytest.mark.parametrize("num", [1, 6, 7, 8, 100])
def test_last_is_the_mean_of_exactly_the_last_n(num: int) -> None:
    rows = iterates(num, 30)

    average = averaged(LastIterates(n=7).build(rows[0]), rows)

    torch.testing.assert_close(average, exact_mean(rows[-7:]).float(), rtol=1e-7, atol=0)


def test_the_last_n_is_all_that_starts_n_before_the_end() -> None:
    rows = iterates(100, 30)

    last = averaged(LastIterates(n=30).build(rows[0]), rows)

    torch.testing.assert_close(last, averaged(AllIterates(start=70).build(rows[0]), rows))


@pytest.mark.parametrize("name", SPECS)
def test_there_is_no_average_before_an_iterate_counts(name: str) -> None:
    averager = SPECS[name].build(torch.zeros(5))
    assert averager.average() is None

    for row in iterates(70, 5)[: 70 if "70" in name else 0]:
        averager.update(row)

    assert averager.average() is None


def test_an_average_stays_as_it_was_returned() -> None:
    for spec in SPECS.values():
        averager = spec.build(torch.zeros(5))
        rows = iterates(80, 5)
        average = averaged(averager, rows)
        before = average.clone()

        averager.update(100 * rows[0])

        assert torch.equal(average, before)


def test_the_parameters_may_be_written_again() -> None:
    for spec in (AllIterates(), LastIterates(n=3)):
        averager = spec.build(torch.zeros(5))
        params = torch.ones(5)
        averager.update(params)

        params.fill_(7)

        average = averager.average()
        assert average is not None
        assert torch.equal(average, torch.ones(5))


@pytest.mark.parametrize("name", SPECS)
def test_any_cut_gives_the_same_bits(name: str) -> None:
    rows = iterates(150, 3 * 64 + 17)
    edges = [0, 64, 130, rows.shape[1]]

    whole = averaged(SPECS[name].build(rows[0]), rows)

    parts = []
    for a, b in itertools.pairwise(edges):
        parts.append(averaged(SPECS[name].build(rows[0, a:b]), rows[:, a:b]))
    assert torch.equal(torch.cat(parts), whole)


def test_many_float32_iterates_do_not_wear_the_average_out() -> None:
    # A float32 mean or sum is off by 1e-5 here; what is left is the rounding of the result.
    num, levels = 200_000, torch.arange(1000.0)
    rows = 1 + (levels[:, None] * torch.tensor([1.0, 3.0, 7.0, 9.0]) % 1000) / 2**13  # exact
    averager = AllIterates().build(rows[0])

    for _ in range(num // len(rows)):
        for row in rows.unbind():
            averager.update(row)

    average = averager.average()
    assert average is not None
    mean = rows.double().mean(0)  # exact: the sums are of multiples of 2^-13
    assert float(((average - mean) / mean).abs().max()) <= 2**-24


def test_averaged_sgd_has_the_variance_of_polyak_and_juditsky() -> None:
    # 20,000 separate problems h θ²/2 with gradient noise of variance 1, as one flat vector: the
    # average's variance is (1/h)·1·(1/h) / T, whatever the rate; the last iterate's is not small.
    h, lr, num = 0.5, 0.4, 400
    noise = torch.Generator().manual_seed(1)
    theta = torch.zeros(20_000)
    averager = AllIterates().build(theta)

    for _ in range(num):
        theta -= lr * (h * theta + torch.randn(len(theta), generator=noise))
        averager.update(theta)

    average = averager.average()
    assert average is not None
    assert float(average.var()) * num == pytest.approx(1 / h**2, rel=0.04)
    assert float(theta.var()) == pytest.approx(lr / (h * (2 - lr * h)), rel=0.04)


@pytest.mark.parametrize("stopped_at", [0, 3, 69, 70, 75, 130])
@pytest.mark.parametrize("name", SPECS)
def test_an_average_that_is_resumed_is_one_that_never_stopped(name: str, stopped_at: int) -> None:
    rows = iterates(150, 10)
    first, second = SPECS[name].build(rows[0]), SPECS[name].build(rows[0])
    for row in rows[:stopped_at]:
        first.update(row)

    second.load_state_dict(copy.deepcopy(first.state_dict()))

    assert torch.equal(averaged(second, rows[stopped_at:]), averaged(first, rows[stopped_at:]))


@pytest.mark.parametrize("name", SPECS)
def test_three_shards_go_on_as_two_to_the_bit(name: str) -> None:
    rows = iterates(150, 6 * 64)
    whole = averaged(SPECS[name].build(rows[0]), rows)
    cuts, new_cuts = (range(64), range(64, 256), range(256, 384)), (range(128), range(128, 384))
    saved = []
    for cut in cuts:
        averager = SPECS[name].build(rows[0, cut.start : cut.stop])
        for row in rows[:100, cut.start : cut.stop]:
            averager.update(row)
        saved.append((cut, {"state": {0: averager.state_dict()}, "param_groups": [{}]}))

    state = gather_state(saved)

    parts = []
    for cut in new_cuts:
        averager = SPECS[name].build(rows[0, cut.start : cut.stop])
        averager.load_state_dict(scatter_state(state, cut)["state"][0])
        parts.append(averaged(averager, rows[100:, cut.start : cut.stop]))
    assert torch.equal(torch.cat(parts), whole)


def test_an_average_takes_no_other_shape_or_dtype() -> None:
    for spec in SPECS.values():
        averager = spec.build(torch.zeros(5))

        for wrong in (torch.zeros(6), torch.zeros(1), torch.zeros(5, dtype=torch.float64)):
            with pytest.raises(LayoutError, match=r"^expected parameters of \(5,\) torch\.float32"):
                averager.update(wrong)


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        (AllIterates(), LastIterates(n=3), r"^the saved average has part, start, sum, updates"),
        (LastIterates(n=3), AllIterates(), r"^the saved average has n, ring, updates"),
        (LastIterates(n=3), LastIterates(n=4), r"^the saved average is of the last 3 iterates"),
        (AllIterates(), AllIterates(start=9), r"^the saved average starts after update 0, not 9"),
    ],
)
def test_another_average_cannot_be_resumed(saved: Average, resumed: Average, message: str) -> None:
    state = saved.build(torch.zeros(5)).state_dict()

    with pytest.raises(CheckpointError, match=message):
        resumed.build(torch.zeros(5)).load_state_dict(state)


def test_the_average_of_another_slice_cannot_be_resumed() -> None:
    for spec in (AllIterates(), LastIterates(n=3)):
        averager = spec.build(torch.zeros(5))
        averager.update(torch.ones(5))
        before = averager.average()
        other = spec.build(torch.zeros(6))
        other.update(torch.ones(6))

        with pytest.raises(CheckpointError, match=r"^the saved average is \((1, )?6,?\)"):
            averager.load_state_dict(other.state_dict())

        assert torch.equal(averager.average(), before)  # type: ignore[arg-type]


def test_a_window_that_takes_too_much_memory_is_refused_by_size() -> None:
    params = torch.zeros(1 << 18)  # 1 MiB
    LastIterates(n=10, limit_mb=10).build(params)

    with pytest.raises(ResourceError, match=r"262,144 parameters take 11\.0 MiB.*all:start=T-11,"):
        LastIterates(n=11, limit_mb=10).build(params)


def test_averages_are_named_on_the_command_line() -> None:
    assert AVERAGES.parse("all:start=100") == AllIterates(start=100)
    assert AVERAGES.parse("last:n=20,limit_mb=64") == LastIterates(n=20, limit_mb=64.0)
    assert isinstance(AVERAGES.parse("all").build(torch.zeros(3)), MeanOfAll)
    assert isinstance(AVERAGES.parse("last:n=2").build(torch.zeros(3)), MeanOfLast)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all:start=-1", "start must be a whole number of updates"),
        ("last", "needs n"),
        ("last:n=0", "n must be a whole number of iterates"),
        ("last:n=2,limit_mb=0", "limit_mb must be above 0 MiB"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        AVERAGES.parse(text)
