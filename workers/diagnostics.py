"""What a net looks like from inside: gradients by layer, units at rest, steps, and noise.

Of one version, on the same few training samples every time:

    gradient      norm of each parameter's gradient: vanishing or exploding along the net
    weight        norm of each parameter
    step          how far an update moves each parameter, relative to its norm, on average since the
                  version looked at before
    saturated     share of a sigmoid's or tanh's outputs so near its limits that its slope is small
    dead          share of a ReLU's units that are 0 for every sample
    noise scale   tr(S) / |G|², the batch size at which noise and gradient are equally large

Sources: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
networks", AISTATS 2010 (saturation). Pascanu, Mikolov & Bengio, ICML 2013, arXiv:1211.5063
(vanishing and exploding gradients). McCandlish et al., "An Empirical Model of Large-Batch
Training", 2018, arXiv:1812.06162, appendix A.1 (the noise scale from two batch sizes).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paramserver.layout import Layout
from paramserver.rounds import Sample
from workers.examples import Batch, Examples
from workers.functional import kept_random_state
from workers.samples import Piece
from workers.samples import indices as drawn
from workers.task import Task, modes_of, user_code

VANISHING = 1e-4
"""A layer's gradient is called vanishing below this share of the largest layer's, both divided by
the root of the number of elements."""

EXPLODING = 100.0
"""A gradient is called exploding above this many times the norm of all parameters, or 1."""

AT_REST = 0.5
"""Units of a layer are called saturated or dead if more than this share of them is."""

_LIMIT = 0.02
"""A sigmoid is saturated within this distance of 0 and 1, a tanh within twice that of -1 and 1:
where their slope is below a twelfth of its largest."""

_PARTS = 4
"""Batches that gradients are computed on: their mean is the large batch of the noise scale."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One parameter."""

    gradient: float
    weight: float
    step: float | None
    """None for the first version that is looked at."""


