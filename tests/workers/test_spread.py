from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from paramserver.batch_sizes import CABS, Rate, Sizer
from paramserver.errors import TaskError
from paramserver.groups import Group
from paramserver.layout import Layout
from paramserver.optimizers import SGD, Adam, AnyOptimizer
from paramserver.rounds import Sample
from tests.support.noisy_bowl import TASK, noise
from workers.config import RunConfig
from workers.estimate import Estimator
from workers.gradients import BoundModel
from workers.programs import check_adaptive
from workers.samples import Piece, indices
from workers.spread import ChunkedGradient
from workers.task import Batch, Data, Task, TensorExamples, build_data, build_model
from workers.tasks import task


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))


def half_squares(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    mean: Tensor = (x @ model.get_parameter("w") - y).square().mean() / 2
    return mean


def points() -> TensorExamples:
    drawn = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorExamples(drawn[:, :2], drawn[:, 2])


LINE = Task(
    name="line",
    model=Line,
    data=lambda: Data(points(), points()),
    loss=half_squares,
    headline="loss",
)


def chunked(
    what: Task, num_chunks: int, num_shards: int = 1
) -> tuple[ChunkedGradient, list[Tensor]]:
    model = build_model(what, 0)
    layout = Layout.of(model)
    cuts = layout.cuts(num_shards)
    vector = layout.flatten(model)
    bound = BoundModel(model, layout, cuts)
    bound.read([vector[cut.start : cut.stop] for cut in cuts])
    slots = [torch.zeros(len(cut), dtype=layout.dtype) for cut in cuts]
    bound.write_gradients_to(slots)
    return ChunkedGradient(what, bound, slots, num_chunks), slots


@pytest.mark.parametrize(("size", "num_chunks"), [(4, 2), (3, 2), (4, 3)])
def test_the_noise_is_without_bias_over_all_batches(size: int, num_chunks: int) -> None:
    """Of N samples n drawn without replacement have covariance S (1/n - 1/N), S over N - 1."""
    (x, y), w = points().batch(torch.arange(6)), torch.tensor([0.5, -1.0], dtype=torch.float64)
    exact = ((x @ w - y)[:, None] * x).T.cov().trace().item()
    gradient, _ = chunked(LINE, num_chunks)

    noises = [gradient(points().batch(torch.tensor(p)))[2] for p in permutations(range(6), size)]

    assert sum(noises) / len(noises) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_gradient_is_that_of_all_samples_at_once(num_shards: int) -> None:
    digits = task("digits:hidden=16")
    batch = build_data(digits).train.batch(torch.arange(30))
    gradient, slots = chunked(digits, 4, num_shards)

    loss, norm, _ = gradient(batch)

    model = build_model(digits, 0)
    whole = digits.loss(model, batch)
    whole.backward()  # type: ignore[no-untyped-call]
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    layout = Layout.of(model)
    ours = torch.cat([torch.cat(slots)[slot.offset : slot.end] for slot in layout.slots])
    torch.testing.assert_close(ours, expected)
    assert loss == pytest.approx(whole.item())
    assert norm == pytest.approx(expected.norm().item())


def test_a_batch_smaller_than_its_chunks_is_cut_into_samples() -> None:
    gradient, _ = chunked(LINE, 4)
    few = points().batch(torch.arange(2))

    found = gradient(few)[2]

    w = torch.tensor([0.5, -1.0], dtype=torch.float64)
    one, other = (few[0] @ w - few[1])[:, None] * few[0]
    assert found == pytest.approx(float((one - other).square().sum()) / 2)


def test_equal_samples_have_no_noise() -> None:
    gradient, _ = chunked(LINE, 4)

    assert gradient(points().batch(torch.zeros(8, dtype=torch.int64)))[2] < 1e-14


def test_a_bowl_whose_noise_and_loss_are_known_gets_the_batch_of_the_formula() -> None:
    gradient, _ = chunked(TASK, 4)
    sizer = Sizer(CABS(most=400, decay=0.99), Rate(SGD(lr=50.0), None), first=32, owned=400)
    examples = build_data(TASK).train

    for number in range(200):
        which = indices(Piece(Sample("drawn", 20), number, 0, 1), 400, seed=0)
        loss, _, trace = gradient(examples.batch(which))
        sizer.add(trace, loss)

    exact = 50.0 * noise().T.cov().trace().item() / 4.0
    assert sizer.size(200) == pytest.approx(exact, rel=0.05)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = build_model(LINE, 0)
    layout = Layout.of(model)
    bound = BoundModel(model, layout, layout.cuts(1))
    bound.read([layout.flatten(model)])
    slots = [torch.zeros(layout.numel, dtype=layout.dtype)]
    compute = Estimator("reverse", LINE, bound, layout.cuts(1), slots, seed=0, num_chunks=2)
    x, y = points().batch(torch.arange(4))

    done = compute((x, y * torch.tensor([1, 1, 1, torch.nan])), 0, 0)

    assert done.layer == "w"


def test_a_loss_that_fails_is_named() -> None:
    gradient, _ = chunked(LINE, 2)

    with pytest.raises(TaskError, match=r"^the loss of task 'line' failed"):
        gradient((torch.zeros(4, 3), torch.zeros(4)))


@pytest.mark.parametrize(
    ("what", "optimizer", "keys", "message"),
    [
        (LINE, Adam(), {}, "adaptive_batch goes by a step .* that of adam is not: use sgd"),
        (task("tinyshakespeare"), SGD(), {}, "task tinyshakespeare reads streams side by side"),
        (LINE, SGD(), {"gradient": "random"}, "adaptive_batch measures .* gradient=random differ"),
        (
            LINE,
            SGD(),
            {"group": (Group(name="w", lr_factor=0.1),)},
            "group w has a learning rate of its own",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(
    what: Task, optimizer: AnyOptimizer, keys: dict[str, object], message: str
) -> None:
    config = RunConfig(adaptive_batch=CABS(), **keys)  # type: ignore[arg-type]
    name = type(optimizer).__name__.lower()

    with pytest.raises(ValueError, match=f"^{message}"):
        check_adaptive(config.applied_to(what), config, optimizer, name)
