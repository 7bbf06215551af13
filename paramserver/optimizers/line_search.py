"""Line searches on slices: how far to go along a direction.

With φ(t) = loss(x + t d), both searches want enough decrease, and strong Wolfe a flat end too:

    φ(t) ≤ φ(0) + c₁ t φ'(0)        (Armijo)            |φ'(t)| ≤ c₂ |φ'(0)|

They are generators for ``yield from`` in a round program. Each trial asks for loss and gradient at
x + t d and for two dot products; all decisions are made on such numbers, so every owner of a slice
makes the same ones. A loss or gradient that is NaN or infinite, -∞ too, means the step was too
long.

A loss that rounding made equal to φ(0) counts as lower if the gradient is shorter. So along a run
on one sample either the loss or, at the same loss, the gradient's norm falls with each step, and a
run in float32 ends instead of walking about.

Source: Nocedal & Wright, *Numerical Optimization*, 2nd ed., 2006: algorithms 3.1, 3.5 and 3.6, the
cubic (3.59). The last two are one loop here.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from paramserver.optimizers.base import check_above_0, check_from_0
from paramserver.rounds import Answer, Ask, Request, Sample, Step, dots, finite


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A point whose loss and gradient are known."""

    x: Tensor
    """Own slice, shape ``(n,)``."""
    loss: float
    gradient: Tensor
    """Own slice, shape ``(n,)``."""
    square: float
    """The gradient's squared 2-norm, over all slices."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.square)

    @property
    def norm(self) -> float:
        """The gradient's 2-norm, over all slices."""
        return math.sqrt(self.square)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A lower point."""

    step: float
    """How far along the direction, above 0."""
    point: Point
    slope: float
    """Gradient times direction at the point."""
    meets_conditions: bool
    """Whether the search's conditions hold; if not, it is the lowest point that was tried."""


@dataclass(frozen=True, slots=True)
class NotFound:
    """No lower point among those tried."""

    evaluations: int
    shortest: float
    """The shortest step tried."""

    def __str__(self) -> str:
        return f"no lower loss in {self.evaluations} steps down to {self.shortest:.1e}"


Search: TypeAlias = Generator[Request, Any, Found | NotFound]


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """A point on the line."""

    step: float
    slope: float
    point: Point

    @property
    def loss(self) -> float:
        return self.point.loss

    @property
    def is_finite(self) -> bool:
        return self.point.is_finite and math.isfinite(self.slope)


def evaluate(x: Tensor, on: Sample) -> Generator[Request, Any, Point]:
    """Return the point at ``x``; its loss or gradient may be NaN or infinite."""
    answer: Answer = yield Ask("gradient", x, on)
    if not math.isfinite(answer.loss):
        return Point(x, answer.loss, answer.vector, math.nan)
    (square,) = (yield from dots((answer.vector, answer.vector))).tolist()
    return Point(x, answer.loss, answer.vector, square)


def begin(x: Tensor, on: Sample, memory: dict[str, Any]) -> Generator[Request, Any, Point]:
    """Return the point a round begins at.

    Where the sample is all there is, `remember` has kept it and nothing is asked.

    Raises:
        CurvatureError: Its loss or gradient is NaN or infinite.
    """
    if on.size is None and "gradient" in memory:
        return Point(x, memory["loss"], memory["gradient"], memory["square"])
    point = yield from evaluate(x, on)
    finite(point.loss, "the loss")
    finite(point.square, "the gradient's squared norm")
    return point


def remember(point: Point, on: Sample, memory: dict[str, Any]) -> None:
    """Keep for the next round what `begin` can use of the point this one ends at."""
    if on.size is None:
        memory.update(loss=point.loss, gradient=point.gradient, square=point.square)


def stop_at(point: Point, tolerance: float, on: Sample) -> str | None:
    """Return why a run ends at ``point``, if it does.

    Its gradient's norm is ``tolerance`` or less; or, where the sample is all there is, it is 0.
    """
    if (tolerance > 0 or on.size is None) and point.norm <= tolerance:
        return f"the gradient's norm is {point.norm:.1e}"
    return None


