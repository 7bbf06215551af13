"""The processes of a synchronous run: ranks that train, and one that evaluates."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ray
import torch

from paramserver.checkpoint import OptimizerState, scatter_state
from paramserver.freed_memory import keep_freed_memory
from paramserver.layout import Layout
from paramserver.packing import Packed, pack, unpack
from paramserver.rounds import build_program
from sync import mesh, shared
from sync.collective import Collective
from sync.desk import Desk, Part, Position
from sync.gloo import Gloo
from sync.interfaces import interface_ip
from sync.nodes import meet
from sync.rounds import RoundTrainee
from sync.shared import SharedMemory
from sync.worker import Finished, Plan, Trainee
from workers.examiner import Examined, Examiner, Keep, Looks
from workers.examples import Examples
from workers.oracles import Oracle
from workers.task import Task, build_data, build_model

Kind = Literal["shared_memory", "gloo", "nodes"]
"""What carries gradients; ``nodes`` is shared memory within a node and gloo between nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What a rank needs to meet the others."""

    kind: Kind
    layout: Layout
    world: int
    nodes: tuple[int, ...]
    """The node of each rank."""
    token: str
    """Lets a rank in; every group has its own."""
    timeout_s: float
    """Seconds a rank waits for the others, in every step."""
    network_interface: str | None
    """Of each node, that gloo is to use; None takes the address Ray knows the node by."""

    @property
    def ip(self) -> str:
        """Address of this node that the other ranks reach."""
        if self.network_interface is None:
            return str(ray.util.get_node_ip_address())
        return interface_ip(self.network_interface)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a group begins, beside the parameters there."""

    position: Position
    state: OptimizerState | None
    """None before the first update."""


class Rank:
    """One process of the group. `train` runs on one thread; the driver asks the rest meanwhile."""

    def __init__(self, task: Task, seed: int, threads: int) -> None:
        """Keep what `node` needs: Ray hides what a constructor raises."""
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._task, self._seed = task, seed
        self._host: shared.Host | mesh.Host | None = None
        self._collective: Collective | None = None
        self._desk = Desk()
        self._told = self._desk.status

    @cached_property
    def _examples(self) -> Examples:
        return build_data(self._task).train

    def node(self, network_interface: str | None) -> str:
        """Load the data; return the id of the node this process is on.

        Raises:
            ResourceError: The node has no such ``network_interface``.
        """
        if network_interface is not None:
            interface_ip(network_interface)
        _ = self._examples
        return str(ray.get_runtime_context().get_node_id())

    def prepare(self, rank: int, group: Group) -> str:
        """Get ready to be ``rank`` of a new group; rank 0 returns the address to meet at."""
        self._desk = Desk()
        self._told = self._desk.status
        if rank > 0:
            return ""
        self._host = (
            shared.Host() if group.kind == "shared_memory" else mesh.Host(group.ip, group.timeout_s)
        )
        return self._host.address

    def train(
        self, rank: int, group: Group, address: str, plan: Plan, start: Start, params: Any
    ) -> Finished:
        """Join the group at ``address`` and train from ``start``, with the loop the plan needs.

        ``params`` is what `pack` makes of the parameters at ``start``.
        """
        try:
            self._collective = self._join(rank, group, address)
            trainee, state = self._trainee(self._collective, plan), start.state
            trainee.load(
                unpack(params, group.layout.dtype),
                start.position,
                None if state is None else scatter_state(state, trainee.cut),
                None if state is None else state.schedule,
            )
            return trainee.train(self._desk)
        finally:
            self._desk.close()
            self._leave()

    def stop(self) -> None:
        """Let all ranks end the run after the step they are in."""
        self._desk.stop = True

    def begin_save(self, number: int) -> None:
        """Let all ranks save their state after the step they are in; `saved` brings it."""
        self._desk.save = number

    def saved(self, number: int, timeout_s: float) -> Part | None:
        """Return this rank's share of save ``number``; None if the run has ended.

        Number 0 is what a run leaves that ended because a gradient was not finite.
        """
        return self._desk.part(number, timeout_s)

    def snapshot(self, timeout_s: float) -> tuple[int, Any] | None:
        """Return the version at the end of a step and its parameters; None if the run has ended."""
        snapshot = self._desk.snapshot(timeout_s)
        return None if snapshot is None else (snapshot.version, pack(snapshot.params))

    def status(self) -> dict[str, Any]:
        """Return where the run stands, and its mean loss since the last call."""
        now, before = self._desk.status, self._told
        self._told = now
        updates = now.position.version - before.position.version
        collective = self._collective
        peers, since = ((), 0.0) if collective is None else collective.waits
        figures = now.figures()
        figures["waiting"] = {0: (list(peers), time.monotonic() - since)} if peers else {}
        if updates > 0:
            figures["loss"] = (now.loss_sum - before.loss_sum) / updates
        return figures

    def _trainee(self, collective: Collective, plan: Plan) -> Trainee | RoundTrainee:
        """Make the loop that the plan's optimizer needs."""
        model = build_model(self._task, self._seed)
        if build_program(plan.optimizer) is None:
            return Trainee(self._task, model, self._examples, collective, plan)
        oracle = Oracle(self._task, model, plan.layout, self._examples, self._seed)
        return RoundTrainee(oracle, len(self._examples), collective, plan)

    def _join(self, rank: int, group: Group, address: str) -> Collective:
        joined: SharedMemory | mesh.Mesh
        if rank == 0:
            assert self._host is not None, "a rank is prepared before it trains"
            joined = self._host.form(group.layout, group.world, group.token, group.timeout_s)
        elif group.kind == "shared_memory":
            joined = shared.join(
                address, rank, group.layout, group.world, group.token, group.timeout_s
            )
        else:
            joined = mesh.join(
                address,
                rank,
                group.layout,
                group.world,
                group.token,
                group.ip,
                group.timeout_s,
            )
        if isinstance(joined, SharedMemory):
            return joined
        if group.kind == "gloo":
            return Gloo(joined, group.layout)
        return meet(joined, group.layout, group.nodes, group.token)

    def _leave(self) -> None:
        """Leave the group this process is in, if it is in one."""
        if self._collective is not None:
            self._collective.close()
            self._collective = None
        if self._host is not None:
            self._host.close()
            self._host = None


class Evaluator:
    """Evaluates parameters while the ranks go on."""

    def __init__(self, task: Task, seed: int, threads: int, looks: Looks) -> None:
        """Keep what `ready` needs."""
        torch.set_num_threads(threads)
        self._task, self._seed, self._looks = task, seed, looks

    @cached_property
    def _examiner(self) -> Examiner:
        model, data = build_model(self._task, self._seed), build_data(self._task)
        layout = Layout.of(model, self._task.groups)
        self._dtype = layout.dtype
        return Examiner(
            self._task,
            model,
            data,
            layout,
            [range(layout.numel)],
            seed=self._seed,
            looks=self._looks,
        )

    def ready(self) -> None:
        """Build the model and load the data, the first time."""
        _ = self._examiner

    def evaluate(self, snapshot: tuple[int, Packed] | None, keep: Keep | None) -> Examined | None:
        """Return what came of what `Rank.snapshot` gave; None if it gave nothing."""
        if snapshot is None:
            return None
        self.ready()
        version, params = snapshot
        return self._examiner.examine(version, [unpack(params, self._dtype)], keep)


RankActor = ray.remote(max_restarts=0, max_task_retries=0)(Rank)
EvaluatorActor = ray.remote(max_restarts=0, max_task_retries=0)(Evaluator)
