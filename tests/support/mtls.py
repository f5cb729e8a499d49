"""Certificates with identities, the server's files that name them, and channels that show them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HOUR = dt.timedelta(hours=1)


@dataclass(frozen=True)
class Pem:
    """A certificate and its key."""

    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority of its own."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self.pem = self._ca.cert_pem.bytes()
        self._certificate = x509.load_pem_x509_certificate(self.pem)
        self._key: Any = load_pem_private_key(self._ca.private_key_pem.bytes(), None)

    def issue(
        self,
        *identities: str,
        lifetime: dt.timedelta = HOUR,
        key: Any = None,
        names: bytes = b"",
        usages: Sequence[x509.ObjectIdentifier] = (),
    ) -> Pem:
        """Return a certificate for "dns:..." names and URIs, written as given, that ends after `lifetime` from now.

        `names` is its subject alternative name instead, in DER; `usages` are its extended key usages.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "spiffe://example.org/common-name")]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 48 * HOUR)
            .not_valid_after(now + lifetime)
        )
        if identities:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_name, identities))), critical=False)
        if names:
            oid = x509.SubjectAlternativeName.oid
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, names), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return Pem(
            builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )

    def server(self) -> Pem:
        """Return a certificate for a server on this machine."""
        return self.issue("dns:localhost")


@dataclass(frozen=True)
class Files:
    """The files of a server with mutual TLS, in a directory; `grants` may be missing."""

    directory: Path

    def write(self, pem: Pem | None = None, client_ca: bytes | None = None, grants: str | None = None) -> Files:
        """Write the given files."""
        for name, content in (
            ("tls.crt", pem.certificate if pem else None),
            ("tls.key", pem.key if pem else None),
            ("ca.crt", client_ca),
            ("grants.toml", None if grants is None else grants.encode()),
        ):
            if content is not None:
                (self.directory / name).write_bytes(content)
        return self

    @property
    def options(self) -> Sequence[str]:
        """The settings that name the files which are there."""
        names = {"--tls-cert": "tls.crt", "--tls-key": "tls.key", "--client-ca": "ca.crt", "--grants": "grants.toml"}
        there = {option: self.directory / name for option, name in names.items() if (self.directory / name).exists()}
        return [text for option, path in there.items() for text in (option, str(path))]


def grant(identity: str, namespaces: Sequence[str], operations: Sequence[str]) -> str:
    """Return a grant as the file has it."""
    return f'[[grant]]\nidentity = "{identity}"\nnamespaces = {list(namespaces)}\noperations = {list(operations)}\n'


def channel(target: str, authority: bytes, pem: Pem | None) -> grpc.Channel:
    """Return a connection of its own to a server on this machine whose certificate `authority` issued."""
    credentials = grpc.ssl_channel_credentials(
        authority, private_key=pem.key if pem else None, certificate_chain=pem.certificate if pem else None
    )
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost")]
    return grpc.secure_channel(target, credentials, options)


def _name(identity: str) -> x509.GeneralName:
    # Without validation: an authority can sign anything.
    if identity.startswith("dns:"):
        return x509.DNSName._init_without_validation(identity.removeprefix("dns:"))
    return x509.UniformResourceIdentifier._init_without_validation(identity)
