"""Addresses, certificates and the token: who may speak to a run from outside, and how.

A local address (a Unix socket, or one of this machine's loopback) may be spoken to in clear text.
Any other needs TLS, or to be told in so many words that everybody on the way may read the token and
the parameters, and change them.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import grpc

from paramserver.errors import (
    ParamServerError,
    ProtocolError,
    ResourceError,
    ServerLostError,
    ServerTimeoutError,
)
from paramserver.transports.frames import MAX_FRAME_BYTES

PROTOCOL: Final = "1"
"""Version of `paramserver.proto`; both sides must have the same."""

_KEEPALIVE_MS: Final = 10_000
COMMON_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS: Final = (
    *COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # else two runs could share one port, and each get half the calls
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
)
_CLIENT_OPTIONS: Final = (
    *COMMON_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # a TCP connection for each stream
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
_UNIX: Final = ("unix:", "unix-abstract:")
_HANDSHAKE_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The certificate one side shows, and the authority whose certificates it takes."""

    certificate: Path | bytes | None = None
    """PEM file, or what is in one, with this side's certificate chain."""

    key: Path | bytes | None = None
    """The same with the certificate's private key."""

    ca: Path | bytes | None = None
    """The same with the authorities that the other side's certificate must be signed by."""

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "ca"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, Path(path))
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a certificate needs its key, and a key its certificate: give both")

    def inline(self) -> Identity:
        """Return this identity with the files' contents, for processes that do not see them."""
        certificate, key, ca = (self.read(path) for path in (self.certificate, self.key, self.ca))
        return Identity(certificate=certificate, key=key, ca=ca)

    def read(self, path: Path | bytes | None) -> bytes | None:
        """Return what is in one of the files.

        Raises:
            ResourceError: It cannot be read, or is no PEM file.
        """
        if path is None or isinstance(path, bytes):
            return path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ResourceError(f"cannot read {path}: {error.strerror}") from error
        if b"-----BEGIN" not in content:
            raise ResourceError(f"{path} is not a PEM file")
        return content

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Return what a server listens with; None for clear text."""
        if self.certificate is None:
            return None
        key, chain, ca = (self.read(path) for path in (self.key, self.certificate, self.ca))
        return grpc.ssl_server_credentials([(key, chain)], ca, ca is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where a run listens, and what it takes to be let in."""

    address: str
    """``host:port``, ``unix:path`` or ``unix-abstract:name``."""

    token: str
    """The run's secret."""

    identity: Identity | None = None
    """None speaks in clear text."""

    clear_text: bool = False
    """Whether clear text may leave this machine."""

    def __post_init__(self) -> None:
        if not self.is_secret:
            check_clear_text(self.address, self.clear_text)

    @property
    def is_secret(self) -> bool:
        """Whether what is said is encrypted."""
        return self.identity is not None and self.identity.ca is not None

    def channel(self) -> grpc.Channel:
        """Open a channel; it connects at the first call."""
        if self.identity is None or not self.is_secret:
            return grpc.insecure_channel(self.address, _CLIENT_OPTIONS)
        i = self.identity
        credentials = grpc.ssl_channel_credentials(
            i.read(i.ca), i.read(i.key), i.read(i.certificate)
        )
        return grpc.secure_channel(self.address, credentials, _CLIENT_OPTIONS)

    def metadata(self, *more: tuple[str, str | bytes]) -> Sequence[tuple[str, str | bytes]]:
        """Return what every call carries, and ``more``."""
        token = ("paramserver-token-bin", self.token.encode())
        return (("paramserver-protocol", PROTOCOL), token, *more)

    def raise_named(
        self, error: grpc.RpcError, shard: int, doing: str, waited_s: float
    ) -> NoReturn:
        """Raise what ``error`` means.

        Raises:
            ProtocolError: The token, the protocol, or what was sent is refused.
            ResourceError: There is no room.
            ServerTimeoutError: No answer in time.
            ServerLostError: Nobody is there, or the certificates do not let the two speak.
        """
        code, details = error.code(), error.details() or ""
        refusals: dict[grpc.StatusCode, type[ParamServerError]] = {
            grpc.StatusCode.UNAUTHENTICATED: ProtocolError,
            grpc.StatusCode.FAILED_PRECONDITION: ProtocolError,
            grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
            grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
            grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceError,
        }
        if code in refusals:
            raise refusals[code](details) from error
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ServerTimeoutError(shard, f"{doing} at {self.address}", waited_s) from error
        reason = self._why_not() or details.rpartition(": ")[2] or code.name.lower()
        raise ServerLostError(shard, f"{doing} at {self.address} ({reason})") from error

    def is_deserted(self) -> bool:
        """Whether its machine answers that nobody listens there; one that is cut off does not."""
        try:
            if self.address.startswith(_UNIX):
                kind, _, name = self.address.partition(":")
                with socket.socket(socket.AF_UNIX) as plain:
                    plain.settimeout(_HANDSHAKE_S)
                    plain.connect(name if kind == "unix" else f"\0{name}")
            else:
                socket.create_connection(split_address(self.address), _HANDSHAKE_S).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            return False
        return False

    def _why_not(self) -> str | None:
        """Try a connection without gRPC, which says little of why one fails."""
        if self.address.startswith(_UNIX):
            return None
        try:
            with socket.create_connection(split_address(self.address), _HANDSHAKE_S) as plain:
                plain.settimeout(_HANDSHAKE_S)
                return self._shake_hands(plain)
        except TimeoutError:
            return "no connection in time"
        except OSError as error:
            return error.strerror or str(error)

    def _shake_hands(self, plain: socket.socket) -> str | None:
        if self.identity is None or not self.is_secret:
            return "it wants TLS: give the ca of its certificate" if _wants_tls(plain) else None
        i = self.identity
        context = ssl.create_default_context(cadata=(i.read(i.ca) or b"").decode())
        context.set_alpn_protocols(["h2"])
        if isinstance(i.certificate, Path) and isinstance(i.key, Path):
            context.load_cert_chain(i.certificate, i.key)
        host, _ = split_address(self.address)
        try:
            with context.wrap_socket(plain, server_hostname=host) as secret:
                if not secret.recv(1):  # a server refuses certificates after the client's handshake
                    return "TLS failed: it may want a certificate that its own ca has signed"
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is refused: {error.verify_message}"
        except TimeoutError:
            return None
        except ssl.SSLError as error:
            return f"TLS failed: {(error.reason or str(error)).lower().replace('_', ' ')}"
        return None


