from __future__ import annotations

import json
import math

import pytest

from workers.stopping import EarlyStopping, Overfitting, Patience, Stopper


def stopped_at(config: EarlyStopping, values: list[float], train: list[float] | None = None) -> int:
    """Return after how many evaluations a run ends; 0 if it does not."""
    stopper = Stopper(config)
    for number, value in enumerate(values, start=1):
        metrics = {f"validation_{config.metric}": value}
        if train is not None:
            metrics[f"train_{config.metric}"] = train[number - 1]
        if stopper.evaluated(metrics) is not None:
            return number
    return 0


def test_patience_counts_evaluations_since_the_best() -> None:
    assert stopped_at(Patience(n=3), [0.9, 0.61, 0.52, 0.50, 0.51, 0.55, 0.58]) == 7
    assert stopped_at(Patience(n=4), [0.9, 0.61, 0.52, 0.50, 0.51, 0.55, 0.58]) == 0


def test_an_equal_value_is_no_better() -> None:
    assert stopped_at(Patience(n=2), [0.5, 0.5, 0.5]) == 3


def test_a_change_too_small_does_not_count() -> None:
    assert stopped_at(Patience(n=2, change=0.1), [1.0, 0.95, 0.91]) == 3
    assert stopped_at(Patience(n=2, change=0.1), [1.0, 0.95, 0.89, 0.85, 0.80]) == 5
    assert stopped_at(Patience(n=2), [1.0, 0.95, 0.91]) == 0


def test_more_is_better_for_a_metric_that_is_no_loss() -> None:
    assert stopped_at(Patience(n=2, metric="accuracy"), [0.5, 0.6, 0.59, 0.58]) == 4
    assert stopped_at(Patience(n=2, metric="accuracy", change=0.05), [0.5, 0.54, 0.56, 0.57]) == 0


def test_what_is_not_a_number_is_never_better() -> None:
    assert stopped_at(Patience(n=2), [math.nan, math.nan]) == 2
    assert stopped_at(Patience(n=2), [0.5, math.nan, math.nan]) == 3


def test_overfitting_stops_while_training_still_goes_down() -> None:
    rising = [0.50, 0.51, 0.52, 0.53]

    assert stopped_at(Overfitting(n=2), rising, train=[0.40, 0.30, 0.20, 0.10]) == 3


def test_overfitting_goes_on_if_training_has_come_to_rest_too() -> None:
    rising = [0.50, 0.51, 0.52, 0.53]

    assert stopped_at(Overfitting(n=2), rising, train=[0.40, 0.41, 0.42, 0.40]) == 0
    assert stopped_at(Overfitting(n=2), rising, train=[0.40, 0.41, 0.42, 0.39]) == 4


def test_it_says_why() -> None:
    stopper = Stopper(Patience(n=1))
    stopper.evaluated({"validation_loss": 0.25})

    reason = stopper.evaluated({"validation_loss": 0.5})

    assert reason == "validation_loss no better for 1 evaluations (best 0.25)"


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    stopper = Stopper(Patience(metric="f1"))

    with pytest.raises(ValueError, match=r"^early stopping watches 'f1'; .* has accuracy, loss$"):
        stopper.evaluated({"validation_loss": 1.0, "validation_accuracy": 0.5, "f1": 0.1})


def test_a_stopper_that_goes_on_from_its_state_stops_at_the_same_place() -> None:
    values = [0.9, 0.5, 0.6, 0.7, 0.8, 0.9]
    for cut in range(len(values)):
        stopper = Stopper(Patience(n=3))
        for value in values[:cut]:
            assert stopper.evaluated({"validation_loss": value}) is None or cut > 4
        stopper = Stopper(Patience(n=3), json.loads(json.dumps(stopper.state())))

        reasons = [stopper.evaluated({"validation_loss": value}) for value in values[cut:]]

        assert [reason is not None for reason in reasons] == [
            number >= 5 for number in range(cut + 1, len(values) + 1)
        ]


def test_who_has_stopped_has_enough_also_later_unless_more_evaluations_may_pass() -> None:
    stopper = Stopper(Patience(n=1))
    assert stopper.enough is None
    stopper.evaluated({"validation_loss": 0.25})
    reason = stopper.evaluated({"validation_loss": 0.5})
    state = json.loads(json.dumps(stopper.state()))

    assert Stopper(Patience(n=1), state).enough == reason
    assert Stopper(Patience(n=2), state).enough is None


@pytest.mark.parametrize("kind", [Patience, Overfitting])
def test_impossible_values_are_refused(kind: type[Patience]) -> None:
    with pytest.raises(ValueError, match=r"^n must be 1 evaluation or more, got 0$"):
        kind(n=0)
    with pytest.raises(ValueError, match=r"^change must be 0 or more, got -1$"):
        kind(change=-1)
