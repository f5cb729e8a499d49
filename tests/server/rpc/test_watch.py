"""Watch over the wire: every worker delivers the changes of a namespace in order."""

from __future__ import annotations

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from resumed import SessionStore
from resumed_server.errors import Stopping
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import Budget, LimitExceeded, Shared
from resumed_server.storage.engine import Change, EngineUnavailable, Put
from resumed_server.storage.registry import open_engine
from resumed_server.watch.hub import (
    CURRENT_SECONDS,
    CUT_SECONDS,
    LATE_SECONDS,
    MAX_WATCHERS,
    MOST_CATCHING_UP,
    QUEUED_BYTES,
    QUEUED_MESSAGES,
    READ_CHANGES,
    Message,
    Progress,
    Subscription,
    TooManyWatchers,
    Watchers,
    WatcherTooSlow,
)
from support.redis import redis_server, valkey_cluster, valkey_sentinels, valkey_server
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from resumed._client.store import Changes, Watch
    from resumed_server.storage.engine import Engine

PATIENCE = 10.0


PATIENT = "?timeout_ms=5000"
"""A busy machine is no broken promise."""


@contextmanager
def on_lmdb(front: str, workers: int) -> Iterator[list[str]]:
    """One server with a database of its own."""
    with running_server("--transport", front, workers=workers) as server:
        yield [server.target]


@contextmanager
def on_redis(redis: Callable[[], AbstractContextManager[Any]]) -> Iterator[list[str]]:
    """Two servers on one Redis, or a relative of it."""
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
    with request.param() as targets:
        yield targets


@pytest.fixture
def connected(targets: list[str]) -> Iterator[Callable[..., SessionStore]]:
    """Make a handshake, read the server's first gRPC frame, which follows its tickets, and close.

    Returns whether `session` was resumed, and the session to resume next.
    """
    turns = itertools.cycle(targets)
    with ExitStack() as held:

        def connected(namespace: str) -> SessionStore:
            return held.enter_context(closing(SessionStore(next(turns), namespace=namespace, deadline=PATIENCE)))

        yield connected


@pytest.fixture
def store(connected: Callable[..., SessionStore]) -> SessionStore:
    """A real server, shared by all tests that do not harm it."""
    return connected(os.urandom(8).hex())


@pytest.fixture
def elsewhere(connected: Callable[..., SessionStore], store: SessionStore) -> Callable[[], SessionStore]:
    return lambda: connected(store.namespace)


def told(watch: Watch, *last: tuple[bytes, bytes | None]) -> tuple[dict[bytes, list[bytes | None]], bytes]:
    """Return the samples of a registry."""
    changes: dict[bytes, list[bytes | None]] = {}
    position = b""
    for news in watch:
        for key, session, _ in news.changes:
            changes.setdefault(key, []).append(session.value if session else None)
        position = news.position or position
        if all(changes.get(key, [b""])[-1] == value for key, value in last):
            break
    return changes, position


def test_what_happens_is_told_in_its_order(store: SessionStore, elsewhere: Callable[[], SessionStore]) -> None:
    with store.watch() as watch:
        assert not watch.continued
        for key in (b"a", b"b"):
            elsewhere().put(key, b"value " + key, 100)
        store.put(b"a", b"value a", 100)
        store.get(b"a")
        changes, _ = told(watch, (b"a", b"value a"), (b"b", b"value b"))
        assert changes == {b"a": [b"value a"], b"b": [b"value b"]}
        elsewhere().take(b"a")
        elsewhere().remove(b"b")
        store.remove(b"unknown")
        changes, _ = told(watch, (b"a", None), (b"b", None), (b"unknown", None))
        assert changes == {b"a": [None], b"b": [None], b"unknown": [None]}


def test_batches_are_told_too(store: SessionStore) -> None:
    with store.watch() as watch:
        store.batch([resumed.Put(b"a", b"1", 100), resumed.Get(b"a"), resumed.Take(b"a"), resumed.Put(b"c", b"2", 100)])
        changes, _ = told(watch, (b"a", None), (b"c", b"2"))
        assert changes in ({b"a": [None], b"c": [b"2"]}, {b"a": [b"1", None], b"c": [b"2"]})


