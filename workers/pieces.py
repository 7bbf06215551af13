"""What a worker does for a round program: read a request, compute its piece, push; to the end."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from paramserver.client import Client, Ended
from paramserver.rounds import Sample
from workers.loop import Finished
from workers.oracles import Oracle
from workers.samples import Piece


def answer(oracle: Oracle, cuts: Sequence[range], client: Client) -> Finished:
    """Answer pieces of requests until the server says that the run has ended.

    Args:
        oracle: Computes what is asked for.
        cuts: The shards' ranges.
        client: A connected client that has joined.

    Raises:
        ParamServerError: What ended the run early, as the server says it.
    """
    reading = client.first_read()
    while not isinstance(reading, Ended):
        asked = json.loads(reading.text)
        sample = Sample(asked["sample"], asked["size"])
        piece = Piece(sample, asked["round"], asked["piece"], asked["of"])
        vector = whole(reading.vectors) if reading.vectors else None
        samples, loss, rows = oracle.answer(asked["kind"], whole(reading.params), piece, vector)
        write_rows(client.slots, cuts, rows)
        norm = float(torch.linalg.vector_norm(rows))
        reading = client.push(loss=loss, norm=norm, samples=samples)
    return Finished(reading.reason, client.clock)


def write_rows(
    slots: Sequence[Tensor], cuts: Sequence[range], rows: Tensor, columns: range | None = None
) -> None:
    """Write rows of the whole vector into the slots, each row's slice after that of the one before.

    Args:
        slots: One a shard, with room for as many rows.
        cuts: The shards' ranges.
        rows: Shape ``(k, m)``.
        columns: Which ``m`` elements they are of; None is all. The slots' others are left alone.
    """
    start = 0 if columns is None else columns.start
    for slot, cut in zip(slots, cuts, strict=True):
        first, last = max(cut.start, start), min(cut.stop, start + rows.shape[1])
        if first < last:
            own = slot[: len(rows) * len(cut)].view(len(rows), len(cut))
            own[:, first - cut.start : last - cut.start] = rows[:, first - start : last - start]


def whole(pieces: Sequence[Tensor]) -> Tensor:
    """Return the whole vector: without a copy if one shard has all of it."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
