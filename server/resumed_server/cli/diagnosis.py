"""The diagnosis of a failed call to the store: the problem, its remedy, and the exit status of the command.

Errors of TLS are ambiguous: gRPC reports most of them as "socket closed", and its server ends a handshake that it
rejects without an alert. So this module connects once more by itself, and compares both sides.
"""

from __future__ import annotations

import re
import socket
import ssl
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

import resumed
from resumed._transport.target import Target
from resumed_server.errors import ExitStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from resumed._transport.target import SocketAddress
    from resumed_server.cli.tls_options import TlsOptions

PATIENCE = 2.0
"""Time limit of each step of a connection, in seconds."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""The preface of an HTTP/2 connection, with an empty SETTINGS frame (RFC 9113, section 3.4)."""
_SETTINGS_TYPE, _TYPE_OFFSET = 4, 3
_EXPIRED, _NOT_YET_VALID, _WRONG_HOST, _WRONG_ADDRESS = 10, 9, 62, 64
"""OpenSSL's codes of a failed verification: X509_V_ERR_*."""


class Explanation(NamedTuple):
    """A problem, its remedy, and the exit status that it causes."""

    problem: str
    remedy: str
    status: ExitStatus = ExitStatus.FAILED


class Failure(Exception):
    """A check failed."""

    def __init__(self, problem: str, remedy: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(problem)
        self.explanation = Explanation(problem, remedy, status)


# By a pattern of an error that begins with its status code: its meaning and the remedy; the first match counts.
_SPECIFIC = {
    r"DNS|errors resolving|name resolution|does not resolve": Explanation(
        "the name does not resolve",
        "check the spelling, and the DNS configuration of this machine",
        ExitStatus.RETRY,
    ),
    r"Connection refused": Explanation(
        "no process listens there",
        "start the store (`resumed serve`), or correct the address",
        ExitStatus.RETRY,
    ),
    r"No such file": Explanation(
        "there is no such socket",
        "start the store with --listen unix:PATH, or correct the path",
        ExitStatus.RETRY,
    ),
    r"Permission denied": Explanation(
        "this user may not use the socket",
        "run this as the user that runs the store",
    ),
    r"unreachable|No route": Explanation(
        "the address is unreachable",
        "check address, routes and firewall",
        ExitStatus.RETRY,
    ),
    r"http2 header with status|HTTP status": Explanation(
        "a web server or proxy responds, not the store",
        "correct the target; where http_proxy or grpc_proxy is set, add the store to no_proxy",
    ),
    r"^(UNIMPLEMENTED|NOT_FOUND)": Explanation(
        "a gRPC server responds, but it is not a resumed store",
        "correct the port; `resumed serve` listens on 7400 by default",
    ),
    r"^UNAUTHENTICATED": Explanation(
        "the store does not accept this client",
        "use a certificate that the store trusts",
    ),
    r"^PERMISSION_DENIED": Explanation(
        "no grant allows this",
        "add one to the store's grants file; `resumed grants check` explains its decisions",
    ),
    r"^INVALID_ARGUMENT": Explanation(
        "the store rejects the request",
        "correct it",
        ExitStatus.USAGE,
    ),
    r"^RESOURCE_EXHAUSTED.*limit": Explanation(
        "a limit of the store is used up",
        "raise it in the store's grants file, or use less",
        ExitStatus.RETRY,
    ),
    r"^RESOURCE_EXHAUSTED": Explanation(
        "the store is full, or overloaded",
        "give it more --capacity or --workers; see its log",
        ExitStatus.RETRY,
    ),
    r"^UNAVAILABLE.*storage": Explanation(
        "the storage of the store is unavailable",
        "see the store's log",
        ExitStatus.RETRY,
    ),
    r"^UNAVAILABLE.*is stopping": Explanation(
        "the server is shutting down",
        "try again: another one takes over",
        ExitStatus.RETRY,
    ),
    r"^UNAVAILABLE.*watchers": Explanation(
        "the server has reached its limit of watchers",
        "give the store more --workers, or more servers",
        ExitStatus.RETRY,
    ),
    r"^ABORTED": Explanation(
        "the watcher did not keep up with the store",
        "try again; reduce the load on this machine",
        ExitStatus.RETRY,
    ),
}
_GENERAL = {
    r"^DEADLINE_EXCEEDED|[Tt]imed? ?out|FD Shutdown": Explanation(
        "no answer in time",
        "check address and firewall, and that the store is not overloaded; --deadline gives it more time",
        ExitStatus.RETRY,
    ),
    r"^(UNAVAILABLE|UNKNOWN|CANCELLED)": Explanation(
        "the process that listens there does not accept gRPC, or is shutting down",
        "correct the port; the target must be the store itself, or a proxy that forwards HTTP/2",
    ),
}
"""Errors that a fault of TLS may have caused."""


def explain(error: Exception, target: str, tls: TlsOptions) -> Explanation:
    """Explain the error of a call to the store at `target`; connect again if TLS may be the cause."""
    if isinstance(error, Failure):
        return error.explanation
    if isinstance(error, resumed.KeyringError):
        problem, _, remedy = str(error).partition("; ")
        remedy = remedy or "copy the keyring from another frontend again, or create one with `resumed keygen`"
        return Explanation(problem, remedy, ExitStatus.USAGE)
    text = _text(error)
    if found := _match(_SPECIFIC, text):
        return found
    if general := _match(_GENERAL, text):
        return diagnose(target, tls) or general
    return Explanation(text, "see the store's log")


def _text(error: Exception) -> str:
    """Return the text of an error, after its status code."""
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    code = getattr(error, "code", "")
    return str(error) if str(error).startswith(code) else f"{code}: {error}"


def _match(table: Mapping[str, Explanation], text: str) -> Explanation | None:
    for pattern, meaning in table.items():
        if re.search(pattern, text):
            return meaning._replace(problem=f"{meaning.problem} ({text})")
    return None


_NEEDS_TLS = Explanation(
    "the store requires TLS, and this command connected without it",
    "give --ca FILE, and --cert FILE and --key FILE if the store verifies clients",
)
_NEEDS_PLAINTEXT = Explanation(
    "the store listens without TLS, and this command connected with it",
    "omit --ca, --cert, --key and --server-name, or start the store with --tls-cert and --tls-key",
)
_NO_GRPC = Explanation("a TLS server responds, but it does not speak gRPC", "correct the port")


# --- TLS -----------------------------------------------------------------------------------------------------------


def diagnose(target: str, tls: TlsOptions) -> Explanation | None:
    """Connect to the store at `target`, and return the fault of TLS or of certificates; None if there is none."""
    with suppress(OSError, ValueError):
        parsed = Target.parse(target)
        name = tls.server_name or parsed.host
        for address in parsed.resolve():
            with suppress(OSError):
                return _diagnose(address, name, tls)
    return None


def protocol_of(address: SocketAddress) -> str:
    """Return the protocol that a server speaks: "TLS", "HTTP/2" (plaintext gRPC), or "" for any other.

    Raises:
        OSError: The server cannot be reached.
    """
    try:
        with _connect(address) as connection, _unverified().wrap_socket(connection):
            return "TLS"
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):  # only TLS servers send alerts
            return "TLS"
    except TimeoutError:
        return ""
    except ConnectionResetError:
        pass
    with suppress(TimeoutError, ConnectionResetError), _connect(address) as connection:
        connection.sendall(_PREFACE)
        frame = connection.recv(_TYPE_OFFSET + 1)
        if frame[_TYPE_OFFSET:] == bytes((_SETTINGS_TYPE,)):
            return "HTTP/2"
    return ""


