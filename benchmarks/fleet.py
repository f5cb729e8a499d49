"""What the measurements of TLS share: frontends as processes of their own, a client that times them, and figures."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import resumed
from support.tls import CERTIFICATE, STACKS, VERSIONS, Stack, client_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Sequence

    import trustme

PATIENCE = 20.0
"""Seconds that a peer may take for anything; only a broken one takes them."""
OTHER: dict[Stack, Stack] = dict(zip(STACKS, reversed(STACKS), strict=True))
VERSION_NAMES = {version.name.replace("TLSv1_", "TLS 1."): version for version in VERSIONS}


class Visit(NamedTuple):
    """What a client saw of one connection."""

    resumed: bool
    session: ssl.SSLSession | None
    seconds: float
    """From the connection's first byte to the frontend's first answer: all that a user waits for."""


class Client:
    """Connects with one version of TLS, asks one line, and cuts the connection without close_notify."""

    def __init__(self, version: ssl.TLSVersion) -> None:
        self._context = client_context(version)

    def visit(self, port: int, session: ssl.SSLSession | None = None, line: bytes = b"who") -> Visit:
        """Connect to `port`, resuming `session` if the frontend agrees."""
        with self._connected(port, session) as (tls, started):
            _ask(tls, line)
            seconds = time.perf_counter() - started
            return Visit(tls.session_reused is True, tls.session, seconds)

    def ask(self, port: int, line: bytes) -> dict[str, Any]:
        """Return the frontend's answer to `line`."""
        with self._connected(port, None) as (tls, _):
            answer: dict[str, Any] = json.loads(_ask(tls, line))
            return answer

    @contextlib.contextmanager
    def _connected(self, port: int, session: ssl.SSLSession | None) -> Iterator[tuple[ssl.SSLSocket, float]]:
        started = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._context.wrap_socket(connection, server_hostname="localhost", session=session) as tls:
                yield tls, started


def _ask(tls: ssl.SSLSocket, line: bytes) -> bytes:
    tls.sendall(line + b"\n")
    # Or a frontend that left Nagle's algorithm on holds its answer back until our acknowledgement of TLS 1.3 tickets
    # comes, 40 ms later.
    tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    answer = b""
    while not answer.endswith(b"\n"):
        received = tls.recv(16_384)
        if not received:
            raise ConnectionError("the frontend closed the connection")
        answer += received
    return answer


class Fleet:
    """Frontends in processes of their own, with one keyring and one certificate.

    Args:
        directory: Where keyring and certificate go.
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


def p99(figures: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(figures, n=100)[98] if len(figures) > 1 else figures[0]


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median and the 99th percentile."""
    return f"{statistics.median(seconds) * 1e3:.2f} / {p99(seconds) * 1e3:.2f}" if seconds else "-"
