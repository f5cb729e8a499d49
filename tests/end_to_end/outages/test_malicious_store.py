"""A malicious server causes no wrong resumption: real handshakes with a server that lies.

Only the server can guarantee that a removed or taken session stays away. The last tests show how far a malicious one
can break that, as docs/threat-model.md describes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from resumed._crypto.store_key import StoreKeys
from resumed_server.storage.engine import StoredSession
from support.lying_store import lying_store
from support.tls import VERSIONS, Client, Frontend, Mirrored
from support.waiting import until

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    from resumed._crypto.envelope import Envelope
    from support.lying_store import Lie, LyingEngine, LyingStore
    from support.tls import Stack

YEAR = 365 * 86_400.0


# --- Lies: (engine, namespace, key, truth) -> response -------------------------------------------------------------


def another_session(engine: LyingEngine, namespace: str, key: bytes, _truth: StoredSession | None) -> Any:
    """Swap the sessions of the first client and the last."""
    ours = [each for each in engine.given if each.namespace == namespace]
    place = [each.key for each in ours].index(key)
    return StoredSession(ours[(place + len(ours) // 2) % len(ours)].value, YEAR)


def an_older_session_of_the_client(engine: LyingEngine, namespace: str, _key: bytes, _truth: Any) -> StoredSession:
    return StoredSession(next(each.value for each in engine.given if each.namespace == namespace), YEAR)


def the_session_of_another_namespace(engine: LyingEngine, namespace: str, _key: bytes, truth: Any) -> Any:
    """The same fleet sealed it."""
    others = [each.value for each in engine.given if each.namespace == f"other-{namespace}"]
    return StoredSession(others[0], YEAR) if others else truth


def prolonged(_engine: LyingEngine, _namespace: str, _key: bytes, truth: StoredSession | None) -> StoredSession:
    """Write a later end into the value."""
    assert truth
    end = int.from_bytes(truth.value[5:13], "big") + int(YEAR)
    return StoredSession(truth.value[:5] + end.to_bytes(8, "big") + truth.value[13:], YEAR)


def cut_short(_engine: LyingEngine, _namespace: str, _key: bytes, truth: StoredSession | None) -> StoredSession:
    assert truth
    return StoredSession(truth.value[:-1], truth.ttl)


def cut_to_its_header(_engine: LyingEngine, _namespace: str, _key: bytes, truth: StoredSession | None) -> StoredSession:
    assert truth
    return StoredSession(truth.value[:13], truth.ttl)


def made_longer(_engine: LyingEngine, _namespace: str, _key: bytes, truth: StoredSession | None) -> StoredSession:
    assert truth
    return StoredSession(truth.value + b"\0", truth.ttl)


def marked_as_plaintext(_engine: LyingEngine, _ns: str, _key: bytes, truth: StoredSession | None) -> StoredSession:
    assert truth
    return StoredSession(b"\0" + truth.value[5:], truth.ttl)


def of_a_made_up_key(_engine: LyingEngine, _namespace: str, _key: bytes, truth: StoredSession | None) -> StoredSession:
    assert truth
    return StoredSession(truth.value[:1] + bytes(4) + truth.value[5:], truth.ttl)


def never_removed(engine: LyingEngine, namespace: str, key: bytes, _truth: Any) -> StoredSession | None:
    """Return a session that was removed, taken or has expired."""
    given = engine.given_for(namespace, key)
    return StoredSession(given.value, YEAR) if given else None


LIES: dict[Lie, str] = {
    another_session: "not-authentic",
    an_older_session_of_the_client: "not-authentic",
    the_session_of_another_namespace: "not-authentic",
    prolonged: "not-authentic",
    cut_short: "not-authentic",
    cut_to_its_header: "malformed",
    made_longer: "not-authentic",
    marked_as_plaintext: "malformed",
    of_a_made_up_key: "unknown-key",
}
"""Maps each manipulation to the reason of the miss."""


# --- None of it resumes --------------------------------------------------------------------------------------------


class Fleet:
    """A frontend that negotiates sessions and one that resumes them, with a namespace of their own."""

    def __init__(self, store: LyingStore, stack: Stack, *, mirror: bool) -> None:
        self.engine, self._target = store.engine, store.target
        self.keyring = resumed.Keyring.from_keys([os.urandom(32)])
        self.namespace = os.urandom(8).hex()
        self.negotiator = self.frontend("ssl")
        self.resumer = self.frontend(stack, mirrored=mirror)
        self.missed: Callable[[], dict[str, int]] = dict

    def frontend(self, stack: Stack, *, mirrored: bool = False, **more: Any) -> Frontend:
        options = {"namespace": self.namespace, "deadline": 5.0, **more}
        return (Mirrored if mirrored else Frontend)(stack, self._target, self.keyring, **options)

    def session(self, client: Client, negotiator: Frontend | None = None) -> ssl.SSLSession | None:
        """Return a session that was stored."""
        negotiator = negotiator or self.negotiator
        session = client.visit(negotiator).session
        assert negotiator.shim.flush(5.0)
        return session

    def resumes(self, client: Client, session: ssl.SSLSession | None) -> bool:
        """Offer a session to the other frontend, after its mirror has received it."""
        if isinstance(self.resumer, Mirrored):
            stored = {each.key for each in self.engine.given if each.namespace == self.namespace}
            sessions = self.resumer.mirror.sessions
            until(lambda: all(sessions.get(key) is not None for key in stored))
        reused = client.visit(self.resumer, session).reused
        assert self.resumer.shim.flush(5.0)
        return reused


@pytest.fixture(scope="module")
def fleets() -> Iterator[Callable[[Stack, bool], Fleet]]:
    """A malicious store, and a fleet of every kind: it takes a mirror a second to be there."""
    with lying_store() as store:
        yield cache(lambda stack, mirror: Fleet(store, stack, mirror=mirror))


@pytest.fixture(params=[False, True], ids=["asked", "mirrored"])
def mirror(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def fleet(fleets: Callable[[Stack, bool], Fleet], stack: Stack, mirror: bool) -> Iterator[Fleet]:
    """A fleet whose server is honest until a test changes it, in a namespace of its own."""
    fleet = fleets(stack, mirror)
    fleet.engine.given.clear()
    fleet.engine.lies = 0
    before = Counter(fleet.resumer.shim.stats.misses)
    fleet.missed = lambda: fleet.resumer.shim.stats.misses - before
    yield fleet
    fleet.engine.lie = None


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.replace("_", " "))
def test_no_lie_resumes(fleet: Fleet, client: Client, lie: Lie) -> None:
    fleet.session(client, fleet.frontend("ssl", namespace=f"other-{fleet.namespace}"))
    fleet.session(client)
    fleet.engine.lie = lie
    assert not fleet.resumes(client, fleet.session(client))
    assert fleet.engine.lies
    assert fleet.missed() == {LIES[lie]: 1}


def test_the_truth_resumes(fleet: Fleet, client: Client) -> None:
    """Without this the previous test would show nothing."""
    fleet.engine.lie = lambda _engine, _namespace, _key, truth: truth
    assert fleet.resumes(client, fleet.session(client))
    assert fleet.missed() == {}


def test_no_session_gets_from_one_version_of_tls_to_the_other(fleet: Fleet, client: Client) -> None:
    (other,) = (Client(version) for version in VERSIONS if version != client.version)
    fleet.session(other)
    fleet.engine.lie = an_older_session_of_the_client
    assert not fleet.resumes(client, fleet.session(client))
    assert fleet.missed() == {"not-authentic": 1}


def test_no_session_gets_from_one_format_to_another(
    fleet: Fleet, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bytes, bytes]] = []
    negotiated = fleet.negotiator.shim._policy.on_new_session

    def spy(session_id: bytes, envelope: Envelope, remaining: float, **more: Any) -> None:
        seen.append((session_id, envelope.encode()))
        negotiated(session_id, envelope, remaining, **more)

    monkeypatch.setattr(fleet.negotiator.shim._policy, "on_new_session", spy)

    def of_go(_engine: LyingEngine, namespace: str, key: bytes, truth: StoredSession | None) -> Any:
        go, openssl = StoreKeys(namespace, "go"), StoreKeys(namespace)
        for session_id, envelope in seen:
            if openssl.key(session_id) == key:
                return StoredSession(fleet.keyring.seal(go.key(session_id), envelope, int(time.time() + YEAR)), YEAR)
        return truth

    fleet.engine.lie = of_go
    assert not fleet.resumes(client, fleet.session(client))
    assert fleet.missed() == {"not-authentic": 1}


def test_a_session_ends_when_it_was_sealed_to_end(
    fleet: Fleet, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the server's ttl nor the longer lifetime of another frontend extends it."""
    fleet.engine.lie = never_removed
    session = fleet.session(client, fleet.frontend("ssl", lifetime=100))
    assert fleet.resumes(client, session)
    monkeypatch.setattr(fleet.resumer.shim._policy, "_clock", lambda: time.time() + 101)
    assert not fleet.resumes(client, session)
    assert fleet.missed() == {"expired": 1}


