"""Server TLS certificates and client CAs, reloaded at run time.

gRPC requests them before every handshake, in threads of its own. Another thread reads and validates the files
(`Followed`), so gRPC never waits for a file and never gets an invalid one.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from resumed_server.config.reloading_file import Followed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# With keys of other types (Ed25519) the server would start, and gRPC's clients would reject every handshake.
_MIN_RSA_BITS = 2_048
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


class CertificateFiles(NamedTuple):
    """A certificate and its key, in PEM. Without a `client_ca`, clients need no certificate."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    begins: float
    """When the validity of the server's certificate begins, in Unix seconds."""
    expires: float
    """When it ends."""

    def __repr__(self) -> str:
        """Return no content: the key is a secret."""
        return "CertificateFiles()"


def watch_files(certificate: str, key: str, client_ca: str = "") -> Followed[CertificateFiles]:
    """Read the files at these paths (`client_ca` may be empty); return them as files that can be reloaded.

    Raises:
        ValueError: A file is invalid; the message names the reason.
    """
    paths = [certificate, key, client_ca] if client_ca else [certificate, key]
    return Followed("TLS", paths, lambda contents: _validate(paths, contents))


class ServerCertificates:
    """Provides gRPC with the present content of `files`.

    A client that resumes a TLS session presents no certificate again. So gRPC gets even unchanged files again every
    `renewal` seconds: then it creates new ticket keys, and no earlier session can be resumed.
    """

    def __init__(
        self, files: Followed[CertificateFiles], renewal: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._files = files
        self._renewal = renewal
        self._clock = clock
        self._fetchers: list[CertificateConfigFetcher] = []

    @property
    def begins(self) -> float:
        """When the validity of the present server certificate begins, in Unix seconds."""
        return self._files.value.begins

    @property
    def expires(self) -> float:
        """When it ends."""
        return self._files.value.expires

    @property
    def handshakes(self) -> int:
        """Number of handshakes that clients have begun."""
        return sum(fetcher.handshakes for fetcher in self._fetchers)

    def for_listener(self) -> grpc.ServerCredentials:
        """Return the credentials of one listener, which remember the files that gRPC has for it."""
        initial = self._files.value
        fetch = CertificateConfigFetcher(self._files, initial, self._renewal, self._clock)
        self._fetchers.append(fetch)
        return grpc.dynamic_ssl_server_credentials(
            _configuration(initial),
            fetch,  # type: ignore[arg-type] # the stubs do not allow the None that gRPC accepts
            require_client_authentication=initial.client_ca is not None,
        )


class CertificateConfigFetcher:
    """The function that gRPC calls before each handshake.

    Attributes:
        handshakes: Number of its calls.
    """

    def __init__(
        self, files: Followed[CertificateFiles], initial: CertificateFiles, renewal: float, clock: Callable[[], float]
    ) -> None:
        self._files = files
        self._sent = initial
        self._renewal = renewal
        self._clock = clock
        self._renewed = clock()
        self._lock = threading.Lock()
        self.handshakes = 0

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the present files, or None if gRPC has them."""
        files, now = self._files.value, self._clock()
        with self._lock:
            self.handshakes += 1
            if files is self._sent and now - self._renewed < self._renewal:
                return None
            self._sent, self._renewed = files, now
        return _configuration(files)


def _configuration(files: CertificateFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(files.key, files.certificate)], root_certificates=files.client_ca
    )


def _validate(paths: Sequence[str], contents: Sequence[bytes]) -> CertificateFiles:
    """Return the files if gRPC accepts them. gRPC itself would reject them without a message."""
    (leaf, *_), key = _certificates(paths[0], contents[0]), _key(paths[1], contents[1])
    if leaf.public_key() != key.public_key():
        raise ValueError(f"the certificate {paths[0]} and the key {paths[1]} do not match")
    if leaf.not_valid_after_utc < datetime.now(timezone.utc):
        raise ValueError(f"the certificate {paths[0]} expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    client_ca = None
    for path, client_ca in zip(paths[2:], contents[2:], strict=True):
        _certificates(path, client_ca)
    begins, expires = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    return CertificateFiles(contents[0], contents[1], client_ca, begins, expires)


def _certificates(path: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError(f"{path} contains no certificate in PEM format") from None


def _key(path: str, pem: bytes) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ValueError(f"the key {path} is encrypted; use a key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{path} contains no private key in PEM format") from None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES):
        return key
    raise ValueError(f"the key {path} must be RSA of {_MIN_RSA_BITS} bits or more, or EC on P-256, P-384 or P-521")
