"""What a record holds over time, as columns: one value a push, or one a line that was logged.

Every set of columns has ``gradients``, ``updates`` and ``seconds``, to be drawn against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.progress import metric_label
from paramserver.measures import MEASURES
from paramserver.record import AXES, Record

Columns = dict[str, NDArray[Any]]

NOT_METRICS = {"kind", "gradients", "updates", "seconds", "version"}
"""Keys of a line of metrics.jsonl that say where the run was, not how good."""


def applied_pushes(record: Record) -> Columns | None:
    """Return the applied pushes with their place on each axis; None if there are none."""
    if record.updates is None:
        return None
    applied = record.updates["dropped"] == 0
    pushes = {name: column[applied] for name, column in record.updates.items()}
    start, end = pushes["start"], pushes["end"]
    if not len(end):
        return None
    # The server's clock starts before the first read, and again when a run is resumed.
    passed = np.maximum(np.diff(end, prepend=end[0]), 0)
    return {
        "gradients": np.arange(1.0, len(end) + 1),
        "updates": pushes["version"].astype(float),
        "seconds": end[0] - start[0] + np.cumsum(passed),
        "worker": pushes["worker"],
        "staleness": pushes["staleness"],
        "loss": pushes["loss"],
        "samples": pushes["samples"],
        **{name: pushes[name] for name in MEASURES if name in pushes},
    }


def curves(record: Record) -> Iterator[tuple[str, Columns, str]]:
    """Yield label, columns and key of each curve: the loss of every push, and what was logged."""
    train = applied_pushes(record) or _logged(record, "train", "loss")
    if len(train["loss"]):
        yield "train loss", train, "loss"
    if record.config.get("adaptive_batch") is not None:
        yield "train batch size", *_batch_sizes(record)
    lines = (line for line in record.metrics if line.get("kind") == "test")
    names = dict.fromkeys(name for line in lines for name in line if name not in NOT_METRICS)
    for name in sorted(names, key=lambda name: name != "loss"):
        yield metric_label(name), _logged(record, "test", name), name


def _batch_sizes(record: Record) -> tuple[Columns, str]:
    """Return the samples of each push, or of a worker's batch as it was logged; and the key."""
    pushes = applied_pushes(record)
    if pushes is not None:
        return pushes, "samples"
    return _logged(record, "train", "batch_size"), "batch_size"


def counters(record: Record) -> Columns | None:
    """Return gradients and updates over time, from every push if there is a ledger."""
    pushes = applied_pushes(record)
    if pushes is not None or not record.metrics:
        return pushes
    return {k: np.array([line[k] for line in record.metrics], dtype=float) for k in AXES}


def staleness_counts(record: Record) -> dict[int, int]:
    """Return applied pushes by staleness, from the ledger if the run was killed."""
    said = (record.result or {}).get("staleness")
    if said is not None:
        return {int(value): count for value, count in said["histogram"].items()}
    pushes = applied_pushes(record)
    return {} if pushes is None else dict(Counter(pushes["staleness"].tolist()))


def _logged(record: Record, kind: str, key: str) -> Columns:
    """Return a figure of metrics.jsonl with its place on each axis; null is NaN."""
    lines = [line for line in record.metrics if line.get("kind") == kind and key in line]
    return {k: np.array([line[k] for line in lines], dtype=float) for k in (*AXES, key)}
