"""Small tasks in float64 with every kind of layer that derivatives have trouble with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from paramserver.layout import Layout
from paramserver.rounds import Sample
from workers.oracles import Oracle
from workers.samples import Piece
from workers.task import Data, Examples, Task, TensorExamples
from workers.tasks import cross_entropy, sample_classes

DOUBLE = torch.float64
NUM_EXAMPLES, NUM_CLASSES = 23, 3


class LastOfLSTM(nn.Module):
    """Classes from the last output of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.out(self.lstm(inputs.unflatten(1, (2, 4)))[0][:, -1])
        return logits


class Attentive(nn.Module):
    """Classes from a transformer's layer over two tokens."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)
        self.out = nn.Linear(4, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.out(self.layer(inputs.unflatten(1, (2, 4))).mean(1))
        return logits


class Tied(nn.Module):
    """One matrix used as two layers, a parameter that nothing uses, a frozen one, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(70))
        self.frozen = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(inputs).tanh() * self.frozen)
        return self.scale * hidden[:, :NUM_CLASSES]


class Checkpointed(nn.Module):
    """A layer that runs again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 4), nn.Linear(4, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        logits: Tensor = checkpoint(lambda x: self.out(x).sin(), hidden, use_reentrant=False)
        return logits


class Square(torch.autograd.Function):
    """A square without a forward derivative, as `torch.func` wants functions written."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        doubled: Tensor = 2 * x * grad
        return doubled


class OldSquare(torch.autograd.Function):
    """The same as such functions were written before `torch.func`."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        doubled: Tensor = 2 * x * grad
        return doubled


class Squaring(nn.Module):
    """A layer with a function of the user's own."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 4), nn.Linear(4, NUM_CLASSES)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.out(self.function.apply(self.first(inputs)))
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, NUM_CLASSES)
    )


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, NUM_CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "tied": Tied,
    "norms": norms,
    "LSTM": LastOfLSTM,
    "transformer": Attentive,
}
"""Those that `torch.func` can follow."""

BACKWARD_MODELS: dict[str, Callable[[], nn.Module]] = {
    "own function": lambda: Squaring(Square),
    "old function": lambda: Squaring(OldSquare),
    "checkpointed": Checkpointed,
}
"""Those that it cannot, or not forward."""


def examples(dtype: torch.dtype = DOUBLE) -> TensorExamples:
    noise = torch.Generator().manual_seed(5)
    inputs = torch.randn(NUM_EXAMPLES, 8, generator=noise, dtype=DOUBLE).to(dtype)
    return TensorExamples(inputs, torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=noise))


class Small:
    """A task's model at a point that is not its own, and its oracle."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        dtype: torch.dtype = DOUBLE,
        *,
        data: Examples | None = None,
        **fields: object,
    ) -> None:
        self.data = examples(dtype) if data is None else data
        keys = {"loss": cross_entropy, "sample_targets": sample_classes, **fields}
        self.task = Task(
            name="small", model=make, data=lambda: Data(self.data, self.data), headline="loss",
            **keys,  # type: ignore[arg-type]
        )  # fmt: skip
        torch.manual_seed(1)
        self.model = make().to(dtype)
        self.layout = Layout.of(self.model)
        noise = torch.Generator().manual_seed(2)
        drawn = torch.randn(self.layout.numel, generator=noise, dtype=DOUBLE).to(dtype)
        self.point = self.layout.flatten(self.model) + 0.1 * self.masked(drawn)
        self.oracle = Oracle(self.task, self.model, self.layout, self.data, seed=0)

    def masked(self, flat: Tensor) -> Tensor:
        """Return ``flat`` with its padding 0."""
        out = torch.zeros_like(flat)
        both = zip(self.layout.views(out), self.layout.views(flat), strict=True)
        for view, source in both:
            view.copy_(source)
        return out

    def direction(self, seed: int = 3) -> Tensor:
        """Return a random vector, padding 0."""
        noise = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.layout.numel, generator=noise, dtype=DOUBLE)
        return self.masked(drawn.to(self.layout.dtype))

    def at_point(self) -> nn.Module:
        """Return a copy of the model that holds the point's parameters."""
        model = copy.deepcopy(self.model)
        self.layout.load(model, self.point)
        return model

    def ask(self, kind: str, vector: Tensor | None = None, piece: Piece | None = None) -> Tensor:
        """Return the rows of an answer over all samples."""
        piece = Piece(Sample("all"), 0, 0, 1) if piece is None else piece
        return self.oracle.answer(kind, self.point, piece, vector)[2]  # type: ignore[arg-type]

    def everything(self) -> tuple[Tensor, ...]:
        return self.data.batch(torch.arange(len(self.data)))

    def by_autograd(self, vector: Tensor | None = None) -> Tensor:
        """Return the gradient, or the Hessian times ``vector``, by plain reverse mode, flat."""
        model = self.at_point()
        named = dict(model.named_parameters())
        parameters = [named[slot.name] for slot in self.layout.slots]
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = self.task.loss(model, self.everything())
        grads = torch.autograd.grad(
            loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if vector is not None:
            views = self.layout.views(vector)
            slope = sum((g * v).sum() for g, v in zip(grads, views, strict=True))
            assert isinstance(slope, Tensor)
            grads = torch.autograd.grad(
                slope, parameters, allow_unused=True, materialize_grads=True
            )
        flat = torch.zeros(self.layout.numel, dtype=self.layout.dtype)
        for view, g in zip(self.layout.views(flat), grads, strict=True):
            view.copy_(g.detach())
        return flat


def mse(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    inputs, classes = batch
    return functional.mse_loss(model(inputs), functional.one_hot(classes, NUM_CLASSES).to(DOUBLE))
