from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.averaging import AllIterates, Average
from paramserver.clipping import Clip, ClipNorm
from paramserver.compensation import Compensation, Compensator
from paramserver.errors import LayoutError, ProtocolError, ResourceError
from paramserver.messages import Action, Kind, Message
from paramserver.optimizers import OPTIMIZERS, SGD, Adam, Optimizer, Subgradient
from paramserver.schedules import Exponential, Schedule
from paramserver.shard import Shard

N = 64


def vector(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def shard(
    optimizer: Optimizer | None = None,
    *,
    buffers: int = 4,
    schedule: Schedule | None = None,
    average: Average | None = None,
    clip: Clip | None = None,
    compensation: Compensation | None = None,
) -> Shard:
    return Shard(
        vector(0),
        optimizer or SGD(lr=1.0),
        [torch.zeros(N) for _ in range(buffers)],
        schedule=schedule,
        average=average,
        clip=clip,
        compensation=compensation,
    )


def order(action: Action, worker: int, version: int, **of: float) -> Message:
    fields = {"incarnation": 1, "step": 1, "scale": 1.0, "samples": 1, **of}
    return Message(Kind.ORDER, action, worker, version=version, **fields)  # type: ignore[arg-type]


def take(s: Shard, grad: Tensor, version: int, worker: int = 0, **of: float) -> None:
    s.hold(worker, 1, 1, grad)
    s.execute(order(Action.TAKE, worker, version, seq=1, **of))


def read(s: Shard, worker: int) -> int:
    lease = s.execute(order(Action.READ, worker, s.version))
    assert lease is not None
    return lease.buffer


def test_an_update_nobody_reads_is_written_in_place() -> None:
    s = shard()
    before = s.snapshots.params.data_ptr()
    read(s, 0)

    take(s, vector(1), version=1, worker=0)

    assert s.snapshots.params.data_ptr() == before
    assert torch.equal(s.snapshots.params, vector(0) - vector(1))


def test_an_update_somebody_else_reads_is_written_to_a_copy() -> None:
    s = shard()
    read(s, 0)
    other = s.snapshots.params
    read(s, 1)

    take(s, vector(1), version=1, worker=0)

    assert s.snapshots.params.data_ptr() != other.data_ptr()
    assert torch.equal(other, vector(0))
    assert torch.equal(s.snapshots.params, vector(0) - vector(1))


def test_one_buffer_a_reader_plus_one_is_enough_whoever_pushes() -> None:
    s = shard(buffers=4)
    for worker in range(3):
        read(s, worker)

    for version, worker in enumerate([0, 0, 1, 2, 1, 0, 2, 2], start=1):
        take(s, vector(version), version, worker)
        read(s, worker)

    assert s.snapshots.num_leases == 3


def test_more_readers_than_buffers_is_an_error_and_nothing_is_written() -> None:
    s = shard(buffers=1)
    read(s, 1)

    with pytest.raises(ResourceError, match="all 1 snapshot buffers are read"):
        take(s, vector(1), version=1, worker=0)

    assert torch.equal(s.snapshots.params, vector(0))


@pytest.mark.parametrize("action", [Action.RELEASE, Action.LEAVE, Action.DISCARD])
def test_a_lease_ends_with(action: Action) -> None:
    s = shard()
    read(s, 1)

    s.execute(order(action, 1, 0))

    assert s.snapshots.num_leases == 0


@pytest.mark.parametrize(
    "grad", [torch.zeros(N + 1), torch.zeros(1, N), torch.zeros(N, dtype=torch.float64)]
)
def test_a_gradient_of_another_shape_is_not_held(grad: Tensor) -> None:
    s = shard()

    with pytest.raises(LayoutError, match=r"^expected a gradient of 64 torch.float32, got"):
        s.hold(0, 1, 1, grad)
    with pytest.raises(ProtocolError, match="which is not held"):
        s.execute(order(Action.TAKE, 0, 1, seq=1))


@pytest.mark.parametrize("held", [(2, 1), (1, 2)])
def test_only_the_very_push_that_was_ordered_is_taken(held: tuple[int, int]) -> None:
    s = shard()
    s.hold(0, *held, vector(1))

    with pytest.raises(ProtocolError, match="takes push 1 of worker 0, which is not held"):
        s.execute(order(Action.TAKE, 0, 1, seq=1))

    assert torch.equal(s.snapshots.params, vector(0))


@pytest.mark.parametrize("action", [Action.LEAVE, Action.DISCARD])
def test_what_was_held_is_forgotten_with(action: Action) -> None:
    s = shard()
    s.hold(0, 1, 1, vector(1))
    s.execute(order(action, 0, 0))

    with pytest.raises(ProtocolError, match="which is not held"):
        s.execute(order(Action.TAKE, 0, 1, seq=1))


def test_an_order_for_another_version_is_refused() -> None:
    with pytest.raises(ProtocolError, match="an order for version 3 came at 0"):
        shard().execute(order(Action.READ, 0, 3))


def gather(s: Shard, grads: Sequence[Tensor], of: Sequence[dict[str, float]]) -> None:
    for worker, (grad, fields) in enumerate(zip(grads, of, strict=True)):
        is_last = worker == len(grads) - 1
        take(s, grad.clone(), int(is_last), worker, step=int(is_last), **fields)


def test_a_gathered_update_is_the_mean_weighted_by_samples() -> None:
    s = shard()
    grads = [vector(1), vector(2), vector(3)]

    gather(s, grads, [{"samples": 8}, {"samples": 8}, {"samples": 4}])

    mean = (8 * grads[0] + 8 * grads[1] + 4 * grads[2]) / 20
    torch.testing.assert_close(s.snapshots.params, vector(0) - mean)
    assert s.version == 1


def test_gathered_sgd_is_the_mean_of_the_damped_gradients() -> None:
    s = shard()
    grads = [vector(1), vector(2)]

    gather(s, grads, [{"samples": 1, "scale": 0.5}, {"samples": 3, "scale": 0.25}])

    mean = (0.5 * grads[0] + 3 * 0.25 * grads[1]) / 4
    torch.testing.assert_close(s.snapshots.params, vector(0) - mean)


def test_gathered_equal_gradients_of_full_scale_are_one_step_of_the_optimizer() -> None:
    alone, together = shard(Adam(lr=0.1)), shard(Adam(lr=0.1))
    take(alone, vector(1), version=1)

    gather(together, [vector(1), vector(1)], [{}, {}])

    assert torch.equal(alone.snapshots.params, together.snapshots.params)


def test_a_departure_can_complete_an_update() -> None:
    s = shard()
    take(s, vector(1), version=0, worker=0, step=0)

    s.execute(order(Action.STEP, 1, 1))

    assert torch.equal(s.snapshots.params, vector(0) - vector(1))


def test_the_next_update_starts_from_nothing_gathered() -> None:
    s = shard()
    gather(s, [vector(1), vector(2)], [{}, {}])
    after_first = s.snapshots.params.clone()

    take(s, vector(3), version=2)

    assert torch.equal(s.snapshots.params, after_first - vector(3))


def test_the_step_of_adam_is_damped_though_its_gradient_is_not() -> None:
    full, damped = shard(Adam(lr=0.1)), shard(Adam(lr=0.1))
    take(full, vector(1), version=1)

    take(damped, vector(1), version=1, scale=0.5)

    torch.testing.assert_close(
        damped.snapshots.params - vector(0), (full.snapshots.params - vector(0)) / 2
    )


@pytest.mark.parametrize(
    "name",
    [
        *("momentum", "nesterov", "adagrad", "adadelta", "adam", "rmsprop"),
        *("local-momentum", "dana", "dana-slim", "delayed-nesterov:every=2"),
    ],
)
def test_a_restored_shard_goes_on_bit_for_bit(name: str) -> None:
    optimizer, schedule = OPTIMIZERS.parse(name), Exponential(gamma=0.9)
    s = shard(optimizer, schedule=schedule)
    for version in (1, 2, 3):
        take(s, vector(version), version)
    s.execute(order(Action.SAVE, -1, 3))
    saved = s.saved
    assert saved is not None
    for version in (4, 5):
        take(s, vector(version), version)

    room = [torch.zeros(N) for _ in range(4)]
    again = Shard(saved.params, optimizer, room, schedule=schedule, version=saved.version)
    again.restore(saved.rule, saved.scheduler)
    for version in (4, 5):
        take(again, vector(version), version)

    assert torch.equal(again.snapshots.params, s.snapshots.params)
    assert again.rule.param_groups[0]["lr"] == s.rule.param_groups[0]["lr"]


def test_what_was_saved_does_not_move() -> None:
    s = shard(Adam(lr=0.1))
    take(s, vector(1), version=1)
    s.execute(order(Action.SAVE, -1, 1))
    saved = s.saved
    assert saved is not None
    params, moment = saved.params.clone(), saved.rule["state"][0]["exp_avg"].clone()

    take(s, vector(2), version=2)

    assert saved.version == 1
    assert torch.equal(saved.params, params)
    assert torch.equal(saved.rule["state"][0]["exp_avg"], moment)


def test_the_schedule_counts_updates_and_not_gradients() -> None:
    s = shard(SGD(lr=1.0), schedule=Exponential(gamma=0.5))
    take(s, vector(1), version=0, worker=0, step=0)
    take(s, vector(2), version=1, worker=1, step=1)
    s.execute(order(Action.DISCARD, 2, 1))
    take(s, vector(3), version=2)

    assert s.rule.param_groups[0]["lr"] == 0.25


def test_a_gathered_gradient_is_clipped_once_by_its_own_norm() -> None:
    s = Shard(
        vector(0), SGD(lr=1.0), [torch.zeros(N)] * 1, clip=ClipNorm(max_norm=1.0, where="reduced")
    )

    gather(s, [vector(1), vector(2)], [{}, {}])

    mean = nn.Parameter(torch.zeros(N))
    mean.grad = (vector(1) + vector(2)) / 2
    nn.utils.clip_grad_norm_([mean], 1.0)
    torch.testing.assert_close(s.snapshots.params, vector(0) - mean.grad)


def test_readers_see_the_average_and_workers_the_parameters() -> None:
    s = shard(average=AllIterates(start=1))
    iterates = []
    for version in (1, 2, 3):
        take(s, vector(version), version)
        iterates.append(s.snapshots.params.clone())

    reader, worker = read(s, -1), read(s, 0)

    mean = torch.stack(iterates[1:]).double().mean(0).float()
    torch.testing.assert_close(s.snapshots._buffers[reader], mean)
    assert torch.equal(s.snapshots._buffers[worker], iterates[-1])


def test_an_average_goes_on_from_what_was_saved() -> None:
    s = shard(Adam(lr=0.1), average=AllIterates())
    take(s, vector(1), 1)
    s.execute(order(Action.SAVE, -1, 1))
    saved = s.saved
    assert saved is not None
    take(s, vector(2), 2)

    room = [torch.zeros(N) for _ in range(4)]
    again = Shard(saved.params, Adam(lr=0.1), room, average=AllIterates(), version=1)
    again.restore(saved.rule, saved.scheduler)
    take(again, vector(2), 2)

    assert s.averager is not None
    assert again.averager is not None
    mine, theirs = again.averager.average(), s.averager.average()
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine, theirs)


