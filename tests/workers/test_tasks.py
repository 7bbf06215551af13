from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from paramserver.errors import DataError, PluginError, TaskError
from workers.batches import Batches
from workers.task import Data, Task, TensorExamples, build_data, build_model, evaluate
from workers.tasks import TASKS, accuracy, cross_entropy, mlp, task
from workers.tasks.images import FashionMnist
from workers.tasks.logistic import logistic_loss, sign_accuracy
from workers.tasks.quadratic import Quadratic


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On small tensors a second thread only waits, and waits long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(
    task: Task, make: Callable[..., torch.optim.Optimizer], *, epochs: int, seed: int = 0
) -> dict[str, float]:
    """A plain single-process loop; returns the metrics on the test data."""
    data, model = build_data(task), build_model(task, seed)
    optimizer = make(model.parameters())
    batches = Batches(len(data.train), task.batch_size, seed=seed, worker=0, num_workers=1)
    for clock in range(epochs * len(data.train) // task.batch_size):
        optimizer.zero_grad()
        task.loss(model, data.train.batch(batches.indices(clock))).backward()
        optimizer.step()
    return evaluate(task, model, data.test)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    ],
    ids=["momentum", "adam"],
)
def test_digits_reaches_97_percent(make: Callable[..., torch.optim.Optimizer]) -> None:
    metrics = train(task("digits"), make, epochs=15)

    assert metrics["accuracy"] >= 0.97


def test_digits_are_split_by_class_and_always_the_same() -> None:
    data, again = build_data(task("digits")), build_data(task("digits"))
    images, classes = data.test.batch(torch.arange(len(data.test)))

    assert (len(data.train), len(data.test)) == (1438, 359)
    assert classes.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert images.equal(again.test.batch(torch.arange(359))[0])
    assert images.dtype == torch.float32


def test_digits_are_those_of_scikit_learn() -> None:
    def rows(images: Tensor, classes: Tensor) -> list[tuple[float, ...]]:
        return sorted(map(tuple, torch.column_stack([images, classes]).tolist()))

    data = build_data(task("digits"))
    parts = [part.batch(torch.arange(len(part))) for part in (data.train, data.test)]
    images, classes = (torch.cat(column) for column in zip(*parts, strict=True))
    theirs, their_classes = map(torch.from_numpy, load_digits(return_X_y=True))

    pixels = (images * 0.3760 + 0.3053) * 16

    assert rows(pixels.round(), classes) == rows(theirs, their_classes)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_image_tasks_build_the_nets_they_name(name: str) -> None:
    def num_parameters(text: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in task(text).model().parameters())

    assert num_parameters(f"{name}:net=convnet") == 1960
    assert num_parameters(f"{name}:hidden=100") == 784 * 100 + 100 + 100 * 10 + 10
    wide = 784 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10
    assert num_parameters(f"{name}:hidden=4096/4096") == wide


@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_image_nets_take_normalised_batches(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (20, 28, 28), dtype=torch.uint8)
    classes = torch.arange(20, dtype=torch.uint8) % 10
    monkeypatch.setattr("workers.tasks.images.read_images", lambda *_, **__: (images, classes) * 2)
    mnist = task(f"mnist:net={net}")
    data, model = build_data(mnist), build_model(mnist, seed=0)

    inputs, targets = data.train.batch(torch.arange(20))

    assert inputs.shape == (20, 1, 28, 28)
    torch.testing.assert_close(inputs[:, 0], (images / 255 - 0.1307) / 0.3081)
    assert targets.tolist() == classes.tolist()
    assert model(inputs).shape == (20, 10)
    assert 0 <= evaluate(mnist, model, data.test)["accuracy"] <= 1


def test_an_image_task_looks_in_the_folder_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PARAMSERVER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(DataError, match=r"in .*nowhere.*--task mnist:download=true"):
        build_data(task("mnist:data_dir=nowhere"))


def test_the_quadratics_optimum_has_zero_gradient() -> None:
    bowl = task("quadratic:dim=16,noise=0.5")
    model, data = build_model(bowl, seed=0), build_data(bowl)
    with torch.no_grad():
        model.x.fill_(1.0)

    bowl.loss(model, data.train.batch(torch.arange(len(data.train)))).backward()

    assert model.x.grad.abs().max() < 1e-6
    assert evaluate(bowl, model, data.test)["distance"] == 0


def test_the_quadratics_loss_and_gradient_are_the_formulas() -> None:
    bowl = Quadratic(dim=3, condition=100.0, noise=0.2, num_points=50).build()
    model, data = build_model(bowl, seed=0), build_data(bowl)
    batch = (points,) = data.train.batch(torch.tensor([4, 7]))
    curvature = torch.tensor([1.0, 0.1, 0.01])

    loss = bowl.loss(model, batch)
    loss.backward()

    torch.testing.assert_close(loss, (points.square() * curvature).sum() / 2 / 2)
    torch.testing.assert_close(model.x.grad, curvature * (0 - points).mean(0))


