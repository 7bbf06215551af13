"""Language models of characters: recurrent nets that say what comes next, on Shakespeare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn import functional

from workers.datasets import read_text
from workers.recurrent import Recurrent, Reset, State
from workers.task import Batch, Data, Task
from workers.windows import TensorSeries

Cell: TypeAlias = Literal["lstm", "gru", "rnn"]

NUM_CHARACTERS = 65
"""Different characters in the text."""

_TRAINED_ON = 1_003_854
"""Characters of the text's first nine tenths; the others are for validation."""

_VALIDATED_ON = 1014
"""Characters of each of the 110 pieces that the validation part is evaluated in."""

_LAYERS: dict[Cell, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShakespeare:
    """The next character of 1,115,394 by Shakespeare, by a recurrent net; loss in nats a character.

    The last tenth of the text is for validation. It is evaluated in 110 pieces of 1,014 characters,
    each from the zero state on. A sample is a window of k1 characters, and a batch as many windows
    side by side, each of a stream of its own.
    """

    cell: Cell = "lstm"
    """``lstm``, ``gru`` or ``rnn``, which has tanh units."""

    hidden: int = 128
    """Units in each layer."""

    layers: int = 1
    """Layers, one on the other."""

    k1: int = 50
    """Characters between two gradients."""

    k2: int | None = None
    """Characters a gradient goes back; none is k1."""

    reset: Reset = "never"
    """``pull`` starts from the zero state whenever parameters were read; ``never`` carries it."""

    data_dir: str | None = None
    """Folder that holds the data; it is looked for elsewhere too."""

    download: bool = False
    """Whether data that is nowhere is fetched."""

    def __post_init__(self) -> None:
        if self.cell not in get_args(Cell):
            raise ValueError(f"cell must be 'lstm', 'gru' or 'rnn', got {self.cell!r}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be 1 unit or more, got {self.hidden}")
        if self.layers < 1:
            raise ValueError(f"layers must be 1 or more, got {self.layers}")
        self._recurrent()

    def build(self) -> Task:
        """Return the task."""
        recurrent = self._recurrent()
        return Task(
            name="tinyshakespeare",
            model=partial(CharacterNet, self.cell, NUM_CHARACTERS, self.hidden, self.layers),
            data=partial(_load, self.k1, self.data_dir, self.download),
            loss=recurrent.whole,
            metrics=next_accuracy,
            headline="loss",
            batch_size=32,
            recurrent=recurrent,
        )

    def _recurrent(self) -> Recurrent:
        return Recurrent(
            initial=zero_state, loss=next_loss, k1=self.k1, k2=self.k2, reset=self.reset
        )


class CharacterNet(nn.Module):
    """Embedded characters, recurrent layers, and the logits of the next character."""

    def __init__(self, cell: Cell, num_characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters, hidden)
        self.layers = _LAYERS[cell](hidden, hidden, layers, batch_first=True)
        self.output = nn.Linear(hidden, num_characters)

    def forward(self, characters: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits, shape ``(n, steps, characters)``, and the state after the last step.

        Args:
            characters: Numbers of characters, int64, shape ``(n, steps)``.
            state: The hidden state, and of an LSTM its cell's, shapes ``(layers, n, hidden)``.
        """
        is_lstm = isinstance(self.layers, nn.LSTM)
        outputs, after = self.layers(self.embedding(characters), state if is_lstm else state[0])
        return self.output(outputs), after if is_lstm else (after,)


def zero_state(model: nn.Module, num_streams: int) -> State:
    """Return the state of a `CharacterNet` before the first character."""
    assert isinstance(model, CharacterNet)
    layers, weight = model.layers, model.output.weight
    zeros = weight.new_zeros(layers.num_layers, num_streams, layers.hidden_size)
    return (zeros, zeros) if isinstance(layers, nn.LSTM) else (zeros,)


def next_loss(model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, State]:
    """Return the mean cross-entropy of the next characters in nats, and the state after them."""
    characters, following = batch
    logits, state = model(characters, state)
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten()), state


def next_accuracy(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the share of characters that had the largest logit."""
    characters, following = batch
    logits, _ = model(characters, zero_state(model, len(characters)))
    return {"accuracy": (logits.argmax(dim=2) == following).double().mean().item()}


def _load(k1: int, data_dir: str | None, download: bool) -> Data:
    text, num_characters = read_text(data_dir=data_dir, download=download)
    assert num_characters == NUM_CHARACTERS, "the text's hash was checked"
    train, test = text[:_TRAINED_ON], text[_TRAINED_ON - 1 :]
    return Data(
        train=TensorSeries(train[:-1], train[1:], window=k1),
        test=TensorSeries(test[:-1], test[1:], window=_VALIDATED_ON),
    )