def test_a_rule_is_told_the_loss_and_the_norm_of_what_it_applies() -> None:
    s = shard(Subgradient(step="polyak", optimum=1.0))
    gradient = vector(1)
    norm = float(gradient.norm())

    take(s, gradient, 1, loss=3.0, norm=norm)

    torch.testing.assert_close(s.snapshots.params, vector(0) - 2.0 / norm**2 * gradient)


def test_a_rule_is_told_those_of_a_gathered_mean() -> None:
    s = shard(Subgradient(step="polyak", optimum=1.0))
    first, second = vector(1), vector(2)
    take(s, first, 0, worker=0, step=0, loss=3.0, samples=1)

    take(s, second, 1, worker=1, loss=5.0, samples=3)

    mean = (first + 3 * second) / 4
    step = (4.5 - 1.0) / float(mean.norm()) ** 2
    torch.testing.assert_close(s.snapshots.params, vector(0) - step * mean)


class Doubling:
    """Doubles every gradient, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Tensor, Tensor, int, int, float]] = []
        self.updates: list[Tensor] = []

    def build(self, params: Tensor) -> Compensator:
        return self

    def correct_(
        self, grad: Tensor, params: Tensor, read: Tensor, *, worker: int, staleness: int, lr: float
    ) -> None:
        grad.mul_(2)
        self.told.append((params.clone(), read.clone(), worker, staleness, lr))

    def on_update(self, params: Tensor) -> None:
        self.updates.append(params.clone())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def test_a_compensator_sees_what_the_pusher_read_whoever_pushed_meanwhile() -> None:
    doubling = Doubling()
    s = shard(compensation=doubling, schedule=Exponential(gamma=0.5))
    iterates = [vector(0)]
    read(s, 0)
    read(s, 1)
    for version, worker in enumerate([0, 0, 1], start=1):
        take(s, vector(version), version, worker, staleness=2 * worker)
        read(s, worker)
        iterates.append(s.snapshots.params.clone())

    told = doubling.told
    assert [(worker, staleness, lr) for _, _, worker, staleness, lr in told] == [
        (0, 0, 1.0),
        (0, 0, 0.5),
        (1, 2, 0.25),
    ]
    for (now, was, _, staleness, _), version in zip(told, range(3), strict=True):
        assert torch.equal(now, iterates[version])
        assert torch.equal(was, iterates[version - staleness])
    torch.testing.assert_close(torch.stack(doubling.updates), torch.stack(iterates[1:]))
    torch.testing.assert_close(iterates[1], vector(0) - 2 * vector(1))


def test_an_update_that_is_compensated_is_still_written_in_place() -> None:
    s = shard(compensation=Doubling())
    before = s.snapshots.params.data_ptr()
    read(s, 0)

    take(s, vector(1), version=1, worker=0)

    assert s.snapshots.params.data_ptr() == before


def test_gathered_gradients_are_compensated_one_by_one_and_damped_as_ever() -> None:
    doubling = Doubling()
    s = shard(compensation=doubling)
    read(s, 0)
    read(s, 1)

    gather(s, [vector(1), vector(2)], [{"samples": 1, "scale": 0.5}, {"samples": 3}])

    mean = (0.5 * 2 * vector(1) + 3 * 2 * vector(2)) / 4
    torch.testing.assert_close(s.snapshots.params, vector(0) - mean)
    assert [worker for _, _, worker, _, _ in doubling.told] == [0, 1]
    assert len(doubling.updates) == 1


@pytest.mark.parametrize("num_pushes", [1, 2])
def test_the_server_clips_what_was_compensated_by_its_own_norm(num_pushes: int) -> None:
    clip = ClipNorm(max_norm=1.0, where="reduced")
    s = shard(compensation=Doubling(), clip=clip)
    grad = 0.6 * vector(1) / vector(1).norm()
    for worker in range(num_pushes):
        read(s, worker)

    gather(s, [grad] * num_pushes, [{"norm": 0.6}] * num_pushes)

    torch.testing.assert_close(s.snapshots.params, vector(0) - grad / 0.6)


def test_a_rule_is_told_the_norm_of_what_was_compensated() -> None:
    s = shard(Subgradient(step="polyak", optimum=1.0), compensation=Doubling())
    read(s, 0)

    take(s, vector(1), 1, loss=3.0, norm=float(vector(1).norm()))

    doubled = 2 * vector(1)
    step = 2.0 / float(doubled.norm()) ** 2
    torch.testing.assert_close(s.snapshots.params, vector(0) - step * doubled)


@pytest.mark.parametrize("action", [Action.DISCARD, Action.LEAVE])
def test_a_push_that_is_not_taken_is_not_compensated(action: Action) -> None:
    doubling = Doubling()
    s = shard(compensation=doubling)
    read(s, 0)
    s.hold(0, 1, 1, vector(1))

    s.execute(order(action, 0, 0))

    assert doubling.told == []


def test_who_has_left_is_compensated_from_what_its_successor_read() -> None:
    doubling = Doubling()
    s = shard(compensation=doubling)
    read(s, 0)
    read(s, 1)
    take(s, vector(1), 1, worker=1)
    s.execute(order(Action.LEAVE, 0, 1))
    read(s, 0)

    take(s, vector(2), 2, worker=0)

    _, was, _, staleness, _ = doubling.told[-1]
    assert staleness == 0
    assert torch.equal(was, doubling.updates[0])