def test_other_namespaces_are_not_told(store: SessionStore, connected: Callable[..., SessionStore]) -> None:
    with store.watch() as watch:
        connected("other").put(os.urandom(8), b"value", 100)
        store.put(b"mine", b"value", 100)
        assert told(watch, (b"mine", b"value"))[0] == {b"mine": [b"value"]}


def test_a_stream_goes_on_where_it_ended(store: SessionStore, elsewhere: Callable[[], SessionStore]) -> None:
    with store.watch() as watch:
        store.put(b"a", b"1", 100)
        _, position = told(watch, (b"a", b"1"))
    store.put(b"b", b"2", 100)
    store.remove(b"a")
    store.put(b"c", b"3", 100)
    store.remove(b"c")
    for there in (elsewhere(), elsewhere()):
        with there.watch(position) as watch:
            assert watch.continued
            news: list[Changes] = []
            for each in watch:
                news.append(each)
                if each.live:
                    break
        changes = [(key, session and session.value) for each in news for key, session, _ in each.changes]
        assert sorted(changes) == [(b"a", None), (b"b", b"2"), (b"c", None)]
        assert [each.live for each in news] == [False] * (len(news) - 1) + [True]


@pytest.mark.parametrize("position", [b"nonsense", bytes(16), b"\xff" * 16, b"x" * 64])
def test_a_position_that_means_nothing_begins_anew(store: SessionStore, position: bytes) -> None:
    with store.watch(position) as watch:
        assert not watch.continued


@pytest.mark.parametrize(("namespace", "position"), [("Shop", b""), ("shop", bytes(65))])
def test_limits_are_errors_that_name_the_field(
    connected: Callable[..., SessionStore], namespace: str, position: bytes
) -> None:
    with pytest.raises(resumed.InvalidCall), connected(namespace).watch(position):
        pass


def test_a_quiet_stream_gives_signs_of_life(store: SessionStore) -> None:
    with store.watch() as watch:
        assert next(iter(watch)).live
        changes, position, live = next(iter(watch))
        assert not changes
        assert live
    with store.watch(position) as watch:
        assert watch.continued


def test_fifty_watchers_hold_up_no_call(store: SessionStore, elsewhere: Callable[[], SessionStore]) -> None:
    with ExitStack() as open_streams:
        watches = [open_streams.enter_context(elsewhere().watch()) for _ in range(50)]
        store.put(b"key", b"value", 100)
        assert store.get(b"key", deadline=5)
        for watch in watches:
            assert told(watch, (b"key", b"value"))[0] == {b"key": [b"value"]}


@pytest.mark.parametrize("front", ["grpcio", "native"])
def test_the_end_of_the_server_ends_the_stream(front: str) -> None:
    with running_server("--transport", front) as server:
        store = SessionStore(server.target, namespace="shop", deadline=PATIENCE)
        with store.watch() as watch:
            threading.Thread(target=server.stop).start()
            with pytest.raises(resumed.StoreUnavailable):
                told(watch, (b"never", b"stored"))


