"""A TLS client with little overhead: each visit is a generator, so one thread makes many visits concurrently.

A visit connects, makes a handshake, sends a request if there is one, waits for the session if it arrives after the
handshake (TLS 1.3), and sends close_notify. The client does not verify certificates. It uses pyOpenSSL: a TLS 1.2
resumption costs the client 0.2 ms of processor time, and 0.6 ms with `ssl`, which copies the session into and out of
each connection.
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
"""Time limit for a TLS 1.3 server's ticket: four times the handshake, at least and at most these seconds."""
_TICKETS_MISSED = 3
"""Number of consecutive visits without a ticket after which visits no longer wait for one."""
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


class Endpoint(NamedTuple):
    """The address of a server, with its name resolved once."""

    name: str
    """The address as text, from the user's input."""
    family: int
    address: Any

    @classmethod
    def resolve(cls, host: str, port: int) -> Endpoint:
        """Resolve `host`; raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", family, address)


class Handshake(NamedTuple):
    """The result of one connection."""

    resumed: bool
    session: SSL.Session | None
    """The session to offer next."""
    version: str
    seconds: float
    """Seconds from the first packet to the end of the handshake."""
    response_seconds: float
    """Seconds from the first packet to the first byte of the response; equal to `seconds` if there was no request."""
    cipher: str
    """The cipher that the server chose, by OpenSSL's name."""


class WaitFor(NamedTuple):
    """The condition that a visit waits for. After its deadline TimeoutError is thrown into the visit."""

    socket: socket.socket
    events: int
    seconds: float


class HandshakeFailed(Exception):
    """A visit failed; the message is the reason in a few words."""


class Client:
    """Visits servers.

    Args:
        server_name: The server name to send (SNI); an address is not sent.
        version: The only version of TLS to offer, one of VERSIONS; None for the newest that both peers support.
        send: A request to send after the handshake; the client waits for the first byte of the response.
        ciphersuites: The cipher suites of TLS 1.3 to offer, by OpenSSL's names, separated by colons; empty for its own
            order.
    """

    def __init__(self, server_name: str, version: str | None = None, send: bytes = b"", ciphersuites: str = "") -> None:
        self._context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        self._context.set_min_proto_version(VERSIONS[version or "1.2"])
        self._context.set_max_proto_version(VERSIONS[version or "1.3"])
        if ciphersuites:
            self._context.set_tls13_ciphersuites(ciphersuites.encode())
        # OpenSSL calls this for the server's certificates, hence in full handshakes only: pyOpenSSL has no other
        # indication.
        self._context.set_verify(SSL.VERIFY_PEER, self._verify)
        self._server_name = b"" if _is_address(server_name) else server_name.encode("idna")
        self._send = send
        self._ticketless: defaultdict[tuple[Endpoint, bool], int] = defaultdict(int)
        self._full = False

    def visit(self, endpoint: Endpoint, session: SSL.Session | None = None) -> Handshake:
        """Visit a server, offering `session`; raises HandshakeFailed."""
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
                visit: Handshake = end.value
                return visit

    def steps(self, endpoint: Endpoint, session: SSL.Session | None = None) -> Generator[WaitFor, None, Handshake]:
        """Return a visit, which the caller advances when its condition is true; it raises HandshakeFailed."""
        with socket.socket(endpoint.family, socket.SOCK_STREAM) as sock:
            try:
                return (yield from self._visit(sock, endpoint, session))
            except (OSError, SSL.Error) as error:
                raise HandshakeFailed(_explain_error(error)) from None

    def _visit(
        self, sock: socket.socket, endpoint: Endpoint, session: SSL.Session | None
    ) -> Generator[WaitFor, None, Handshake]:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        try:
            sock.connect(endpoint.address)
        except BlockingIOError:
            yield WaitFor(sock, selectors.EVENT_WRITE, PATIENCE)
            if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, "") from None
        tls = SSL.Connection(self._context, sock)
        tls.set_connect_state()
        if self._server_name:
            tls.set_tlsext_host_name(self._server_name)
        if session is not None:
            tls.set_session(session)
        resumed = yield from self._handshake(tls, sock)
        seconds = response_seconds = time.perf_counter() - started
        if self._send:
            yield from _run_step(sock, lambda: tls.sendall(self._send))
            if _QUICKACK is not None:
                # Otherwise a server with Nagle's algorithm delays its response until our acknowledgement of the tickets
                # arrives, 40 ms later.
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
            yield from _run_step(sock, lambda: tls.recv(_CHUNK))
            response_seconds = time.perf_counter() - started
        version = tls.get_protocol_version_name()
        if version == "TLSv1.3" and not self._send:
            yield from self._await_ticket(tls, sock, (endpoint, resumed), seconds)
        with contextlib.suppress(SSL.Error):
            tls.shutdown()  # otherwise OpenSSL considers the session not resumable
        return Handshake(resumed, tls.get_session(), version, seconds, response_seconds, tls.get_cipher_name() or "")

    def _handshake(self, tls: SSL.Connection, sock: socket.socket) -> Generator[WaitFor, None, bool]:
        """Make a handshake, and return whether it resumed a session."""
        full = False
        while True:
            self._full = False
            try:
                tls.do_handshake()
            except SSL.WantReadError:
                full |= self._full
                yield WaitFor(sock, selectors.EVENT_READ, PATIENCE)
            else:
                return not (full or self._full)

    def _verify(self, *_: object) -> bool:
        self._full = True
        return True

    def _await_ticket(
        self, tls: SSL.Connection, sock: socket.socket, kind: tuple[Endpoint, bool], seconds: float
    ) -> Generator[WaitFor, None, None]:
        """Wait for a ticket, unless the last handshakes of this kind brought none."""
        if self._ticketless[kind] >= _TICKETS_MISSED:
            return
        least, most = _TICKET_PATIENCE
        try:
            yield WaitFor(sock, selectors.EVENT_READ, max(least, min(4 * seconds, most)))
        except TimeoutError:
            self._ticketless[kind] += 1
            return
        self._ticketless[kind] = 0
        with contextlib.suppress(SSL.WantReadError, SSL.ZeroReturnError):
            tls.recv(_CHUNK)


def _run_step(sock: socket.socket, step: Callable[[], object]) -> Generator[WaitFor, None, None]:
    while True:
        try:
            step()
        except SSL.WantReadError:
            yield WaitFor(sock, selectors.EVENT_READ, PATIENCE)
        except SSL.WantWriteError:
            yield WaitFor(sock, selectors.EVENT_WRITE, PATIENCE)
        else:
            return


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _explain_error(error: OSError | SSL.Error) -> str:
    """Return the reason of a failure, from the text of the system's or OpenSSL's error."""
    if isinstance(error, TimeoutError):
        return "no response in time"
    if isinstance(error, (SSL.ZeroReturnError, SSL.SysCallError)):
        return "the server closed the connection"
    if isinstance(error, SSL.Error):
        return str(error.args[0][-1][-1]) if error.args and error.args[0] else "the TLS handshake failed"
    return os.strerror(error.errno) if error.errno else str(error)
