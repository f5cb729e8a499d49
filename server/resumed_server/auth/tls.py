"""The certificate that the server shows and the authorities whose clients it serves, renewed while it serves.

gRPC asks for them before every handshake, on threads of its own. So whoever looks at the files is somebody else
(`Followed`): what gRPC gets is in memory, checked, and whole.
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

# With keys of other kinds (Ed25519) the server starts, and gRPC's clients refuse every handshake.
_SMALLEST_RSA_KEY = 2_048
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


class Material(NamedTuple):
    """PEM files that fit each other. No `client_ca` means that clients need no certificate."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: float
    """When the server's certificate does, in Unix seconds."""

    def __repr__(self) -> str:
        """Show nothing: one of them is a secret."""
        return "Material()"


def followed(certificate: str, key: str, client_ca: str = "") -> Followed[Material]:
    """Follow the files at these paths; `client_ca` may be empty.

    Raises:
        ValueError: They cannot be used; the message says why.
    """
    paths = [certificate, key, client_ca] if client_ca else [certificate, key]
    return Followed("TLS", paths, lambda contents: _checked(paths, contents))


class Credentials:
    """Hands gRPC what `files` hold at the moment.

    A client that resumes a TLS session is not asked for its certificate again. So what there is, is handed out anew
    every `renewal` seconds, with which gRPC makes itself new ticket keys: no session from before that can be resumed.
    """

    def __init__(self, files: Followed[Material], renewal: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._renewal = renewal
        self._clock = clock

    @property
    def expires(self) -> float:
        """When the certificate that is shown now expires, in Unix seconds."""
        return self._files.value.expires

    def for_one_port(self) -> grpc.ServerCredentials:
        """Return credentials for one address; they remember what gRPC was handed for it."""
        initial = self._files.value
        fetch = _Fetcher(self._files, initial, self._renewal, self._clock)
        return grpc.dynamic_ssl_server_credentials(
            _configuration(initial),
            fetch,  # type: ignore[arg-type] # the stubs have forgotten that it may return None
            require_client_authentication=initial.client_ca is not None,
        )


class _Fetcher:
    """What gRPC calls before a handshake: None means that nothing changed."""

    def __init__(
        self, files: Followed[Material], initial: Material, renewal: float, clock: Callable[[], float]
    ) -> None:
        self._files = files
        self._handed = initial
        self._renewal = renewal
        self._clock = clock
        self._renewed = clock()
        self._lock = threading.Lock()

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        material, now = self._files.value, self._clock()
        with self._lock:
            if material is self._handed and now - self._renewed < self._renewal:
                return None
            self._handed, self._renewed = material, now
        return _configuration(material)


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.certificate)], root_certificates=material.client_ca
    )


def _checked(paths: Sequence[str], contents: Sequence[bytes]) -> Material:
    """Return the files if gRPC can use them: it would tell nobody that it cannot."""
    (leaf, *_), key = _certificates(paths[0], contents[0]), _key(paths[1], contents[1])
    if leaf.public_key() != key.public_key():
        raise ValueError(f"the certificate {paths[0]} and the key {paths[1]} do not belong together")
    if leaf.not_valid_after_utc < datetime.now(timezone.utc):
        raise ValueError(f"the certificate {paths[0]} expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    expires = leaf.not_valid_after_utc.timestamp()
    if len(contents) == len(paths[:2]):
        return Material(contents[0], contents[1], None, expires)
    _certificates(paths[2], contents[2])
    return Material(contents[0], contents[1], contents[2], expires)


def _certificates(path: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError(f"{path} holds no certificates in PEM") from None


def _key(path: str, pem: bytes) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ValueError(f"the key {path} is encrypted; the server cannot ask for its password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{path} holds no private key in PEM") from None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _SMALLEST_RSA_KEY:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES):
        return key
    raise ValueError(f"the key {path} must be RSA of {_SMALLEST_RSA_KEY} bits or more, or EC on P-256, P-384 or P-521")
