"""The law of conserved staleness, which every run obeys to the integer."""

from __future__ import annotations


class Conservation:
    """The law of conserved staleness, checked to the integer: no read or update goes uncounted.

    Every update makes each gradient in flight one version staler. Count that twice, once where it
    happens and once where it ends up:

        sum over pushes that arrived of their staleness
        + sum over reads still in flight of their age
        + sum over reads that were abandoned of their age then
        ==  sum over updates of the number of reads in flight
        + sum over reads that were kept for another push of their age then

    A read is in flight from `on_read` to its arrival, and the push that completes an update is out
    of flight before it. The law holds for any delays, any rule and any joins, leaves, drops and
    cancellations: a cancelled gradient is a read that was abandoned.

    With ``M`` workers that read again as soon as they have pushed, each of ``B`` updates finds
    ``M - 1`` reads in flight, the pusher's being the one that is not. So with one push an update
    and no drops the staleness of all pushes is ``B * (M - 1)`` less the ages still in flight, and
    its mean goes to ``M - 1`` whoever is fast or slow. If ``c`` pushes make an update, the sum over
    pushes is the same and the mean ``(M - 1) / c``.

    A bookkeeping error breaks the equality: a read at another version than was recorded, an update
    that counts twice, a push applied twice.
    """

    def __init__(self, version: int = 0) -> None:
        """Start at ``version`` with nothing in flight."""
        self._version = version
        self._reads: dict[int, int] = {}  # worker -> version of its read in flight
        self._sum_reads = 0
        self._arrived = 0
        self._abandoned = 0
        self._right = 0

    def on_read(self, worker: int, version: int) -> None:
        """Let ``worker`` start a gradient on ``version``; one it had in flight is abandoned."""
        self.on_abandon(worker, self._version)
        self._reads[worker] = version
        self._sum_reads += version

    def on_kept(self, worker: int, read_version: int) -> None:
        """Let ``worker`` compute another gradient on a read of which it has pushed one already.

        Its age until now was counted with that push and is counted once more with the next one, so
        it is on both sides.
        """
        self._reads[worker] = read_version
        self._sum_reads += read_version
        self._right += self._version - read_version

    def on_arrival(self, worker: int, read_version: int, version: int) -> None:
        """Let a push read at ``read_version`` arrive at ``version``, to be applied or dropped."""
        assert worker in self._reads, f"worker {worker} pushed without having read"
        self._sum_reads -= self._reads.pop(worker)
        self._arrived += version - read_version

    def on_abandon(self, worker: int, version: int) -> None:
        """Give up the read of ``worker``, dead or told to stop at ``version``, if it has one."""
        read_version = self._reads.pop(worker, None)
        if read_version is not None:
            self._sum_reads -= read_version
            self._abandoned += version - read_version

    def on_bump(self, version: int) -> None:
        """Count the update that made ``version``."""
        self._version = version
        self._right += len(self._reads)

    def read_by(self, version: int) -> list[tuple[int, int]]:
        """Return (worker, version read) of the reads in flight of ``version`` or earlier."""
        found = []
        for worker, read_version in self._reads.items():  # the oldest come first
            if read_version > version:
                break
            found.append((worker, read_version))
        return found

    def read_version(self, worker: int) -> int | None:
        """Return the version ``worker`` has in flight; None if it has no read."""
        return self._reads.get(worker)

    @property
    def in_flight_age(self) -> int:
        """Sum of the ages, in versions, of the reads in flight."""
        return len(self._reads) * self._version - self._sum_reads

    @property
    def holds(self) -> bool:
        """Whether both sides are equal."""
        return self._left == self._right

    @property
    def _left(self) -> int:
        return self._arrived + self.in_flight_age + self._abandoned

    def report(self) -> dict[str, int | bool]:
        """Return both sides, whether they are equal, and what the left one consists of."""
        return {
            "left": self._left,
            "right": self._right,
            "holds": self.holds,
            "arrived": self._arrived,
            "in_flight": self.in_flight_age,
            "abandoned": self._abandoned,
        }