def test_without_noise_every_batch_gives_the_closed_form_of_gradient_descent() -> None:
    bowl = task("quadratic:dim=8,condition=10,noise=0")
    model, data = build_model(bowl, seed=0), build_data(bowl)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.5), 20

    for step in range(steps):
        optimizer.zero_grad()
        bowl.loss(model, data.train.batch(torch.tensor([step]))).backward()
        optimizer.step()

    curvature = torch.logspace(0, -1, 8)
    torch.testing.assert_close(1 - model.x.detach(), (1 - 0.5 * curvature) ** steps)
    assert bowl.headline == "distance"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quadratic:dim=0", "dim must be 1 or more"),
        ("quadratic:condition=0.5", "condition must be 1 or more"),
        ("quadratic:noise=-1", "noise must be 0 or more"),
        ("quadratic:num_points=0", "num_points must be 1 or more"),
        ("digits:hidden=0", "hidden must be 1 unit"),
        ("mnist:hidden=8/0", "hidden must be 1 unit"),
        ("mnist:net=cnn", "'cnn' is not one of mlp, convnet"),
        ("digits:width=8", "has no key 'width'; it has hidden"),
        ("digits:hidden", "task 'digits': 'hidden' is not key=value"),
        ("digit", "did you mean 'digits'"),
        (
            "cifar",
            "there are digits, digits-autoencoder, fashion-mnist, logistic, mnist, quadratic",
        ),
    ],
)
def test_texts_that_mean_nothing_say_what_is_valid(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        task(text)


def test_logistic_starts_at_log_2_and_its_optimum_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) + torch.randn(200, generator=generator)).sign()
    tiny = Task(
        name="tiny",
        model=lambda: nn.Linear(3, 1),
        data=lambda: Data(TensorExamples(x, y), TensorExamples(x, y)),
        loss=logistic_loss,
        metrics=sign_accuracy,
    )
    model = build_model(tiny, seed=0)
    reference = LogisticRegression(C=math.inf, tol=1e-8).fit(x.numpy(), y.numpy())

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = logistic_loss(model, (x, y))
        loss.backward()
        return loss

    optimizer.step(closure)

    torch.testing.assert_close(
        model.weight.detach().double(),
        torch.from_numpy(reference.coef_).double(),
        rtol=1e-3,
        atol=0,
    )
    assert evaluate(tiny, model, build_data(tiny).test)["accuracy"] == pytest.approx(
        reference.score(x.numpy(), y.numpy())
    )
    start = build_model(task("logistic"), seed=0)
    ones = torch.ones(2, 123), torch.tensor([1.0, -1.0])
    assert logistic_loss(start, ones).item() == pytest.approx(math.log(2))


def test_every_task_travels_by_cloudpickle_and_describes_itself() -> None:
    for entry in TASKS:
        spec = entry.factory()

        copy = cloudpickle.loads(cloudpickle.dumps(task(spec)))

        assert copy.name == entry.name
        assert TASKS.build(TASKS.describe(spec)) == spec
        assert entry.summary


def test_a_task_is_a_task_a_text_a_spec_or_a_mapping() -> None:
    mine = task("fashion-mnist:hidden=64/32,data_dir=somewhere")
    spec = FashionMnist(hidden=(64, 32), data_dir="somewhere")

    described = {"name": "fashion-mnist", "hidden": [64, 32], "data_dir": "somewhere"}

    assert task(mine) is mine
    for same in (task(spec), task(described)):
        assert same.name == "fashion-mnist"
        assert same.model.args == mine.model.args == (784, (64, 32), 10)
        assert same.data.args == mine.data.args


def make(hidden: int, lr_hint: float = 0.1, wide=False, name_of_it: str | None = None) -> Task:
    """A user's factory; one parameter without an annotation."""
    width = hidden * 2 if wide else hidden
    return Task(
        name=name_of_it or f"user-{width}-{lr_hint}",
        model=lambda: mlp(4, (width,), 2),
        data=lambda: Data(TensorExamples(torch.zeros(1, 4)), TensorExamples(torch.zeros(1, 4))),
        loss=cross_entropy,
        metrics=accuracy,
    )


def fails() -> Task:
    raise RuntimeError("no licence for this model")


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("user_tasks")
    module.make, module.fails, module.number = make, fails, 3
    module.not_a_task, module.ready = lambda: 3, make(hidden=1)
    monkeypatch.setitem(sys.modules, "user_tasks", module)


@pytest.mark.usefixtures("user_module")
def test_a_users_factory_is_called_with_keys_read_by_annotation_or_default() -> None:
    assert task("user_tasks:make:hidden=5").name == "user-5-0.1"
    assert task("user_tasks:make:hidden=5,wide=true,lr_hint=1").name == "user-10-1.0"
    assert task({"name": "user_tasks:make", "hidden": 7}).name == "user-7-0.1"
    assert task("user_tasks:make:hidden=5,name_of_it=x").name == "x"
    assert task("user_tasks:ready").name == "user-1-0.1"


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_tasks:make", "needs hidden"),
        ("user_tasks:make:hidden=wide", "hidden: expected int, got 'wide'"),
        ("user_tasks:make:hiden=5", "has no key 'hiden'; it has hidden, lr_hint, wide"),
        ("user_tasks:mke", "user_tasks has no 'mke'; its functions are make, fails"),
        ("user_tasks:number", "must be a function that returns a Task, got int"),
        ("user_tusks.deep:make", "there is no module 'user_tusks'; .*digits"),
    ],
)
def test_a_users_factory_that_is_not_there_or_refuses_keys(text: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        task(text)


@pytest.mark.usefixtures("user_module")
def test_a_users_factory_that_fails_keeps_its_traceback() -> None:
    with pytest.raises(TaskError, match=r"user_tasks:fails failed: .*no licence") as error:
        task("user_tasks:fails")

    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(TaskError, match=r"^task user_tasks:not_a_task must be a Task, got int"):
        task("user_tasks:not_a_task")


def test_a_users_module_that_fails_is_the_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_tasks.py").write_text("import no_such_library\n")

    with pytest.raises(TaskError, match=r"^importing broken_tasks failed: .*no_such_library"):
        task("broken_tasks:make")
