"""Watch over the wire: the changes of a namespace arrive in order, through every worker."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from resumed import SessionStore
from support.redis import redis_server, valkey_cluster, valkey_sentinels, valkey_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from resumed._client.store import Watch, WatchBatch

PATIENCE = 10.0


PATIENT = "?timeout_ms=5000"
"""A busy machine is no broken promise."""


@contextmanager
def on_lmdb(transport: str, workers: int) -> Iterator[list[str]]:
    """One server with a database of its own."""
    with running_server("--transport", transport, workers=workers) as server:
        yield [server.target]


@contextmanager
def on_redis(redis: Callable[[], AbstractContextManager[Any]]) -> Iterator[list[str]]:
    """Two servers on one Redis, Valkey, cluster or Sentinel."""
    with ExitStack() as held:
        url = held.enter_context(redis()).url
        yield [held.enter_context(running_server("--storage", url + PATIENT)).target for _ in range(2)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(partial(on_lmdb, "grpcio", 1), id="one process"),
        pytest.param(partial(on_lmdb, "grpcio", 2), id="two workers"),
        pytest.param(partial(on_lmdb, "native", 1), id="one native process"),
        pytest.param(partial(on_lmdb, "native", 2), id="two native workers"),
        pytest.param(partial(on_redis, valkey_server), id="two servers on Valkey"),
        pytest.param(partial(on_redis, redis_server), id="two servers on Redis"),
        pytest.param(partial(on_redis, valkey_cluster), id="two servers on a cluster"),
        pytest.param(partial(on_redis, valkey_sentinels), id="two servers behind Sentinels"),
    ],
)
def targets(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The addresses of the servers of one store."""
    with request.param() as targets:
        yield targets


@pytest.fixture
def connected(targets: list[str]) -> Iterator[Callable[..., SessionStore]]:
    """Connect to each server of the store in turn, and so, after some connections, to each worker."""
    turns = itertools.cycle(targets)
    with ExitStack() as held:

        def connected(namespace: str) -> SessionStore:
            return held.enter_context(closing(SessionStore(next(turns), namespace=namespace, deadline=PATIENCE)))

        yield connected


@pytest.fixture
def store(connected: Callable[..., SessionStore]) -> SessionStore:
    """A client of a namespace that only this test uses."""
    return connected(os.urandom(8).hex())


@pytest.fixture
def elsewhere(connected: Callable[..., SessionStore], store: SessionStore) -> Callable[[], SessionStore]:
    """Connect to the same namespace again."""
    return lambda: connected(store.namespace)


def read_until(watch: Watch, *last: tuple[bytes, bytes | None]) -> tuple[dict[bytes, list[bytes | None]], bytes]:
    """Read until the last change of each key in `last` has that value; return all changes, and the position."""
    changes: dict[bytes, list[bytes | None]] = {}
    position = b""
    for news in watch:
        for key, session, _ in news.changes:
            changes.setdefault(key, []).append(session.value if session else None)
        position = news.position or position
        if all(changes.get(key, [b""])[-1] == value for key, value in last):
            break
    return changes, position


def test_changes_arrive_in_order(store: SessionStore, elsewhere: Callable[[], SessionStore]) -> None:
    """Put, Take and Remove over other connections. A Get and a repeated Put are not changes."""
    with store.watch() as watch:
        assert not watch.resumed_from_position
        for key in (b"a", b"b"):
            elsewhere().put(key, b"value " + key, 100)
        store.put(b"a", b"value a", 100)
        store.get(b"a")
        changes, _ = read_until(watch, (b"a", b"value a"), (b"b", b"value b"))
        assert changes == {b"a": [b"value a"], b"b": [b"value b"]}
        elsewhere().take(b"a")
        elsewhere().remove(b"b")
        store.remove(b"unknown")
        changes, _ = read_until(watch, (b"a", None), (b"b", None), (b"unknown", None))
        assert changes == {b"a": [None], b"b": [None], b"unknown": [None]}


