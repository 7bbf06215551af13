"""Early stopping: a run ends when its validation data say that it no longer gets better.

    validation loss   .90  .61  .52  .50  .51  .55  .58        patience:n=3 stops here, at .58,
    evaluation          1    2    3    4    5    6    7        and .50 is what is kept

Each evaluation is of a consistent snapshot, so every value belongs to one version. The version with
the best value is kept; what came after it is thrown away.

Source: Prechelt, "Early Stopping - But When?", in Neural Networks: Tricks of the Trade, 1998.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from paramserver.registry import Registry
from workers.examiner import Keep
from workers.task import is_minimised


class EarlyStopping(Protocol):
    """When a run is to end early: the configuration of a `Stopper`."""

    @property
    def n(self) -> int:
        """Evaluations that may pass without the metric becoming better."""

    @property
    def change(self) -> float:
        """By how much more than before a value must be better to count."""

    @property
    def metric(self) -> str:
        """What is watched on the validation data."""

    @property
    def needs_train(self) -> bool:
        """Whether the metric is wanted on training samples, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Stop when a metric on the validation data has not become better for n evaluations."""

    n: int = 5
    """Evaluations in a row that may pass without the metric becoming better, 1 or more."""

    change: float = 0.0
    """By how much more than before a value must be better to count, 0 or more."""

    metric: str = "loss"
    """Which metric; less is better if its name ends in loss, error or distance."""

    needs_train: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self.n, self.change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overfitting:
    """As patience, and only while the metric still becomes better on training samples.

    A run whose training has come to rest as well goes on to the end of its budget: nothing is lost
    by it but time.
    """

    n: int = 5
    """Evaluations in a row that may pass without the metric becoming better, 1 or more."""

    change: float = 0.0
    """By how much more than before a value must be better to count, 0 or more."""

    metric: str = "loss"
    """Which metric; less is better if its name ends in loss, error or distance."""

    needs_train: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.n, self.change)


STOPPINGS: Registry[EarlyStopping] = Registry("early stopping")
STOPPINGS.register("patience", Patience, source="Prechelt 1998, the criterion UP")
STOPPINGS.register("overfitting", Overfitting, source="Prechelt 1998; the two-part condition")


class Stopper:
    """Hears of every evaluation of a run, and says when it is enough."""

    def __init__(self, config: EarlyStopping, state: Mapping[str, Any] | None = None) -> None:
        """Begin, or go on from what `state` said."""
        self._config = config
        state = state or {}
        self._best: float | None = state.get("best")
        self._train: float = state.get("train", math.nan)  # the metric on training samples then
        self._passed: int = state.get("passed", 0)  # evaluations since then
        self.enough: str | None = state.get("enough")
        """Why the run has ended early; None if it has not, or is to go on for more evaluations."""
        if self._passed < config.n:
            self.enough = None

    @property
    def metric(self) -> str:
        """What is watched, as evaluations name it."""
        return f"validation_{self._config.metric}"

    def evaluated(self, metrics: Mapping[str, float]) -> str | None:
        """Count an evaluation; return why the run is to end, if it is.

        Raises:
            ValueError: ``metrics`` lack the one that is watched.
        """
        value = metrics.get(self.metric)
        if value is None:
            there = sorted(name for name in metrics if name.startswith("validation_"))
            raise ValueError(
                f"early stopping watches {self._config.metric!r}; on validation data the task has "
                f"{', '.join(name.removeprefix('validation_') for name in there) or 'none'}"
            )
        if self._is_better(value):
            self._best, self._passed, self.enough = value, 0, None
            self._train = metrics.get(f"train_{self._config.metric}", math.nan)
            return None
        if self.enough is not None:  # the last evaluation of a run that it has ended
            return self.enough
        self._passed += 1
        if self._passed < self._config.n or not self._still_learns(metrics):
            return None
        best = "it was never a number" if self._best is None else f"best {self._best:.4g}"
        self.enough = f"{self.metric} no better for {self._passed} evaluations ({best})"
        return self.enough

    def state(self) -> dict[str, Any]:
        """Return what it takes to go on, as JSON can hold it."""
        return {
            "best": self._best,
            "train": self._train,
            "passed": self._passed,
            "enough": self.enough,
        }

    def _is_better(self, value: float) -> bool:
        if self._best is None:
            return not math.isnan(value)
        margin = -self._config.change if is_minimised(self.metric) else self._config.change
        return Keep(self.metric, self._best + margin).better(value)

    def _still_learns(self, metrics: Mapping[str, float]) -> bool:
        """Whether training has made the metric better since the best version, if that matters."""
        if not self._config.needs_train:
            return True
        return Keep(self.metric, self._train).better(metrics[f"train_{self._config.metric}"])


def _check(n: int, change: float) -> None:
    if n < 1:
        raise ValueError(f"n must be 1 evaluation or more, got {n}")
    if not 0 <= change < math.inf:
        raise ValueError(f"change must be 0 or more, got {change}")
