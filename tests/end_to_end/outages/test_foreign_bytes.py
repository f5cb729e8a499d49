"""Bytes from a peer or from the store never cause a wrong resumption, an alert or a crash."""

from __future__ import annotations

import ctypes
import os
import random
from typing import TYPE_CHECKING, Any

import pytest

from resumed._client.store import StoredSession
from resumed._crypto.keyring import Keyring
from resumed._crypto.store_key import StoreKeys
from resumed._openssl.offer import Offer
from resumed._policy.served_names import Expected
from support.tls import PATIENCE, STACKS, VERSIONS, Client, Frontend

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from resumed._crypto.envelope import Envelope
    from support.server import RunningServer
    from support.tls import Stack

OTHER_FLEET = Keyring.from_keys([bytes(32)])


class DishonestStore:
    """Replaces the store client of a policy: counts the lookups and answers each with `answer`."""

    target, namespace, deadline = "dishonest", "shop", PATIENCE

    def __init__(self, answer: bytes | None = None) -> None:
        self.answer = answer
        self.calls = 0

    def get(self, _key: bytes, *, deadline: float = PATIENCE) -> StoredSession | None:
        self.calls += 1
        return None if self.answer is None else StoredSession(self.answer, 100.0)

    def close(self) -> None:
        """Do nothing."""


class Scene:
    """A frontend with one session of its own, as OpenSSL sees it through the get callback."""

    def __init__(self, store: RunningServer, keyring: Keyring, stack: Stack, version: ssl.TLSVersion) -> None:
        self.client = Client(version)
        self.frontend = Frontend(stack, store.target, keyring)
        self.binding = self.frontend.shim._binding
        self.shim = self.frontend.shim._policy
        self.keyring = keyring
        seen: list[tuple[bytes, Envelope]] = []
        negotiated = self.shim.on_new_session

        def spy(session_id: bytes, envelope: Envelope, remaining: float, **more: Any) -> None:
            seen.append((session_id, envelope))
            negotiated(session_id, envelope, remaining, **more)

        self.shim.on_new_session = spy
        self.session = self.client.visit(self.frontend).session
        self.frontend.shim.flush()
        self.session_id, self.envelope = seen[-1]
        self.encoded = self.envelope.encode()
        self.store_key = StoreKeys("shop").key(self.session_id)
        self.sealed = keyring.seal(self.store_key, self.encoded, 2**32)

    def ask(self, session_id: bytes) -> int | None:
        """Call the get callback as OpenSSL does, and free its result; return whether it was a session."""
        copy = ctypes.c_int(1)
        buffer = ctypes.create_string_buffer(session_id, max(len(session_id), 1))
        session: int | None = self.binding._on_get(0, ctypes.addressof(buffer), len(session_id), ctypes.addressof(copy))
        assert copy.value == 0
        if session:
            self.binding.library.SSL_SESSION_free(session)
        return session


