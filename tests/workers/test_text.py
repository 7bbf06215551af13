"""Language models of characters, on a text of our own and on Shakespeare's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from paramserver.errors import DataError
from tests.workers.test_datasets import real_folder
from workers.datasets import TINYSHAKESPEARE, read_text
from workers.task import build_data, build_model, evaluate
from workers.tasks import task
from workers.tasks.text import CharacterNet, TinyShakespeare, next_loss, zero_state
from workers.windows import Series


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_loss_is_the_cross_entropy_of_the_next_characters(cell: str, layers: int) -> None:
    torch.manual_seed(0)
    model = CharacterNet(cell, 65, 8, layers)  # type: ignore[arg-type]
    text = torch.randint(65, (2, 11))
    batch = (text[:, :-1], text[:, 1:])

    loss, _ = next_loss(model, batch, zero_state(model, 2))

    state, nats = zero_state(model, 2), []
    for step in range(10):  # a character at a time
        logits, state = model(text[:, step : step + 1], state)
        nats.append(functional.cross_entropy(logits[:, 0], text[:, step + 1]))
    torch.testing.assert_close(loss, torch.stack(nats).mean())


@pytest.mark.data
def test_shakespeare_is_split_and_coded_as_it_was_published() -> None:
    text, num_characters = read_text(data_dir=real_folder(TINYSHAKESPEARE))

    alphabet = sorted(
        set((Path(real_folder(TINYSHAKESPEARE)) / "tinyshakespeare/input.txt").read_text())
    )
    assert (len(text), num_characters) == (1_115_394, 65)
    assert "".join(alphabet[i] for i in text[:14].tolist()) == "First Citizen:"


@pytest.mark.data
def test_the_last_tenth_is_for_validation_and_every_character_is_predicted_once() -> None:
    what = task({"name": "tinyshakespeare", "data_dir": real_folder(TINYSHAKESPEARE), "hidden": 4})
    data, (text, _) = build_data(what), read_text(data_dir=real_folder(TINYSHAKESPEARE))

    assert isinstance(data.train, Series)
    assert isinstance(data.test, Series)
    assert data.train.num_steps == 1_003_854 - 1
    assert len(data.test) * data.test.window == data.test.num_steps == 1_115_394 - 1_003_854
    inputs, targets = data.test.batch(torch.tensor([0]))
    assert inputs[0, 0] == text[1_003_853]  # the last one that was trained on says what is next
    assert targets[0, 0] == text[1_003_854]
    loss = evaluate(what, build_model(what, 0), data.test)["loss"]
    assert loss == pytest.approx(math.log(65), abs=0.3)  # it knows nothing yet


def test_the_same_settings_give_the_same_task() -> None:
    made = task("tinyshakespeare:cell=gru,hidden=16,k1=20,k2=60,reset=pull")

    how = made.recurrent
    assert how is not None
    assert (how.k1, how.back, how.reset, made.headline) == (20, 60, "pull", "loss")
    model = build_model(made, 0)
    assert isinstance(model, CharacterNet)
    assert isinstance(model.layers, torch.nn.GRU)
    assert len(zero_state(model, 3)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "transformer"}, "cell must be 'lstm', 'gru' or 'rnn', got 'transformer'"),
        ({"hidden": 0}, "hidden must be 1 unit or more, got 0"),
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"k1": 0}, "k1 must be 1 step or more, got 0"),
        ({"reset": "always"}, "reset must be 'never' or 'pull', got 'always'"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TinyShakespeare(**change)  # type: ignore[arg-type]


def test_a_text_that_is_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PARAMSERVER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        DataError,
        match=r"^tinyshakespeare: there is no input\.txt in .*--task tinyshakespeare:download=true",
    ):
        read_text(data_dir=str(tmp_path))

    (tmp_path / "input.txt").write_text("To be, or not to be")

    with pytest.raises(DataError, match=r"input\.txt is altered or cut short: the sha256 of its"):
        read_text(data_dir=str(tmp_path))