def _wants_tls(plain: socket.socket) -> bool:
    """Whether who answers at ``plain`` speaks TLS; nothing is said to them but a greeting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        context.wrap_socket(plain).close()
    except OSError:  # what came is no greeting of TLS's, or nothing
        return False
    return True


def remote_at(
    address: str,
    token: str,
    ca: Path | str | None,
    certificate: Path | str | None,
    key: Path | str | None,
    clear_text: bool,
) -> Remote:
    """Return the remote that a user's own words describe."""
    paths = {"ca": ca, "certificate": certificate, "key": key}
    given = {name: Path(path) for name, path in paths.items() if path is not None}
    identity = Identity(**given) if given else None
    return Remote(address=address, token=token, identity=identity, clear_text=clear_text)


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port``.

    Raises:
        ValueError: It has another form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"an address is host:port or unix:path, got {address!r}")
    return host.strip("[]"), int(port)


def is_local(address: str) -> bool:
    """Whether what is said to ``address`` stays on this machine."""
    if address.startswith(_UNIX):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_clear_text(address: str, allowed: bool) -> None:
    """Raise ResourceError if clear text would leave this machine and that is not allowed."""
    if not allowed and not is_local(address):
        raise clear_text_refused(address)


def clear_text_refused(place: str, instead: str = "") -> ResourceError:
    """Return the error of a ``place`` that others can reach; ``instead`` is one more way out."""
    return ResourceError(
        f"{place} can be reached from other machines, and without a certificate everybody on "
        "the way could read the token and the parameters and change them: give certificates "
        "(tls_certificate, tls_key, tls_ca), or allow it with clear_text=true on a network of "
        f"trusted machines only{instead}"
    )
