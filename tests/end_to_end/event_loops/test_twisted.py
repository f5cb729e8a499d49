"""A lookup does not block Twisted's reactor if resumed.twisted makes the connections."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.tls import TLSMemoryBIOFactory

from resumed.twisted import ConnectionCreator
from support.server import running_server
from support.suspension import Gate, disconnect_while_suspended, resume_byte_by_byte, sessions_of
from support.tls import PATIENCE, Client, Frontend
from support.waiting import until

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    import resumed
    from support.server import RunningServer

MANY = 32
reactor: Any = _reactor


@pytest.fixture(scope="session", autouse=True)  # a worker may come back to this module
def running_reactor() -> Iterator[None]:
    """Run the one reactor of this process, which cannot be run again."""
    thread = threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False}, daemon=True)
    thread.start()
    yield
    reactor.callFromThread(reactor.stop)
    thread.join(PATIENCE)


class Echo(Protocol):
    transport: Any
    factory: Any

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self.transport.write(data)

    def connectionLost(self, reason: Any = None) -> None:  # noqa: N802
        """Set the event that `serve` waits for."""
        self.factory.gone.set()


class Reactor(Frontend):
    def __init__(self, target: str, keyring: resumed.Keyring, **options: Any) -> None:
        super().__init__("pyopenssl", target, keyring, **options)
        self._creator: Any = ConnectionCreator(self.context, self.shim)

    def serve(self, connection: socket.socket) -> None:
        """Shake hands and echo until the client goes."""
        factory: Any = Factory.forProtocol(Echo)
        factory.gone = threading.Event()
        tls = TLSMemoryBIOFactory(self._creator, False, factory)

        def adopt() -> None:
            with connection:
                connection.setblocking(False)
                reactor.adoptStreamConnection(connection.fileno(), socket.AF_UNIX, tls)

        reactor.callFromThread(adopt)
        assert factory.gone.wait(PATIENCE)


@pytest.fixture
def session(store: RunningServer, keyring: resumed.Keyring, client: Client) -> ssl.SSLSession | None:
    """A session that a frontend of the other stack negotiated."""
    [session] = sessions_of(client, Frontend("ssl", store.target, keyring))
    return session


@pytest.fixture
def gated(store: RunningServer, keyring: resumed.Keyring) -> Iterator[tuple[Reactor, Gate]]:
    """A frontend whose look-ups wait for a gate."""
    frontend = Reactor(store.target, keyring)
    gate = Gate(frontend)
    yield frontend, gate
    gate.open()


def test_a_session_is_looked_up_in_another_thread(
    store: RunningServer, keyring: resumed.Keyring, client: Client, session: ssl.SSLSession | None
) -> None:
    frontend = Reactor(store.target, keyring)
    assert client.visit(frontend, session).reused
    assert frontend.shim.stats.hits == {"store": 1}
    assert sum(frontend.shim.stats.lookup_seconds) == 1
    assert frontend.shim._policy._lookups._threads._threads


def test_the_reactor_serves_others_while_a_handshake_rests(
    client: Client, gated: tuple[Reactor, Gate], session: ssl.SSLSession | None
) -> None:
    frontend, gate = gated
    with ThreadPoolExecutor(1) as pool:
        resting = pool.submit(client.visit, frontend, session)
        until(lambda: gate.keys)
        assert not client.visit(frontend).reused
        assert not resting.done()
        gate.open()
        assert resting.result(PATIENCE).reused


def test_many_rest_at_once(
    store: RunningServer, keyring: resumed.Keyring, client: Client, gated: tuple[Reactor, Gate]
) -> None:
    frontend, gate = gated
    sessions = sessions_of(client, Frontend("ssl", store.target, keyring), MANY)
    with ThreadPoolExecutor(MANY) as pool:
        visits = [pool.submit(client.visit, frontend, session) for session in sessions]
        until(lambda: len(gate.keys) == MANY)
        gate.open()
        assert all(visit.result(PATIENCE).reused for visit in visits)


def test_a_client_that_leaves_during_the_look_up(
    client: Client, gated: tuple[Reactor, Gate], session: ssl.SSLSession | None
) -> None:
    frontend, gate = gated
    disconnect_while_suspended(client, frontend, gate, session)
    assert len(gate.keys) == 1
    gate.open()
    until(lambda: sum(frontend.shim.stats.lookup_seconds) == 1)
    assert client.visit(frontend, session).reused


def test_a_client_hello_byte_by_byte(
    store: RunningServer, keyring: resumed.Keyring, client: Client, session: ssl.SSLSession | None
) -> None:
    frontend = Reactor(store.target, keyring)
    assert resume_byte_by_byte(client, frontend, session)
    assert sum(frontend.shim.stats.lookup_seconds) == 1


def test_a_single_use_is_single(
    store: RunningServer, keyring: resumed.Keyring, client: Client, session: ssl.SSLSession | None
) -> None:
    frontend = Reactor(store.target, keyring, single_use=True)
    with ThreadPoolExecutor(8) as pool:
        visits = list(pool.map(lambda _: client.visit(frontend, session), range(8)))
    assert [visit.reused for visit in visits].count(True) == 1


def test_a_store_that_is_down(keyring: resumed.Keyring, client: Client) -> None:
    with running_server() as server:
        sessions = sessions_of(client, Frontend("ssl", server.target, keyring), 6)
        target = server.target
    frontend = Reactor(target, keyring)
    assert not any(client.visit(frontend, session).reused for session in sessions)
    assert set(frontend.shim.stats.misses) == {"unavailable", "breaker-open"}
