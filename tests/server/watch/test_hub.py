"""WatchHub on an engine in this process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from resumed_server.errors import Stopping
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitExceeded, LimitState, SharedCounters
from resumed_server.storage.engine import Change, EngineUnavailable, Put, Remove
from resumed_server.storage.registry import open_engine
from resumed_server.watch.hub import (
    CANCEL_SECONDS,
    MAX_REPLAYS,
    MAX_WATCHERS,
    READ_CHANGES,
    STALL_SECONDS,
    TooManyWatchers,
    WatchHub,
)
from resumed_server.watch.subscription import (
    MAX_LOG_AGE_SECONDS,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_MESSAGES,
    LogPosition,
    Message,
    Subscription,
    Topic,
    WatcherTooSlow,
)
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumed_server.storage.engine import Engine

PATIENCE = 10.0
REMOVALS = Topic("shop", removals_only=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An LMDB engine."""
    engine = open_engine("lmdb:", capacity=16 << 20)
    yield engine
    engine.close()


def test_a_watcher_that_does_not_read_is_ended_and_delays_no_other(engine: Engine) -> None:
    """Its queue is bounded."""
    hub = WatchHub(engine)
    with hub.subscribe(Topic("shop")) as slow, hub.subscribe(Topic("shop")) as quick:
        news = quick.messages()
        for number in range(MAX_QUEUED_MESSAGES + 1):
            engine.put("shop", b"%d" % number, b"value", 100)
            while not next(news).changes:
                pass
        with pytest.raises(WatcherTooSlow):
            for _ in slow.messages():
                pass
        engine.put("shop", b"more", b"value", 100)
        assert next(news)
    hub.close()


