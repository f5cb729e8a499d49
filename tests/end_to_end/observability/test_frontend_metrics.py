"""The metrics of a frontend after real handshakes, and the statistic of foreign hits."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import resumed
import resumed.prometheus
from resumed_server.cli.keyring.keygen import keygen
from support.frontend import running_frontend
from support.metrics import Scrape
from support.server import running_server
from support.tickets import TicketFrontend
from support.tls import Client, Frontend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.server import RunningServer
    from support.tls import Stack


def told(registry: CollectorRegistry) -> Scrape:
    """Return the samples of a registry."""
    return Scrape(generate_latest(registry).decode())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    keygen(str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def other_process(store: RunningServer, keys: Path, tmp_path: Path) -> Iterator[dict[str, int]]:
    """A frontend in another process, with metrics of its own; its ports."""
    options = ("--target", store.target, "--namespace", "shop", "--keyring", str(keys))
    with running_frontend(tmp_path, *options) as ports:
        yield ports


def visit(client: Client, port: int, session: ssl.SSLSession | None = None) -> ssl.SSLSession:
    """Visit the other process; return one of its sessions after its Put."""
    with (
        socket.create_connection(("127.0.0.1", port)) as connection,
        client.context.wrap_socket(connection, server_hostname="localhost", session=session) as tls,
    ):
        tls.sendall(b"flush\n")
        assert json.loads(tls.recv(4096)) == {"flushed": True}
        assert tls.session
        return tls.session


def test_a_session_that_another_process_negotiated_is_a_foreign_hit(
    store: RunningServer, keys: Path, other_process: dict[str, int], stack: Stack, client: Client
) -> None:
    registry = CollectorRegistry()
    frontend = Frontend(stack, store.target, resumed.Keyring.load(keys))
    resumed.prometheus.export(frontend.shim, registry)
    own = client.visit(frontend)
    frontend.shim.flush()
    assert client.visit(frontend, own.session).reused
    assert client.visit(frontend, visit(client, other_process["port"])).reused
    found = told(registry)
    assert found.total("resumed_frontend_hits_total", session_namespace="shop") == 2
    assert found.total("resumed_frontend_foreign_hits_total", session_namespace="shop") == 1
    assert found.value("resumed_frontend_foreign_hits_total", session_namespace="shop", source="store") == 1
    assert frontend.shim.stats.foreign_hits.total() == 1
    visit(client, other_process["port"], own.session)
    with urllib.request.urlopen(f"http://127.0.0.1:{other_process['metrics']}/metrics") as answer:
        theirs = Scrape(answer.read().decode())
    assert theirs.total("resumed_frontend_foreign_hits_total") == theirs.total("resumed_frontend_hits_total") == 1
    frontend.shim.uninstall()


def test_each_hit_saves_the_time_of_one_signature(store: RunningServer, keyring: resumed.Keyring, stack: Stack) -> None:
    registry, client = CollectorRegistry(), Client(ssl.TLSVersion.TLSv1_2)
    frontend = Frontend(stack, store.target, keyring)
    resumed.prometheus.export(frontend.shim, registry)
    seconds = frontend.shim.signature_seconds
    assert seconds is not None
    assert 1e-6 < seconds < 1
    session = client.visit(frontend).session
    frontend.shim.flush()
    for _ in range(3):
        assert client.visit(frontend, session).reused
    found = told(registry)
    assert found.value("resumed_frontend_saved_seconds_total", session_namespace="shop") == pytest.approx(3 * seconds)
    assert found.value("resumed_frontend_lookup_duration_seconds_count", session_namespace="shop") == 3
    assert found.value("resumed_frontend_lookup_duration_seconds_bucket", session_namespace="shop", le="+Inf") == 3
    assert found.value("resumed_frontend_puts_total", session_namespace="shop", outcome="stored") == 1
    frontend.shim.uninstall()


def test_a_context_without_a_key_reports_no_saved_time(store: RunningServer, keyring: resumed.Keyring) -> None:
    """Its certificate is chosen by server name, so the cost of a signature is unknown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with contextlib.closing(Installed(context, store.target, keyring)) as installed:
        assert installed.installation.signature_seconds is None
        assert "saved_seconds_total{" not in told(installed.registry).text


def test_states_are_exported_and_installations_of_a_namespace_add_up(keyring: resumed.Keyring) -> None:
    client, registry = Client(ssl.TLSVersion.TLSv1_3), CollectorRegistry()
    frontends = [Frontend("ssl", "127.0.0.1:1", keyring, namespace="shop", mirror=True) for _ in range(2)]
    for frontend in frontends:
        resumed.prometheus.export(frontend.shim, registry)
        resumed.prometheus.export(frontend.shim, registry)  # twice is once
    assert told(registry).value("resumed_frontend_breaker_open", session_namespace="shop") == 0
    for _ in range(5):
        session = client.visit(frontends[0]).session
        assert not client.visit(frontends[1], session).reused
    found = told(registry)
    assert found.value("resumed_frontend_breaker_open", session_namespace="shop") == 1
    assert found.value("resumed_frontend_mirror_live", session_namespace="shop") == 0
    assert found.total("resumed_frontend_misses_total", session_namespace="shop") == 5
    assert found.value("resumed_frontend_misses_total", session_namespace="shop", reason="breaker-open") > 0
    for frontend in frontends:
        frontend.shim.uninstall()


def test_the_state_of_a_keyring_file_is_that_of_its_present_content(keys: Path) -> None:
    registry, keyring = CollectorRegistry(), resumed.Keyring.load(keys)
    frontend = Frontend("ssl", "127.0.0.1:1", keyring)
    resumed.prometheus.export(frontend.shim, registry)

    def state(content: str) -> tuple[float, float]:
        keys.write_text(content)
        assert keyring._file
        for _ in range(2):
            keyring._file.follow()
        metric = "resumed_frontend_keyring_last_reload_succes"
        return (
            told(registry).value(f"{metric}sful", session_namespace="shop"),
            told(registry).value(f"{metric}s_timestamp_seconds", session_namespace="shop"),
        )

    successful, loaded = state(keys.read_text())
    assert successful == 1
    assert state("nonsense") == (0, loaded)
    successful, rotated = state(resumed.Keyring.generate())
    assert successful == 1
    assert rotated > loaded
    frontend.shim.uninstall()


def test_a_ticket_secret_is_held_over_while_the_store_does_not_answer(keyring: resumed.Keyring) -> None:
    registry, started = CollectorRegistry(), time.time()
    with running_server() as server:
        frontend = TicketFrontend("ssl", server.target, keyring)
    resumed.prometheus.export(frontend.shim, registry)

    def value(metric: str) -> float:
        return told(registry).value(f"resumed_frontend_ticket_secret_{metric}", session_namespace="shop")

    assert started <= value("created_timestamp_seconds") <= time.time()
    assert value("held_over") == 0
    frontend.advance(2 * 3600)  # beyond the epoch that was the next one
    assert value("held_over") == 1
    frontend.shim.uninstall()


class Installed:
    """A context with the shim, exported to a registry of its own."""

    def __init__(self, context: ssl.SSLContext, target: str, keyring: resumed.Keyring) -> None:
        self.registry = CollectorRegistry()
        self.installation = resumed.install(context, target=target, namespace="shop", keyring=keyring)
        resumed.prometheus.export(self.installation, self.registry)

    def close(self) -> None:
        self.installation.uninstall()
