"""The state of a run on disk: tensors in a safetensors file, all else in a manifest beside it.

    checkpoint/manifest.json                     names the data file, its size and its hash
    checkpoint/v120-3f9ac2d1e07b.safetensors     named by version and hash: no two states share one

A save writes the new data file, replaces the manifest by a rename, and only then deletes the old
data file. A crash before the rename leaves the old checkpoint, a crash after it the new one.

Nothing in it depends on how the parameters were cut, so as many shards go on with it as there are
then: see `paramserver.reshard`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from paramserver.durable import write_durably
from paramserver.errors import CheckpointError, LayoutError
from paramserver.layout import Layout, layout_from_json
from paramserver.reshard import OptimizerState, gather_state, scatter_state

__all__ = [
    "Checkpoint",
    "OptimizerState",
    "gather_state",
    "load_checkpoint",
    "save_checkpoint",
    "scatter_state",
]

FORMAT = 1
"""Version of what is on disk; a checkpoint of another one is refused."""

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run at one version, whatever number of shards and workers goes on with it.

    ``optimizer``, ``groups``, ``schedule`` and ``extra`` may hold what JSON can, and tuples and
    dictionaries with any keys; keys that start with ``$`` are taken.
    """

    layout: Layout
    version: int
    """Updates that made ``params``."""
    params: Tensor
    """The parameters, shape ``(layout.numel,)``."""
    optimizer: dict[str, object]
    """The optimizer as `paramserver.registry.Registry.describe` tells of it."""
    state: OptimizerState | None = None
    """None before the first update."""
    workers: dict[str, dict[str, int]] = field(default_factory=dict)
    """Incarnation, seq and clock of each worker: retries are recognised by it, data goes on."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the run itself keeps: mode, seed, counters."""

    def __post_init__(self) -> None:
        numel = self.layout.numel
        if self.params.shape != (numel,):
            raise LayoutError(f"params must have shape ({numel},), got {tuple(self.params.shape)}")
        state = {} if self.state is None else self.state.tensors
        for name, tensor in state.items():
            if tensor.ndim == 0 or tensor.shape[-1] != numel:
                raise LayoutError(f"{name} must have shape (…, {numel}), got {tuple(tensor.shape)}")
        if self.params.dtype != self.layout.dtype:
            raise LayoutError(f"params must be {self.layout.dtype}, got {self.params.dtype}")

    @classmethod
    def fresh(cls, layout: Layout, params: Tensor, optimizer: dict[str, object]) -> Checkpoint:
        """Return the state of a run before its first update."""
        return cls(layout, 0, params, optimizer)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``folder``, in place of the one that is there.

    Raises:
        CheckpointError: It cannot be written; the checkpoint that was there is as it was.
    """
    state = checkpoint.state
    tensors = {"params": checkpoint.params}
    described: dict[str, Any] | None = None
    if state is not None:
        singles = {k: v for k, v in state.scalars.items() if isinstance(v, Tensor)}
        tensors |= {f"tensors.{key}": vector for key, vector in state.tensors.items()}
        tensors |= {f"scalars.{key}": single for key, single in singles.items()}
        described = {
            "scalars": {k: v for k, v in state.scalars.items() if k not in singles},
            "groups": state.groups,
            "schedule": state.schedule,
        }
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"v{checkpoint.version}-{digest[:12]}.safetensors"
    manifest = {
        "format": FORMAT,
        "version": checkpoint.version,
        "data": {"file": name, "bytes": len(data), "sha256": digest},
        "layout": checkpoint.layout.to_json(),
        "optimizer": checkpoint.optimizer,
        "state": described,
        "workers": checkpoint.workers,
        "extra": checkpoint.extra,
    }
    # NaN stays NaN here, unlike in a record: what is loaded must be what was saved.
    text = json.dumps(_to_json(manifest), indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / name, data)
        write_durably(folder / MANIFEST, text.encode())
        for path in folder.iterdir():
            if path.suffix in (".safetensors", ".tmp") and path.name != name:
                path.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error}; make room or choose another folder "
            "(what was there before can still be loaded)"
        ) from error


def load_checkpoint(folder: Path, layout: Layout | None = None) -> Checkpoint:
    """Read the checkpoint in ``folder``.

    Args:
        folder: Where `save_checkpoint` wrote.
        layout: The model that is to go on; None takes any.

    Raises:
        CheckpointError: There is none, it is damaged or of another format, or of another model
            than ``layout``; the message says which, and what to do.
    """
    manifest = _read_manifest(folder)
    try:
        saved = layout_from_json(manifest["layout"])
        if layout is not None:
            _check_model(folder, layout, saved)
        tensors = _read_data(folder / manifest["data"]["file"], manifest["data"])
        state = manifest["state"]
        return Checkpoint(
            layout=saved,
            version=manifest["version"],
            params=tensors["params"],
            optimizer=manifest["optimizer"],
            state=None
            if state is None
            else OptimizerState(
                tensors=_under("tensors.", tensors),
                scalars={**_under("scalars.", tensors), **state["scalars"]},
                groups=state["groups"],
                schedule=state["schedule"],
            ),
            workers=manifest["workers"],
            extra=manifest["extra"],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged ({error!r}); use another checkpoint"
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = _from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no checkpoint in {folder}: it has no {MANIFEST}; name the folder of a run "
            "that wrote one"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; check its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from error
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if written != FORMAT:
        raise CheckpointError(
            f"{path} has format {written} and this version of paramserver reads format {FORMAT}; "
            "load it with the version that wrote it"
        )
    return dict(manifest)


def _check_model(folder: Path, layout: Layout, saved: Layout) -> None:
    if saved.dtype != layout.dtype:
        raise CheckpointError(
            f"{folder} holds {saved.dtype} parameters and the model has {layout.dtype}; give the "
            f"model {saved.dtype} parameters to go on with it"
        )
    difference = layout.difference(saved)
    if difference is not None:
        raise CheckpointError(
            f"{folder} is of another model ({difference}); go on with the task and the settings "
            "it was made with"
        )


def _read_data(path: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors, if the file is the one the manifest means to the last bit."""
    again = "copy the folder again or use another checkpoint"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; {again}") from error
    if len(data) < expected["bytes"]:
        raise CheckpointError(
            f"{path} is cut short: {len(data)} of {expected['bytes']} bytes; {again}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected["sha256"]:
        raise CheckpointError(
            f"{path} was altered: its sha256 is {digest[:12]}…, not {expected['sha256'][:12]}…; "
            f"{again}"
        )
    tensors: dict[str, Tensor] = safetensors.torch.load(data)
    return tensors


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _to_json(value: object) -> object:
    """Mark what JSON would change on the way: tuples, and keys that are not text.

    torch's schedulers hold both: ``MultiStepLR`` with milestones under ``"30"`` for ``30`` would
    load, and never change the rate.
    """
    if isinstance(value, tuple):
        return {"$tuple": [_to_json(v) for v in value]}
    if isinstance(value, list):
        return [_to_json(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    if all(isinstance(k, str) for k in value):
        return {k: _to_json(v) for k, v in value.items()}
    return {"$items": [[_to_json(k), _to_json(v)] for k, v in value.items()]}


def _from_json(value: object) -> Any:
    """Undo `_to_json`."""
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$tuple"}:
        return tuple(_from_json(v) for v in value["$tuple"])
    if value.keys() == {"$items"}:
        return {_from_json(k): _from_json(v) for k, v in value["$items"]}
    return {k: _from_json(v) for k, v in value.items()}
