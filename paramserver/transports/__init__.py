"""Ways for messages and tensors to get from a worker to a shard, all under one contract."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from paramserver.compression import Payload
from paramserver.messages import Message


class Server(Protocol):
    """A leader or a follower, as a transport sees it. Calls come one at a time."""

    def on_message(self, conn: Hashable, m: Message, now: float) -> None:
        """Handle a message that came over ``conn`` at ``now``, in seconds."""

    def on_gone(self, conn: Hashable, now: float) -> None:
        """Handle the end of a connection."""

    def on_tick(self, now: float) -> None:
        """Look at the clock; called a few times a second."""


class Connection(Protocol):
    """A client's end of the way to one shard. Used by one thread at a time."""

    slot: Tensor
    """Where the client writes its gradient, shape ``(n,)``; the shard reads it at a push."""

    buffers: Sequence[Tensor]
    """The shard's snapshot buffers, shape ``(n,)`` each. Only a leased one may be read."""

    def send(self, message: Message) -> None:
        """Give ``message`` to the shard.

        Raises:
            ServerLostError: The shard is gone; it may or may not have the message.
        """

    def receive(self, timeout_s: float) -> Message:
        """Wait for the shard's next message.

        Raises:
            ServerTimeoutError: Nothing came within ``timeout_s`` seconds.
            ServerLostError: The shard is gone.
        """

    def poll(self) -> Message | None:
        """Return the shard's next message if it is here already.

        Raises:
            ServerLostError: The shard is gone.
        """

    def close(self) -> None:
        """End the connection; the shard forgets the worker. Closing twice is harmless."""


@runtime_checkable
class PayloadConnection(Connection, Protocol):
    """A `Connection` that can carry payloads in the place of vectors."""

    carries: bool
    """Whether it does: that was agreed when it was made."""

    pulled_bytes: int
    """Of the payload that the last read has come as, its header included."""

    def carry(self, payload: Payload) -> None:
        """Send ``payload`` at the next push, which may be sent more than once."""
