"""A TLS client with little overhead: each visit is a generator, so one thread makes many visits concurrently.

A visit connects, shakes hands, asks something if there is something to ask, waits for the session where it comes
behind the handshake (TLS 1.3), and says close_notify. Certificates are not checked. It is made with pyOpenSSL: a TLS
1.2 resumption costs the client 0.2 ms of processor time, and 0.6 ms with `ssl`, which copies the session into and out
of each connection.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import selectors
import socket
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from OpenSSL import SSL

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

PATIENCE = 10.0
"""Time limit of a server for each step, in seconds."""
VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}
_CHUNK = 16_384
_TICKET_PATIENCE = (0.1, 1.0)
"""Seconds that a TLS 1.3 server's ticket may be late, at least and at most: between them four times the handshake."""
_TICKETS_MISSED = 3
"""Number of consecutive visits without a ticket after which visits no longer wait for one."""
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


class Endpoint(NamedTuple):
    """Where a server listens, its name resolved once."""

    name: str
    """As the user wrote it."""
    family: int
    address: Any

    @classmethod
    def resolved(cls, host: str, port: int) -> Endpoint:
        """Resolve `host`; raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", family, address)


class Visit(NamedTuple):
    """The result of one connection."""

    resumed: bool
    session: SSL.Session | None
    """The session to offer next."""
    version: str
    seconds: float
    """From the first packet to the end of the handshake."""
    answered: float
    """From the first packet to the first byte of the answer; like `seconds` if nothing is sent."""
    cipher: str
    """The cipher that the server chose, by OpenSSL's name."""


class Want(NamedTuple):
    """The condition that a visit waits for. After its deadline TimeoutError is thrown into the visit."""

    socket: socket.socket
    events: int
    seconds: float


class Failed(Exception):
    """A visit failed; the message is the reason in a few words."""


class Client:
    """Visits servers.

    Args:
        server_name: The name to ask for (SNI), unless it is an address.
        version: The only version of TLS to speak, one of VERSIONS; None for the newest that both ends know.
        send: Sent behind the handshake; the answer's first byte is waited for.
        ciphersuites: Those of TLS 1.3 that it offers, in its order, by OpenSSL's names with colons between; empty for
            OpenSSL's own order.
    """

    def __init__(self, server_name: str, version: str | None = None, send: bytes = b"", ciphersuites: str = "") -> None:
        self._context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        self._context.set_min_proto_version(VERSIONS[version or "1.2"])
        self._context.set_max_proto_version(VERSIONS[version or "1.3"])
        if ciphersuites:
            self._context.set_tls13_ciphersuites(ciphersuites.encode())
        # Called for the server's certificates, and so in full handshakes only: pyOpenSSL does not tell otherwise.
        self._context.set_verify(SSL.VERIFY_PEER, self._certified)
        self._server_name = b"" if _is_address(server_name) else server_name.encode("idna")
        self._send = send
        self._ticketless: defaultdict[tuple[Endpoint, bool], int] = defaultdict(int)
        self._full = False

    def visit(self, endpoint: Endpoint, session: SSL.Session | None = None) -> Visit:
        """Visit a server, offering `session`; raises Failed."""
        steps = self.steps(endpoint, session)
        with selectors.DefaultSelector() as selector:
            try:
                want = next(steps)
                while True:
                    selector.register(want.socket, want.events)
                    ready = selector.select(want.seconds)
                    selector.unregister(want.socket)
                    want = next(steps) if ready else steps.throw(TimeoutError())
            except StopIteration as end:
                visit: Visit = end.value
                return visit

    def steps(self, endpoint: Endpoint, session: SSL.Session | None = None) -> Generator[Want, None, Visit]:
        """Return a visit, which the caller advances when the condition that it yields is true; it raises Failed."""
        with socket.socket(endpoint.family, socket.SOCK_STREAM) as sock:
            try:
                return (yield from self._visit(sock, endpoint, session))
            except (OSError, SSL.Error) as error:
                raise Failed(_reason(error)) from None

    def _visit(
        self, sock: socket.socket, endpoint: Endpoint, session: SSL.Session | None
    ) -> Generator[Want, None, Visit]:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        try:
            sock.connect(endpoint.address)
        except BlockingIOError:
            yield Want(sock, selectors.EVENT_WRITE, PATIENCE)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, "") from None
        tls = SSL.Connection(self._context, sock)
        tls.set_connect_state()
        if self._server_name:
            tls.set_tlsext_host_name(self._server_name)
        if session is not None:
            tls.set_session(session)
        resumed = yield from self._handshake(tls, sock)
        seconds = answered = time.perf_counter() - started
        if self._send:
            yield from _done(sock, lambda: tls.sendall(self._send))
            if _QUICKACK is not None:
                # Or a server that left Nagle's algorithm on holds its answer back until our acknowledgement of the
                # tickets comes, 40 ms later.
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
            yield from _done(sock, lambda: tls.recv(_CHUNK))
            answered = time.perf_counter() - started
        version = tls.get_protocol_version_name()
        if version == "TLSv1.3" and not self._send:
            yield from self._ticket(tls, sock, (endpoint, resumed), seconds)
        with contextlib.suppress(SSL.Error):
            tls.shutdown()  # without it OpenSSL holds the connection for a failed one, and its session for useless
        return Visit(resumed, tls.get_session(), version, seconds, answered, tls.get_cipher_name() or "")

    def _handshake(self, tls: SSL.Connection, sock: socket.socket) -> Generator[Want, None, bool]:
        """Shake hands and return whether a session was resumed."""
        full = False
        while True:
            self._full = False
            try:
                tls.do_handshake()
            except SSL.WantReadError:
                full |= self._full
                yield Want(sock, selectors.EVENT_READ, PATIENCE)
            else:
                return not (full or self._full)

    def _certified(self, *_: object) -> bool:
        self._full = True
        return True

    def _ticket(
        self, tls: SSL.Connection, sock: socket.socket, kind: tuple[Endpoint, bool], seconds: float
    ) -> Generator[Want, None, None]:
        """Wait for a ticket, unless handshakes of this kind never bring one."""
        if self._ticketless[kind] >= _TICKETS_MISSED:
            return
        least, most = _TICKET_PATIENCE
        try:
            yield Want(sock, selectors.EVENT_READ, max(least, min(4 * seconds, most)))
        except TimeoutError:
            self._ticketless[kind] += 1
            return
        self._ticketless[kind] = 0
        with contextlib.suppress(SSL.WantReadError, SSL.ZeroReturnError):
            tls.recv(_CHUNK)


def _done(sock: socket.socket, step: Callable[[], object]) -> Generator[Want, None, None]:
    while True:
        try:
            step()
        except SSL.WantReadError:
            yield Want(sock, selectors.EVENT_READ, PATIENCE)
        except SSL.WantWriteError:
            yield Want(sock, selectors.EVENT_WRITE, PATIENCE)
        else:
            return


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _reason(error: OSError | SSL.Error) -> str:
    """Return why a connection failed, in the words of the system's or OpenSSL's error."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, (SSL.ZeroReturnError, SSL.SysCallError)):
        return "the server closed the connection"
    if isinstance(error, SSL.Error):
        return str(error.args[0][-1][-1]) if error.args and error.args[0] else "the TLS handshake failed"
    return os.strerror(error.errno) if error.errno else str(error)