class TestWatchers:
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = open_engine("lmdb:", capacity=16 << 20)
        yield engine
        engine.close()

    def test_who_does_not_keep_up_is_cut_off_and_slows_nobody(self, engine: Engine) -> None:
        watchers = Watchers(engine)
        with watchers.subscribed("shop") as slow, watchers.subscribed("shop") as quick:
            news = quick.messages()
            for number in range(QUEUED_MESSAGES + 1):
                engine.put("shop", b"%d" % number, b"value", 100)
                while not next(news).changes:
                    pass
            with pytest.raises(WatcherTooSlow):
                for _ in slow.messages():
                    pass
            engine.put("shop", b"more", b"value", 100)
            assert next(news)
        watchers.close()

    def test_what_waits_for_a_watcher_is_bounded_in_bytes(self, engine: Engine) -> None:
        watchers = Watchers(engine)
        with watchers.subscribed("shop") as slow, watchers.subscribed("shop") as quick:
            news = quick.messages()
            for number in range(QUEUED_BYTES // (1 << 17)):  # a little more, with what is beside the values
                assert slow.ended_at is None
                engine.put("shop", b"%d" % number, bytes(1 << 17), 100)
                while not next(news).changes:
                    pass
            until(lambda: slow.ended_at is not None)
            assert slow.lag() == 0.0
            with pytest.raises(WatcherTooSlow):
                next(slow.messages())
        watchers.close()

    def test_what_waits_for_all_watchers_is_bounded_in_bytes(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("resumed_server.watch.hub.ALL_QUEUED_BYTES", 1 << 20)
        watchers = Watchers(engine)
        with ExitStack() as stack:
            alike = [stack.enter_context(watchers.subscribed("shop")) for _ in range(4)]
            engine.put("shop", b"key", bytes(400_000), 100)
            until(lambda: all(each.waiting for each in alike))
            other = stack.enter_context(watchers.subscribed("pay"))
            assert not any(each.ended_at for each in alike)
            for number in range(2):
                engine.put("pay", b"%d" % number, bytes(400_000), 100)
            until(lambda: other.ended_at is not None)
            assert not any(each.ended_at for each in alike)
            with pytest.raises(WatcherTooSlow):
                next(other.messages())
        watchers.close()

    def test_what_changes_without_a_value_takes_room_too(self) -> None:
        removals = [Change("shop", b"%d" % number, None) for number in range(READ_CHANGES)]
        assert Message(removals, b"", 0.0).size > 100 * READ_CHANGES

    def test_watchers_that_come_back_together_leave_the_engine_to_others(self, engine: Engine) -> None:
        start = engine.position()
        engine.put("shop", b"key", b"value", 100)
        counted = Crowded(engine)
        watchers = Watchers(counted)  # type: ignore[arg-type] # as much as is called

        def come_back(_: int) -> int:
            with watchers.subscribed("shop") as subscription:
                return sum(len(message.changes) for message in watchers.missed(start, subscription))

        with ThreadPoolExecutor(4 * MOST_CATCHING_UP) as pool:
            missed = pool.map(come_back, range(4 * MOST_CATCHING_UP))
            until(lambda: counted.inside == MOST_CATCHING_UP)
            counted.gate.set()
            assert list(missed) == [1] * 4 * MOST_CATCHING_UP
        assert counted.most == MOST_CATCHING_UP
        watchers.close()

    def test_a_watcher_whose_message_waits_for_too_long_is_cut_off(self, engine: Engine) -> None:
        now = 1.0
        watchers = Watchers(engine, clock=lambda: now)
        with watchers.subscribed("shop") as slow, watchers.subscribed("shop") as quick:
            engine.put("shop", b"key", b"value", 100)
            assert next(message for message in quick.messages() if message.changes)
            assert slow.ended_at is None
            now += LATE_SECONDS + 0.1
            until(lambda: slow.ended_at is not None)
            assert quick.ended_at is None
        watchers.close()

    def test_there_is_a_limit(self, engine: Engine) -> None:
        """RESOURCE_EXHAUSTED."""
        watchers = Watchers(engine)
        with ExitStack() as stack:
            for _ in range(MAX_WATCHERS):
                stack.enter_context(watchers.subscribed("shop"))
            with pytest.raises(TooManyWatchers), watchers.subscribed("shop"):
                pass
        with watchers.subscribed("shop"):
            pass
        watchers.close()
        with pytest.raises(Stopping), watchers.subscribed("shop"):
            pass

    def test_a_namespace_with_fewer_watchers_gets_a_place(self, engine: Engine) -> None:
        watchers = Watchers(engine)
        with ExitStack() as stack:
            many = [stack.enter_context(watchers.subscribed("shop")) for _ in range(MAX_WATCHERS)]
            few = [stack.enter_context(watchers.subscribed("pay")) for _ in range(MAX_WATCHERS // 2)]
            for namespace in ("pay", "shop"):
                with pytest.raises(TooManyWatchers), watchers.subscribed(namespace):
                    pass
            stack.enter_context(watchers.subscribed("eu"))
            assert [each for each in many + few if each.ended_at] == [*many[MAX_WATCHERS // 2 - 1 :]]
            with pytest.raises(TooManyWatchers):
                next(many[-1].messages())
        watchers.close()

    def test_a_budget_has_its_own_limit(self, engine: Engine) -> None:
        watchers = Watchers(engine)
        ours = [Budget("shop", Limit(namespaces=("shop",), watchers=2), Shared.fresh())]
        with watchers.subscribed("shop", ours), watchers.subscribed("shop", ours) as last:
            with pytest.raises(LimitExceeded, match="shop is at its limit of 2 watchers"):
                watchers.subscribed("shop", ours).__enter__()
            with watchers.subscribed("pay"):
                pass
            last.end(WatcherTooSlow("slow"))
            with watchers.subscribed("shop", ours):
                pass
        watchers.close()

    def test_who_was_ended_and_does_not_go_is_cut(self, engine: Engine) -> None:
        """A watcher that does not read blocks its own thread, so another thread must cancel its call."""
        now, cut = 1.0, threading.Event()
        watchers = Watchers(engine, clock=lambda: now)
        with watchers.subscribed("shop", cut=cut.set) as blocked, watchers.subscribed("shop") as other:
            blocked.end(WatcherTooSlow("slow"))
            assert not cut.wait(0.2)
            now += CUT_SECONDS + 0.1
            assert cut.wait(PATIENCE)
            engine.put("shop", b"key", b"value", 100)
            assert next(message for message in other.messages() if message.changes)
        watchers.close()

    def test_a_quiet_stream_ends_when_the_log_cannot_be_read(self, engine: Engine) -> None:
        now = 0.0
        watchers = Watchers(Unreadable(engine), clock=lambda: now)  # type: ignore[arg-type] # as much as is called
        with watchers.subscribed("shop") as subscription:
            news = subscription.messages()
            assert not next(news).changes
            now += CURRENT_SECONDS + 0.1
            with pytest.raises(EngineUnavailable):
                next(news)
        watchers.close()

    def test_who_catches_up_too_slowly_is_cut_off(self, engine: Engine) -> None:
        watchers, position = Watchers(engine), engine.position()
        engine.batch([Put("shop", b"%d" % number, b"value", 100) for number in range(READ_CHANGES + 1)])
        with watchers.subscribed("shop") as subscription:
            missed = watchers.missed(position, subscription)
            assert not next(missed).changes
            assert len(next(missed).changes) == READ_CHANGES
            for start in range(0, (16 << 20) // 2048, 256):
                engine.batch([Put("eu", b"%d" % number, b"value", 100) for number in range(start, start + 256)])
            with pytest.raises(WatcherTooSlow):
                next(missed)
        watchers.close()

    @pytest.mark.parametrize("queued", [True, False])
    def test_a_sign_of_life_stands_behind_all_that_was_told_before(self, engine: Engine, queued: bool) -> None:
        told = Progress(b"before", 0.0)
        subscription = Subscription("shop", lambda: told, lambda: 0.0)

        def overtaken() -> Progress:
            if queued:
                subscription.tell(Message((), b"message", 0.0))
            return told

        subscription._progress = overtaken
        assert next(subscription.messages()).position == (b"message" if queued else b"before")


class Crowded:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self.gate = threading.Event()
        self.inside = self.most = 0

    def position(self) -> bytes:
        return self._engine.position()

    def changes(self, after: bytes, until: bytes, limit: int) -> Any:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self.gate.wait(PATIENCE)
        with self._lock:
            self.inside -= 1
        return self._engine.changes(after, until, limit)


class Unreadable:
    """An engine that says where its log ends once."""

    def __init__(self, engine: Engine) -> None:
        self._positions = iter([engine.position()])

    def position(self) -> bytes:
        for position in self._positions:
            return position
        raise EngineUnavailable("away")
