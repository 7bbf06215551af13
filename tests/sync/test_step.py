"""The step on every rank against one process that does the same alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from paramserver.clipping import Clip, ClipNorm, ClipValue
from paramserver.layout import Layout
from paramserver.optimizers import (
    SGD,
    AdaDelta,
    AdaGrad,
    Adam,
    AdamW,
    DANASlim,
    DelayedNesterov,
    LocalMomentum,
    Momentum,
    Nesterov,
    Optimizer,
    RMSProp,
    TorchOptimizer,
)
from paramserver.schedules import LinearWarmup, Schedule
from sync.collective import Collective
from sync.step import Outcome, Reduce, Report, Stepper, weights
from tests.support.ranks import KINDS, Kind, group, results

LAYOUT = Layout.of(nn.Sequential(nn.Linear(20, 17), nn.Linear(17, 3)))
SAMPLES = (8, 24, 32)
STEPS = 6

OPTIMIZERS: list[Optimizer] = [
    SGD(lr=0.1),
    SGD(lr=0.1, weight_decay=0.01),
    Momentum(lr=0.1),
    Nesterov(lr=0.1),
    AdaGrad(lr=0.1),
    AdaDelta(),
    RMSProp(lr=0.01),
    Adam(lr=0.01),
    AdamW(lr=0.01),
    TorchOptimizer(algorithm="NAdam", lr=0.01),
    LocalMomentum(lr=0.1),
    DANASlim(lr=0.1),
    DelayedNesterov(lr=0.1, every=2),
]


def gradient(rank: int, step: int) -> Tensor:
    """Return a gradient that has the layout's zeros in its padding."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    flat = torch.zeros(LAYOUT.numel)
    for view in LAYOUT.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator))
    return flat


