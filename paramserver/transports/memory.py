"""Everything in one process, one message at a time: for tests, faults and virtual time.

A message goes into its shard's inbox and is handled when somebody runs the network: `step` delivers
one, `receive` delivers until an answer is there. So a test says exactly what has happened, and in
which order, when something breaks.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from paramserver.errors import ServerLostError, ServerTimeoutError
from paramserver.messages import Kind, Message, decode, encode
from paramserver.transports import Server


class Host:
    """One shard's place in the network: its memory, its inbox, its connections."""

    def __init__(
        self,
        network: Network,
        numel: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        *,
        slot_rows: int = 1,
    ) -> None:
        """Make room for ``capacity`` snapshot buffers of ``numel`` elements, and larger slots."""
        self.buffers: Sequence[Tensor] = [torch.zeros(numel, dtype=dtype) for _ in range(capacity)]
        self.server: Server | None = None
        self._network = network
        self._new_slot = lambda: torch.zeros(slot_rows * numel, dtype=dtype)
        self._slots: dict[Hashable, Tensor] = {}

    def slot(self, conn: Hashable) -> Tensor:
        """Return the gradient slot of a connection."""
        return self._slots.setdefault(conn, self._new_slot())

    def send(self, conn: Hashable, message: Message) -> None:
        """Send ``message`` from this shard to the other end of ``conn``."""
        assert isinstance(conn, MemoryConnection | Link)
        conn.deliver(message, self)


class Network:
    """The messages under way, delivered one at a time in the order they were sent."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """Read the time from ``clock``; without one, every delivery takes a second."""
        self._deliveries = itertools.count()
        self._clock = clock or (lambda: float(next(self._deliveries)))
        self._under_way: deque[tuple[Host, Hashable, bytes | None]] = deque()
        self.lose: Callable[[Message], bool] = lambda message: False
        """Decides whether a message to a shard is lost on its way."""
        self.repeat: Callable[[Message], bool] = lambda message: False
        """Decides whether a message to a shard arrives twice."""

    def post(self, host: Host, conn: Hashable, message: Message | None) -> None:
        """Put a message, or None for the end of the connection, on its way to ``host``."""
        if message is not None and self.lose(message):
            return
        data = None if message is None else encode(message)
        copies = 2 if message is not None and self.repeat(message) else 1
        self._under_way.extend([(host, conn, data)] * copies)

    def step(self) -> bool:
        """Deliver the oldest message; return whether there was one."""
        if not self._under_way:
            return False
        host, conn, data = self._under_way.popleft()
        now = self._clock()
        if host.server is None:  # the shard has died: nobody is there to read it
            return True
        if data is None:
            host.server.on_gone(conn, now)
        else:
            host.server.on_message(conn, decode(data), now)
        return True

    def run(self) -> None:
        """Deliver everything that is under way, and what that causes."""
        while self.step():
            pass


class Link:
    """The connection between a leader and a follower."""

    def __init__(self, network: Network, leader: Host, follower: Host) -> None:
        self._network, self._leader, self._follower = network, leader, follower

    def deliver(self, message: Message, sender: Host) -> None:
        """Take a message to the other end; a follower's welcome is not waited for."""
        if sender is not self._follower:
            self._network.post(self._follower, self, message)
        elif message.kind != Kind.WELCOME:
            self._network.post(self._leader, self, message)


class MemoryConnection:
    """A client's connection to a shard in the same process."""

    def __init__(self, network: Network, host: Host, shard: int) -> None:
        self.shard = shard
        self.slot: Tensor = host.slot(self)
        self.buffers: Sequence[Tensor] = host.buffers
        self._network, self._host = network, host
        self._inbox: deque[Message] = deque()
        self._is_open = True

    def deliver(self, message: Message, sender: Host) -> None:
        """Take a message from the shard."""
        if self._is_open:
            self._inbox.append(decode(encode(message)))

    def send(self, message: Message) -> None:
        """Put ``message`` on its way."""
        if not self._is_open or self._host.server is None:
            raise ServerLostError(self.shard, "sending")
        self._network.post(self._host, self, message)

    def receive(self, timeout_s: float) -> Message:
        """Run the network until a message is here."""
        while not self._inbox:
            if self._host.server is None:
                raise ServerLostError(self.shard, "waiting for an answer")
            if not self._network.step():
                raise ServerTimeoutError(self.shard, "waiting for an answer", timeout_s)
        return self._inbox.popleft()

    def poll(self) -> Message | None:
        """Return a message if one is here; nothing that is under way is delivered for it."""
        if self._host.server is None and not self._inbox:
            raise ServerLostError(self.shard, "looking for a message")
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        """End the connection."""
        if self._is_open:
            self._is_open = False
            self._network.post(self._host, self, None)
