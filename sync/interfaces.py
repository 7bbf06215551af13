"""Network interfaces of this machine, by name."""

from __future__ import annotations

import fcntl
import socket
import struct

from paramserver.errors import ResourceError

_SIOCGIFADDR = 0x8915
"""Asks Linux for an interface's IPv4 address; of <linux/sockios.h>."""


def interface_ip(name: str) -> str:
    """Return the IPv4 address of network interface ``name``.

    Raises:
        ResourceError: This machine has no such interface, or it has no address.
    """
    names = [known for _, known in socket.if_nameindex()]
    if name not in names:
        raise ResourceError(
            f"{socket.gethostname()} has no network interface {name!r} (it has "
            f"{', '.join(names)}): name one that every node has"
        )
    request = struct.pack("256s", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            raise ResourceError(
                f"network interface {name!r} of {socket.gethostname()} has no IPv4 address: "
                f"{error.strerror}"
            ) from error
    return socket.inet_ntoa(answer[20:24])  # ifreq: 16 bytes of name, sockaddr_in
