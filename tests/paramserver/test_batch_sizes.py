from __future__ import annotations

import math
import pickle

import pytest

from async_sgd.rules import Asynchronous
from paramserver.batch_sizes import CABS, Averages, Rate, Sizer, largest
from paramserver.errors import TaskError
from paramserver.messages import Action, Kind, Message
from paramserver.optimizers import SGD, Momentum, Nesterov, Optimizer
from paramserver.schedules import CosineOnce, CosineRestarts, Schedule, Step
from paramserver.sequencer import Sequencer

WIDE = CABS(least=2, most=10**6, decay=0.5)


def sizer(spec: CABS = WIDE, *, lr: float = 0.5, num_sharing: int = 1) -> Sizer:
    rate = Rate(SGD(lr=lr), None)
    return Sizer(spec, rate, first=32, owned=10**6, num_sharing=num_sharing)


def test_a_batch_is_the_rate_times_the_noise_over_the_loss() -> None:
    one = sizer()
    one.add(noise=400.0, loss=2.0)
    assert one.size(1) == 0.5 * 400 / 2

    one.add(noise=1000.0, loss=1.0)

    noise, loss = 0.25 * 400 + 0.5 * 1000, 0.25 * 2 + 0.5 * 1
    assert one.size(2) == round(0.5 * noise / loss)


def test_before_the_first_gradient_a_batch_is_the_one_that_was_asked_for() -> None:
    assert sizer().size(0) == 32


@pytest.mark.parametrize(("wanted", "size"), [(20.4, 20), (20.6, 21), (3.0, 10), (300.0, 50)])
def test_a_size_is_rounded_and_kept_within_its_limits(wanted: float, size: int) -> None:
    one = sizer(CABS(least=10, most=50), lr=1.0)

    one.add(noise=wanted, loss=1.0)

    assert one.size(1) == size


def test_without_any_loss_left_a_batch_is_the_largest() -> None:
    one = sizer(CABS(most=50))

    one.add(noise=1.0, loss=0.0)

    assert one.size(1) == 50


def test_workers_that_make_one_update_share_its_samples() -> None:
    one = sizer(num_sharing=4)

    one.add(noise=400.0, loss=1.0)

    assert one.size(1) == 0.5 * 400 / 4


def test_no_batch_is_larger_than_what_a_worker_owns() -> None:
    assert largest(CABS(most=50), owned=30) == 30
    with pytest.raises(ValueError, match=r"^adaptive_batch: least=16 is more than the 10 samples"):
        largest(CABS(), owned=10)


def test_a_loss_below_zero_is_refused() -> None:
    one = sizer()
    one.add(noise=1.0, loss=0.25)

    with pytest.raises(TaskError, match=r"^the loss is -0.25 on average, and an adaptive batch"):
        one.add(noise=1.0, loss=-0.5)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        (SGD(lr=0.2), 1.0),
        (Momentum(lr=0.2, momentum=0.9), 10.0),
        (Momentum(lr=0.2, momentum=0.5, dampening=0.5), 1.0),
        (Nesterov(lr=0.2, momentum=0.75), 4.0),
    ],
)
def test_with_momentum_the_rate_is_that_of_a_lasting_direction(
    optimizer: Optimizer, factor: float
) -> None:
    assert Rate(optimizer, None).at(7) == pytest.approx(0.2 * factor)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Step(every=3, gamma=0.1), [0.2, 0.2, 0.2, 0.02, 0.02]),
        (CosineOnce(updates=4), [0.1 * (1 + math.cos(math.pi * v / 4)) for v in range(5)]),
        (CosineRestarts(t_0=2), [0.2, 0.1, 0.2, 0.1, 0.2]),
    ],
)
def test_the_rate_follows_the_schedule(schedule: Schedule, expected: list[float]) -> None:
    rate = Rate(SGD(lr=0.2), schedule)

    assert [rate.at(version) for version in range(5)] == pytest.approx(expected)
    assert Rate(SGD(lr=0.2), schedule).at(3) == pytest.approx(expected[3])  # as after a resume


def test_averages_go_on_from_a_checkpoint() -> None:
    before = Averages().after(3.0, 0.1, decay=0.95).after(2.0, 0.3, decay=0.95)

    after = Averages.of(before.state())

    assert after == before
    assert Averages.of(None) == Averages()
    assert before.weight == pytest.approx(1 - 0.95**2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"least": 1}, "least must be 2 samples or more"),
        ({"least": 8, "most": 4}, r"most must be least \(8\) or more, got 4"),
        ({"decay": 1.0}, "decay must be 0 or more and below 1, got 1.0"),
        ({"chunks": 1}, "chunks must be 2 or more, got 1"),
    ],
)
def test_impossible_values_are_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        CABS(**keys)  # type: ignore[arg-type]


def push(s: Sequencer, noise: float, loss: float) -> list[Message]:
    read = s.conservation.read_version(0)
    assert read is not None
    return s.on_push(
        Message(
            Kind.PUSH, incarnation=1, seq=s.seq(0) + 1, read_version=read, samples=2, loss=loss,
            norm=1.0, noise=noise,
        ),
        0.0,
    )  # fmt: skip


def sequencer() -> Sequencer:
    one = sizer()
    return Sequencer(Asynchronous().build(1), sizer=pickle.loads(pickle.dumps(one)))


def test_a_read_says_how_many_samples_come_next() -> None:
    s = sequencer()
    (first,) = s.on_join(0, 1, 0.0)

    _, second = push(s, noise=400.0, loss=2.0)

    assert (first.action, first.samples) == (Action.READ, 32)
    assert (second.action, second.samples) == (Action.READ, 100)
    assert s.progress().averages == Averages(weight=0.5, noise=200.0, loss=1.0)


def test_a_loss_below_zero_ends_a_run() -> None:
    s = sequencer()
    s.on_join(0, 1, 0.0)

    push(s, noise=400.0, loss=-2.0)

    assert isinstance(s.error, TaskError)
    assert s.ended is not None
