"""Answers to what round programs ask: losses, gradients and curvature on named samples.

With the model's outputs z(x), Jacobian J = dz/dx, and the loss as ℓ(z(x)):

    gradient          ∇ = Jᵀ ∇ℓ                         reverse mode
    hvp               H v = ∇(∇·v)                      reverse mode twice
    ggnvp             G v = Jᵀ (∇²ℓ) (J v)              J v = ∇ᵤ(uᵀ J)·v: reverse mode alone
    hessian           H, as H times unit vectors        many at once, vectorised
    fisher            F, as G times unit vectors        F = G for softmax and Gaussian likelihoods
    fisher_diagonal   mean of (∇ log p(y | x))²         y drawn from the model, never the data's

Sources: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994;
Schraudolph, "Fast curvature matrix-vector products", Neural Computation 14, 2002; Martens, "New
insights and perspectives on the natural gradient method", JMLR 21, 2020; Kunstner et al.,
"Limitations of the empirical Fisher approximation", NeurIPS 2019, on whose labels to take.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from paramserver.errors import TaskError
from paramserver.layout import Layout
from paramserver.rounds import Kind, check_holds
from workers.examples import Batch, Examples
from workers.functional import (
    Params,
    PureLoss,
    differentiable,
    kept_random_state,
    loss_of_outputs,
    outputs_of,
    push_forward,
)
from workers.samples import Piece, indices, piece_seed
from workers.task import Task, user_code

logger = logging.getLogger(__name__)

DENSE_LIMIT = 8192
"""Elements of the flat vector up to which a matrix is computed: half a gigabyte in float64."""

_AT_ONCE = 64
"""Rows of a matrix, or samples with a gradient each, that are computed at once, at most."""
_ELEMENTS_AT_ONCE = 2**24
"""Elements of all of them together, at most, unless a single one has more."""

T = TypeVar("T", Tensor, Params)


class Oracle:
    """Computes pieces of requests on one task's training samples.

    An answer depends on its arguments and the seed alone, up to rounding: it can be computed again,
    and elsewhere. The model's modes and buffers count as they are at the time.
    """

    def __init__(
        self, task: Task, model: nn.Module, layout: Layout, examples: Examples, seed: int
    ) -> None:
        """Answer for the loss of ``task`` over ``examples``.

        Args:
            task: Gives the loss.
            model: The task's model; it is left as it is.
            layout: Describes ``model``.
            examples: The training data.
            seed: Of the run; decides which samples a name means, and seeds what is random.
        """
        self._task, self._model, self._layout = task, model, layout
        self._examples, self._seed = examples, seed
        self._pure = PureLoss(task, model, layout)
        self._vectorises = True  # until torch.func turns out not to follow the model

    def answer(
        self, kind: Kind, point: Tensor, piece: Piece, vector: Tensor | None
    ) -> tuple[int, float, Tensor]:
        """Return the samples of ``piece``, their mean loss, and the mean rows.

        Rows have shape ``(k, numel)``, the model's dtype and 0 as padding; ``k`` is 0 for ``loss``,
        numel for a matrix, else 1. The loss is NaN for all but ``loss`` and ``gradient``. A piece
        without samples is answered with 0 samples and zeros.

        Args:
            kind: What is wanted.
            point: The parameters, shape ``(numel,)``; not changed.
            piece: Over which samples.
            vector: What a product is taken with, shape ``(numel,)``; its padding counts as 0.

        Raises:
            LayoutError: A vector of another shape or dtype, or a matrix over `DENSE_LIMIT`.
            TaskError: The task's loss failed, its error is the cause; or the task is not one that
                this kind can be computed for.
            ValueError: A product without a vector, or a sample that does not exist.
        """
        self._layout.views(point)  # refuses another shape or dtype
        num_rows = self._num_rows(kind, vector)
        which = indices(piece, len(self._examples), self._seed)
        value = 0.0 if kind in ("loss", "gradient") else math.nan
        rows = point.new_zeros(num_rows, self._layout.numel)
        if len(which) == 0:
            return 0, value, rows

        batch = self._examples.batch(which)
        params, seed = self._pure.split(point.detach()), piece_seed(self._seed, piece)
        what = f"{kind} of the loss of task {self._task.name!r}"
        with user_code(what), kept_random_state(), torch.enable_grad():
            if kind == "loss":
                with torch.no_grad():
                    value = self._pure.loss(params, batch, seed).item()
            elif kind == "gradient":
                value = self._gradient(params, batch, seed, rows)
            elif kind == "fisher_diagonal":
                labels = torch.Generator().manual_seed(piece_seed(self._seed, piece, "labels"))
                self._fisher_diagonal(params, batch, seed, labels, rows)
            elif vector is not None and kind in ("hvp", "ggnvp"):
                product = hvp if kind == "hvp" else ggnvp
                with differentiable(self._model):
                    parts = product(self._pure, params, self._pure.split(vector), batch, seed)
                self._pure.join(parts, rows)
            else:
                self._matrix(kind == "hessian", params, batch, seed, rows)
        return len(which), value, rows

    def _num_rows(self, kind: Kind, vector: Tensor | None) -> int:
        """Return the number of rows of an answer, if it can be given."""
        match kind:
            case "loss":
                return 0
            case "hvp" | "ggnvp":
                if vector is None:
                    raise ValueError(f"{kind} takes a vector")
                self._layout.views(vector)
            case "hessian" | "fisher":
                instead = "hvp" if kind == "hessian" else "ggnvp or fisher_diagonal"
                check_holds(kind, self._layout.numel, DENSE_LIMIT, instead)
                return self._layout.numel
        return 1

    def _gradient(self, params: Params, batch: Batch, seed: int, rows: Tensor) -> float:
        """Write the gradient into ``rows``, shape ``(1, numel)``, and return the loss."""
        leaves = _leaves(params)

        def backward(model: nn.Module) -> float:
            # with the parameters still in the model: checkpointed parts run again in here
            loss = self._task.loss(model, batch)
            loss.backward()
            return loss.item()

        value = self._pure.call(backward, leaves, seed)
        self._pure.join([leaf.grad for leaf in leaves], rows)
        return value

    def _matrix(self, hessian: bool, params: Params, batch: Batch, seed: int, rows: Tensor) -> None:
        """Write the Hessian or the Gauss-Newton matrix into ``rows``, shape ``(numel, numel)``."""
        pure, numel = self._pure, self._layout.numel
        one = hvp if hessian else ggnvp

        def loss(params: Params) -> Tensor:
            return pure.loss(params, batch, seed)

        def outputs(params: Params) -> Tensor:
            return pure.outputs(params, batch, seed)

        def many(tangent: Params) -> Params:
            # `hvp` and `ggnvp` in the form that vmap takes, which is up to 6 times faster here
            if hessian:
                return cast(Params, _by_symmetry(loss, params, tangent))
            z, jv = push_forward(outputs, params, tangent)
            hjv = _by_symmetry(lambda z: pure.loss_of(z, batch, seed), z, jv)
            return cast(Params, vjp(outputs, params)[1](hjv)[0])

        elements = torch.cat([torch.arange(s.offset, s.end) for s in self._layout.slots])
        with differentiable(self._model):
            for chosen in elements.split(at_once(numel)):
                units = rows.new_zeros(len(chosen), numel)
                units[torch.arange(len(chosen)), chosen] = 1
                if self._vectorises:
                    try:
                        parts = vmap(many, randomness="same")(pure.split(units))
                        rows[chosen] = pure.join(parts, units)
                        continue
                    except (NotImplementedError, RuntimeError) as error:
                        if not _is_beyond_torch_func(error):
                            raise
                        logger.info("task %s: matrices row by row: %s", self._task.name, error)
                        self._vectorises = False
                for i, unit in zip(chosen.tolist(), units, strict=True):
                    pure.join(one(pure, params, pure.split(unit), batch, seed), rows[i])

    def _fisher_diagonal(
        self, params: Params, batch: Batch, seed: int, labels: torch.Generator, rows: Tensor
    ) -> None:
        """Write the mean of squared gradients, targets from the model, into ``rows``."""
        sample_targets = self._task.sample_targets
        if sample_targets is None:
            raise TaskError(
                f"task {self._task.name!r} does not say how targets are drawn from the model's "
                "outputs, which the Fisher matrix's diagonal takes: set Task.sample_targets, such "
                "as workers.tasks.sample_classes"
            )
        self._check_samples_are_independent()
        # torch's recurrent layers write in place, which vmap over samples cannot follow
        recurrent = any(isinstance(m, nn.RNNBase) for m in self._model.modules())
        size = 1 if recurrent else at_once(self._layout.numel)
        num_samples = len(batch[0])
        for start in range(0, num_samples, size):
            part = tuple(tensor[start : start + size] for tensor in batch)
            part_seed = (seed + start) % 2**63
            with differentiable(self._model):
                predicted = self._predict(params, part, part_seed)
                with user_code(f"sample_targets of task {self._task.name!r}"):
                    targets = sample_targets(predicted, labels)
                if targets.shape != part[-1].shape:
                    raise TaskError(
                        f"sample_targets of task {self._task.name!r} must return the shape of the "
                        f"batch's last tensor, {tuple(part[-1].shape)}, got {tuple(targets.shape)}"
                    )
                drawn = (*part[:-1], targets.to(part[-1].dtype))

                def gradient(sample: Batch, seed: int = part_seed) -> Params:
                    own = tuple(tensor[None] for tensor in sample)
                    gradients: Params = grad(self._pure.loss)(params, own, seed)
                    return gradients

                gradients = _each(gradient, drawn)
            squares = rows.new_zeros(len(part[0]), self._layout.numel)
            rows += self._pure.join(gradients, squares).square_().sum(dim=0)
        rows /= num_samples

    def _predict(self, params: Params, batch: Batch, seed: int) -> Tensor:
        """Return the model's outputs for each sample by itself, a row each.

        Dropout is that of the samples' gradients, so that targets come from the same network.
        """

        def output(sample: Batch) -> Tensor:
            return self._pure.outputs(params, tuple(tensor[None] for tensor in sample), seed)

        with torch.no_grad():
            outputs = _each(output, batch)
        if outputs.ndim < 2 or outputs.shape[1] != 1:
            raise TaskError(
                f"the model of task {self._task.name!r} must give one row a sample for the Fisher "
                f"matrix's diagonal, got shape {tuple(outputs.shape[1:])} for one sample"
            )
        return outputs.squeeze(1)

    def _check_samples_are_independent(self) -> None:
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise TaskError(
                    f"layer {name!r} normalises by its batch, so no sample has a gradient of its "
                    "own: take another norm, or ask for ggnvp or fisher instead of fisher_diagonal"
                )


def hvp(pure: PureLoss, params: Params, tangent: Params, batch: Batch, seed: int) -> Params:
    """Return the Hessian of the loss at ``params`` times ``tangent``, a tensor for each slot.

    Reverse mode twice: torch 2.13 takes 1.4 to 4 times as long for forward over reverse on CPU, and
    has no forward derivatives for the gradients of such losses as `mse_loss`.
    """
    leaves = _leaves(params)

    def run(model: nn.Module) -> Params:
        return cast(Params, _pull(_pull(pure.task.loss(model, batch), leaves), leaves, tangent))

    return tuple(part.detach() for part in pure.call(run, leaves, seed))


def ggnvp(pure: PureLoss, params: Params, tangent: Params, batch: Batch, seed: int) -> Params:
    """Return the Gauss-Newton matrix at ``params`` times ``tangent``, a tensor for each slot.

    Raises:
        TaskError: The loss is not a function of the model's one output; see `outputs_of`.
    """
    leaves = _leaves(params)

    def run(model: nn.Module) -> Params:
        z = outputs_of(pure.task, model, batch)
        u = torch.zeros_like(z, requires_grad=True)
        jv = _pull(_pull(z, leaves, u), u, tangent)
        own = z.detach().requires_grad_()
        hjv = _pull(_pull(loss_of_outputs(pure.task, model, own, batch), own), own, jv)
        return cast(Params, _pull(z, leaves, hjv))

    return tuple(part.detach() for part in pure.call(run, leaves, seed))


def at_once(numel: int) -> int:
    """Return how many vectors of ``numel`` elements are computed at once."""
    return max(1, min(_AT_ONCE, _ELEMENTS_AT_ONCE // numel))


def _by_symmetry(of: Callable[[Any], Tensor], at: Any, along: Any) -> Any:
    """Return the Hessian of ``of`` times ``along`` as the transposed one times it."""
    return vjp(grad(of), at)[1](along)[0]


def _leaves(params: Params) -> Params:
    return tuple(part.detach().requires_grad_() for part in params)


def _pull(of: Tensor | Params, at: Tensor | Params, weights: Tensor | Params | None = None) -> Any:
    """Return the gradient of the weighted sum of ``of``, shaped as ``at``, open to another one."""
    sources, targets = _as_params(of), _as_params(at)
    factors = [None] * len(sources) if weights is None else _as_params(weights)
    known = [(y, w) for y, w in zip(sources, factors, strict=True) if y.requires_grad]
    if not known:  # such as the gradient of something linear
        gradients = tuple(torch.zeros_like(target) for target in targets)
    else:
        ys, ws = zip(*known, strict=True)
        gradients = torch.autograd.grad(ys, targets, ws, create_graph=True, materialize_grads=True)
    return gradients[0] if isinstance(at, Tensor) else gradients


def _as_params(one_or_more: Tensor | Params) -> Params:
    return (one_or_more,) if isinstance(one_or_more, Tensor) else one_or_more


def _each(do: Callable[[Batch], T], samples: Batch) -> T:
    """Return ``do`` of every sample, stacked."""
    if len(samples[0]) > 1:
        return vmap(do, randomness="different")(samples)
    result = do(tuple(tensor[0] for tensor in samples))
    return result[None] if isinstance(result, Tensor) else tuple(part[None] for part in result)


def _is_beyond_torch_func(error: Exception) -> bool:
    """Whether `torch.func` says that it cannot follow the model; plain reverse mode may."""
    marks = ("forward AD", "forward mode AD", "torch.func", "functorch", "vmap:", "transform, the")
    return any(mark in str(error) for mark in marks)