def _diagnose(address: SocketAddress, name: str, tls: TlsOptions) -> Explanation | None:
    credentials = tls.credentials()
    if credentials is None:
        return _NEEDS_TLS if protocol_of(address) == "TLS" else None
    try:
        with _connect(address) as connection, credentials.context().wrap_socket(connection, server_hostname=name) as it:
            if it.selected_alpn_protocol() != "h2":
                return _NO_GRPC
            # With TLS 1.3 the server verifies the client after the client's side of the handshake is complete.
            accepted = bool(it.recv(1))
    except ssl.SSLCertVerificationError as error:
        return _distrusted(error, address, name, tls)
    except (ssl.SSLEOFError, ConnectionResetError):
        accepted = False
    except ssl.SSLError:
        return _NEEDS_PLAINTEXT if protocol_of(address) == "HTTP/2" else None
    return None if accepted else _rejected(tls)


def _distrusted(error: ssl.SSLCertVerificationError, address: SocketAddress, name: str, tls: TlsOptions) -> Explanation:
    """Explain why this side does not trust the store's certificate."""
    certificate = _certificate_of(address)
    if error.verify_code in {_WRONG_HOST, _WRONG_ADDRESS}:
        names = ", ".join(_names(certificate)) or "no name"
        return Explanation(
            f"the store's certificate is for {names}, not for {name}",
            "use one of its names in the target, or give it as --server-name",
        )
    if error.verify_code in {_EXPIRED, _NOT_YET_VALID}:
        return _outdated("the store's certificate", certificate)
    trusted = f"{tls.ca} did not issue" if tls.ca else "no authority of this system issued"
    issuer = f" (issuer: {certificate.issuer.rfc4514_string()})" if certificate else ""
    return Explanation(
        f"{trusted} the store's certificate{issuer}",
        "give the certificate of its authority as --ca FILE",
    )


def _rejected(tls: TlsOptions) -> Explanation:
    """Explain why the store ended the handshake."""
    if tls.cert is None:
        return Explanation(
            "the store requires a client certificate",
            "give --cert FILE and --key FILE, of an authority in the store's --client-ca",
        )
    certificate = x509.load_pem_x509_certificates(Path(tls.cert).read_bytes())[0]
    now = datetime.now(timezone.utc)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        return _outdated(f"the client certificate {tls.cert}", certificate)
    if not _is_for_clients(certificate):
        return Explanation(
            f"the store rejects {tls.cert}, a certificate for servers only",
            'use a certificate with the extended key usage "client authentication"',
        )
    return Explanation(
        f"the store does not trust {tls.cert} (issuer: {certificate.issuer.rfc4514_string()})",
        "use a certificate of an authority in the store's --client-ca, or add this issuer there",
    )


def _outdated(what: str, certificate: x509.Certificate | None) -> Explanation:
    period = "at another time"
    if certificate:
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        period = f"from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
    return Explanation(f"{what} is valid {period} only", "renew it, or correct the clock of this machine")


def _connect(address: SocketAddress) -> socket.socket:
    family, where = address
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    try:
        connection.connect(where)
    except OSError:
        connection.close()
        raise
    return connection


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _certificate_of(address: SocketAddress) -> x509.Certificate | None:
    """Return the certificate of a server; None if its handshake fails."""
    with (
        suppress(OSError, ValueError),
        _connect(address) as connection,
        _unverified().wrap_socket(connection) as secured,
    ):
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    return None


def _names(certificate: x509.Certificate | None) -> list[str]:
    with suppress(ValueError, x509.ExtensionNotFound):
        if certificate:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found = names.get_values_for_type(x509.DNSName)
            return [*found, *map(str, names.get_values_for_type(x509.IPAddress))]
    return []


def _is_for_clients(certificate: x509.Certificate) -> bool:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (ValueError, x509.ExtensionNotFound):
        return True
    return ExtendedKeyUsageOID.CLIENT_AUTH in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages
