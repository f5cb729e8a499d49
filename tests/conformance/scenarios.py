"""Shows what behaviour.toml says must happen: a function for each row, which raises AssertionError where it does not.

They see frontends as clients and operators do, through TLS and the store, so that they are the same for every language.
"""

from __future__ import annotations

import base64
import contextlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import resumed
from conformance.client import HOSTS, Client, id_of, seen
from conformance.fleet import Fleet, fleet
from conformance.liar import lying_store
from resumed_server.cli.diagnose.issued_session import SessionReader
from support.processes import paused
from support.server import running_server

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from conformance.fleet import Stack

PATIENCE = 30.0
"""Upper bound in seconds for any step."""
_ROUNDS = 10
_HUNG_DEADLINE = 1.0
_BREAKER = 3
"""Failures in a row after which a frontend asks no more."""


def stored(stack: Stack, target: str, client: Client) -> None:
    """Show a full handshake's session in the store, sealed."""
    with fleet(stack, target) as f:
        visit = client.visit(f.start())
        assert not visit.resumed
        key = f.store_key(id_of(visit.session))
        value = await_put(f, visit.session)
        keyring = resumed.Keyring.from_keys([_raw(f.keys[0])])
        plaintext, not_after = keyring.open(key, value, time.time())
        assert len(plaintext) > 48  # a master secret at least
        assert 290 < not_after - time.time() <= 7201  # the default lifetime, or the timeout of a server: five minutes


def another_process(stack: Stack, target: str, client: Client) -> None:
    """Show resumption in both of two processes, by turns."""
    with fleet(stack, target) as f:
        ports = [f.start(), f.start()]
        by_turns(f, client, [*ports, *ports])


def unix_socket(stack: Stack, target: str, client: Client) -> None:
    """Show resumption in both of two processes with a store that listens on a unix socket."""
    del target
    with tempfile.TemporaryDirectory(prefix="resumed-") as directory:
        listen = f"unix:{directory}/resumed.sock"
        with running_server(listen=listen), fleet(stack, listen) as f:
            ports = [f.start(), f.start()]
            by_turns(f, client, [*ports, *ports])


def single_use(stack: Stack, target: str, client: Client) -> None:
    """Show that of four connections at once, two to each process, one resumes."""
    with fleet(stack, target) as f, ThreadPoolExecutor(4) as pool:
        ports = [f.start(single_use=True), f.start(single_use=True)]
        for _ in range(_ROUNDS):
            session = client.visit(ports[0]).session
            await_put(f, session)
            visits = list(pool.map(lambda port, session=session: client.visit(port, session), [*ports, *ports]))
            assert sum(visit.resumed for visit in visits) == 1, [visit.resumed for visit in visits]


def removed(stack: Stack, target: str, client: Client) -> None:
    """Show that a session that an operator removes resumes in neither process."""
    with fleet(stack, target) as f:
        ports = [f.start(), f.start()]
        session = client.visit(ports[0]).session
        await_put(f, session)
        assert client.visit(ports[1], session).resumed
        assert f.store().remove(f.store_key(id_of(session)))
        assert not any(client.visit(port, session).resumed for port in ports)


def down(stack: Stack, target: str, client: Client) -> None:
    """Show full handshakes without a store, and resumption with the next one at the same address."""
    with running_server() as first, fleet(stack, first.target) as f:
        port = f.start()
        session = client.visit(port).session
        await_put(f, session)
        assert client.visit(port, session).resumed
        first.kill()
        assert not any(client.visit(port, session).resumed for _ in range(_ROUNDS))
        with running_server(listen=first.target):
            eventually("resumption", lambda: client.comes_back(port))


def hung(stack: Stack, target: str, client: Client) -> None:
    """Show full handshakes, few of which ask, while the store answers nothing, and resumption when it does."""
    with lying_store() as liar, fleet(stack, liar.target) as f:
        port = f.start(deadline=_HUNG_DEADLINE)
        session = client.visit(port).session
        eventually("a Put", lambda: liar.has(f.store_key(id_of(session))))
        assert client.visit(port, session).resumed
        liar.lookups.clear()
        with liar.hanging():
            started = time.monotonic()
            assert not any(client.visit(port, session).resumed for _ in range(4 * _BREAKER))
            waited = time.monotonic() - started
        eventually("resumption", lambda: client.comes_back(port))
        # Only those that asked waited, in each of two workers at most; if all had, it were half as long again.
        assert waited < (2 * _BREAKER + 2) * _HUNG_DEADLINE, f"{waited:.1f} s for {4 * _BREAKER} handshakes"


