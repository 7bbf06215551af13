"""Truncated gradients of a scalar linear recurrence, against sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from paramserver.errors import TaskError
from tests.support.recurrences import (
    DOUBLE,
    LinearRecurrence,
    by_hand,
    half_squares,
    recurrence_task,
    series,
    zero,
)
from workers.config import RunConfig
from workers.curriculum import Linear
from workers.programs import check_recurrent
from workers.recurrent import Carried, Recurrent
from workers.task import Data, Task, batches_of, build_data, build_model
from workers.tasks.text import CharacterNet, next_loss, zero_state
from workers.windows import Series, TensorSeries, Windows

A, B, STEPS = 0.9, 0.5, 24


def windows_of(task: Task) -> Windows:
    size = task.batch_size
    of = batches_of(task, build_data(task).train, size, seed=0, worker=0, num_workers=1)
    assert isinstance(of, Windows)
    return of


def unrolled(task: Task, num_windows: int, model: nn.Module | None = None) -> list[Tensor]:
    """Return loss and gradients of each window, one after the other; parameters do not move."""
    model = model or task.model()
    parameters, how, of = list(model.parameters()), task.recurrent, windows_of(task)
    assert how is not None
    carried, found = Carried(), []
    for clock in range(num_windows):
        window = of.read(build_data(task).train, clock)
        loss, state = how.unroll(model, window, carried.at(clock))
        carried.keep(clock + 1, state)
        grads = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([loss.detach()[None], *(g.flatten() for g in grads)]))
    return found


def steps_of(task: Task) -> tuple[list[float], list[float]]:
    data = build_data(task).train
    assert isinstance(data, Series)
    inputs, targets = data.read(torch.tensor([0]), data.num_steps)
    return inputs[0].tolist(), targets[0].tolist()


@pytest.mark.parametrize("k1", [1, 4, 6])
@pytest.mark.parametrize("k2", [1, 3, 4, 9, 24])
def test_a_truncated_gradient_is_the_closed_form(k1: int, k2: int) -> None:
    task = recurrence_task(k1, k2, num_steps=STEPS, a=A, b=B)
    x, y = steps_of(task)

    found = unrolled(task, STEPS // k1)

    for number, of_window in enumerate(found):
        stop = (number + 1) * k1
        expected = by_hand(
            A, B, x, y, 0, range(stop - min(k1, k2), stop), detached_before=max(0, stop - k2)
        )
        assert of_window.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("a", [0.5, 1.0, -1.1])
@pytest.mark.parametrize("k2", [6, 11, 12, 30])
def test_an_impulse_comes_back_as_a_to_the_distance_if_k2_reaches_it(a: float, k2: int) -> None:
    length = 12
    inputs, targets = torch.zeros(length, dtype=DOUBLE), torch.zeros(length, dtype=DOUBLE)
    inputs[0] = 1.0

    def last_state(model: nn.Module, batch: tuple[Tensor, ...], state: tuple[Tensor, ...]):  # type: ignore[no-untyped-def]
        states, state = model(batch[0], state)
        return states.mean(), state

    how = Recurrent(initial=zero, loss=last_state, k1=1, k2=k2)
    task = replace(
        recurrence_task(1, a=a),
        data=lambda: Data(*2 * [TensorSeries(inputs, targets, window=1)]),
        recurrent=how,
    )

    by_b = unrolled(task, length)[-1][2]

    assert float(by_b) == pytest.approx(a ** (length - 1) if k2 >= length else 0.0, rel=1e-12)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_once_k2_covers_a_stream_windows_sum_up_to_the_whole_gradient(cell: str) -> None:
    num_steps, k1 = 20, 5
    torch.manual_seed(0)
    model = CharacterNet(cell, 7, 6, 2).double()  # type: ignore[arg-type]
    text = torch.randint(7, (2 * num_steps + 1,), generator=torch.Generator().manual_seed(1))
    data = TensorSeries(text[:-1], text[1:], window=k1)

    def gradient(k2: int) -> Tensor:
        how = Recurrent(initial=zero_state, loss=next_loss, k1=k1, k2=k2)
        task = replace(
            recurrence_task(k1, batch_size=2), data=lambda: Data(data, data), recurrent=how
        )
        return torch.stack(unrolled(task, num_steps // k1, model)).mean(0)

    batch = data.read(torch.tensor([0, num_steps]), num_steps)
    loss, _ = next_loss(model, batch, zero_state(model, 2))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    whole = torch.cat([loss.detach()[None], *(g.flatten() for g in grads)])

    torch.testing.assert_close(gradient(num_steps), whole, rtol=1e-10, atol=1e-12)
    assert float((gradient(num_steps // 2) - whole).abs().max()) > 1e-6


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_windows_with_the_state_carried_are_one_long_forward(cell: str) -> None:
    torch.manual_seed(0)
    model = CharacterNet(cell, 7, 6, 1).double()  # type: ignore[arg-type]
    text = torch.randint(7, (31,), generator=torch.Generator().manual_seed(1))
    data = TensorSeries(text[:-1], text[1:], window=5)
    how = Recurrent(initial=zero_state, loss=next_loss, k1=5)
    task = replace(recurrence_task(5), data=lambda: Data(data, data), recurrent=how)

    losses = [float(of_window[0]) for of_window in unrolled(task, 6, model)]

    one_long = how.whole(model, data.read(torch.tensor([0]), 30)).item()
    assert sum(losses) / 6 == pytest.approx(one_long, rel=1e-12)
    alone = how.whole(model, data.read(torch.tensor([5]), 5)).item()  # from the zero state
    assert losses[1] != pytest.approx(alone)


def test_a_window_that_begins_a_stream_begins_with_the_initial_state() -> None:
    task = recurrence_task(6, num_steps=STEPS)

    found = unrolled(task, 2 * STEPS // 6)

    assert torch.equal(torch.stack(found[:4]), torch.stack(found[4:]))


def test_a_state_is_for_one_step_alone() -> None:
    carried, state = Carried(), (torch.ones(1),)
    carried.keep(3, state)

    assert carried.at(3) is state
    assert carried.at(2) is carried.at(4) is None
    carried.reset()
    assert carried.at(3) is None


def test_a_carried_state_has_no_history() -> None:
    task = recurrence_task(4, 9)
    model, how, of = task.model(), task.recurrent, windows_of(task)
    assert how is not None

    _, state = how.unroll(model, of.read(build_data(task).train, 2), None)

    assert state is not None
    assert not any(tensor.requires_grad for tensor in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0}, "k1 must be 1 step or more, got 0"),
        ({"k2": 0}, "k2 must be 1 step or more, got 0"),
        ({"reset": "push"}, "reset must be 'never' or 'pull', got 'push'"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Recurrent(initial=zero, loss=half_squares, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "program", "message"),
    [
        (
            RunConfig(gradient="forward"),
            None,
            "task recurrence goes back through time, which gradient=forward does not: use ",
        ),
        (
            RunConfig(curriculum=Linear()),
            None,
            "task recurrence reads windows that follow each other, and a curriculum would draw",
        ),
        (RunConfig(), "lbfgs", "lbfgs is a round program, answered on windows of task recurrence"),
    ],
)
def test_what_a_recurrent_task_cannot_be_trained_with_is_refused(
    config: RunConfig, program: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_recurrent(recurrence_task(4), config, program)


def test_a_round_program_may_have_windows_that_nothing_is_carried_to() -> None:
    check_recurrent(recurrence_task(4, reset="pull"), RunConfig(), "lbfgs")

    with pytest.raises(ValueError, match="use reset=pull and no k2, or a push rule"):
        check_recurrent(recurrence_task(4, 8, reset="pull"), RunConfig(), "lbfgs")


def test_training_data_that_are_no_series_are_refused() -> None:
    task = recurrence_task(4)
    with pytest.raises(TaskError, match=r"training data must be a Series, such as TensorSeries"):
        batches_of(task, _Plain(), 1, seed=0, worker=0, num_workers=1)
    with pytest.raises(TaskError, match=r"by windows of k1=4 steps, and counts examples of 5: "):
        batches_of(task, series(24, 5), 1, seed=0, worker=0, num_workers=1)


class _Plain:
    def __len__(self) -> int:
        return 3

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (indices,)


def test_a_model_of_the_recurrence_is_what_it_says() -> None:
    model = LinearRecurrence(A, B)
    states, (last,) = model(torch.tensor([[1.0, 0.0, 2.0]], dtype=DOUBLE), zero(model, 1))

    assert states[0].tolist() == pytest.approx([B, A * B, A * A * B + 2 * B])
    assert torch.equal(last, states[:, -1])
    assert build_model(recurrence_task(4), 0).a.item() == A
