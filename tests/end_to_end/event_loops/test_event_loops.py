"""A lookup suspends its handshake and does not block the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import ssl
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import resumed
from support.distance import distant
from support.loops import LOOPS, Loop, LoopFrontend, running
from support.processes import paused
from support.server import running_server
from support.suspension import Gate, disconnect_while_suspended, offer, resume_byte_by_byte, sessions_of
from support.tls import PATIENCE, VERSIONS, Client, Connection, Frontend
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

MANY = 32


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    loop: Loop = request.param
    return loop


@pytest.fixture
def negotiator(store: RunningServer, keyring: resumed.Keyring) -> Frontend:
    """Another frontend of the fleet, on the other stack."""
    return Frontend("pyopenssl", store.target, keyring)


@contextlib.contextmanager
def gated(
    loop: Loop, store: RunningServer, keyring: resumed.Keyring, **options: Any
) -> Iterator[tuple[LoopFrontend, Gate]]:
    """Run a frontend whose look-ups wait for a gate."""
    with running(LoopFrontend(loop, store.target, keyring, **options)) as frontend:
        gate = Gate(frontend)
        try:
            yield frontend, gate
        finally:
            gate.open()


def test_a_session_crosses_from_loop_to_loop(
    store: RunningServer, keyring: resumed.Keyring, loop: Loop, client: Client
) -> None:
    with (
        running(LoopFrontend(loop, store.target, keyring)) as first,
        running(LoopFrontend(loop, store.target, keyring)) as second,
    ):
        [session] = sessions_of(client, first)
        assert client.visit(second, session).reused
        assert second.shim.stats.hits == {"store": 1}
        assert sum(second.shim.stats.lookup_seconds) == 1
        assert second.shim._policy._lookups._threads._threads


def test_the_loop_serves_others_while_a_handshake_rests(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with gated(loop, store, keyring) as (frontend, gate), ThreadPoolExecutor(1) as pool:
        suspended = pool.submit(client.visit, frontend, session)
        until(lambda: gate.keys)
        assert not client.visit(frontend).reused
        assert not suspended.done()
        gate.open()
        assert suspended.result(PATIENCE).reused


def test_many_rest_at_once(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    sessions = sessions_of(client, negotiator, MANY)
    with gated(loop, store, keyring) as (frontend, gate), ThreadPoolExecutor(MANY) as pool:
        visits = [pool.submit(client.visit, frontend, session) for session in sessions]
        until(lambda: len(gate.keys) == MANY)
        gate.open()
        assert all(visit.result(PATIENCE).reused for visit in visits)
        assert len(set(gate.keys)) == len(gate.keys) == MANY


def test_a_store_far_away(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    sessions = sessions_of(client, negotiator, MANY)
    with (
        distant(store.target, 0.02) as target,
        running(LoopFrontend(loop, target, keyring)) as frontend,
        ThreadPoolExecutor(MANY) as pool,
    ):
        assert all(visit.reused for visit in pool.map(lambda session: client.visit(frontend, session), sessions))
        assert frontend.shim.stats.hits["store"] == MANY


def test_one_session_offered_many_times_at_once_is_one_call(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with gated(loop, store, keyring) as (frontend, gate), ThreadPoolExecutor(8) as pool:
        visits = [pool.submit(client.visit, frontend, session) for _ in range(8)]
        flights = frontend.shim._policy._lookups._flights
        until(lambda: [len(flight._done_callbacks) for flight in flights.values()] == [8])
        gate.open()
        assert all(visit.result(PATIENCE).reused for visit in visits)
        assert len(gate.keys) == 1
        assert frontend.shim.stats.hits == {"store": 1, "coalesced": 7}


def test_a_single_use_is_single(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    options: dict[str, Any] = {"single_use": True}
    with (
        running(LoopFrontend(loop, store.target, keyring, **options)) as one,
        running(LoopFrontend(loop, store.target, keyring, **options)) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        visits = list(pool.map(lambda frontend: client.visit(frontend, session), [one, other] * 4))
        assert [visit.reused for visit in visits].count(True) == 1
        assert one.shim.stats.hits + other.shim.stats.hits == {"store": 1}


def test_a_client_that_leaves_takes_a_single_use_with_it(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with gated(loop, store, keyring, single_use=True) as (frontend, gate):
        disconnect_while_suspended(client, frontend, gate, session)
        gate.open()
        until(lambda: sum(frontend.shim.stats.lookup_seconds) == 1)
        assert not client.visit(frontend, session).reused
        assert frontend.shim.stats.misses == {"unknown": 1}


def test_a_client_that_leaves_during_the_look_up(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with gated(loop, store, keyring) as (frontend, gate):
        disconnect_while_suspended(client, frontend, gate, session)
        gate.open()
        until(lambda: sum(frontend.shim.stats.lookup_seconds) == 1)
        assert client.visit(frontend, session).reused
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "Handshake"]


def test_a_handshake_that_is_cancelled_during_the_look_up(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with gated(loop, store, keyring) as (frontend, gate):
        ours, theirs, hello = offer(client, session)
        with ours:
            server = threading.Thread(target=frontend.serve, args=(theirs,))
            server.start()
            ours.sendall(hello)
            until(lambda: gate.keys)
            frontend.run(cancel_all())
            server.join(PATIENCE)
        gate.open()
        assert client.visit(frontend, session).reused


async def cancel_all() -> None:
    """Cancel all tasks of the running loop but this one."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio's own transport calls the loop that is closed")
