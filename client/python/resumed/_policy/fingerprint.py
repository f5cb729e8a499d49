"""The context fingerprint: the identity that a full handshake proved, in 32 bytes that are the same in every language.

The encoding is in protos/README.md and protos/vectors/contexts.json; docs/contexts.md explains its purpose.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable

FINGERPRINT_BYTES = 32
"""Length of a fingerprint: server identity (16), client authentication (16)."""

_HALF = FINGERPRINT_BYTES // 2
_IDENTITY = b"resumed/v1 identity\0"
_CLIENT_AUTHENTICATION = b"resumed/v1 client authentication\0"


@dataclass(frozen=True)
class ClientPolicy:
    """How a connection verifies the certificate that it asks its client for.

    Attributes:
        mode: OpenSSL's SSL_VERIFY_ flags: SSL_CTX_set_verify(3).
        depth: SSL_CTX_set_verify_depth(3); -1 for OpenSSL's default.
        security_level: SSL_CTX_set_security_level(3).
        flags: X509_V_FLAG_ of the connection: X509_VERIFY_PARAM_set_flags(3).
        store_flags: Those of the trust store.
        hosts: Names of which the certificate must have one.
        certificates: The trust store's certificates, each as SHA-256 of its DER.
        crls: The trust store's CRLs, each as SHA-256 of its DER.
    """

    mode: int
    depth: int = -1
    security_level: int = 0
    flags: int = 0
    store_flags: int = 0
    hosts: tuple[bytes, ...] = ()
    certificates: frozenset[bytes] = frozenset()
    crls: frozenset[bytes] = frozenset()


def server_identity(names: Iterable[bytes]) -> bytes:
    """Return the first half of a fingerprint: of the names_of() all certificates that a connection could show."""
    return hashlib.sha256(_IDENTITY + b"".join(sorted(set(names)))).digest()[:_HALF]


def client_authentication(policy: ClientPolicy | None) -> bytes:
    """Return the second half of a fingerprint; None for a connection that asks for no certificate."""
    encoded = b"" if policy is None else _encoded(policy)
    return hashlib.sha256(_CLIENT_AUTHENTICATION + encoded).digest()[:_HALF]


def names_of(certificate: bytes) -> frozenset[bytes]:
    """Return the encoded names of a certificate (DER); its digest, if it has none or they cannot be read."""
    try:
        names = _names_of(x509.load_der_x509_certificate(certificate))
    except ValueError:
        names = set()
    return frozenset(names or {_name(b"X", hashlib.sha256(certificate).digest())})


NO_CLIENT_AUTHENTICATION = client_authentication(None)
"""The second half of the fingerprint of all connections that ask for no certificate."""


def _encoded(policy: ClientPolicy) -> bytes:
    hosts = [len(host).to_bytes(2, "big") + host for host in policy.hosts]
    anchors = {b"A" + digest for digest in policy.certificates} | {b"R" + digest for digest in policy.crls}
    return b"".join(
        (
            policy.mode.to_bytes(1, "big"),
            policy.depth.to_bytes(4, "big", signed=True),
            policy.security_level.to_bytes(4, "big"),
            policy.flags.to_bytes(8, "big"),
            policy.store_flags.to_bytes(8, "big"),
            len(hosts).to_bytes(2, "big"),
            *hosts,
            *sorted(anchors),
        )
    )


def _names_of(certificate: x509.Certificate) -> set[bytes]:
    with suppress(x509.ExtensionNotFound):
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = {_name(b"D", name.encode().lower()) for name in alternatives.get_values_for_type(x509.DNSName)}
        addresses = alternatives.get_values_for_type(x509.IPAddress)
        names |= {_name(b"I", each.packed) for each in addresses}  # type: ignore[union-attr]  # no network in a certificate
        if names:
            return names
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return {_name(b"C", str(each.value).encode().lower()) for each in common}


def _name(kind: bytes, value: bytes) -> bytes:
    return kind + len(value).to_bytes(2, "big") + value
