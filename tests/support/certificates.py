"""Certificates for tests, made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from paramserver.transports.remote import Identity

_NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Authority:
    """Signs certificates for ``addresses``, this machine's loopback unless given."""

    folder: Path
    name: str
    addresses: tuple[str, ...] = ("127.0.0.1",)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        object.__setattr__(self, "_key", key)
        _write(self.ca, self._sign(self.name, key, is_ca=True), key)

    @property
    def ca(self) -> Path:
        return self.folder / f"{self.name}.pem"

    def identity(self, name: str, *, ca: Path | None = None, days: int = 1) -> Identity:
        """Return the identity ``name``, which takes what ``ca`` has signed, valid for ``days``."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.folder / f"{name}.pem"
        _write(certificate, self._sign(name, key, is_ca=False, days=days), key)
        return Identity(certificate=certificate, key=certificate.with_suffix(".key"), ca=ca)

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, is_ca: bool, days: int = 1
    ) -> x509.Certificate:
        own: ec.EllipticCurvePrivateKey = self._key  # type: ignore[attr-defined]
        subjects = [x509.IPAddress(ipaddress.ip_address(each)) for each in self.addresses]
        return (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - datetime.timedelta(days=3))
            .not_valid_after(_NOW + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
            .sign(own, hashes.SHA256())
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _write(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