def stay(start: Point, found: NotFound, on: Sample) -> Step:
    """Return the end of a round that found no lower point, and left parameters and state alone.

    The run ends, unless the next round draws another sample.
    """
    stop = f"along steepest descent, {found}" if on.size is None else None
    return Step(start.x, start.loss, stop)


def strong_wolfe(
    start: Point,
    direction: Tensor,
    slope: float,
    *,
    on: Sample,
    first: float,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_evaluations: int = 25,
) -> Search:
    """Look for a step that meets the strong Wolfe conditions.

    Args:
        start: Where the line begins; loss and gradient are finite.
        direction: d, own slice, shape ``(n,)``. Not changed.
        slope: φ'(0), the gradient times d over all slices; below 0.
        on: The sample of every trial, that of ``start``.
        first: The first step to try, above 0.
        c1: Least decrease, as a share of that of the tangent.
        c2: Largest slope left, as a share of the first; above ``c1``.
        max_evaluations: Steps to try at most.

    Returns:
        `Found`, or `NotFound` where no trial was lower than ``start``.
    """
    origin = _Trial(0.0, slope, start)
    # The steps sought lie between `low`, the lowest so far, and `high`, which is too long or
    # higher; None: no end is known yet. `before` is the lowest before `low`.
    low = before = origin
    high: _Trial | None = None
    step, width, shortest, evaluations = first, math.inf, first, 0
    while evaluations < max_evaluations:
        trial = yield from _try(start.x, direction, step, on)
        evaluations, shortest = evaluations + 1, min(shortest, step)
        if not _is_enough(trial, origin, c1) or not _is_lower(trial, low):
            high = trial
        elif abs(trial.slope) <= -c2 * slope:
            return Found(step, trial.point, trial.slope, meets_conditions=True)
        else:
            if trial.slope * (math.inf if high is None else high.step - low.step) >= 0:
                high = low
            before, low = low, trial
        if high is None:
            step = _beyond(before, low)
            continue
        step = _between(low, high, origin, last_width=width)
        width = abs(high.step - low.step)
        if step in (low.step, high.step):  # no number lies between them
            break
    if low is origin:
        return NotFound(evaluations, shortest)
    return Found(low.step, low.point, low.slope, meets_conditions=False)


def backtracking(
    start: Point,
    direction: Tensor,
    slope: float,
    *,
    on: Sample,
    first: float,
    c1: float = 1e-4,
    max_evaluations: int = 25,
) -> Search:
    """Look for a step of enough decrease, from ``first`` downwards.

    It suits directions that come with their length, such as Newton's. Each new step is the
    minimum of the parabola through what is known, within 0.1 to 0.5 of the last one. Arguments
    and result are those of `strong_wolfe`.
    """
    origin = _Trial(0.0, slope, start)
    step, shortest = first, first
    for _ in range(max_evaluations):
        trial = yield from _try(start.x, direction, step, on)
        shortest = step
        if _is_enough(trial, origin, c1) and _is_lower(trial, origin):
            return Found(step, trial.point, trial.slope, meets_conditions=True)
        bend = trial.loss - start.loss - slope * step
        best = -slope * step * step / (2 * bend) if trial.is_finite and bend > 0 else math.nan
        step = min(max(best, 0.1 * step), 0.5 * step) if math.isfinite(best) else 0.1 * step
    return NotFound(max_evaluations, shortest)