def tickets_removed(stack: Stack, target: str, client: Client) -> None:
    """Show that tickets that an operator removes resume in neither process."""
    with fleet(stack, target) as f, contextlib.closing(f.store()) as store:
        ports = [f.start(), f.start()]
        session = client.visit(ports[0]).session
        assert client.visit(ports[1], session).resumed
        keyring = resumed.Keyring.from_keys([_raw(f.keys[0])])
        removal = SessionReader(store, keyring, f.namespace).read(id_of(session)).removal
        assert removal
        store.batch([removal])
        for port in ports:
            eventually("the removal", lambda port=port: not client.visit(port, session).resumed)  # type: ignore[misc]
            assert client.comes_back(port)


def tickets_down(stack: Stack, target: str, client: Client) -> None:
    """Show resumption without a store, of tickets of before and of the outage, and with the next store."""
    del target
    with running_server() as first, fleet(stack, first.target) as f:
        ports = [f.start(), f.start()]
        session = client.visit(ports[0]).session
        first.kill()
        assert all(client.visit(port, session).resumed for port in ports)
        by_turns(f, client, [*ports, *ports])
        with running_server(listen=first.target):
            by_turns(f, client, [*ports, *ports])


def tickets_hung(stack: Stack, target: str, client: Client) -> None:
    """Show resumption while the store answers nothing."""
    del target
    with running_server() as store, fleet(stack, store.target) as f:
        ports = [f.start(), f.start()]
        with paused(store.process):
            by_turns(f, client, [*ports, *ports])


def malformed(stack: Stack, target: str, client: Client) -> None:
    """Show full handshakes for responses that contain no session of this fleet."""
    with lying_store() as liar, fleet(stack, liar.target) as f:
        own = resumed.Keyring.from_keys([_raw(f.keys[0])])
        stranger = resumed.Keyring.from_keys([bytes(32)])
        later = int(time.time()) + 3600
        answers: list[Callable[[bytes, bytes], bytes]] = [
            lambda _key, _value: b"\0",
            lambda _key, value: value[:40],
            lambda _key, value: b"\7" + value[1:],
            lambda _key, _value: bytes(65_536),
            lambda _key, value: value[:-1] + bytes([value[-1] ^ 1]),
            lambda _key, value: value[:12] + bytes([value[12] ^ 1]) + value[13:],
            lambda key, _value: stranger.seal(key, b"a session", later),
            lambda key, _value: own.seal(key, b"a session", int(time.time())),
            lambda key, _value: own.seal(key, b"a session of another format", later),
            lambda key, _value: own.seal(key, b"", later),
        ]
        port = f.start()
        for number, answer in enumerate(answers):
            session = client.visit(port).session
            key = f.store_key(id_of(session))
            eventually("a Put", lambda key=key: liar.has(key))  # type: ignore[misc]
            liar.spoil = answer
            before = len(liar.lookups)
            assert not client.visit(port, session).resumed, number
            assert key in liar.lookups[before:], f"{number}: it was not asked for"
            liar.spoil = lambda _key, value: value
            assert client.visit(port, session).resumed, number


def rotated(stack: Stack, target: str, client: Client) -> None:
    """Show resumption through a rotation of keys, until the old key is retired."""
    with fleet(stack, target) as f:
        port, old = f.start(), f.keys[0]
        session = client.visit(port).session
        await_put(f, session)
        young = resumed.Keyring.generate()
        f.list_keys(young, old)
        eventually("a session of the new key", lambda: sealed_with(f, client, port, young))
        assert client.visit(port, session).resumed
        f.list_keys(young)
        eventually("the end of the old key", lambda: not client.visit(port, session).resumed)
        assert client.comes_back(port)


