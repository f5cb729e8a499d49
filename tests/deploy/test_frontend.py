"""The example's frontend, run as its Deployment runs it: replicas that resume each other's sessions over mutual TLS."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

import resumed
from deploy.kubernetes import MANIFESTS, kustomized
from support.mtls import Authority, Files
from support.ports import free_port
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 20.0


class Fleet(NamedTuple):
    """Two replicas of the frontend."""

    ports: list[int]
    processes: list[subprocess.Popen[bytes]]
    client: ssl.SSLContext


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A store with the grants of the overlay, and two frontends with the identity of the example."""
    authority = Authority()
    store, shop, keyring = tmp_path / "store", tmp_path / "shop", tmp_path / "fleet.keys"
    for directory in (store, shop):
        directory.mkdir()
    grants = next(each for each in kustomized("kustomize/overlays/valkey") if each["kind"] == "ConfigMap")
    files = Files(store).write(authority.server(), client_ca=authority.pem, grants=grants["data"]["grants.toml"])
    certificate = next(each for each in kustomized("frontend") if each["kind"] == "Certificate")["spec"]
    pem = authority.issue("dns:localhost", *certificate["uris"])
    Files(shop).write(pem, client_ca=authority.pem)
    keyring.touch(0o440)
    keyring.write_bytes(resumed.Keyring.generate().encode())
    client = ssl.create_default_context(cadata=authority.pem.decode())
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # whose session is there after the handshake
    with contextlib.ExitStack() as held:
        server = held.enter_context(running_server(*files.options))
        target = server.target.replace("127.0.0.1", "localhost")
        ports, processes = [free_port(), free_port()], []
        for port in ports:
            env = {"RESUMED_TARGET": target, "TLS_DIRECTORY": str(shop), "KEYRING": str(keyring), "PORT": str(port)}
            program = [sys.executable, str(MANIFESTS / "frontend/frontend.py")]
            processes.append(
                held.enter_context(subprocess.Popen(program, env=os.environ | env | {"DRAIN_SECONDS": "1"}))
            )
            held.callback(processes[-1].kill)
            _wait_for(port)
        yield Fleet(ports, processes, client)


def test_replicas_resume_each_others_sessions(fleet: Fleet) -> None:
    """In both directions, and each page reports it. A lookup may be late on a loaded machine."""
    session, answer = visit(fleet, 0, None)
    assert answer.endswith(b": full handshake\n")
    for replica in (1, 0):
        answers = (visit(fleet, replica, session)[1] for _ in range(50))
        assert any(answer.endswith(b": resumed\n") for answer in answers)


def test_a_terminating_replica_serves_during_the_shutdown_delay(fleet: Fleet) -> None:
    process = fleet.processes[0]
    process.send_signal(signal.SIGTERM)
    _, answer = visit(fleet, 0, None)
    assert answer.endswith(b": full handshake\n")
    assert process.wait(PATIENCE) == 0


def visit(fleet: Fleet, replica: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bytes]:
    """Visit a replica; return the session and the response."""
    with (
        socket.create_connection(("localhost", fleet.ports[replica]), PATIENCE) as connection,
        fleet.client.wrap_socket(connection, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while received := tls.recv(4096):
            answer += received
        return tls.session, answer


def _wait_for(port: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port), PATIENCE):
            return
        assert time.monotonic() < end