def test_the_queue_of_a_watcher_is_bounded_in_bytes(engine: Engine) -> None:
    """Beyond the bound it is ended, and its messages are dropped."""
    hub = WatchHub(engine)
    with hub.subscribe(Topic("shop")) as slow, hub.subscribe(Topic("shop")) as quick:
        news = quick.messages()
        for number in range(MAX_QUEUED_BYTES // (1 << 17)):  # slightly more than the bound, including CHANGE_BYTES
            assert slow.ended_at is None
            engine.put("shop", b"%d" % number, bytes(1 << 17), 100)
            while not next(news).changes:
                pass
        until(lambda: slow.ended_at is not None)
        assert slow.lag() == 0.0
        with pytest.raises(WatcherTooSlow):
            next(slow.messages())
    hub.close()


def test_the_queues_of_all_watchers_are_bounded_in_bytes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound, the watcher with the fullest queue is ended. A message in several queues counts once."""
    monkeypatch.setattr("resumed_server.watch.hub.MAX_TOTAL_BYTES", 1 << 20)
    hub = WatchHub(engine)
    with ExitStack() as stack:
        alike = [stack.enter_context(hub.subscribe(Topic("shop"))) for _ in range(4)]
        engine.put("shop", b"key", bytes(400_000), 100)
        until(lambda: all(each.unread_messages for each in alike))
        other = stack.enter_context(hub.subscribe(Topic("pay")))
        assert not any(each.ended_at for each in alike)
        for number in range(2):
            engine.put("pay", b"%d" % number, bytes(400_000), 100)
        until(lambda: other.ended_at is not None)
        assert not any(each.ended_at for each in alike)
        with pytest.raises(WatcherTooSlow):
            next(other.messages())
    hub.close()


def test_changes_without_a_value_have_a_size() -> None:
    """So many unread removals fill a queue as well."""
    removals = [Change("shop", b"%d" % number, None) for number in range(READ_CHANGES)]
    assert Message(removals, b"", 0.0).size > 100 * READ_CHANGES


def test_watchers_that_reconnect_together_leave_the_engine_to_others(engine: Engine) -> None:
    """Some read the changes that they missed, the others wait for their turn."""
    start = engine.position()
    engine.put("shop", b"key", b"value", 100)
    counted = Crowded(engine)
    hub = WatchHub(counted)  # type: ignore[arg-type] # as much as is called

    def come_back(_: int) -> int:
        with hub.subscribe(Topic("shop")) as subscription:
            return sum(len(message.changes) for message in hub.replay(start, subscription))

    with ThreadPoolExecutor(4 * MAX_REPLAYS) as pool:
        missed = pool.map(come_back, range(4 * MAX_REPLAYS))
        until(lambda: counted.inside == MAX_REPLAYS)
        counted.gate.set()
        assert list(missed) == [1] * 4 * MAX_REPLAYS
    assert counted.most == MAX_REPLAYS
    hub.close()


def test_watchers_of_removals_that_begin_together_leave_the_engine_to_others(engine: Engine) -> None:
    """For the last purge, and for every part of the removals."""
    engine.batch([Remove("shop", b"%d" % number, 600.0) for number in range(READ_CHANGES + 1)])
    counted = Crowded(engine)
    hub = WatchHub(counted)  # type: ignore[arg-type] # as much as is called

    def begin(_: int) -> int:
        with hub.subscribe(REMOVALS) as subscription:
            return sum(len(message.changes) for message in hub.snapshot(subscription))

    with ThreadPoolExecutor(4 * MAX_REPLAYS) as pool:
        found = pool.map(begin, range(4 * MAX_REPLAYS))
        until(lambda: counted.inside == MAX_REPLAYS)
        counted.gate.set()
        assert list(found) == [READ_CHANGES + 1] * 4 * MAX_REPLAYS
    assert counted.most == MAX_REPLAYS
    hub.close()


def test_a_watcher_with_a_message_that_is_too_old_is_ended(engine: Engine) -> None:
    """Even without further messages."""
    now = 1.0
    hub = WatchHub(engine, clock=lambda: now)
    with hub.subscribe(Topic("shop")) as slow, hub.subscribe(Topic("shop")) as quick:
        engine.put("shop", b"key", b"value", 100)
        assert next(message for message in quick.messages() if message.changes)
        assert slow.ended_at is None
        now += STALL_SECONDS + 0.1
        until(lambda: slow.ended_at is not None)
        assert quick.ended_at is None
    hub.close()


def test_a_watcher_beyond_the_maximum_is_rejected(engine: Engine) -> None:
    hub = WatchHub(engine)
    with ExitStack() as stack:
        for _ in range(MAX_WATCHERS):
            stack.enter_context(hub.subscribe(Topic("shop")))
        with pytest.raises(TooManyWatchers), hub.subscribe(Topic("shop")):
            pass
    with hub.subscribe(Topic("shop")):
        pass
    hub.close()
    with pytest.raises(Stopping), hub.subscribe(Topic("shop")):
        pass


def test_a_namespace_with_fewer_watchers_gets_a_place(engine: Engine) -> None:
    """A namespace with all of the watchers loses its youngest ones, until both have the same number."""
    hub = WatchHub(engine)
    with ExitStack() as stack:
        many = [stack.enter_context(hub.subscribe(Topic("shop"))) for _ in range(MAX_WATCHERS)]
        few = [stack.enter_context(hub.subscribe(Topic("pay"))) for _ in range(MAX_WATCHERS // 2)]
        for namespace in ("pay", "shop"):
            with pytest.raises(TooManyWatchers), hub.subscribe(Topic(namespace)):
                pass
        stack.enter_context(hub.subscribe(Topic("eu")))
        assert [each for each in many + few if each.ended_at] == [*many[MAX_WATCHERS // 2 - 1 :]]
        with pytest.raises(TooManyWatchers):
            next(many[-1].messages())
    hub.close()


def test_a_limit_bounds_its_own_watchers_only(engine: Engine) -> None:
    hub = WatchHub(engine)
    ours = [LimitState("shop", Limit(namespaces=("shop",), watchers=2), SharedCounters.create())]
    with hub.subscribe(Topic("shop"), ours), hub.subscribe(Topic("shop"), ours) as last:
        with pytest.raises(LimitExceeded, match="shop is at its limit of 2 watchers"):
            hub.subscribe(Topic("shop"), ours).__enter__()
        with hub.subscribe(Topic("pay")):
            pass
        last.end(WatcherTooSlow("slow"))
        with hub.subscribe(Topic("shop"), ours):
            pass
    hub.close()


def test_the_call_of_an_ended_watcher_is_cancelled(engine: Engine) -> None:
    """A client that does not read blocks the thread of its watcher, so another thread cancels the call."""
    now, cancelled = 1.0, threading.Event()
    hub = WatchHub(engine, clock=lambda: now)
    with hub.subscribe(Topic("shop"), cancel_call=cancelled.set) as blocked, hub.subscribe(Topic("shop")) as other:
        blocked.end(WatcherTooSlow("slow"))
        assert not cancelled.wait(0.2)
        now += CANCEL_SECONDS + 0.1
        assert cancelled.wait(PATIENCE)
        engine.put("shop", b"key", b"value", 100)
        assert next(message for message in other.messages() if message.changes)
    hub.close()


def test_a_quiet_stream_ends_if_the_log_cannot_be_read(engine: Engine) -> None:
    """It must not report that nothing happened."""
    now = 0.0
    hub = WatchHub(Unreadable(engine), clock=lambda: now)  # type: ignore[arg-type] # as much as is called
    with hub.subscribe(Topic("shop")) as subscription:
        news = subscription.messages()
        assert not next(news).changes
        now += MAX_LOG_AGE_SECONDS + 0.1
        with pytest.raises(EngineUnavailable):
            next(news)
    hub.close()


def test_a_watcher_that_replays_too_slowly_is_ended(engine: Engine) -> None:
    """It must not take the changes so far for all."""
    hub, position = WatchHub(engine), engine.position()
    engine.batch([Put("shop", b"%d" % number, b"value", 100) for number in range(READ_CHANGES + 1)])
    with hub.subscribe(Topic("shop")) as subscription:
        missed = hub.replay(position, subscription)
        assert not next(missed).changes
        assert len(next(missed).changes) == READ_CHANGES
        for start in range(0, (16 << 20) // 2048, 256):
            engine.batch([Put("eu", b"%d" % number, b"value", 100) for number in range(start, start + 256)])
        with pytest.raises(WatcherTooSlow):
            next(missed)
    hub.close()


def test_watchers_of_removals_share_messages_without_other_changes(engine: Engine) -> None:
    """Sessions that are stored do not fill their queues."""
    hub = WatchHub(engine)
    with hub.subscribe(REMOVALS) as one, hub.subscribe(REMOVALS) as other, hub.subscribe(Topic("shop")) as everything:
        news = everything.messages()
        for number in range(MAX_QUEUED_MESSAGES + 1):
            engine.put("shop", b"%d" % number, b"value", 100)
            while not next(news).changes:
                pass
        engine.remove("shop", b"plain")
        engine.remove("shop", b"lasting", ttl=100.0)
        engine.purge("shop", None)
        until(lambda: sum(len(message.changes) for message in other.unread_messages) == 2)
        assert one.unread_messages == other.unread_messages
        assert not {id(message) for message in one.unread_messages} & {
            id(message) for message in everything.unread_messages
        }
    hub.close()


def test_while_a_watcher_reads_a_snapshot_the_log_keeps_the_changes(engine: Engine) -> None:
    """Its queue begins after the snapshot, so it does not overflow, and repeats nothing."""
    hub = WatchHub(engine)
    engine.batch([Remove("shop", b"%d" % number, 600.0) for number in range(READ_CHANGES + 1)])
    with hub.subscribe(REMOVALS) as slow, hub.subscribe(REMOVALS) as quick:
        engine.remove("shop", b"early", ttl=600.0)
        until(lambda: bool(slow.unread_messages))
        snapshot, news = hub.snapshot(slow), quick.messages()
        assert len(next(snapshot).changes) == READ_CHANGES
        new = {b"\0%d" % number for number in range(MAX_QUEUED_MESSAGES + 1)}  # before the place that was read last
        assert next(news).changes
        for key in new:
            engine.remove("shop", key, ttl=600.0)
            while not next(news).changes:
                pass
        assert {change.key for message in snapshot for change in message.changes if isinstance(change, Change)} >= new
        assert slow.ended_at is None
        engine.remove("shop", b"last", ttl=600.0)
        (last,) = next(message for message in slow.messages() if message.changes).changes
        assert isinstance(last, Change)
        assert last.key == b"last"
    hub.close()


def test_a_watcher_that_does_not_read_its_snapshot_is_ended(engine: Engine) -> None:
    """It blocks a thread. The queue, which is paused, has no old message."""
    now, cancelled = 1.0, threading.Event()
    hub = WatchHub(engine, clock=lambda: now)
    engine.batch([Remove("shop", b"%d" % number, 600.0) for number in range(3 * READ_CHANGES)])
    with hub.subscribe(REMOVALS, cancel_call=cancelled.set) as stalled:
        snapshot = hub.snapshot(stalled)
        for _ in range(2):
            now += STALL_SECONDS - 0.1
            assert next(snapshot).changes
            assert stalled.ended_at is None
        now += STALL_SECONDS + 0.1
        until(lambda: stalled.ended_at is not None)
        with pytest.raises(WatcherTooSlow):
            next(snapshot)
        now += CANCEL_SECONDS + 0.1
        assert cancelled.wait(PATIENCE)
    hub.close()


def test_a_watcher_whose_snapshot_outlasts_the_log_is_ended(engine: Engine) -> None:
    """It must not take the removals so far for all."""
    hub = WatchHub(engine)
    engine.batch([Remove("shop", b"%d" % number, 600.0) for number in range(READ_CHANGES + 1)])
    with hub.subscribe(REMOVALS) as slow:
        snapshot = hub.snapshot(slow)
        assert next(snapshot).changes
        for start in range(0, (16 << 20) // 2048 + 1, 256):
            engine.batch([Put("eu", b"%d" % number, b"value", 100) for number in range(start, start + 256)])
        with pytest.raises(WatcherTooSlow):
            list(snapshot)
    hub.close()


@pytest.mark.parametrize("queued", [True, False])
def test_a_heartbeat_follows_all_earlier_messages(engine: Engine, queued: bool) -> None:
    """Its position is never ahead of a message in the queue."""
    told = LogPosition(b"before", 0.0)
    subscription = Subscription(Topic("shop"), lambda: told, lambda: 0.0)

    def overtaken() -> LogPosition:
        if queued:
            subscription.enqueue(Message((), b"message", 0.0))
        return told

    subscription._progress = overtaken
    assert next(subscription.messages()).position == (b"message" if queued else b"before")


class Crowded:
    """An engine that counts the readers of its log and its removals, and blocks them until its gate is open."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self.gate = threading.Event()
        self.inside = self.most = 0

    def position(self) -> bytes:
        """See Engine."""
        return self._engine.position()

    def changes(self, after: bytes, until: bytes, limit: int, **options: bool) -> Any:
        """See Engine."""
        self._wait()
        return self._engine.changes(after, until, limit, **options)

    def last_purge(self, namespace: str) -> Any:
        """See Engine."""
        self._wait()
        return self._engine.last_purge(namespace)

    def removals(self, namespace: str, limit: int) -> Any:
        """See Engine."""
        for part in self._engine.removals(namespace, limit):
            self._wait()
            yield part

    def _wait(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self.gate.wait(PATIENCE)
        with self._lock:
            self.inside -= 1


class Unreadable:
    """An engine that returns the end of its log once."""

    def __init__(self, engine: Engine) -> None:
        self._positions = iter([engine.position()])

    def position(self) -> bytes:
        """See Engine."""
        for position in self._positions:
            return position
        raise EngineUnavailable("away")
