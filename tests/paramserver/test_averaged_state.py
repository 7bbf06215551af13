from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.averaged_state import averaged, check_average, with_average, without_average
from paramserver.averaging import AllIterates, Average, LastIterates
from paramserver.errors import CheckpointError
from paramserver.optimizers import SGD, Adam, Optimizer
from paramserver.reshard import OptimizerState, gather_state

CUTS = (range(64), range(64, 192), range(192, 192))
NUMEL = 192


def iterate(t: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(t))


def saved(optimizer: Optimizer, average: Average | None, iterates: int) -> OptimizerState:
    """Return the state after some updates, as three owners of slices bring it."""
    parts: list[tuple[range, dict[str, Any]]] = []
    for cut in CUTS:
        own = iterate(0)[cut.start : cut.stop]
        rule = optimizer.build([nn.Parameter(own)])
        averager = None if average is None else average.build(own)
        for t in range(1, iterates + 1):
            rule.apply([own])
            if averager is not None:
                averager.update(iterate(t)[cut.start : cut.stop])
        parts.append((cut, with_average(rule.state_dict(), averager)))
    return gather_state(parts)


@pytest.mark.parametrize("optimizer", [SGD(), Adam()], ids=["no state", "state"])
def test_both_states_come_apart_as_they_were(optimizer: Optimizer) -> None:
    param = nn.Parameter(torch.ones(64))
    rule, averager = optimizer.build([param]), AllIterates().build(param.data)
    rule.apply([torch.ones(64)])
    averager.update(param.data)

    rules, average = without_average(with_average(rule.state_dict(), averager))

    torch.testing.assert_close(rules, rule.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(average, averager.state_dict(), rtol=0, atol=0)


def test_without_an_average_a_state_is_as_it_was() -> None:
    rule = Adam().build([nn.Parameter(torch.ones(64))])

    assert with_average(rule.state_dict(), None) == rule.state_dict()
    assert without_average(rule.state_dict()) == (rule.state_dict(), {})


@pytest.mark.parametrize("cuts", [(range(NUMEL),), CUTS, (range(128), range(128, NUMEL))])
@pytest.mark.parametrize(("average", "counted"), [(AllIterates(), 5), (LastIterates(n=3), 3)])
def test_an_average_is_found_again_whatever_the_cuts(
    average: Average, counted: int, cuts: tuple[range, ...]
) -> None:
    state = saved(Adam(), average, iterates=5)

    mean = averaged(iterate(5), state, average, cuts)

    expected = torch.stack([iterate(t) for t in range(6 - counted, 6)]).mean(0)
    torch.testing.assert_close(mean, expected)


def test_parameters_are_evaluated_where_there_is_no_average_yet() -> None:
    late = AllIterates(start=9)

    assert torch.equal(averaged(iterate(5), saved(SGD(), late, 5), late, CUTS), iterate(5))
    assert averaged(iterate(5), None, late, CUTS).equal(iterate(5))
    assert averaged(iterate(5), saved(SGD(), None, 5), None, CUTS).equal(iterate(5))


def test_a_memory_limit_holds_for_each_cut_alone() -> None:
    tight = LastIterates(n=4, limit_mb=4 * 128 * 4 / 2**20)

    averaged(iterate(5), saved(SGD(), tight, 5), tight, CUTS)


def test_a_run_goes_on_with_an_average_only_if_it_had_one() -> None:
    having, lacking = saved(Adam(), AllIterates(), 1), saved(Adam(), None, 1)

    check_average(having, AllIterates())
    check_average(lacking, None)
    check_average(None, AllIterates())
    with pytest.raises(CheckpointError, match=r"^the run had an average"):
        check_average(having, None)
    with pytest.raises(CheckpointError, match=r"^the run had no average"):
        check_average(lacking, AllIterates())
