"""A TLS client that can misbehave, of servers in other processes: real handshakes over loopback."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resumed._openssl.session_ids import session_of
from support.tls import PATIENCE, Connection, client_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    import trustme

HOSTS = ("localhost", "public.example")
_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Visit:
    """A client's view of one connection."""

    resumed: bool
    session: ssl.SSLSession


class Client:
    """Connects to ports of 127.0.0.1 with one version of TLS. Goes without close_notify, as if it were cut off."""

    def __init__(self, version: ssl.TLSVersion) -> None:
        self.version = version
        self._context = client_context(version)

    def show(self, certificate: trustme.LeafCert) -> None:
        """Show a certificate from now on, if a server requests one."""
        certificate.configure_cert(self._context)

    def visit(self, port: int, session: ssl.SSLSession | None = None, host: str = HOSTS[0]) -> Visit:
        """Connect, exchange a few bytes (so that TLS 1.3 tickets arrive) and go. Raises OSError if it fails."""
        with self.connect(port, session, host) as connection:
            return seen(connection)

    def comes_back(self, port: int) -> bool:
        """Return whether a new session resumes."""
        return self.visit(port, self.visit(port).session).resumed

    @contextlib.contextmanager
    def connect(self, port: int, session: ssl.SSLSession | None = None, host: str = HOSTS[0]) -> Iterator[Connection]:
        """Shake hands and exchange a few bytes."""
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            # Or the request waits for the acknowledgement of the handshake's last message, 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self._context, sock, session, host)
            connection.ask(_REQUEST)
            yield connection


def seen(connection: Connection) -> Visit:
    """Return the present view of a connection."""
    session = connection.tls.session
    assert session, "no session was negotiated"
    return Visit(connection.tls.session_reused is True, session)


def id_of(session: ssl.SSLSession) -> bytes:
    """Return the id under which the server stored a session: its ticket if it has one, or its session id."""
    codec, pointer = session_of(session)
    return codec.ticket_of(pointer) or codec.id_of(pointer)