def test_a_loop_that_closes_during_the_look_up(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with pytest.warns(ResourceWarning):  # asyncio warns of its unclosed transport
        close_loop_while_suspended(client, LoopFrontend("asyncio", store.target, keyring), session)


def close_loop_while_suspended(client: Client, frontend: LoopFrontend, session: ssl.SSLSession | None) -> None:
    """Offer a session, close the loop before the store has answered, and wait until it has."""
    gate = Gate(frontend)
    ours, theirs, hello = offer(client, session)
    with ours:
        make: Any = frontend.loop._make_ssl_transport  # type: ignore[attr-defined]  # without a pending task
        frontend.loop.call_soon_threadsafe(
            lambda: make(theirs, asyncio.Protocol(), frontend.context, None, server_side=True)
        )
        ours.sendall(hello)
        until(lambda: gate.keys)
        frontend.stop()
        gate.open()
        until(lambda: sum(frontend.shim.stats.lookup_seconds) == 1)
        make = frontend = gate = None  # type: ignore[assignment]
        gc.collect()


def test_a_store_that_is_down(keyring: resumed.Keyring, loop: Loop, client: Client) -> None:
    with running_server() as server:
        sessions = sessions_of(client, Frontend("ssl", server.target, keyring), 6)
        target = server.target
    with running(LoopFrontend(loop, target, keyring)) as frontend:
        assert not any(client.visit(frontend, session).reused for session in sessions)
        assert set(frontend.shim.stats.misses) == {"unavailable", "breaker-open"}


def test_a_store_that_hangs_and_comes_back(keyring: resumed.Keyring, loop: Loop, client: Client) -> None:
    with running_server() as server:
        sessions = sessions_of(client, Frontend("ssl", server.target, keyring), 3)
        with running(LoopFrontend(loop, server.target, keyring, deadline=0.2)) as frontend:
            with paused(server.process), ThreadPoolExecutor(3) as pool:
                visits = list(pool.map(lambda session: client.visit(frontend, session), sessions))
            assert not any(visit.reused for visit in visits)
            assert set(frontend.shim.stats.misses) <= {"timeout", "unavailable", "too-many-lookups", "breaker-open"}
            until(lambda: client.visit(frontend, sessions[0]).reused)


def test_a_client_hello_byte_by_byte(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    with running(LoopFrontend(loop, store.target, keyring)) as frontend:
        assert resume_byte_by_byte(client, frontend, session)
        assert sum(frontend.shim.stats.lookup_seconds) == 1


def test_a_hello_retry_request_looks_up_once(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop
) -> None:
    """Both ClientHellos offer the session in one handshake, so even a single use serves both."""
    client = Client(VERSIONS[1])
    [session] = sessions_of(client, negotiator)
    with running(LoopFrontend(loop, store.target, keyring, single_use=True)) as frontend:
        frontend.context.set_ecdh_curve("secp384r1")  # the client's first key share is of another one
        assert client.visit(frontend, session).reused
        assert sum(frontend.shim.stats.lookup_seconds) == 1


@pytest.mark.parametrize("why", ["foreign", "mirrored", "open breaker"])
def test_a_look_up_without_a_call_starts_no_thread(
    store: RunningServer, keyring: resumed.Keyring, loop: Loop, client: Client, why: str
) -> None:
    name = os.urandom(8).hex()
    other = resumed.Keyring.from_keys([os.urandom(32)]) if why == "foreign" else keyring
    [session] = sessions_of(client, Frontend("ssl", store.target, other, namespace=name))
    options: dict[str, Any] = {"namespace": name, "mirror": why == "mirrored"}
    with running(LoopFrontend(loop, store.target, keyring, **options)) as frontend:
        shim = frontend.shim._policy
        if why == "mirrored":
            shim._mirror.follow()
            until(lambda: shim._mirror.live)
            [session] = sessions_of(client, Frontend("ssl", store.target, keyring, namespace=name))
            until(lambda: len(shim._mirror.sessions) == (1 if client.version == VERSIONS[0] else 2))
        if why == "open breaker":
            shim._breaker.closed = False
        assert client.visit(frontend, session).reused == (why == "mirrored")
        assert not shim._lookups._threads._threads
        assert sum(frontend.shim.stats.lookup_seconds) == 0


def test_a_server_limited_to_tls_1_2_asks_nothing_for_random_ids(
    store: RunningServer, keyring: resumed.Keyring, loop: Loop
) -> None:
    """Clients that support TLS 1.3 send a random session id (RFC 8446 appendix D.4)."""
    with running(LoopFrontend(loop, store.target, keyring)) as frontend:
        frontend.context.maximum_version = VERSIONS[0]
        client = Client(VERSIONS[0])
        client.context.maximum_version = VERSIONS[1]
        assert not client.visit(frontend).reused
        assert frontend.shim.stats.misses == {"foreign-id": 1}
        assert not frontend.shim._policy._lookups._threads._threads


def test_the_random_id_of_a_tls_1_3_client_is_not_looked_up(
    store: RunningServer, keyring: resumed.Keyring, loop: Loop
) -> None:
    with running(LoopFrontend(loop, store.target, keyring, accept_foreign_ids=True)) as frontend:
        assert not Client(VERSIONS[1]).visit(frontend).reused
        assert not frontend.shim._policy._lookups._threads._threads


def test_garbage_affects_no_other_client(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, loop: Loop, client: Client
) -> None:
    session, other = sessions_of(client, negotiator, 2)  # a connection that resumes one and fails takes it along
    dice = random.Random(7)
    with running(LoopFrontend(loop, store.target, keyring)) as frontend:
        for _ in range(60):
            ours, theirs, hello = offer(client, session)
            mangled = bytearray(hello)
            for _ in range(dice.randint(1, 4)):
                at = dice.randrange(len(mangled))
                mangled[at : at + dice.choice((0, 1, 1, 1, 2))] = dice.randbytes(dice.choice((0, 1, 1, 1, 2)))
            server = threading.Thread(target=frontend.serve, args=(theirs,))
            server.start()
            with ours:
                ours.sendall(mangled)
                ours.shutdown(socket.SHUT_WR)
            server.join(PATIENCE)
            assert not server.is_alive()
        frontend.complaints = [
            told for told in frontend.complaints if not isinstance(told.get("exception"), ssl.SSLError)
        ]
        assert not frontend.shim.stats.misses["internal-error"]
        assert client.visit(frontend, other).reused


def test_an_application_with_its_own_memory_bios_resumes_too(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, client: Client
) -> None:
    """The library cannot resume such a handshake later, so the lookup blocks."""
    [session] = sessions_of(client, negotiator)
    frontend = Frontend("ssl", store.target, keyring)
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    theirs.settimeout(PATIENCE)

    def serve() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = frontend.context.wrap_bio(incoming, outgoing, server_side=True)
        with theirs, contextlib.suppress(OSError):  # the client goes as soon as it has resumed
            while data := theirs.recv(16_384):
                incoming.write(data)
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                theirs.sendall(outgoing.read())

    server = threading.Thread(target=serve)
    server.start()
    with ours:
        assert Connection(client.context, ours, session).tls.session_reused
    server.join(PATIENCE)
    assert not server.is_alive()
    assert not frontend.shim._policy._lookups._threads._threads


def test_tls_inside_of_tls_resumes(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, client: Client
) -> None:
    """The inner connection runs through memory BIOs, where the protocol of the outer one cannot resume it."""
    [session] = sessions_of(client, negotiator)
    inner = Frontend("ssl", store.target, keyring)
    transports: list[Any] = []

    class Proxy(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transports.append(transport)
            self.transport, self.incoming, self.outgoing = transport, ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = inner.context.wrap_bio(self.incoming, self.outgoing, server_side=True)

        def data_received(self, data: bytes) -> None:
            self.incoming.write(data)
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
            self.transport.write(self.outgoing.read())

    with running(LoopFrontend("asyncio", None)) as outer:
        server = outer.run(outer.loop.create_server(Proxy, "127.0.0.1", 0, ssl=outer.context))
        with (
            socket.create_connection(server.sockets[0].getsockname(), PATIENCE) as plain,
            client.context.wrap_socket(plain, server_hostname="localhost") as around,
        ):
            assert Connection(client.context, around, session).tls.session_reused

        async def end() -> None:
            server.close()
            for transport in transports:
                transport.abort()
            await asyncio.sleep(0)

        outer.run(end())
    assert inner.shim.stats.hits == {"store": 1}


class Counted(ssl.SSLObject):
    alive: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()

    def do_handshake(self) -> None:
        self.alive.add(self)
        super().do_handshake()


@pytest.mark.parametrize("ending", ["garbage", "silence"])
def test_a_handshake_that_fails_leaves_nothing_to_the_garbage_collector(
    store: RunningServer, keyring: resumed.Keyring, ending: str
) -> None:
    """Otherwise a port scan would cost memory. asyncio's own protocols are in reference cycles, so it is excluded."""
    frontend = LoopFrontend("uvloop", None)
    frontend.context.sslobject_class = Counted
    frontend.shim = resumed.install(frontend.context, target=store.target, namespace="shop", keyring=keyring)
    gc.disable()
    try:
        with running(frontend):
            for _ in range(5):
                ours, theirs = socket.socketpair()
                server = threading.Thread(target=frontend.serve, args=(theirs,))
                server.start()
                if ending == "garbage":
                    ours.sendall(b"GET / HTTP/1.0\r\n\r\n")
                ours.shutdown(socket.SHUT_WR)
                server.join(PATIENCE)
                ours.close()
            until(lambda: not Counted.alive)
            frontend.complaints.clear()
    finally:
        gc.enable()


def test_uvloop_after_a_garbage_collection_at_the_wrong_moment(
    store: RunningServer,
    keyring: resumed.Keyring,
    negotiator: Frontend,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The protocol object has left the young generation, so all generations are searched."""
    [session] = sessions_of(client, negotiator)
    monkeypatch.setattr("resumed._async.uvloop_adapter._LAST_OBJECTS", 0)
    with running(LoopFrontend("uvloop", store.target, keyring)) as frontend:
        assert client.visit(frontend, session).reused
        assert frontend.shim._policy._lookups._threads._threads


def test_uvloop_without_garbage_collection_resumes_too(
    store: RunningServer,
    keyring: resumed.Keyring,
    negotiator: Frontend,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [session] = sessions_of(client, negotiator)
    monkeypatch.setattr("resumed._async.uvloop_adapter._MOST_OBJECTS", -1)
    with running(LoopFrontend("uvloop", store.target, keyring)) as frontend:
        assert client.visit(frontend, session).reused
        assert not frontend.shim._policy._lookups._threads._threads


class Own(ssl.SSLObject):
    """A class that an application set."""


def test_an_sslobject_class_of_the_application_stays(
    store: RunningServer, keyring: resumed.Keyring, negotiator: Frontend, client: Client
) -> None:
    [session] = sessions_of(client, negotiator)
    frontend = LoopFrontend("asyncio", None)
    with running(frontend):
        frontend.context.sslobject_class = Own
        arguments: dict[str, Any] = {
            "target": store.target,
            "namespace": "shop",
            "keyring": keyring,
            "deadline": PATIENCE,
            "ignore_id_context": True,
        }
        first = resumed.install(frontend.context, **arguments)
        second = resumed.install(frontend.context, **arguments, replace=True)
        assert issubclass(frontend.context.sslobject_class, Own)
        assert client.visit(frontend, session).reused
        assert second._policy._lookups._threads._threads
        second.uninstall()
        assert client.visit(frontend, session).reused
        assert first.stats.hits == {"store": 1}
        first.uninstall()
        assert frontend.context.sslobject_class is Own
        assert not client.visit(frontend, session).reused
