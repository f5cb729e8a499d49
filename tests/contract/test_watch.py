"""Watch over the wire: what happens in a namespace is told, in order, to whoever follows, by every worker."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import resumed
from resumed import SessionStore
from resumed.store import Changes, Watch
from resumed_server.engines import open_engine
from resumed_server.engines.base import EngineUnavailable
from resumed_server.watchers import MAX_WATCHERS, QUEUED_MESSAGES, TooManyWatchers, Watchers, WatcherTooSlow
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumed_server.engines.base import Engine

PATIENCE = 10.0


@pytest.fixture(
    scope="module",
    params=[("grpcio", 1), ("grpcio", 2), ("native", 1), ("native", 2)],
    ids=["one process", "two workers", "one native process", "two native workers"],
)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """A real store."""
    front, workers = request.param
    with running_server("--front", front, workers=workers) as server:
        yield server.target


@pytest.fixture
def store(target: str) -> Iterator[SessionStore]:
    """A namespace of its own."""
    store = SessionStore(target, namespace=os.urandom(8).hex(), deadline=PATIENCE)
    yield store
    store.close()


def elsewhere(store: SessionStore, **options: str) -> SessionStore:
    """Return the same store over another connection, and so, sooner or later, another worker."""
    return SessionStore(store.target, namespace=options.get("namespace", store.namespace), deadline=PATIENCE)


def told(watch: Watch, count: int) -> tuple[list[tuple[bytes, bytes | None]], bytes]:
    """Read until `count` changes were told; return them and the position behind them."""
    changes: list[tuple[bytes, bytes | None]] = []
    position = b""
    for news in watch:
        changes += [(key, session.value if session else None) for key, session in news.changes]
        position = news.position or position
        if len(changes) >= count:
            break
    return changes, position


def test_what_happens_is_told_in_its_order(store: SessionStore) -> None:
    """Put, Take and Remove, made over other connections; a Get and a repeated Put are nothing to tell."""
    with store.watch() as watch:
        assert not watch.continued
        for key in (b"a", b"b"):
            elsewhere(store).put(key, b"value " + key, 100)
        store.put(b"a", b"value a", 100)
        store.get(b"a")
        changes, _ = told(watch, 2)
        assert changes == [(b"a", b"value a"), (b"b", b"value b")]
        elsewhere(store).take(b"a")
        elsewhere(store).remove(b"b")
        store.remove(b"unknown")
        assert told(watch, 3)[0] == [(b"a", None), (b"b", None), (b"unknown", None)]


def test_batches_are_told_too(store: SessionStore) -> None:
    """Each operation that changed something."""
    with store.watch() as watch:
        store.batch([resumed.Put(b"a", b"1", 100), resumed.Get(b"a"), resumed.Take(b"a"), resumed.Put(b"c", b"2", 100)])
        changes, _ = told(watch, 2)
        assert changes[-2:] == [(b"a", None), (b"c", b"2")]


def test_other_namespaces_are_not_told(store: SessionStore) -> None:
    """A tenant sees its own sessions."""
    with store.watch() as watch:
        elsewhere(store, namespace="other").put(os.urandom(8), b"value", 100)
        store.put(b"mine", b"value", 100)
        assert told(watch, 1)[0] == [(b"mine", b"value")]


def test_a_stream_goes_on_where_it_ended(store: SessionStore) -> None:
    """What happened in between is told first; a session that came and went is told as gone."""
    with store.watch() as watch:
        store.put(b"a", b"1", 100)
        _, position = told(watch, 1)
    store.put(b"b", b"2", 100)
    store.remove(b"a")
    store.put(b"c", b"3", 100)
    store.remove(b"c")
    with store.watch(position) as watch:
        assert watch.continued
        news: list[Changes] = []
        for each in watch:
            news.append(each)
            if each.live:
                break
    changes = [(key, session and session.value) for each in news for key, session in each.changes]
    assert changes == [(b"b", b"2"), (b"a", None), (b"c", None)]
    assert [each.live for each in news] == [False] * (len(news) - 1) + [True]


@pytest.mark.parametrize("position", [b"nonsense", bytes(16), b"\xff" * 16, b"x" * 64])
def test_a_position_that_means_nothing_begins_anew(store: SessionStore, position: bytes) -> None:
    """As does one of another store."""
    with store.watch(position) as watch:
        assert not watch.continued


@pytest.mark.parametrize(("namespace", "position"), [("Shop", b""), ("shop", bytes(65))])
def test_limits_are_errors_that_name_the_field(store: SessionStore, namespace: str, position: bytes) -> None:
    """As in every other call."""
    with pytest.raises(resumed.InvalidCall), elsewhere(store, namespace=namespace).watch(position):
        pass


def test_a_quiet_stream_gives_signs_of_life(store: SessionStore) -> None:
    """An answer without changes, about once a second."""
    with store.watch() as watch:
        assert next(iter(watch)).live
        assert next(iter(watch)) == Changes([], b"", True)


def test_fifty_watchers_hold_up_no_call(store: SessionStore) -> None:
    """They have threads of their own, and all are told."""
    with ExitStack() as open_streams:
        watches = [open_streams.enter_context(elsewhere(store).watch()) for _ in range(50)]
        store.put(b"key", b"value", 100)
        assert store.get(b"key", deadline=5)
        for watch in watches:
            assert told(watch, 1)[0] == [(b"key", b"value")]


@pytest.mark.parametrize("front", ["grpcio", "native"])
def test_the_end_of_the_server_ends_the_stream(front: str) -> None:
    """With UNAVAILABLE: the client goes on elsewhere."""
    with running_server("--front", front) as server:
        store = SessionStore(server.target, namespace="shop", deadline=PATIENCE)
        with store.watch() as watch:
            threading.Thread(target=server.stop).start()
            with pytest.raises(resumed.StoreUnavailable):
                told(watch, 1)


class TestWatchers:
    """The server's side, on an engine in this process."""

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        """An embedded engine."""
        engine = open_engine("lmdb:", capacity=16 << 20)
        yield engine
        engine.close()

    def test_who_does_not_keep_up_is_cut_off_and_slows_nobody(self, engine: Engine) -> None:
        """Its queue is bounded; the others go on."""
        watchers = Watchers(engine)
        with watchers.subscribed("shop") as slow, watchers.subscribed("shop") as quick:
            news = quick.messages()
            for number in range(QUEUED_MESSAGES + 1):
                engine.put("shop", b"%d" % number, b"value", 100)
                message = None
                while message is None:
                    message = next(news)
            with pytest.raises(WatcherTooSlow):
                for _ in slow.messages():
                    pass
            engine.put("shop", b"more", b"value", 100)
            assert next(news)
        watchers.close()

    def test_there_is_a_limit(self, engine: Engine) -> None:
        """Beyond it a watcher is told so."""
        watchers = Watchers(engine)
        with ExitStack() as stack:
            for _ in range(MAX_WATCHERS):
                stack.enter_context(watchers.subscribed("shop"))
            with pytest.raises(TooManyWatchers), watchers.subscribed("shop"):
                pass
        with watchers.subscribed("shop"):
            pass
        watchers.close()
        with pytest.raises(EngineUnavailable), watchers.subscribed("shop"):
            pass

    def test_a_log_that_moved_on_begins_anew(self, engine: Engine) -> None:
        """It is bounded; a position that it does not reach back to is None, never a gap."""
        position = engine.position()
        kept = (16 << 20) // 2048
        for number in range(kept):
            engine.put("shop", b"%d" % number, b"value", 100)
        assert engine.changes(position, engine.position(), 10) is not None
        engine.put("shop", b"one more", b"value", 100)
        assert engine.changes(position, engine.position(), 10) is None

    def test_large_values_are_told_in_several_messages(self, engine: Engine) -> None:
        """About a mebibyte at a time, and every one."""
        position = engine.position()
        for number in range(40):
            engine.put("shop", b"%d" % number, bytes(65_536), 100)
        keys: list[bytes] = []
        until = engine.position()
        reads = 0
        while position != until:
            read = engine.changes(position, until, 1_000)
            assert read is not None
            keys += [change.key for change in read[0]]
            position = read[1]
            reads += 1
        assert keys == [b"%d" % number for number in range(40)]
        assert reads >= 2