# --- What only an honest store can promise -------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [False])
def test_a_malicious_store_brings_removed_sessions_back_until_their_sealed_end(
    fleet: Fleet, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    negotiator = fleet.frontend("ssl", lifetime=100)
    with client.connect(negotiator) as connection:
        connection.echo(b"hello")
        session = connection.tls.session
        connection.send_garbage()
    assert negotiator.shim.flush(5.0)
    assert not fleet.resumes(client, session), "an honest one does not"
    fleet.engine.lie = never_removed
    assert fleet.resumes(client, session)
    monkeypatch.setattr(fleet.resumer.shim._policy, "_clock", lambda: time.time() + 101)
    assert not fleet.resumes(client, session)


@pytest.mark.parametrize("mirror", [False])
def test_a_malicious_store_answers_a_take_twice_until_the_sealed_end(
    fleet: Fleet, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "resumer", fleet.frontend(fleet.resumer.stack, single_use=True))
    session = fleet.session(client, fleet.frontend("ssl", lifetime=100))
    assert [fleet.resumes(client, session) for _ in range(2)] == [True, False], "an honest one"
    fleet.engine.lie = never_removed
    assert [fleet.resumes(client, session) for _ in range(2)] == [True, True]
    fleet.resumer.shim._policy._clock = lambda: time.time() + 101
    assert not fleet.resumes(client, session)
