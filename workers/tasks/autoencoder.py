"""Several modules and losses trained as one: an encoder that a classifier and a decoder share.

               +--> classifier --> 10 logits ---> cross-entropy ------------------+
    digit --> encoder --> code                                                    +--> loss
               +--> decoder ----> 64 pixels ----> mean squared error * weight ----+

All modules are parts of one `torch.nn.Module`, and one loss function adds up what each is to be
good at; so one backward pass gives every part the gradient of the sum. The parts of the loss are
metrics, each under its own name. The modules are groups, which a run can name:

    paramserver train --task digits-autoencoder --group encoder:lr_factor=0.1 --freeze decoder
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from paramserver.groups import Group
from workers.task import Batch, Task
from workers.tasks.classification import mlp
from workers.tasks.digits import PIXELS, read_digits


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsAutoencoder:
    """The digits, classified and reconstructed from one code; two losses, three modules."""

    code: int = 32
    """Numbers that an image is encoded in."""

    hidden: int = 128
    """Width of the hidden layer of encoder and decoder."""

    weight: float = 1.0
    """Factor on the reconstruction's loss in the sum, 0 or more."""

    def __post_init__(self) -> None:
        for name in ("code", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 unit or more, got {getattr(self, name)}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be 0 or more, got {self.weight}")

    def build(self) -> Task:
        """Return the task; the split is that of ``digits``."""
        return Task(
            name="digits-autoencoder",
            model=partial(Autoencoder, self.hidden, self.code),
            data=read_digits,
            loss=partial(weighted_sum, self.weight),
            metrics=each_part,
            groups=tuple(Group(name=name) for name in ("encoder", "classifier", "decoder")),
        )


class Autoencoder(nn.Module):
    """Gives the logits of a digit's class and the digit again, both from its code."""

    def __init__(self, hidden: int, code: int) -> None:
        """Make the modules: a code of ``code`` numbers, one hidden layer on either side of it."""
        super().__init__()
        self.encoder = nn.Sequential(mlp(PIXELS, (hidden,), code), nn.ReLU())
        self.classifier = nn.Linear(code, 10)
        self.decoder = mlp(code, (hidden,), PIXELS)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, shape ``(n, 10)``, and reconstructions, shape ``(n, 64)``."""
        code = self.encoder(images)
        return self.classifier(code), self.decoder(code)


def parts(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, the mean cross-entropy of them, and the mean squared error of a pixel."""
    images, classes = batch
    logits, again = model(images)
    return logits, functional.cross_entropy(logits, classes), functional.mse_loss(again, images)


def weighted_sum(weight: float, model: nn.Module, batch: Batch) -> Tensor:
    """Return what is trained: the cross-entropy plus ``weight`` times the squared error."""
    _, classification, reconstruction = parts(model, batch)
    return classification + weight * reconstruction


def each_part(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return each part of the loss by itself, and the share of digits that are recognised."""
    _, classes = batch
    logits, classification, reconstruction = parts(model, batch)
    return {
        "accuracy": (logits.argmax(dim=1) == classes).double().mean().item(),
        "classification_loss": classification.item(),
        "reconstruction_loss": reconstruction.item(),
    }