def another_namespace(stack: Stack, target: str, client: Client) -> None:
    """Show a full handshake with what another namespace's frontend negotiated."""
    with fleet(stack, target) as f:
        here, there = f.start(), f.start(namespace=f"{f.namespace}-b")
        session = client.visit(here).session
        await_put(f, session)
        assert not client.visit(there, session).resumed
        assert client.visit(here, session).resumed


def another_name(stack: Stack, target: str, client: Client) -> None:
    """Show a full handshake with a session of another server name."""
    with fleet(stack, target) as f:
        port = f.start()
        session = client.visit(port).session
        await_put(f, session)
        assert not client.visit(port, session, HOSTS[1]).resumed
        assert client.visit(port, session).resumed


def made_up(stack: Stack, target: str, client: Client) -> None:
    """Show that the id of another fleet is no call."""
    with fleet(stack, target) as other, lying_store() as liar, fleet(stack, liar.target) as f:
        session = client.visit(other.start()).session
        port = f.start()
        assert not client.visit(port, session).resumed
        assert not liar.lookups


def cut(stack: Stack, target: str, client: Client) -> None:
    """Show that a connection without close_notify keeps its session, in the process that it was cut from too."""
    with fleet(stack, target) as f:
        port = f.start()
        session = client.visit(port).session  # goes so
        await_put(f, session)
        by_turns(f, client, [port, port, port])
        assert client.visit(port, session).resumed


def alert_sent(stack: Stack, target: str, client: Client) -> None:
    """Show that a session whose connection the frontend ended with a fatal alert is removed."""
    _alert(stack, target, client, lambda connection: connection.send_garbage())


def alert_received(stack: Stack, target: str, client: Client) -> None:
    """Show that a session whose connection the client ended with a fatal alert is removed."""
    _alert(stack, target, client, lambda connection: connection.send_fatal_alert())


def across(giver: Stack, taker: Stack, target: str, client: Client) -> None:
    """Show that sessions of one stack resume in another, and its tickets in the first."""
    with fleet(giver, target) as f:
        ports = [f.start(any_id=True), f.start(taker, any_id=True)]
        by_turns(f, client, [*ports, *ports])


def by_turns(f: Fleet, client: Client, ports: list[int]) -> None:
    """Visit `ports` in turn, each with the session of the visit before: all but the first resume."""
    session: ssl.SSLSession | None = None
    for number, port in enumerate(ports):
        visit = client.visit(port, session)
        assert visit.resumed == (number > 0), f"connection {number}"
        session = visit.session
        await_put(f, session)


def await_put(f: Fleet, session: ssl.SSLSession) -> bytes:
    """Wait until a session is in the store, and return its value: Puts go out in the background."""
    if f.stack.tickets:
        return b""  # clients keep the sessions
    store, key = f.store(), f.store_key(id_of(session))
    try:
        eventually("a Put", lambda: store.get(key) is not None)
        found = store.get(key)
        assert found
        return found.value
    finally:
        store.close()


def sealed_with(f: Fleet, client: Client, port: int, key: str) -> bool:
    """Return whether a new session is sealed with a key."""
    value = await_put(f, client.visit(port).session)
    return value[1:5].hex() in resumed.Keyring.from_keys([_raw(key)]).key_ids


def eventually(what: str, happens: Callable[[], bool]) -> None:
    """Wait until something of another process is so."""
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.005)


def _alert(stack: Stack, target: str, client: Client, harm: Callable[..., None]) -> None:
    with fleet(stack, target) as f:
        ports = [f.start(), f.start()]
        with client.connect(ports[0]) as connection:
            session = seen(connection).session
            await_put(f, session)
            harm(connection)
        if not f.stack.tickets:
            store, key = f.store(), f.store_key(id_of(session))
            eventually("a removal", lambda: store.get(key) is None)
            assert not any(client.visit(port, session).resumed for port in ports)
        for port in ports:
            eventually("the removal", lambda port=port: not client.visit(port, session).resumed)  # type: ignore[misc]


def _raw(key: str) -> bytes:
    return base64.b64decode(key)
