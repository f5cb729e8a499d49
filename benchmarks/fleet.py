"""Common parts of the TLS measurements: frontends as separate processes, a client that times them, and figures."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import resumed
from support.tls import CERTIFICATE, STACKS, VERSIONS, Stack, client_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    import trustme

PATIENCE = 20.0
"""Time limit of a peer for any step in seconds; only a broken peer reaches it."""
OTHER_STACK: dict[Stack, Stack] = dict(zip(STACKS, reversed(STACKS), strict=True))
VERSION_NAMES = {version.name.replace("TLSv1_", "TLS 1."): version for version in VERSIONS}


class Handshake(NamedTuple):
    """The result of one connection."""

    resumed: bool
    session: ssl.SSLSession | None
    seconds: float
    """From the connection's first byte to the frontend's first response: the wait of a user."""


class Client:
    """Connects with one version of TLS, sends one line, and cuts the connection without close_notify."""

    def __init__(self, version: ssl.TLSVersion) -> None:
        self._context = client_context(version)

    def visit(self, port: int, session: ssl.SSLSession | None = None, line: bytes = b"who") -> Handshake:
        """Connect to `port`, and offer `session`."""
        with self._connect(port, session) as (tls, started):
            exchange_line(tls, line)
            seconds = time.perf_counter() - started
            return Handshake(tls.session_reused is True, tls.session, seconds)

    def ask(self, port: int, line: bytes) -> dict[str, Any]:
        """Send `line`, and return the frontend's response."""
        with self._connect(port, None) as (tls, _):
            response: dict[str, Any] = json.loads(exchange_line(tls, line))
            return response

    @contextlib.contextmanager
    def _connect(self, port: int, session: ssl.SSLSession | None) -> Iterator[tuple[ssl.SSLSocket, float]]:
        started = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._context.wrap_socket(connection, server_hostname="localhost", session=session) as tls:
                yield tls, started


def exchange_line(tls: ssl.SSLSocket, line: bytes) -> bytes:
    tls.sendall(line + b"\n")
    # Otherwise a frontend with Nagle's algorithm delays its response until our acknowledgement of TLS 1.3 tickets
    # arrives, 40 ms later.
    tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    response = b""
    while not response.endswith(b"\n"):
        received = tls.recv(16_384)
        if not received:
            raise ConnectionError("the frontend closed the connection")
        response += received
    return response


class Fleet:
    """Frontends in processes of their own, with one keyring and one certificate.

    Args:
        directory: The directory of keyring and certificate.
        certificate: The certificate, with its key.
    """

    def __init__(self, directory: str, certificate: trustme.LeafCert = CERTIFICATE) -> None:
        self.keyring, self.certificate = Path(directory, "fleet.keys"), Path(directory, "frontend.pem")
        for path, content in (
            (self.keyring, resumed.Keyring.generate().encode()),
            (self.certificate, certificate.private_key_and_cert_chain_pem.bytes()),
        ):
            path.touch(0o600)
            path.write_bytes(content)

    @contextlib.contextmanager
    def frontend(
        self,
        stack: Stack,
        target: str | None,
        *options: str,
        program: tuple[str, ...] = ("-m", "resumed_server.cli.demo.frontend"),
    ) -> Iterator[int]:
        """Run a frontend, without the shim if `target` is None, and yield its port."""
        command = [sys.executable, *program, "--stack", stack, "--name", stack]
        command += ["--certificate", str(self.certificate), *options]
        if target is not None:
            command += ["--target", target, "--keyring", str(self.keyring), "--namespace", "shop"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                yield json.loads(process.stdout.readline())["port"]
            finally:
                process.terminate()
