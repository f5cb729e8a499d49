"""A client whose sessions move between connections with and without certificates; it reports its view of each."""

from __future__ import annotations

import re
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from OpenSSL import SSL

from contexts.places import HTTP, LINES, MQTT, REDIS, Place

if TYPE_CHECKING:
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
) -> Visit:
    """Connect, send a request, read its answer (TLS 1.3 sends sessions before it), and go."""
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
        connection = SSL.Connection(context, connected)
        if name:
            connection.set_tlsext_host_name(name.encode())
        if session is not None:
            # pyOpenSSL's own method wants one context for both; with certificates of their own there are two.
            _lib.SSL_set_session(connection._ssl, session._session)
        connection.set_connect_state()
        reused = False
        try:
            connection.do_handshake()
            reused = bool(_lib.SSL_session_reused(connection._ssl))
            answer, detail = _ask(connection, place.kind.protocol, name, path), ""
        except (SSL.Error, OSError) as error:
            answer, detail = "refused", repr(error)[:200]
        fresh = connection.get_session()
        # A connection that ends without close_notify must not take its session with it.
        connection.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
    return Visit(reused, answer, fresh, detail)


def _ask(connection: Any, protocol: str, name: str, path: str) -> str:
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
    head, _, body = received.decode(errors="replace").partition("\r\n\r\n")
    status = head.split(" ", 2)[1]
    if status != "200":
        return status
    client = re.search(r"^X-Client: (.*)$", head, re.MULTILINE)
    return body.strip() + (f"client {client[1].strip()}" if client else "")
