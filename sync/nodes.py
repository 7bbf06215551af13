"""Ranks on several nodes: memory is shared within a node, and gloo carries slices between nodes.

    node A   rank 0, rank 1    one copy of the parameters; both read each other's gradients
    node B   rank 2, rank 3    likewise

    reduce    rank 0 adds up what ranks 0 and 1 have for slice 2 and sends rank 2 the sum; rank 1
              does so for slice 3. Rank 0 gets node B's sum for slice 0, adds its own node's.
    publish   rank 0 sends slice 0 to one rank of node B, which writes it into B's copy.

So a slice goes to each other node once, however many ranks are there: two nodes of four ranks send
a quarter of what `sync.gloo` sends between them, and nothing goes over the network within a node.
Of the slices of other nodes each rank of a node carries its share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paramserver.errors import PeerLostError
from paramserver.layout import Layout
from sync import shared
from sync.collective import Sent, Table, fair_cuts, weighted_sum_
from sync.mesh import Mesh
from sync.shared import SharedMemory


class Nodes:
    """A `sync.collective.Collective` of ranks on several nodes; made by `meet`."""

    def __init__(
        self, mesh: Mesh, local: SharedMemory, layout: Layout, nodes: Sequence[int]
    ) -> None:
        """Use both, and close them.

        Args:
            mesh: Connects all ranks.
            local: Memory of the ranks on this node, in their order.
            layout: Of the model, the same on all ranks.
            nodes: The node of each rank.
        """
        self.rank, self.world = mesh.rank, mesh.world
        self._mesh, self._local, self._step = mesh, local, 0
        self.cuts = cuts = fair_cuts(layout, self.world)
        self.cut = cuts[self.rank]
        self.params, self.grad = local.params, local.grad
        self._here = [rank for rank, node in enumerate(nodes) if node == nodes[self.rank]]
        ranks = range(self.world)
        carried = [r for r in ranks if _carrier(r, nodes[self.rank], nodes) == self.rank]
        carriers = [r for r in ranks if _carrier(self.rank, nodes[r], nodes) == r]
        self._cuts = [cuts[rank] for rank in carried]
        """The slices of other nodes that this rank carries."""
        self._of_others = [len(cuts[rank]) if rank in carried else 0 for rank in ranks]
        self._of_mine = [len(self.cut) if rank in carriers else 0 for rank in ranks]
        self._sums = torch.empty(sum(self._of_others), dtype=layout.dtype)
        self._pieces = self._sums.split([len(cut) for cut in self._cuts])
        self._copies = torch.empty(len(carriers), len(self.cut), dtype=layout.dtype)

    @property
    def waits(self) -> tuple[tuple[int, ...], float]:
        """The ranks a call waits for now, and since when."""
        return self._mesh.waits

    @property
    def vector(self) -> Tensor:
        """The second vector, one for the node."""
        return self._local.vector

    def exchange(self, step: int, values: Sequence[float]) -> Table:
        """Tell every rank ``values`` and return what each told."""
        self._step = step
        return self._mesh.exchange(step, values)

    def reduce(self, weights: Sequence[float], sent: Sent | None = None) -> Tensor:
        """Return the weighted sum of the gradients for the own slice, its own term first."""
        assert sent is None, "sums of several ranks go between nodes: gloo carries payloads"
        here = [weights[rank] for rank in self._here]
        for cut, piece in zip(self._cuts, self._pieces, strict=True):
            first, *rest = [slot[cut.start : cut.stop] for slot in self._local.slots]
            piece.copy_(first)
            weighted_sum_(piece, here[0], list(zip(rest, here[1:], strict=True)))
        self._mesh.scatter(self._copies.view(-1), self._sums, self._of_mine, self._of_others)
        slices = [slot[self.cut.start : self.cut.stop] for slot in self._local.slots]
        terms = list(zip(slices, here, strict=True))
        own, weight = terms.pop(self._local.rank)
        return weighted_sum_(own, weight, terms + [(sums, 1.0) for sums in self._copies])

    def publish(self, *, vector: bool = False) -> None:
        """Bring every rank's slice to all nodes, and wait until it is there."""
        for whole in (self.params, self.vector) if vector else (self.params,):
            self._copies.copy_(whole[self.cut.start : self.cut.stop].expand_as(self._copies))
            self._mesh.scatter(self._sums, self._copies.view(-1), self._of_others, self._of_mine)
            for cut, piece in zip(self._cuts, self._pieces, strict=True):
                whole[cut.start : cut.stop].copy_(piece)
        self._mesh.exchange(self._step, ())

    def close(self) -> None:
        """Leave the group; the node's memory goes with the last of its ranks."""
        self._local.close()
        self._mesh.close()


def meet(mesh: Mesh, layout: Layout, nodes: Sequence[int], token: str) -> Nodes:
    """Share memory with the ranks of the own node, and return the group of all.

    Args:
        mesh: Connects all ranks; closed if this fails.
        layout: Of the model, the same on all ranks.
        nodes: The node of each rank.
        token: What a rank must know to be let in.

    Raises:
        PeerLostError: A rank of the own node did not come.
        ResourceError: There is too little memory.
    """
    node = nodes[mesh.rank]
    here = [rank for rank, its_node in enumerate(nodes) if its_node == node]
    door = f"door/{node}"
    try:
        if mesh.rank == here[0]:
            host = shared.Host()
            mesh.tell(door, host.address)
            local = host.form(layout, len(here), token, mesh.timeout_s)
        else:
            place = here.index(mesh.rank)
            local = shared.join(mesh.ask(door), place, layout, len(here), token, mesh.timeout_s)
    except PeerLostError as error:
        mesh.close()
        lost = [here[place] for place in error.peers]
        raise PeerLostError(mesh.rank, lost, error.step, error.waited_s) from error
    except BaseException:
        mesh.close()
        raise
    return Nodes(mesh, local, layout, nodes)


def _carrier(rank: int, node: int, nodes: Sequence[int]) -> int | None:
    """Return who on ``node`` carries the slice of ``rank``; nobody on its own node does."""
    if nodes[rank] == node:
        return None
    here = [other for other, its_node in enumerate(nodes) if its_node == node]
    elsewhere = [other for other, its_node in enumerate(nodes) if its_node != node]
    return here[elsewhere.index(rank) % len(here)]