@pytest.fixture(params=[(stack, version) for stack in STACKS for version in VERSIONS], ids=str)
def scene(
    request: pytest.FixtureRequest, store: RunningServer, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    scene = Scene(store, keyring, *request.param)
    # ask() has no connection, so neither a ClientHello nor a context.
    monkeypatch.setattr(Offer, "name", b"localhost")
    monkeypatch.setattr(Offer, "asks", False)
    monkeypatch.setattr(Offer, "digest", None)
    monkeypatch.setattr(Offer, "expected", Expected(scene.envelope.fingerprint))
    monkeypatch.setattr(scene.binding, "context_may_change", lambda: False)
    monkeypatch.setattr(scene.binding.library, "SSL_set_session_id_context", lambda *_: 1)
    return scene


def malformed(scene: Scene, number: int, source: random.Random) -> Iterator[bytes]:
    """Yield values that must not resume, of every kind there is."""
    sealed, key, plain = scene.sealed, scene.store_key, scene.encoded
    other_key = StoreKeys("bank").key(scene.session_id)
    other_format = StoreKeys("shop", "go").key(scene.session_id)
    fixed = [
        b"",
        b"\x00",
        b"\x01",
        b"\x01" + sealed[1:],
        bytes(65_536),
        os.urandom(65_536),
        plain,
        Keyring.plaintext().seal(key, plain, 2**32),
        OTHER_FLEET.seal(key, plain, 2**32),
        scene.keyring.seal(other_key, plain, 2**32),
        scene.keyring.seal(other_format, plain, 2**32),
        scene.keyring.seal(key, plain, 1),
        scene.keyring.seal(key, b"", 2**32),
        scene.keyring.seal(key, plain[:39], 2**32),
        scene.keyring.seal(key, plain[:40], 2**32),
        scene.keyring.seal(key, bytes(32) + plain[32:], 2**32),
        scene.keyring.seal(key, scene.envelope.session, 2**32),
        scene.keyring.seal(key, plain + b"\0", 2**32),
        scene.keyring.seal(key, plain[:-1], 2**32),
        scene.keyring.seal(key, plain[:40] + b"a Go session, say", 2**32),
        scene.keyring.seal(key, plain[:40] + os.urandom(60_000), 2**32),
    ]
    yield from fixed
    for _ in range((number - len(fixed)) // 3):
        flipped = bytearray(sealed)
        flipped[source.randrange(len(sealed))] ^= 1 << source.randrange(8)
        yield bytes(flipped)
        yield sealed[: source.randrange(len(sealed))]
        yield source.randbytes(source.randrange(400))


def test_10000_malformed_values_are_misses(scene: Scene) -> None:
    dishonest = DishonestStore()
    scene.shim._lookups._store = dishonest
    dishonest.answer = scene.sealed
    assert scene.ask(scene.session_id), "the scene itself works"
    source = random.Random(7400)
    for value in malformed(scene, 10_000, source):
        dishonest.answer = value
        assert scene.ask(scene.session_id) is None
    reasons = scene.frontend.shim.stats.misses
    assert set(reasons) == {
        *("malformed", "unknown-key", "not-authentic", "expired", "undecodable", "context-mismatch"),
    }
    assert dishonest.calls > 9_900


def test_a_mutated_session_that_is_authentic_crashes_nothing(scene: Scene) -> None:
    """A holder of the key can make d2i_SSL_SESSION fail or decode another session, and no more."""
    dishonest = DishonestStore()
    scene.shim._lookups._store = dishonest
    source = random.Random(7400)
    for _ in range(3_000):
        mutated = bytearray(scene.envelope.session)
        for _ in range(source.randrange(1, 4)):
            mutated[source.randrange(len(mutated))] = source.randrange(256)
        envelope = scene.envelope._replace(session=bytes(mutated))
        dishonest.answer = scene.keyring.seal(scene.store_key, envelope.encode(), 2**32)
        scene.ask(scene.session_id)
    assert not scene.frontend.shim.stats.misses["internal-error"]


def test_malformed_values_make_full_handshakes(scene: Scene) -> None:
    dishonest = DishonestStore()
    scene.shim._lookups._store = dishonest
    for value in malformed(scene, 60, random.Random(7401)):
        dishonest.answer = value
        assert not scene.client.visit(scene.frontend, scene.session).reused
    assert dishonest.calls >= 60 - 3


def test_100000_invented_ids_reach_no_store(scene: Scene) -> None:
    dishonest = DishonestStore(scene.sealed)
    scene.shim._lookups._store = dishonest
    source = random.Random(7402)
    lengths = [0, 1, 31, 33, 64, *[32] * 20]
    for number in range(25_000):  # four scenes
        kind = number % 8
        if kind == 0:
            invented = scene.keyring.issue_id("bank", 2**31)
        elif kind == 1:
            invented = OTHER_FLEET.issue_id("shop", 2**31)
        elif kind == 2:
            flipped = bytearray(scene.session_id)
            flipped[source.randrange(32)] ^= 1 << source.randrange(8)
            invented = bytes(flipped)
        else:
            invented = source.randbytes(source.choice(lengths))
        assert scene.ask(invented) is None
    assert dishonest.calls == 0
    assert scene.frontend.shim.stats.misses["foreign-id"] == 25_000


def test_ids_of_any_kind_are_looked_up_if_enabled(scene: Scene) -> None:
    dishonest = DishonestStore()
    scene.shim._lookups._store, scene.shim._rejects_foreign_ids = dishonest, False
    for session_id in (b"\0", b"\xff\xfe", bytes(31), b"a\0b", os.urandom(32)):
        assert scene.ask(session_id) is None
    assert dishonest.calls == 5
    for session_id in (b"", bytes(33), bytes(65)):
        assert scene.ask(session_id) is None
    assert dishonest.calls == 5


def test_a_first_tls_1_3_hello_at_a_tls_1_2_server_makes_no_call(
    store: RunningServer, keyring: Keyring, stack: Stack
) -> None:
    """The client sends a random session id for middlebox compatibility, which looks like a resumption."""
    frontend = Frontend(stack, store.target, keyring)
    if stack == "ssl":
        frontend.context.maximum_version = VERSIONS[0]
    else:
        frontend.context.set_max_proto_version(VERSIONS[0])
    client = Client(VERSIONS[0])
    client.context.maximum_version = VERSIONS[1]
    frontend.shim._policy._lookups._store = dishonest = DishonestStore()
    assert not client.visit(frontend).reused
    assert frontend.shim.stats.misses == {"foreign-id": 1}
    assert dishonest.calls == 0


def test_a_defect_in_the_shim_is_a_miss(scene: Scene) -> None:
    def defect(*_arguments: object, **_more: object) -> None:
        raise RuntimeError("a defect")

    for name in ("on_get_session", "on_new_session", "on_connection_failed", "issue_id"):
        assert hasattr(scene.shim, name)
        setattr(scene.shim, name, defect)
    visit = scene.client.visit(scene.frontend, scene.session)
    assert not visit.reused
    assert scene.frontend.shim.stats.misses["internal-error"] >= 3