@dataclass(frozen=True, slots=True)
class Units:
    """The outputs of one activation function."""

    kind: str
    """``saturated`` or ``dead``."""
    share: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one version looks like."""

    version: int
    layers: Mapping[str, Layer]
    units: Mapping[str, Units]
    """By module and function, in the order they are called."""
    noise_scale: float
    """In samples; NaN where noise hides the gradient."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """What is wrong, by what it is about: a sentence each."""

    def line(self) -> dict[str, Any]:
        """Return it as a line of metrics.jsonl."""
        return {
            "gradient": {name: layer.gradient for name, layer in self.layers.items()},
            "weight": {name: layer.weight for name, layer in self.layers.items()},
            "step": {n: layer.step for n, layer in self.layers.items() if layer.step is not None},
            "units": {name: {u.kind: u.share} for name, u in self.units.items()},
            "noise_scale": self.noise_scale,
            "warnings": sorted(self.warnings.values()),
        }


class Diagnostics:
    """Looks at one version after the other, always on the same samples."""

    def __init__(
        self, task: Task, model: nn.Module, layout: Layout, examples: Examples, *, seed: int
    ) -> None:
        """Look at ``model``, whose parameters are shown by others; ``examples`` train it."""
        self._task, self._model, self._layout = task, model, layout
        self._names = [slot.name for slot in layout.slots]
        by_name = dict(model.named_parameters())
        self._parameters = [by_name[name] for name in self._names]
        self._examples = examples
        size = min(_PARTS * task.batch_size, len(examples))
        self._num_parts = min(_PARTS, size)
        pieces = (
            Piece(Sample("diagnosed", size), 0, part, self._num_parts)
            for part in range(self._num_parts)
        )
        self._indices = [drawn(piece, len(examples), seed) for piece in pieces]
        self._before: tuple[int, list[Tensor]] | None = None

    def look(self, version: int) -> Diagnosis:
        """Return what the model looks like now, at ``version``.

        Raises:
            TaskError: The task's loss failed, or cannot be differentiated.
        """
        gradients, units = self._gradients()
        mean = [torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)]
        weights = [parameter.detach() for parameter in self._parameters]
        layers = {
            name: Layer(float(gradient.norm()), float(weight.norm()), step)
            for name, gradient, weight, step in zip(
                self._names, mean, weights, self._steps(version, weights), strict=True
            )
        }
        self._before = (version, [weight.clone() for weight in weights])
        noise = noise_scale(gradients, [len(part) for part in self._indices])
        sizes = {n: w.numel() for n, w in zip(self._names, weights, strict=True)}
        return Diagnosis(version, layers, units, noise, warnings_of(layers, sizes, units))

    def _gradients(self) -> tuple[list[list[Tensor]], dict[str, Units]]:
        """Return the gradient on each part, a tensor a parameter; and the units of all parts."""
        gradients, watch = [], _Activations(self._model)
        what = f"diagnosing the loss of task {self._task.name!r} (or set diagnostics=false)"
        with modes_of(self._model), kept_random_state(), user_code(what), torch.enable_grad():
            self._model.eval()
            for which in self._indices:
                batch: Batch = self._examples.batch(which)
                with watch.watching():
                    loss = self._task.loss(self._model, batch)
                found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
                both = zip(found, self._parameters, strict=True)
                gradients.append(
                    [torch.zeros_like(p) if g is None else g.to_dense() for g, p in both]
                )
        return gradients, watch.units()

    def _steps(self, version: int, weights: Sequence[Tensor]) -> list[float | None]:
        if self._before is None or self._before[0] == version:
            return [None] * len(weights)
        then, before = self._before
        return [
            float((now - past).norm()) / (version - then) / max(float(now.norm()), 1e-30)
            for now, past in zip(weights, before, strict=True)
        ]


def noise_scale(gradients: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> float:
    """Return tr(S) / |G|² from the gradients of several batches of nearly equal size.

    With b samples in one and B in all of them, and the squared norms n_b, on average, and n_B:

        |G|² = (B n_B - b n_b) / (B - b)        tr(S) = (n_b - n_B) / (1/b - 1/B)

    each without bias, their quotient not. NaN if |G|² comes out as 0 or less: more samples are
    needed to tell the gradient from its noise.
    """
    if len(gradients) < 2:
        return math.nan
    total = sum(sizes)
    each = total / len(sizes)

    def squared(parts: Sequence[Tensor]) -> float:
        return sum(float(part.double().square().sum()) for part in parts)

    small = sum(map(squared, gradients)) / len(gradients)
    large = squared([torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)])
    signal = (total * large - each * small) / (total - each)
    noise = (small - large) / (1 / each - 1 / total)
    return noise / signal if signal > 0 else math.nan


def warnings_of(
    layers: Mapping[str, Layer], sizes: Mapping[str, int], units: Mapping[str, Units]
) -> dict[str, str]:
    """Return what is wrong with a net, a sentence each, by what it is about.

    Parameters without a gradient take no part in it: nothing depends on them.
    """
    found = {}
    total = math.hypot(*(layer.gradient for layer in layers.values()))
    all_weights = math.hypot(*(layer.weight for layer in layers.values()))
    if not math.isfinite(total):
        bad = next(n for n, layer in layers.items() if not math.isfinite(layer.gradient))
        return {"nan": f"the gradient of {bad} is not finite"}
    if total > EXPLODING * max(all_weights, 1.0):
        largest = max(layers, key=lambda name: layers[name].gradient)
        found["exploding"] = (
            f"the gradient explodes: its norm is {total:.2g}, that of the parameters "
            f"{all_weights:.2g}; it is largest in {largest}"
        )
    scaled = {n: x.gradient / math.sqrt(sizes[n]) for n, x in layers.items() if x.gradient > 0}
    largest = max(scaled, key=lambda name: scaled[name], default="")
    for name, value in scaled.items():
        if value < VANISHING * scaled[largest]:
            found[f"vanishing {name}"] = (
                f"the gradient of {name} vanishes: {value / scaled[largest]:.1g} of that of "
                f"{largest}, an element"
            )
    for name, unit in units.items():
        if unit.share > AT_REST:
            what = "outputs" if unit.kind == "saturated" else "units"
            found[f"{unit.kind} {name}"] = (
                f"{100 * unit.share:.0f} % of the {what} of {name} are {unit.kind}"
            )
    return found


class _Activations(TorchFunctionMode):
    """Sees what sigmoids, tanhs and ReLUs of a model give, as modules or as functions.

    What torch's recurrent layers do inside is one function to it, and is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._inside: list[str] = []  # names of the modules that are being called
        self._times: Counter[str] = Counter()
        self._saturated: dict[str, tuple[int, int]] = {}  # outputs near a limit, and all
        self._alive: dict[str, Tensor] = {}  # which units were not 0, for some sample

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one call of the model, or several of the same."""
        self._times.clear()
        hooks = []
        for name, module in self._model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._enter(name or "0")))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield
        finally:
            self._inside.clear()
            for hook in hooks:
                hook.remove()

    def units(self) -> dict[str, Units]:
        """Return the shares, by the names of modules and functions."""
        found = {n: Units("saturated", near / all_) for n, (near, all_) in self._saturated.items()}
        dead = {n: Units("dead", 1 - float(a.float().mean())) for n, a in self._alive.items()}
        return {**found, **dead}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").rstrip("_")
        if name in ("sigmoid", "tanh", "relu") and isinstance(out, Tensor):
            self._see(name, out.detach())
        return out

    def _see(self, kind: str, out: Tensor) -> None:
        where = self._inside[-1] if self._inside else "of the loss"
        self._times[f"{where} {kind}"] += 1
        number = self._times[f"{where} {kind}"]
        name = f"layer {where} ({kind})" if number == 1 else f"layer {where} ({kind} {number})"
        if kind == "relu":
            alive, before = _alive(out), self._alive.get(name)
            self._alive[name] = alive if before is None else before | alive
            return
        centred = out / 2 if kind == "tanh" else out - 0.5
        near = centred.abs() > 0.5 - _LIMIT
        past, total = self._saturated.get(name, (0, 0))
        self._saturated[name] = (past + int(near.sum()), total + out.numel())

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._inside.pop()


def _alive(out: Tensor) -> Tensor:
    """Return which units are not 0 for some sample: of images their channels, else features."""
    units = out.movedim(1, -1) if out.ndim >= 4 else out
    return (units != 0).reshape(-1, units.shape[-1] if units.ndim > 1 else 1).any(0)
