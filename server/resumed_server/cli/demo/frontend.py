"""A small TLS frontend in one process, for `resumed demo`, measurements and tests.

It listens on a free port of 127.0.0.1, prints the port in a line of JSON, and responds to each line of a client with a
line of JSON: `stats` with the counters of the shim, `flush` once the shim has sent all Puts and removals, `bye` before
it closes the connection, any other with its name and the duration of the handshake. Connections end without
close_notify, as with plain `ssl` sockets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import ssl
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import resumed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from OpenSSL import SSL

    Peer: TypeAlias = ssl.SSLSocket | SSL.Connection

MAX_CONNECTIONS = 256
PATIENCE = 60
"""Seconds that a client may be silent."""
_MAX_LINE = 4096
_BACKLOG = 1024
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class SslStack:
    """TLS by the `ssl` module."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, certificate: str, tickets: int | None) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        if tickets is not None:
            self.context.num_tickets = tickets

    def require_clients_of(self, authorities: str) -> None:
        """Require a client certificate of one of the authorities in a file."""
        self.context.load_verify_locations(authorities)
        self.context.verify_mode = ssl.CERT_REQUIRED

    @contextlib.contextmanager
    def accept_tls(self, connection: socket.socket) -> Iterator[tuple[Peer, str | None]]:
        """Shake hands, and close the connection at the end."""
        connection.settimeout(PATIENCE)
        with self.context.wrap_socket(connection, server_side=True) as peer:
            yield peer, peer.version()


class PyOpenSSLStack:
    """TLS by pyOpenSSL."""

    def __init__(self, certificate: str, tickets: int | None) -> None:
        from OpenSSL import SSL  # noqa: PLC0415 - frontends of the other stack do without

        if tickets is not None:
            raise ValueError("pyOpenSSL cannot set the number of tickets; use --stack ssl")
        self.errors = (OSError, SSL.Error)
        self.context = SSL.Context(SSL.TLS_SERVER_METHOD)
        self.context.set_min_proto_version(SSL.TLS1_2_VERSION)
        self.context.use_certificate_chain_file(certificate)
        self.context.use_privatekey_file(certificate)
        self._connection = SSL.Connection
        self._required = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT

    def require_clients_of(self, authorities: str) -> None:
        """Require a client certificate of one of the authorities in a file."""
        self.context.load_verify_locations(authorities)
        self.context.set_verify(self._required)

    @contextlib.contextmanager
    def accept_tls(self, connection: socket.socket) -> Iterator[tuple[Peer, str | None]]:
        """Shake hands; without shutdown() the connection ends without close_notify."""
        # The kernel's own timeout: pyOpenSSL wants a blocking socket, which Python's timeouts do not leave it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
        peer = self._connection(self.context, connection)
        peer.set_accept_state()
        peer.do_handshake()
        yield peer, peer.get_protocol_version_name()


STACKS: dict[str, Callable[[str, int | None], SslStack | PyOpenSSLStack]] = {
    "ssl": SslStack,
    "pyopenssl": PyOpenSSLStack,
}


class Frontend:
    """Serves one stack's context, with the shim where there is a store.

    Args:
        name: How it introduces itself.
        stack: A key of STACKS.
        certificate: File with the certificate and its key.
        tickets: TLS 1.3 tickets a handshake; None for the stack's default.
        store: The arguments of resumed.install(), None to do without.
    """

    def __init__(
        self, name: str, stack: str, certificate: str, tickets: int | None, store: dict[str, Any] | None
    ) -> None:
        self._stack = STACKS[stack](certificate, tickets)
        # Frontends of the two stacks share their sessions, and each stack sets a session id context of its own.
        self._shim = resumed.install(self._stack.context, ignore_id_context=True, **store) if store else None
        self._introduction = {"frontend": name, "stack": stack}
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def require_clients_of(self, authorities: str) -> None:
        """Require a client certificate of one of the authorities in a file; before the first connection."""
        self._stack.require_clients_of(authorities)

    def export(self) -> int:
        """Serve metrics for Prometheus, on a port of 127.0.0.1 that is returned."""
        import prometheus_client  # noqa: PLC0415 - frontends without metrics do without

        import resumed.prometheus  # noqa: PLC0415

        if self._shim:
            resumed.prometheus.export(self._shim)
        server, _ = prometheus_client.start_http_server(0, "127.0.0.1")
        return server.server_port

    def serve(self, listener: socket.socket) -> None:
        """Serve each connection in a thread of its own; never return."""
        while True:
            self._free.acquire()
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or answers wait for the tickets' ACK
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            # A client that goes at any time, in the middle of its handshake too, is nothing special.
            with connection, contextlib.suppress(*self._stack.errors):
                self._converse(connection)
        finally:
            self._free.release()

    def _converse(self, connection: socket.socket) -> None:
        started = time.perf_counter()
        with self._stack.accept_tls(connection) as (peer, version):
            seconds = time.perf_counter() - started
            introduction = {**self._introduction, "version": version, "handshake_seconds": seconds}
            for line in _lines(peer):
                peer.sendall(json.dumps(self._answer(line) or introduction).encode() + b"\n")
                if line == b"bye":
                    return

    def _answer(self, line: bytes) -> dict[str, Any] | None:
        if line == b"stats":
            return _stats(self._shim) if self._shim else {"shim": None}
        if line == b"flush":
            return {"flushed": self._shim.flush() if self._shim else True}
        return None


def _stats(shim: resumed.Installation) -> dict[str, Any]:
    return {
        **vars(shim.stats),
        "breaker_open": shim.breaker_open,
        "removals_live": shim.removals_live,
        "ticket_secrets_held": shim.ticket_secrets_held,
    }


def _lines(peer: Peer) -> Iterator[bytes]:
    rest = b""
    while (data := peer.recv(_MAX_LINE)) and len(rest) < _MAX_LINE:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.strip()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resumed_server.cli.demo.frontend", description=__doc__)
    parser.add_argument("--stack", choices=STACKS, required=True)
    parser.add_argument("--name", required=True, help="how it introduces itself")
    parser.add_argument("--certificate", required=True, metavar="FILE", help="certificate and private key, as PEM")
    parser.add_argument("--client-ca", metavar="FILE", help="require client certificates of these authorities, as PEM")
    parser.add_argument("--num-tickets", type=int, metavar="N", help="TLS 1.3 tickets a handshake")
    parser.add_argument("--metrics", action="store_true", help="serve metrics for Prometheus; the line says where")
    store = parser.add_argument_group("the store (without --target: no shim), see resumed.install()")
    store.add_argument("--target", help="where the store is")
    # Omitted options are not passed on: the defaults are those of install().
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    store.add_argument("--namespace", **options)
    store.add_argument("--keyring", metavar="FILE", **options)
    for name in ("ca", "cert", "key"):
        store.add_argument(f"--{name}", metavar="FILE", help="TLS to the store, see resumed.Credentials()", **options)
    store.add_argument("--lifetime", type=int, metavar="SECONDS", **options)
    store.add_argument("--deadline", type=float, metavar="SECONDS", **options)
    store.add_argument("--accept-foreign-ids", action="store_true", **options)
    store.add_argument("--puts", choices=["wait", "background"], **options)
    store.add_argument("--mirror", action="store_true", **options)
    store.add_argument("--single-use", action="store_true", **options)
    store.add_argument("--sessions", choices=["stored", "tickets"], **options)
    store.add_argument("--tickets-tls12", action="store_true", **options)
    store.add_argument("--rotation", type=int, metavar="SECONDS", **options)
    store.add_argument("--revocation-grace", type=float, metavar="SECONDS", **options)
    return parser


def main() -> None:
    """Run a frontend until SIGTERM or SIGINT, then leave as the interpreter leaves normally."""
    parser = _arguments()
    given = vars(parser.parse_args())
    name, stack, certificate, tickets = (given.pop(each) for each in ("name", "stack", "certificate", "num_tickets"))
    metrics, client_ca = given.pop("metrics"), given.pop("client_ca")
    # Waited for below, and by no thread that starts from here on: one that arrived just before a blocking call is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        if tls := {each: given.pop(each) for each in ("ca", "cert", "key") if each in given}:
            given["credentials"] = resumed.Credentials(**tls)
        server = Frontend(name, stack, certificate, tickets, given if given["target"] else None)
        if client_ca:
            server.require_clients_of(client_ca)
    except (resumed.ResumedError, ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
    threading.Thread(target=server.serve, args=(listener,), daemon=True).start()
    ports = {"port": listener.getsockname()[1]} | ({"metrics": server.export()} if metrics else {})
    print(json.dumps(ports), flush=True)  # noqa: T201 - the promised line
    signal.sigwait(_STOP_SIGNALS)


if __name__ == "__main__":
    main()
