"""TLS frontends inside the test's process, and a client that can misbehave: real handshakes over socket pairs."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import trustme
from OpenSSL import SSL

import resumed
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Stack = Literal["ssl", "pyopenssl"]
STACKS: tuple[Stack, ...] = ("ssl", "pyopenssl")
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
PATIENCE = 10.0
"""Seconds that a peer in the same process may take; only a broken one takes them."""

CA = trustme.CA()
HOSTS = ("localhost", "public.example", "private.example")
"""Server names of the certificate."""
CERTIFICATE = CA.issue_cert(*HOSTS)


def server_context(stack: Stack, *, certificate: trustme.LeafCert = CERTIFICATE) -> Any:
    """Return a context for servers, as an application would make it."""
    context: Any = (
        SSL.Context(SSL.TLS_SERVER_METHOD) if stack == "pyopenssl" else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    )
    certificate.configure_cert(context)
    return context


def client_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a context for clients that speak one version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    CA.configure_trust(context)
    return context


class Frontend:
    """A TLS server of one stack, with the shim unless `target` is None.

    Its look-ups have a patient deadline: where a test is not about lateness, a busy machine must not make it so. It
    ignores session id contexts, as a fleet of both stacks has to.
    """

    def __init__(
        self,
        stack: Stack,
        target: str | None,
        keyring: resumed.Keyring | None = None,
        certificate: trustme.LeafCert = CERTIFICATE,
        **options: Any,
    ) -> None:
        self.stack = stack
        self.context = server_context(stack, certificate=certificate)
        self.shim: Any = None
        if target is not None:
            assert keyring is not None
            options = {"namespace": "shop", "deadline": PATIENCE, "ignore_id_context": True, **options}
            self.shim = resumed.install(self.context, target=target, keyring=keyring, **options)

    def serve(self, connection: socket.socket) -> None:
        """Shake hands and echo until the client goes, then close without close_notify, as plain sockets do."""
        with connection, contextlib.suppress(OSError, SSL.Error):
            if self.stack == "ssl":
                with self.context.wrap_socket(connection, server_side=True) as tls:
                    while data := tls.recv(16_384):
                        tls.sendall(data)
            else:
                peer = SSL.Connection(self.context, connection)
                peer.set_accept_state()
                peer.do_handshake()
                while data := peer.recv(16_384):
                    peer.sendall(data)


class Mirrored(Frontend):
    """A frontend whose mirror is live."""

    def __init__(self, stack: Stack, target: str, keyring: resumed.Keyring, **options: Any) -> None:
        super().__init__(stack, target, keyring, mirror=True, **options)
        self.mirror = self.shim._policy._mirror
        self.mirror.follow()
        until(lambda: self.mirror.live)

    def await_sessions(self, count: int) -> None:
        """Wait until the mirror holds `count` sessions."""
        until(lambda: len(self.mirror.sessions) == count)


@dataclass
class Visit:
    """A client's view of one connection."""

    reused: bool
    session: ssl.SSLSession | None
    seconds: float


class Client:
    """Connects to frontends with one version of TLS, and resumes a given session."""

    def __init__(self, version: ssl.TLSVersion) -> None:
        self.version = version
        self.context = client_context(version)

    @contextlib.contextmanager
    def connect(
        self,
        frontend: Frontend,
        session: ssl.SSLSession | None = None,
        host: str = HOSTS[0],
        pause: Callable[[], object] | None = None,
    ) -> Iterator[Connection]:
        """Shake hands with `frontend`; the connection is cut at the end, without close_notify.

        `pause` is called when the frontend's first flight is there, before it is answered.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        server = threading.Thread(target=frontend.serve, args=(theirs,))
        server.start()
        try:
            with ours:
                yield Connection(self.context, ours, session, host, pause)
        finally:
            server.join(PATIENCE)
            assert not server.is_alive(), "the frontend hangs"

    def visit(self, frontend: Frontend, session: ssl.SSLSession | None = None, host: str = HOSTS[0]) -> Visit:
        """Connect, exchange a few bytes (so that TLS 1.3 tickets arrive) and go."""
        with self.connect(frontend, session, host) as connection:
            connection.echo(b"hello")
            return Visit(connection.tls.session_reused is True, connection.tls.session, connection.seconds)


class OrderedClient:
    """Connects to frontends with TLS 1.3 and an order of ciphersuites, by OpenSSL's names with colons between."""

    def __init__(self, ciphersuites: str) -> None:
        self._context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        self._context.set_min_proto_version(SSL.TLS1_3_VERSION)
        self._context.set_tls13_ciphersuites(ciphersuites.encode())
        self._context.set_verify(SSL.VERIFY_PEER, self._verify)
        self._verified = False

    def _verify(self, *_: object) -> bool:
        """Accept all: it is called in full handshakes only, and pyOpenSSL does not show which ones those are."""
        self._verified = True
        return True

    def visit(self, frontend: Frontend, session: SSL.Session | None = None) -> tuple[bool, SSL.Session]:
        """Connect, exchange a few bytes and go; return whether `session` resumed, and the new one."""
        self._verified = False
        ours, theirs = socket.socketpair()
        server = threading.Thread(target=frontend.serve, args=(theirs,))
        server.start()
        with ours:
            connection = SSL.Connection(self._context, ours)
            connection.set_tlsext_host_name(HOSTS[0].encode())
            if session is not None:
                connection.set_session(session)
            connection.set_connect_state()
            connection.do_handshake()
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
            new = connection.get_session()
            assert new is not None
            connection.set_shutdown(SSL.SENT_SHUTDOWN)  # or OpenSSL would not offer the session again
        server.join()
        return not self._verified, new


class Connection:
    """A client's end, over memory BIOs so that a test can see and change every byte."""

    def __init__(
        self,
        context: ssl.SSLContext,
        sock: socket.socket,
        session: ssl.SSLSession | None,
        host: str = HOSTS[0],
        pause: Callable[[], object] | None = None,
    ) -> None:
        self.sock, self._pause = sock, pause
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=host or None, session=session)
        started = time.perf_counter()
        self._drive(self.tls.do_handshake)
        self.seconds = time.perf_counter() - started

    def echo(self, data: bytes) -> None:
        """Send `data` and read it back."""
        self._drive(self.tls.write, data)
        received = b""
        while len(received) < len(data):
            chunk = self._drive(self.tls.read, len(data) - len(received))
            assert chunk, "the frontend closed the connection"
            received += chunk
        assert received == data

    def ask(self, request: bytes) -> bytes:
        """Send `request` and return the beginning of the response."""
        self._drive(self.tls.write, request)
        answer: bytes = self._drive(self.tls.read, 16_384)
        assert answer, "the frontend closed the connection"
        return answer

    def send_garbage(self) -> None:
        """Send a record that does not authenticate: the server answers with a fatal alert."""
        self.sock.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
        with contextlib.suppress(OSError):
            while self.sock.recv(16_384):
                pass

    def send_fatal_alert(self) -> None:
        """Make our own TLS fail, so that it sends the server a fatal alert."""
        self.incoming.write(b"\x17\x03\x03\x00\x40" + bytes(64))
        with contextlib.suppress(ssl.SSLError):
            while self.tls.read():  # earlier bytes
                pass
        self._flush()
        with contextlib.suppress(OSError):
            while self.sock.recv(16_384):
                pass

    def _drive(self, step: Any, *arguments: Any) -> Any:
        while True:
            try:
                result = step(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(16_384)
                if data:
                    if self._pause:
                        self._pause()
                        self._pause = None
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if data := self.outgoing.read():
            self.sock.sendall(data)