def alone(
    optimizer: Optimizer,
    factors: Sequence[float],
    clip: Clip | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Take the steps in one process, on the sum of the gradients times ``factors``."""
    params = nn.Parameter(torch.ones(LAYOUT.numel), requires_grad=False)
    rule = optimizer.build([params])
    scheduler = None if schedule is None else schedule.build(rule)
    for step in range(STEPS):
        terms = [f * gradient(rank, step).double() for rank, f in enumerate(factors)]
        grad = torch.stack(terms).sum(0).float()
        if clip is not None:
            clip.apply_(grad, float(grad.norm()))
        rule.apply([grad])
        if scheduler is not None:
            scheduler.step()
    return params.data


def together(
    optimizer: Optimizer,
    reduce: Reduce = "mean",
    clip: Clip | None = None,
    schedule: Schedule | None = None,
    world: int = 3,
    kind: Kind = "shared_memory",
) -> list[Tensor]:
    """Take the steps on all ranks; return the parameters each sees at the end."""

    def body(collective: Collective) -> Tensor:
        stepper = Stepper(collective, optimizer, reduce=reduce, clip=clip, schedule=schedule)
        begin(collective)
        for step in range(STEPS):
            collective.grad.copy_(gradient(collective.rank, step))
            stepper.step(step, report(SAMPLES[collective.rank]))
        return collective.params.clone()

    return results(group(kind, LAYOUT, world, body))


def begin(collective: Collective) -> None:
    """Set all parameters to 1."""
    collective.exchange(0, ())
    collective.params[collective.cut.start : collective.cut.stop] = 1.0
    collective.publish()


def report(samples: int = 1, **fields: float) -> Report:
    return Report(**{"samples": samples, "loss": 0.0, "norm": 1.0, "seconds": 0.0, **fields})


def mean(*samples: int) -> list[float]:
    return [n / sum(samples) for n in samples]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_every_optimizer_steps_as_it_does_alone(optimizer: Optimizer) -> None:
    seen = together(optimizer)

    torch.testing.assert_close(seen[0], alone(optimizer, mean(*SAMPLES)), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(seen[0], params) for params in seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_steps_as_one(kind: Kind, world: int) -> None:
    seen = together(Adam(lr=0.01), world=world, kind=kind)

    expected = alone(Adam(lr=0.01), mean(*SAMPLES[:world]))
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(seen[0], params) for params in seen)


def test_a_sum_adds_the_gradients_whatever_their_samples() -> None:
    seen = together(SGD(lr=0.01), reduce="sum")

    torch.testing.assert_close(seen[0], alone(SGD(lr=0.01), [1, 1, 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "clip",
    [
        ClipNorm(max_norm=0.5),
        ClipNorm(max_norm=0.5, mode="normalize"),
        ClipValue(low=-0.1, high=0.2),
    ],
    ids=["norm", "normalize", "value"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reduced_gradient_is_clipped_as_a_whole(clip: Clip, kind: Kind) -> None:
    seen = together(SGD(lr=0.1), clip=clip, kind=kind)

    expected = alone(SGD(lr=0.1), mean(*SAMPLES), clip)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


def test_a_norm_whose_square_is_out_of_range_is_clipped() -> None:
    def body(collective: Collective) -> Tensor:
        stepper = Stepper(collective, SGD(lr=1.0), clip=ClipNorm(max_norm=1.0))
        begin(collective)
        collective.grad.fill_(1e30)
        stepper.step(1, report())
        return collective.params.clone()

    seen = results(group("shared_memory", LAYOUT, 2, body))

    length = 1 / math.sqrt(LAYOUT.numel)
    torch.testing.assert_close(seen[0], torch.full((LAYOUT.numel,), 1.0 - length))


def test_a_schedule_moves_with_the_updates() -> None:
    schedule = LinearWarmup(updates=4, start=0.1)

    seen = together(SGD(lr=0.1), schedule=schedule)

    expected = alone(SGD(lr=0.1), mean(*SAMPLES), schedule=schedule)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)


def test_one_gradient_that_is_not_finite_leaves_the_step_out_everywhere() -> None:
    def body(collective: Collective) -> tuple[Outcome, Outcome, Tensor]:
        stepper = Stepper(collective, SGD(lr=1.0))
        begin(collective)
        collective.grad.fill_(math.nan if collective.rank == 1 else 1.0)
        bad = stepper.step(1, report(bad_layer=2.0 if collective.rank == 1 else -1.0))
        collective.grad.fill_(0.25)
        good = stepper.step(2, report())
        return bad, good, collective.params.clone()

    for bad, good, params in results(group("shared_memory", LAYOUT, 3, body)):
        assert (bad.applied, bad.culprit) == (False, 1)
        assert good.applied
        assert torch.equal(params, torch.full((LAYOUT.numel,), 0.75))


def test_every_rank_hears_every_report() -> None:
    def body(collective: Collective) -> Outcome:
        stepper = Stepper(collective, SGD(lr=1.0))
        collective.grad.zero_()
        return stepper.step(1, report(collective.rank + 1, loss=0.5, stop=collective.rank == 2))

    outcomes = results(group("shared_memory", LAYOUT, 3, body))

    told = tuple(report(rank + 1, loss=0.5, stop=float(rank == 2)) for rank in range(3))
    assert outcomes == [Outcome(told, applied=True)] * 3


def test_a_saved_rule_and_schedule_go_on_as_if_never_stopped() -> None:
    schedule = LinearWarmup(updates=10, start=0.1)

    def body(collective: Collective, stops: bool) -> Tensor:
        stepper = Stepper(collective, Adam(lr=0.1), schedule=schedule)
        begin(collective)
        for step in range(STEPS):
            if stops and step == 3:
                rule, scheduler = stepper.rule.state_dict(), stepper.scheduler
                assert scheduler is not None
                saved = scheduler.state_dict()
                stepper = Stepper(collective, Adam(lr=0.1), schedule=schedule)
                stepper.restore(rule, saved)
            collective.grad.copy_(gradient(collective.rank, step))
            stepper.step(step, report())
        return collective.params.clone()

    straight = results(group("shared_memory", LAYOUT, 2, lambda c: body(c, stops=False)))
    stopped = results(group("shared_memory", LAYOUT, 2, lambda c: body(c, stops=True)))

    assert torch.equal(straight[0], stopped[0])


@pytest.mark.parametrize(("reduce", "expected"), [("mean", [0.25, 0.75]), ("sum", [1.0, 1.0])])
def test_weights(reduce: Reduce, expected: list[float]) -> None:
    assert weights(reduce, [10, 30]) == expected
