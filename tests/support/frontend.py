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


@contextlib.contextmanager
def running_frontend(directory: Path, *options: str) -> Iterator[dict[str, int]]:
    """Run one with `options` of resumed_server.cli.demo.frontend, and yield its `port` and that of its `metrics`."""
    certificate = directory / "frontend.pem"
    certificate.write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
    command = [
        sys.executable,
        "-m",
        "resumed_server.cli.demo.frontend",
        "--stack",
        "ssl",
        "--name",
        "other",
        "--metrics",
    ]
    with subprocess.Popen(
        [*command, "--certificate", str(certificate), *options], stdout=subprocess.PIPE, text=True
    ) as process:
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
