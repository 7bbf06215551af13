"""The loss at many sets of parameters, computed by worker processes side by side.

points   0 1 2 3 | 4 5 6 7 | 8 9 …      in chunks; a worker that is done gets the next one
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from paramserver.errors import ResourceError, TaskError
from paramserver.layout import Layout
from paramserver.rounds import Sample
from workers.examples import Examples
from workers.gradients import BoundModel
from workers.holdout import Selected
from workers.landscape import Slice
from workers.samples import Piece, indices
from workers.session import ray_session
from workers.task import Task, build_data, build_model, evaluate, recalibrate_batchnorm
from workers.threads import torch_threads

_CHUNKS = 8
"""Chunks for each worker, so that the bar moves and none waits long for the last one."""

_WAIT_S = 1.0
"""Seconds between two looks at what is done."""


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """What the loss is computed on; travels to the workers."""

    task: Task
    layout: Layout
    slice: Slice
    part: str
    """``train``, ``test`` or ``validation``."""
    samples: int
    """So many of the part, at most."""
    seed: int


class Heights:
    """Computes losses in one process."""

    def __init__(self, ground: Ground) -> None:
        """Build the model and load the data.

        Raises:
            TaskError: They cannot be built.
        """
        task, self._ground = ground.task, ground
        self._model, data = build_model(task, ground.seed), build_data(task)
        part: Examples | None = getattr(data, ground.part)
        assert part is not None, "look has seen that there is such a part"
        size = min(ground.samples, len(part))
        drawn = indices(Piece(Sample("surface", size), 0, 0, 1), len(part), ground.seed)
        self._examples, self._train = Selected(part, drawn), data.train
        self._bound = BoundModel(self._model, ground.layout, [range(ground.layout.numel)])

    def __call__(self, points: Tensor) -> list[float]:
        """Return the loss at each row of ``points``: coordinates in the slice, or parameters.

        Raises:
            TaskError: The task's loss failed.
        """
        ground, losses = self._ground, []
        is_whole = points.shape[1] == ground.layout.numel
        for point in points:
            self._bound.read([point if is_whole else ground.slice.at(point[None])[0]])
            recalibrate_batchnorm(ground.task, self._model, self._train, seed=ground.seed)
            losses.append(evaluate(ground.task, self._model, self._examples)["loss"])
        return losses


def heights(
    ground: Ground,
    points: Sequence[Tensor],
    *,
    jobs: int,
    progress: Callable[[int, int], None],
) -> list[list[float]]:
    """Return the losses at each table of ``points``; see `Heights`.

    Args:
        ground: What they are computed on.
        points: Tables, a point a row.
        jobs: Worker processes; 1 computes in this one.
        progress: Told how many points are done, of how many.

    Raises:
        TaskError: The task's loss failed.
        ResourceError: A worker was lost, or Ray cannot be started.
    """
    chunks, total = [], sum(map(len, points))
    size = max(1, math.ceil(total / (_CHUNKS * jobs)))
    for table, rows in enumerate(points):
        chunks += [(table, start) for start in range(0, len(rows), size)]
    found = [[math.nan] * len(rows) for rows in points]
    num_done = 0

    def keep(chunk: tuple[int, int], losses: list[float]) -> None:
        nonlocal num_done
        table, start = chunk
        found[table][start : start + len(losses)] = losses
        num_done += len(losses)
        progress(num_done, total)

    def rows_of(chunk: tuple[int, int]) -> Tensor:
        table, start = chunk
        return points[table][start : start + size]

    progress(0, total)
    if jobs == 1:
        with torch_threads(1):
            here = Heights(ground)
            for chunk in chunks:
                keep(chunk, here(rows_of(chunk)))
    else:
        with ray_session(None, jobs):
            _side_by_side(ground, deque(chunks), rows_of, keep, jobs)
    return found


class _Walker:
    """A worker process."""

    def __init__(self, ground: Ground) -> None:
        torch.set_num_threads(1)
        self._ground = ground
        self._heights: Heights | None = None

    def losses(self, points: Tensor) -> list[float]:
        if self._heights is None:  # Ray hides what a constructor raises
            self._heights = Heights(self._ground)
        return self._heights(points)


def _side_by_side(
    ground: Ground,
    chunks: deque[tuple[int, int]],
    rows_of: Callable[[tuple[int, int]], Tensor],
    keep: Callable[[tuple[int, int], list[float]], None],
    jobs: int,
) -> None:
    make: Any = ray.remote(num_cpus=1, max_restarts=0)(_Walker)
    shared = ray.put(ground)
    walkers = [make.remote(shared) for _ in range(min(jobs, len(chunks)))]
    under_way: dict[Any, tuple[Any, tuple[int, int]]] = {}
    try:
        for walker in walkers:
            chunk = chunks.popleft()
            under_way[walker.losses.remote(rows_of(chunk))] = (walker, chunk)
        while under_way:
            ready, _ = ray.wait(list(under_way), timeout=_WAIT_S)
            for ref in ready:
                walker, chunk = under_way.pop(ref)
                keep(chunk, ray.get(ref))
                if chunks:
                    chunk = chunks.popleft()
                    under_way[walker.losses.remote(rows_of(chunk))] = (walker, chunk)
    except TaskError:
        raise
    except RayError as error:
        said = str(error).strip().partition("\n")[0]
        raise ResourceError(f"a worker that computed the surface was lost: {said}") from error
    finally:
        for walker in walkers:
            ray.kill(walker)
