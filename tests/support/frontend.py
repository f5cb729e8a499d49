"""TLS frontends at ports: in a process of its own, with metrics, and in this process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from support.tls import CERTIFICATE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.tls import Frontend


def frontend_command(stack: str, certificate: Path, *options: str) -> list[str]:
    """Return the command that runs a frontend of a stack, with its name."""
    command = [sys.executable, "-m", "resumed_server.cli.demo.frontend", "--stack", stack, "--name", stack]
    return [*command, "--certificate", str(certificate), *options]


@contextlib.contextmanager
def running_frontend(directory: Path, *options: str) -> Iterator[dict[str, int]]:
    """Run one with `options` of resumed_server.cli.demo.frontend, and yield its `port` and that of its `metrics`."""
    certificate = directory / "frontend.pem"
    certificate.write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
    command = frontend_command("ssl", certificate, "--metrics", *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


@contextlib.contextmanager
def listening(frontend: Frontend) -> Iterator[int]:
    """Accept connections of a frontend at a port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=frontend.serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