def test_the_operations_of_a_batch_are_changes(store: SessionStore) -> None:
    with store.watch() as watch:
        store.batch([resumed.Put(b"a", b"1", 100), resumed.Get(b"a"), resumed.Take(b"a"), resumed.Put(b"c", b"2", 100)])
        changes, _ = read_until(watch, (b"a", None), (b"c", b"2"))
        assert changes in ({b"a": [None], b"c": [b"2"]}, {b"a": [b"1", None], b"c": [b"2"]})


def test_changes_of_other_namespaces_do_not_arrive(store: SessionStore, connected: Callable[..., SessionStore]) -> None:
    """A tenant receives its own sessions only."""
    with store.watch() as watch:
        connected("other").put(os.urandom(8), b"value", 100)
        store.put(b"mine", b"value", 100)
        assert read_until(watch, (b"mine", b"value"))[0] == {b"mine": [b"value"]}


def test_a_stream_continues_at_a_position(store: SessionStore, elsewhere: Callable[[], SessionStore]) -> None:
    """Any server sends the missed changes first. A session that was stored and removed is a removal."""
    with store.watch() as watch:
        store.put(b"a", b"1", 100)
        _, position = read_until(watch, (b"a", b"1"))
    store.put(b"b", b"2", 100)
    store.remove(b"a")
    store.put(b"c", b"3", 100)
    store.remove(b"c")
    for there in (elsewhere(), elsewhere()):
        with there.watch(position) as watch:
            assert watch.resumed_from_position
            news: list[WatchBatch] = []
            for each in watch:
                news.append(each)
                if each.live:
                    break
        changes = [(key, session and session.value) for each in news for key, session, _ in each.changes]
        assert sorted(changes) == [(b"a", None), (b"b", b"2"), (b"c", None)]
        assert [each.live for each in news] == [False] * (len(news) - 1) + [True]


@pytest.mark.parametrize("position", [b"nonsense", bytes(16), b"\xff" * 16, b"x" * 64])
def test_an_unknown_position_starts_a_new_stream(store: SessionStore, position: bytes) -> None:
    """As does the position of another store."""
    with store.watch(position) as watch:
        assert not watch.resumed_from_position


@pytest.mark.parametrize(("namespace", "position"), [("Shop", b""), ("shop", bytes(65))])
def test_an_invalid_field_is_named(connected: Callable[..., SessionStore], namespace: str, position: bytes) -> None:
    with pytest.raises(resumed.InvalidRequest), connected(namespace).watch(position):
        pass


def test_a_stream_without_changes_has_heartbeats(store: SessionStore) -> None:
    """About one a second; another stream can continue at its position."""
    with store.watch() as watch:
        assert next(iter(watch)).live
        changes, position, live = next(iter(watch))
        assert not changes
        assert live
    with store.watch(position) as watch:
        assert watch.resumed_from_position


def test_fifty_watchers_delay_no_call(store: SessionStore, elsewhere: Callable[[], SessionStore]) -> None:
    """They have threads of their own, and all receive the change."""
    with ExitStack() as open_streams:
        watches = [open_streams.enter_context(elsewhere().watch()) for _ in range(50)]
        store.put(b"key", b"value", 100)
        assert store.get(b"key", deadline=5)
        for watch in watches:
            assert read_until(watch, (b"key", b"value"))[0] == {b"key": [b"value"]}


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_the_end_of_the_server_ends_the_stream(transport: str) -> None:
    """With UNAVAILABLE, so the client continues at another server."""
    with running_server("--transport", transport) as server:
        store = SessionStore(server.target, namespace="shop", deadline=PATIENCE)
        with store.watch() as watch:
            threading.Thread(target=server.stop).start()
            with pytest.raises(resumed.StoreUnavailable):
                read_until(watch, (b"never", b"stored"))
