"""Messages over a Unix socket, to the last one that the other end has said."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from paramserver.messages import Kind, Message
from paramserver.transports.link import Link


def test_the_last_words_of_an_end_that_left_something_unread_are_heard() -> None:
    ours, theirs = map(Link, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    with closing(ours):
        ours.send(Message(Kind.LEAD))
        theirs.send(Message(Kind.FAIL, text="why"))
        theirs.close()

        assert ours.receive(1.0).text == "why"
        with pytest.raises(EOFError):
            ours.receive(1.0)
