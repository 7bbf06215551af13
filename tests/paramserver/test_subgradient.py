"""The oracles are what the formulas give by hand, the method's own bound, and scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor, nn

from paramserver.optimizers.subgradient import Subgradient, SubgradientRule
from paramserver.reshard import gather_state, scatter_state
from tests.support.programs import loss_and_gradient


def run(
    spec: Subgradient, f: Callable[[Tensor], Tensor], start: Tensor, num: int
) -> tuple[SubgradientRule, list[Tensor]]:
    """Take ``num`` steps on ``f``, told as a synchronous run tells; return all points."""
    param = nn.Parameter(start.clone(), requires_grad=False)
    rule = spec.build([param])
    points = [start.clone()]
    for _ in range(num):
        push(rule, param, f)
        points.append(param.detach().clone())
    return rule, points


def push(rule: SubgradientRule, param: Tensor, f: Callable[[Tensor], Tensor]) -> None:
    loss, h = loss_and_gradient(f, param)
    rule.told(loss, float(torch.linalg.vector_norm(h)))
    rule.apply([h])


def size(x: Tensor) -> Tensor:
    return x.abs().sum()


def point(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("slope", [1.0, 4.0])
@pytest.mark.parametrize("start", [5.0, -0.3, 1e-9])
def test_polyaks_step_reaches_the_kink_of_a_size_at_once(start: float, slope: float) -> None:
    spec = Subgradient(step="polyak", optimum=0.0)

    rule, points = run(spec, lambda x: slope * size(x), point(start), 2)

    assert points[1].item() == 0
    assert points[2].item() == 0  # no step from the optimum, where h may be 0
    assert rule.best_loss == 0


@pytest.mark.parametrize(
    ("step", "lengths"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1]),
        ("sqrt", [0.1, 0.1 / math.sqrt(2), 0.1 / math.sqrt(3), 0.05]),
        ("harmonic", [0.1, 0.05, 0.1 / 3, 0.025]),
    ],
)
def test_steps_shrink_as_they_are_named(step: str, lengths: list[float]) -> None:
    _, points = run(Subgradient(lr=0.1, step=step), size, point(9.0), 4)  # type: ignore[arg-type]

    taken = [float(a - b) for a, b in itertools.pairwise(points)]
    assert taken == pytest.approx(lengths, rel=1e-12)


def test_steps_of_constant_length_end_in_a_cycle_around_the_kink() -> None:
    _, points = run(Subgradient(lr=0.25, step="constant"), size, point(1.1), 20)

    late = [p.item() for p in points[10:]]
    assert all(abs(p) <= 0.25 for p in late)
    assert late[:2] * 5 == pytest.approx(late[:10])
    assert late[0] == pytest.approx(late[1] + 0.25) or late[1] == pytest.approx(late[0] + 0.25)


@pytest.mark.parametrize("step", ["constant", "sqrt", "harmonic"])
@pytest.mark.parametrize("lr", [0.03, 0.3, 3.0])
def test_the_best_point_is_within_the_methods_bound(step: str, lr: float) -> None:
    noise = torch.Generator().manual_seed(0)
    a = torch.randn(30, 6, generator=noise, dtype=torch.float64)
    optimum = torch.randn(6, generator=noise, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (a @ (x - optimum)).abs().sum()  # least at `optimum`, where it is 0

    start, num = torch.zeros(6, dtype=torch.float64), 300

    rule, points = run(Subgradient(lr=lr, step=step), f, start, num)  # type: ignore[arg-type]

    power = {"constant": 0.0, "sqrt": 0.5, "harmonic": 1.0}[step]
    alphas = [lr / k**power for k in range(1, num + 1)]
    g = max(float(loss_and_gradient(f, p)[1].norm()) for p in points)
    r = float((start - optimum).norm())
    bound = (r**2 + g**2 * sum(x**2 for x in alphas)) / (2 * sum(alphas))
    best = rule.best()
    assert best is not None
    assert 0 <= rule.best_loss <= bound
    assert rule.best_loss == min(float(f(p)) for p in points[:-1])
    assert float(f(best)) == rule.best_loss


def test_polyaks_step_and_shrinking_ones_reach_scikit_learns_lasso() -> None:
    noise = torch.Generator().manual_seed(0)
    a = torch.randn(60, 8, generator=noise, dtype=torch.float64)
    b = a @ point(3, -2, 0, 0, 0, 1, 0, 0) + torch.randn(60, generator=noise).double()

    def f(x: Tensor) -> Tensor:
        return ((a @ x - b) ** 2).mean() / 2 + 0.3 * x.abs().sum()

    found = Lasso(alpha=0.3, fit_intercept=False, tol=1e-12).fit(a.numpy(), b.numpy())
    optimum = float(f(torch.from_numpy(found.coef_)))
    start = torch.zeros(8, dtype=torch.float64)

    polyak, points = run(Subgradient(step="polyak", optimum=optimum), f, start, 1000)
    shrinking, _ = run(Subgradient(lr=0.5), f, start, 1000)

    g = max(float(loss_and_gradient(f, p)[1].norm()) for p in points)
    r = float(torch.from_numpy(found.coef_).norm())
    assert optimum < polyak.best_loss < optimum + r * g / math.sqrt(1000)  # Polyak's bound
    assert polyak.best_loss < optimum + 4e-4
    assert optimum < shrinking.best_loss < optimum + 2e-2
    best = polyak.best()
    assert best is not None
    curvature = float(torch.linalg.eigvalsh(a.T @ a / 60).min())  # f - f* ≥ curvature/2 ‖x - x*‖²
    reached = float((best - torch.from_numpy(found.coef_)).norm())
    assert reached <= math.sqrt(2 * 4e-4 / curvature)


def test_a_damped_step_is_as_much_shorter() -> None:
    param = nn.Parameter(point(9.0), requires_grad=False)
    rule = Subgradient(step="polyak", optimum=0.0).build([param])
    rule.told(9.0, 1.0)

    rule.apply([point(1.0)], scale=0.5)

    assert param.item() == 4.5


def test_a_schedule_sets_the_first_length() -> None:
    param = nn.Parameter(point(9.0), requires_grad=False)
    rule = Subgradient(lr=0.1, step="harmonic").build([param])
    scheduler = torch.optim.lr_scheduler.StepLR(rule, 1, 0.5)
    rule.apply([point(1.0)])
    scheduler.step()

    rule.apply([point(1.0)])

    assert param.item() == pytest.approx(9 - 0.1 - 0.05 / 2)


def test_a_batch_below_the_optimum_makes_no_step() -> None:
    param = nn.Parameter(point(9.0), requires_grad=False)
    rule = Subgradient(step="polyak", optimum=1.0).build([param])
    rule.told(0.5, 2.0)

    rule.apply([point(2.0)])

    assert param.item() == 9.0


@pytest.mark.parametrize("told", [None, (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_polyaks_step_needs_to_be_told_before_each_step(told: tuple[float, float] | None) -> None:
    param = nn.Parameter(point(9.0), requires_grad=False)
    rule = Subgradient(step="polyak", optimum=0.0).build([param])
    rule.told(1.0, 1.0)
    rule.apply([point(1.0)])
    before = rule.state_dict()
    if told is not None:
        rule.told(*told)

    with pytest.raises(ValueError, match=r"^Polyak's step needs the loss and the gradient's norm"):
        rule.apply([point(1.0)])

    assert param.item() == 8.0
    assert rule.state_dict() == before


def test_other_steps_need_not_be_told() -> None:
    param = nn.Parameter(point(9.0), requires_grad=False)
    rule = Subgradient(lr=0.5).build([param])

    rule.apply([point(1.0)])

    assert param.item() == 8.5
    assert rule.best() is None
    assert rule.best_loss == math.inf


def test_the_best_point_is_the_one_before_the_step_and_is_kept() -> None:
    param = nn.Parameter(point(1.0), requires_grad=False)
    rule = Subgradient(lr=1.0, step="constant").build([param])

    for loss in (5.0, 3.0, 4.0, math.nan, 3.0):
        rule.told(loss, 1.0)
        rule.apply([point(-1.0)])

    assert rule.best_loss == 3.0
    assert rule.best() == point(2.0)
    assert param.item() == 6.0


@pytest.mark.parametrize("step", ["sqrt", "polyak"])
def test_three_shards_told_the_same_go_on_as_two_to_the_bit(step: str) -> None:
    spec = Subgradient(lr=0.7, step=step, optimum=0.0 if step == "polyak" else None)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(384, generator=noise)
    whole = nn.Parameter(start.clone(), requires_grad=False)
    cuts = (range(64), range(64, 256), range(256, 384))
    new_cuts = (range(128), range(128, 384))
    own = [nn.Parameter(start[c.start : c.stop].clone(), requires_grad=False) for c in cuts]
    reference, rules = spec.build([whole]), [spec.build([p]) for p in own]

    def push_all(rules: list[SubgradientRule], cuts: tuple[range, ...]) -> None:
        loss, h = loss_and_gradient(size, whole)
        for rule, cut in zip([reference, *rules], [range(384), *cuts], strict=True):
            rule.told(loss, float(h.norm()))
            rule.apply([h[cut.start : cut.stop]])

    for _ in range(5):
        push_all(rules, cuts)
    state = gather_state([(c, r.state_dict()) for c, r in zip(cuts, rules, strict=True)])
    own = [nn.Parameter(whole.detach()[c.start : c.stop].clone(), False) for c in new_cuts]
    rules = [spec.build([p]) for p in own]
    for rule, cut in zip(rules, new_cuts, strict=True):
        rule.load_state_dict(scatter_state(state, cut))
    for _ in range(3):
        push_all(rules, new_cuts)

    assert torch.equal(torch.cat(own), whole)
    assert torch.equal(
        torch.cat([b for r in rules if (b := r.best()) is not None]), reference.best()
    )  # type: ignore[arg-type]
    assert {r.best_loss for r in rules} == {reference.best_loss}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"^lr must be above 0"),
        ({"step": "polyak"}, r"^step='polyak' needs a finite optimum, got None"),
        ({"step": "polyak", "optimum": math.inf}, r"^step='polyak' needs a finite optimum"),
        ({"optimum": 0.0}, r"^optimum is for step='polyak', and step is 'sqrt'"),
        ({"step": "cubic"}, r"^step must be 'constant'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subgradient(**settings)  # type: ignore[arg-type]


def test_only_polyaks_step_needs_the_norm() -> None:
    assert Subgradient(step="polyak", optimum=0.0).norm_needed
    assert not Subgradient().norm_needed
