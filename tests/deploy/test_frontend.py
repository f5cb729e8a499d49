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
import urllib.request
from typing import TYPE_CHECKING, NamedTuple

import pytest

import resumed
from deploy.kubernetes import MANIFESTS, kustomized
from support.mtls import Authority, Files
from support.ports import free_port
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 20.0


class Fleet(NamedTuple):
    """Two replicas of the frontend, and the certificate for browsers that they serve."""

    ports: list[int]
    metrics: list[int]
    processes: list[subprocess.Popen[bytes]]
    client: ssl.SSLContext
    authority: Authority
    certificate: Files


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A store with the grants of the overlay, and two frontends with the identity of the example."""
    authority, public = Authority(), Authority()
    directories = {name: tmp_path / name for name in ("store", "identity", "tls")}
    for directory in directories.values():
        directory.mkdir()
    grants = next(each for each in kustomized("kustomize/overlays/valkey") if each["kind"] == "ConfigMap")
    files = Files(directories["store"]).write(
        authority.server(), client_ca=authority.pem, grants=grants["data"]["grants.toml"]
    )
    (uris,) = (each["spec"]["uris"] for each in kustomized("frontend") if "uris" in each.get("spec", {}))
    Files(directories["identity"]).write(authority.issue(*uris), client_ca=authority.pem)
    certificate = Files(directories["tls"]).write(public.issue("dns:localhost"))
    keyring = tmp_path / "fleet.keys"
    keyring.touch(0o440)
    keyring.write_bytes(resumed.Keyring.generate().encode())
    client = ssl.create_default_context(cadata=public.pem.decode())
    client.maximum_version = ssl.TLSVersion.TLSv1_2  # whose session is there after the handshake
    with contextlib.ExitStack() as held:
        server = held.enter_context(running_server(*files.options))
        ports, metrics, processes = [free_port(), free_port()], [free_port(), free_port()], []
        for port, metrics_port in zip(ports, metrics, strict=True):
            env = os.environ | {
                "RESUMED_TARGET": server.target.replace("127.0.0.1", "localhost"),
                "TLS_DIRECTORY": str(directories["tls"]),
                "IDENTITY_DIRECTORY": str(directories["identity"]),
                "KEYRING": str(keyring),
                "PORT": str(port),
                "METRICS_PORT": str(metrics_port),
                "DRAIN_SECONDS": "3",
                "RENEWAL_SECONDS": "0.1",
            }
            program = [sys.executable, str(MANIFESTS / "frontend/frontend.py")]
            processes.append(held.enter_context(subprocess.Popen(program, env=env)))
            held.callback(processes[-1].kill)
            _wait_for(port)
        yield Fleet(ports, metrics, processes, client, public, certificate)


def test_replicas_resume_each_others_sessions(fleet: Fleet) -> None:
    """In both directions, and each page reports it. A lookup may be late on a loaded machine."""
    session, answer = visit(fleet, 0, None)
    assert answer.endswith(b": full handshake\n")
    for replica in (1, 0):
        answers = (visit(fleet, replica, session)[1] for _ in range(50))
        assert any(answer.endswith(b": resumed\n") for answer in answers)


def test_a_renewed_certificate_is_served_without_a_restart(fleet: Fleet) -> None:
    """And the sessions of the old one still resume, since its names are the same."""
    session, _ = visit(fleet, 0, None)
    before = serial(fleet)
    fleet.certificate.write(fleet.authority.issue("dns:localhost"))
    until(lambda: serial(fleet) != before)
    answers = (visit(fleet, 0, session)[1] for _ in range(50))
    assert any(answer.endswith(b": resumed\n") for answer in answers)


def test_a_replica_has_metrics_for_prometheus(fleet: Fleet) -> None:
    visit(fleet, 0, None)
    with urllib.request.urlopen(f"http://localhost:{fleet.metrics[0]}/metrics", timeout=PATIENCE) as response:
        assert b'resumed_frontend_breaker_open{session_namespace="shop"}' in response.read()


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


def serial(fleet: Fleet) -> str:
    """Return the serial number of the certificate that the first replica serves."""
    with (
        socket.create_connection(("localhost", fleet.ports[0]), PATIENCE) as connection,
        fleet.client.wrap_socket(connection, server_hostname="localhost") as tls,
    ):
        return str((tls.getpeercert() or {})["serialNumber"])


def _wait_for(port: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port), PATIENCE):
            return
        assert time.monotonic() < end
