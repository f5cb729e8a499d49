"""A client whose sessions move between connections with and without certificates; it reports its view of each."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL

from contexts.places import HTTP, LINES, MQTT, REDIS, Exchange, Place

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_lib: Any = vars(SSL)["_lib"]  # what pyOpenSSL has no methods for
VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}
PATIENCE = 10
"""Seconds that an answer may take; only a broken server takes them."""
_ALERT = re.compile(r"alert|certificate", re.IGNORECASE)


@dataclass(frozen=True)
class Visit:
    """A client's view of one connection."""

    resumed: bool
    answer: str
    """`served...`, another answer of the application, or `refused`."""
    session: Any = None
    detail: str = ""

    @property
    def served(self) -> bool:
        """Whether the application served the client."""
        return self.answer.startswith("served")

    def __str__(self) -> str:
        """Return a cell of the table."""
        word = "served" if self.served else self.answer
        return f"{'resumed' if self.resumed else 'full'}, {word}"


def visit(
    place: Place,
    version: str,
    *,
    name: str = "localhost",
    certificate: Path | None = None,
    session: Any = None,
    alpn: str = "",
    path: str = "/",
    end: Callable[[socket.socket], None] | None = None,
) -> Visit:
    """Connect, send a request, read its answer (TLS 1.3 sends sessions before it), and go.

    `end` gets the socket before it is closed, which ends the connection without close_notify in any case.
    """
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(VERSIONS[version])
    context.set_max_proto_version(VERSIONS[version])
    _lib.SSL_CTX_set_post_handshake_auth(context._context, 1)
    if certificate:
        context.use_certificate_chain_file(str(certificate))
        context.use_privatekey_file(str(certificate))
    if alpn:
        context.set_alpn_protos([alpn.encode()])
    with socket.create_connection(("127.0.0.1", place.port)) as connected:
        # Of the kernel, as pyOpenSSL has no time limits; then reading raises WantReadError.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        protocol = place.kind.protocol
        connection = SSL.Connection(context, connected)
        if name:
            connection.set_tlsext_host_name(name.encode())
        if session is not None:
            # pyOpenSSL's own method wants one context for both; with certificates of their own there are two.
            _lib.SSL_set_session(connection._ssl, session._session)
        connection.set_connect_state()
        reused = False
        try:
            if isinstance(protocol, Exchange) and protocol.start_tls:
                START_TLS[protocol.start_tls](connected)
            connection.do_handshake()
            reused = bool(_lib.SSL_session_reused(connection._ssl))
            answer, detail = _ask(connection, protocol, name, path), ""
        except (SSL.Error, OSError) as error:
            answer, detail = "refused", repr(error)[:200]
        fresh = connection.get_session()
        # A connection that ends without close_notify must not take its session with it.
        connection.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
        if end:
            end(connected)
    return Visit(reused, answer, fresh, detail)


def reset(connected: socket.socket) -> None:
    """Have a connection end with a reset."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def provoke_alert(connected: socket.socket) -> None:
    """Send a record that is not authentic, and wait until the server has ended the connection with a fatal alert."""
    connected.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
    with contextlib.suppress(OSError):
        while connected.recv(4096):
            pass


def _start_postgresql(connected: socket.socket) -> None:
    connected.sendall(struct.pack(">ii", 8, 80877103))  # SSLRequest
    if connected.recv(1) != b"S":
        raise ConnectionError("PostgreSQL does not accept TLS")


def _start_mysql(connected: socket.socket) -> None:
    connected.recv(4096)  # the server's greeting
    connected.sendall(b"\x20\0\0\1" + MYSQL_LOGIN)


MYSQL_LOGIN = struct.pack("<IIB23x", 0x0008AA00, 1 << 24, 45)
"""A request for TLS, and the first bytes of a login (CLIENT_SSL, protocol 4.1, secure connection, plugins)."""
START_TLS = {"postgresql": _start_postgresql, "mysql": _start_mysql}


def _exchange(connection: Any, protocol: Exchange) -> str:
    if protocol.request:
        connection.sendall(protocol.request)
    received = b""
    while protocol.served not in received:
        try:
            received += connection.recv(16384)
        except (SSL.Error, OSError):
            if received:
                return "refused"
            raise
    return "served"


def _ask(connection: Any, protocol: str | Exchange, name: str, path: str) -> str:
    if isinstance(protocol, Exchange):
        return _exchange(connection, protocol)
    host = name.lower() or "localhost"
    request = {
        HTTP: f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode(),
        REDIS: b"PING\r\n",
        MQTT: b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04abcd",
        LINES: b"admin\n" if path == "/admin" else b"hello\n",
    }[protocol]
    connection.sendall(request)
    received = b""
    while True:
        try:
            received += connection.recv(16384)
        except (SSL.Error, OSError):
            if received:
                break
            raise
        if protocol == LINES and received == b"more\n":
            connection.sendall(b"more\n")
            received = b""
        elif protocol != HTTP and received:
            break
    if protocol == REDIS:
        return "served" if received.startswith(b"+PONG") else "refused"
    if protocol == MQTT:
        return "served" if received[:4] == b"\x20\x02\x00\x00" else "refused"
    if protocol == LINES:
        return received.decode().strip()
    return _http_answer(received.decode(errors="replace"))


def _http_answer(text: str) -> str:
    head, _, body = text.partition("\r\n\r\n")
    status = head.split(" ", 2)[1]
    if status != "200":
        return status
    client = re.search(r"^X-Client: (.*)$", head, re.MULTILINE)
    return body.strip() + (f"client {client[1].strip()}" if client else "")
