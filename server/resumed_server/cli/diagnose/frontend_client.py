"""Clients of `resumed doctor`: connections to a frontend, and the tickets or ids of the sessions that it issues."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import resumed
from resumed._openssl.session_ids import session_of
from resumed_server.cli.diagnosis import Failure
from resumed_server.errors import ExitStatus

if TYPE_CHECKING:
    from resumed_server.config.types import Address

PATIENCE = 5.0
"""Time limit of a handshake with a frontend, in seconds."""


class Connection(NamedTuple):
    """The result of a connection to a frontend."""

    session: Any
    """The session to offer next; None if the frontend issued none."""
    resumed: bool
    version: str
    cipher: str

    @property
    def shown(self) -> bytes:
        """The ticket of the session, or its id if it has none; empty without a session.

        Raises:
            Unavailable: The session is in a libssl that this process cannot reach.
        """
        if self.session is None:
            return b""
        try:
            codec, pointer = session_of(self.session)
        except resumed.UnsupportedContext as error:
            raise Unavailable(str(error)) from None
        return codec.ticket_of(pointer) or codec.id_of(pointer)


class Unavailable(Exception):
    """A frontend cannot be visited in this way; the message is the reason."""


class FrontendClient(Protocol):
    """Connects to frontends with one version of TLS and one order of ciphers."""

    @property
    def label(self) -> str:
        """The clients that use this order of ciphers; empty for any."""

    def connect(self, address: Address, session: Any = None) -> Connection:
        """Connect to a frontend, and offer a session.

        Raises:
            Failure: It cannot be reached.
            Unavailable: This version of TLS, or this client, is not available.
        """


class SslClient:
    """Connects with the `ssl` module, which shows the frontend's certificate; in TLS 1.3 it does not wait for a ticket.

    Args:
        server_name: The server name to send.
        version: The only version of TLS to offer.
    """

    label = ""

    def __init__(self, server_name: str, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2) -> None:
        self._server_name = server_name
        self.certificate = b""
        # Only sessions are checked here; an untrusted certificate does not prevent resumption.
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE
        self._context.minimum_version = self._context.maximum_version = version

    def connect(self, address: Address, session: Any = None) -> Connection:
        """Connect, and keep the frontend's certificate in `certificate`."""
        try:
            with (
                socket.create_connection((address.host, address.port), PATIENCE) as connection,
                self._context.wrap_socket(connection, server_hostname=self._server_name, session=session) as tls,
            ):
                self.certificate = tls.getpeercert(binary_form=True) or b""
                cipher = tls.cipher()
                return Connection(
                    tls.session, bool(tls.session_reused), tls.version() or "", cipher[0] if cipher else ""
                )
        except ssl.SSLError as error:
            raise Unavailable((error.reason or "the handshake failed").lower().replace("_", " ")) from None
        except OSError as error:
            raise Failure(
                f"it cannot be reached ({error.strerror or error})", "check address and firewall", ExitStatus.RETRY
            ) from None


class Tls13Client:
    """Connects with TLS 1.3.

    Args:
        server_name: The server name to send.
        label: The clients that offer ciphers in this order.
        ciphersuites: The order, by OpenSSL's names.
    """

    def __init__(self, server_name: str, label: str, ciphersuites: str) -> None:
        self.label = label
        self._server_name, self._ciphersuites = server_name, ciphersuites
        self._client: Any = None

    def connect(self, address: Address, session: Any = None) -> Connection:
        """Connect, and wait for a ticket."""
        try:
            from resumed_server.cli import tls_client  # noqa: PLC0415 - an extra
        except ImportError:
            raise Unavailable("pyOpenSSL is not installed") from None
        try:
            if self._client is None:
                self._client = tls_client.Client(self._server_name, "1.3", ciphersuites=self._ciphersuites)
            done = self._client.visit(tls_client.Endpoint.resolve(address.host, address.port), session)
        except AttributeError:
            raise Unavailable("this pyOpenSSL cannot set an order of ciphers (25.2 can)") from None
        except (tls_client.HandshakeFailed, OSError) as error:
            raise Unavailable(str(error)) from None
        return Connection(done.session, done.resumed, done.version, done.cipher)
