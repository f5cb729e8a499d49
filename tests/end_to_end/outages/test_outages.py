"""During an outage of the server handshakes are full, and resumption returns by itself."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from support.ports import free_port
from support.processes import paused
from support.server import running_server
from support.tls import PATIENCE, VERSIONS, Client, Frontend
from support.waiting import until

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    import resumed
    from support.tls import Stack

SHORT = 0.1
"""Seconds that a look-up may take."""
LONG = 50 * SHORT
"""Seconds that no handshake may take."""


def assert_handshakes_go_on(client: Client, frontend: Frontend, session: ssl.SSLSession | None, reason: str) -> None:
    """Check that handshakes are full for the stated reason, and that lookups stop after three failed calls."""
    for _ in range(6):
        visit = client.visit(frontend, session)
        assert not visit.reused
        assert visit.seconds < LONG
    misses = frontend.shim.stats.misses
    assert 1 <= misses[reason] <= 3, misses
    assert misses[reason] + misses["breaker-open"] == 6, misses
    assert frontend.shim.breaker_open


def session_of(client: Client, keyring: resumed.Keyring, stack: Stack) -> ssl.SSLSession | None:
    """Return a session whose server is gone."""
    with running_server() as server:
        return client.visit(Frontend(stack, server.target, keyring)).session


def test_store_down(keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    session = session_of(client, keyring, stack)
    frontend = Frontend(stack, f"127.0.0.1:{free_port()}", keyring, deadline=SHORT)
    assert_handshakes_go_on(client, frontend, session, "unavailable")


def test_store_name_does_not_resolve(keyring: resumed.Keyring, client: Client) -> None:
    session = session_of(client, keyring, "ssl")
    frontend = Frontend("ssl", "dns:///store.invalid:7400", keyring, deadline=SHORT)
    for _ in range(4):
        assert not client.visit(frontend, session).reused
    assert set(frontend.shim.stats.misses) <= {"unavailable", "timeout", "breaker-open"}


def test_store_hung_and_back(keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    with running_server() as server:
        frontend = Frontend(stack, server.target, keyring, deadline=SHORT)
        session = client.visit(frontend).session
        assert frontend.shim.flush()
        with paused(server.process):
            assert_handshakes_go_on(client, frontend, session, "timeout")
        until(lambda: client.visit(frontend, session).reused)


def test_a_handshake_spends_its_deadline_once(keyring: resumed.Keyring, client: Client) -> None:
    deadline = 3.0
    with running_server() as server:
        frontend = Frontend("ssl", server.target, keyring, puts="wait", deadline=deadline)
        session = client.visit(frontend).session
        with paused(server.process):
            visit = client.visit(frontend, session)
    assert not visit.reused
    assert visit.seconds < 2 * deadline  # which two calls one after the other take at least
    assert frontend.shim.stats.misses == {"timeout": 1}


def test_store_that_accepts_and_never_answers(keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    session = session_of(client, keyring, stack)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        frontend = Frontend(stack, f"127.0.0.1:{listener.getsockname()[1]}", keyring, deadline=SHORT)
        assert_handshakes_go_on(client, frontend, session, "timeout")


def test_store_that_refuses(keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    session = session_of(client, keyring, stack)
    with refusing_store() as target:
        frontend = Frontend(stack, target, keyring, deadline=LONG)  # it answers at once
        assert_handshakes_go_on(client, frontend, session, "rejected")


def test_store_killed_and_restarted_keeps_its_sessions(
    keyring: resumed.Keyring, stack: Stack, client: Client, tmp_path: Path
) -> None:
    options = ("--storage", f"lmdb://{tmp_path}/sessions")
    with running_server(*options) as server:
        target = server.target
        frontend = Frontend(stack, target, keyring, deadline=SHORT)
        session = client.visit(frontend).session
        assert frontend.shim.flush()
        server.kill()
        assert not client.visit(frontend, session).reused
    with running_server(*options, listen=target):
        until(lambda: client.visit(frontend, session).reused)


def test_frontend_started_before_the_store(keyring: resumed.Keyring, stack: Stack, client: Client) -> None:
    target = f"127.0.0.1:{free_port()}"
    frontend = Frontend(stack, target, keyring, deadline=SHORT)
    session = client.visit(frontend).session
    with running_server(listen=target):
        until(lambda: client.visit(frontend, session).reused)


def test_many_handshakes_at_once_during_an_outage(keyring: resumed.Keyring, stack: Stack) -> None:
    client = Client(VERSIONS[0])
    session = session_of(client, keyring, stack)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        frontend = Frontend(stack, target, keyring, max_lookups=2, single_use=True, deadline=2.0)
        threads = [threading.Thread(target=client.visit, args=(frontend, session)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert frontend.shim.stats.misses["too-many-lookups"] > 0
    assert sum(frontend.shim.stats.misses.values()) == 40


@contextlib.contextmanager
def refusing_store() -> Iterator[str]:
    class Refuse(grpc.GenericRpcHandler):
        def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(
                lambda _request, context: context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")
            )

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[Refuse()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