def search(
    start: Point,
    direction: Tensor,
    slope: float,
    *,
    on: Sample,
    first: float,
    settings: dict[str, Any],
) -> Generator[Request, Any, tuple[Found | NotFound, bool]]:
    """Search along ``direction``; if that finds nothing, once more along steepest descent.

    Args:
        start: Where the line begins.
        direction: Own slice. It is passed over where ``slope`` is not below 0.
        slope: Its slope over all slices; NaN counts as not below 0.
        on: The round's sample.
        first: The first step to try along ``direction``.
        settings: Holds ``lr``, ``c1``, ``c2`` and ``max_evaluations``.

    Returns:
        What was found and whether it lies along ``direction``.
    """
    if start.square == 0:
        return NotFound(0, 0.0), False
    keys = {key: settings[key] for key in ("c1", "c2", "max_evaluations")}
    if slope < 0 and math.isfinite(slope):
        outcome = yield from strong_wolfe(start, direction, slope, on=on, first=first, **keys)
        if isinstance(outcome, Found):
            return outcome, True
    outcome = yield from strong_wolfe(
        start,
        -start.gradient,
        -start.square,
        on=on,
        first=first_step(start, settings["lr"]),
        **keys,
    )
    return outcome, False


def first_step(start: Point, lr: float) -> float:
    """Return the first step along steepest descent: one that moves by ``lr`` at most."""
    return lr / max(1.0, start.norm)


def check_search(lr: float, batch: int | None, tolerance: float) -> None:
    """Raise ValueError unless these settings of a program with a line search are in range."""
    check_above_0("lr", lr)
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be 1 sample or more, or None for all, got {batch}")
    check_from_0("tolerance", tolerance)


def check_wolfe(c1: float, c2: float, max_evaluations: int) -> None:
    """Raise ValueError unless steps can meet the strong Wolfe conditions."""
    if not 0 < c1 < c2 < 1:
        raise ValueError(f"c1 and c2 must be in order 0 < c1 < c2 < 1, got {c1} and {c2}")
    if max_evaluations < 1:
        raise ValueError(f"max_evaluations must be 1 or more, got {max_evaluations}")


def _try(x: Tensor, direction: Tensor, step: float, on: Sample) -> Generator[Request, Any, _Trial]:
    """Return the trial at x + step * direction."""
    at = x.add(direction, alpha=step)
    answer: Answer = yield Ask("gradient", at, on)
    gradient = answer.vector
    if not math.isfinite(answer.loss):
        return _Trial(step, math.nan, Point(at, answer.loss, gradient, math.nan))
    slope, square = (yield from dots((gradient, direction), (gradient, gradient))).tolist()
    return _Trial(step, slope, Point(at, answer.loss, gradient, square))


def _is_enough(trial: _Trial, origin: _Trial, c1: float) -> bool:
    """Whether the trial's loss is low enough."""
    return trial.is_finite and trial.loss <= origin.loss + c1 * trial.step * origin.slope


def _is_lower(a: _Trial, b: _Trial) -> bool:
    """Whether the loss is lower or, where rounding made it the same, the gradient shorter."""
    return a.loss < b.loss or (a.loss == b.loss and a.point.square < b.point.square)


def _beyond(before: _Trial, low: _Trial) -> float:
    """Return a longer step than ``low``, where the loss still falls."""
    least, most = low.step + 0.01 * (low.step - before.step), 10 * low.step
    best = _cubic_minimum(before, low)
    return min(max(best, least), most) if best > low.step else most  # NaN: most


def _between(low: _Trial, high: _Trial, origin: _Trial, *, last_width: float) -> float:
    """Return a step between the two: the cubic's minimum, or the middle where that crawls."""
    width = high.step - low.step
    if not high.is_finite:
        # The first step may have been far too long; later there is a finite one to keep to.
        return low.step + (0.1 if low is origin else 0.5) * width
    middle = low.step + 0.5 * width
    if abs(width) > 0.66 * last_width:
        return middle
    best = _cubic_minimum(low, high)
    if not math.isfinite(best):
        return middle
    share = min(max((best - low.step) / width, 1e-3), 1 - 1e-3)
    return low.step + share * width


def _cubic_minimum(a: _Trial, b: _Trial) -> float:
    """Return where the cubic through both losses and slopes has its minimum, or NaN."""
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.step - b.step)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), b.step - a.step)
    below = b.slope - a.slope + 2 * d2
    if below == 0:
        return math.nan
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / below
