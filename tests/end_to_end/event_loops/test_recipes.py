"""Two instances of each server in examples/python resume each other's sessions."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import resumed
from support.ports import free_port
from support.processes import listening_process
from support.tls import CERTIFICATE, PATIENCE, Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

RECIPES = Path(__file__).parents[3] / "examples" / "python"
SESSIONS = 20
# How a busy machine's look-ups are not late; the recipes themselves have the default deadline.
PATIENT = (
    f"import functools, resumed, runpy, sys; resumed.install = functools.partial(resumed.install, deadline={PATIENCE})"
)
GUNICORN_APP = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'ok']\n"


def command(recipe: Path, port: int) -> list[str]:
    if recipe.stem != "gunicorn_conf":
        return [
            sys.executable,
            "-c",
            f"{PATIENT}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
            str(recipe),
            str(port),
        ]
    gunicorn = f"{PATIENT}; sys.argv[0] = 'gunicorn'; runpy.run_module('gunicorn', run_name='__main__')"
    options = ("-c", str(recipe), "--certfile", "server.pem", "--bind", f"127.0.0.1:{port}", "app:app")
    return [sys.executable, "-c", gunicorn, *options]


@contextlib.contextmanager
def running(recipe: Path, directory: Path, store: RunningServer) -> Iterator[int]:
    """Run a recipe and yield its port."""
    port = free_port()
    log = directory / f"{port}.log"
    with log.open("w") as output:
        arguments = command(recipe, port)
        # Recipes write no bytecode beside themselves.
        environment = {"STORE": store.target, "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(arguments, cwd=directory, env=environment, stdout=output, stderr=output)
    with listening_process(process, port, log.read_text):
        yield port


def visit(client: Client, port: int, session: ssl.SSLSession | None = None) -> tuple[bool, ssl.SSLSession | None]:
    """Request a page; return whether the session resumed, and the next session."""
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE) as connection,
        client.context.wrap_socket(connection, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):  # not every server says goodbye
            while data := tls.recv(16_384):
                answer += data
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")), answer
        return tls.session_reused is True, tls.session


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda recipe: recipe.stem)
def test_two_instances_resume_each_others_sessions(recipe: Path, tmp_path: Path, store: RunningServer) -> None:
    (tmp_path / "server.pem").write_bytes(CERTIFICATE.private_key_and_cert_chain_pem.bytes())
    keys = tmp_path / "fleet.keys"
    keys.touch(0o600)
    keys.write_text(resumed.Keyring.generate())
    (tmp_path / "app.py").write_text(GUNICORN_APP)
    with running(recipe, tmp_path, store) as one, running(recipe, tmp_path, store) as other:
        for server in (one, other):  # Cheroot has a servername callback: a process first learns which context serves
            visit(Client(ssl.TLSVersion.TLSv1_3), server)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            client = Client(version)
            for negotiator, resumer in ((one, other), (other, one)):
                sessions = [visit(client, negotiator)[1] for _ in range(SESSIONS // 2)]
                assert [visit(client, resumer, session)[0] for session in sessions] == [True] * (SESSIONS // 2), version
