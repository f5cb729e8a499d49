from __future__ import annotations

import queue
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

import resumed
from resumed._client.store import Change, StoredSession, WatchBatch
from resumed._policy.mirror import STALE_SECONDS, Mirror, SessionCache
from support.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self


def session(value: bytes = b"value", ttl: float = 100.0) -> StoredSession:
    """Return a session as Watch reports it."""
    return StoredSession(value, ttl)


def test_a_session_is_there_until_it_expires() -> None:
    clock = Clock()
    sessions = SessionCache(1 << 20, clock)
    sessions.put(b"key", session(ttl=10))
    clock.now += 9.9
    assert sessions.get(b"key") == b"value"
    clock.now += 0.1
    assert sessions.get(b"key") is None


def test_a_removed_session_is_gone() -> None:
    sessions = SessionCache(1 << 20)
    sessions.put(b"key", session())
    sessions.remove(b"key")
    assert sessions.get(b"key") is None
    sessions.remove(b"never there")


def test_the_oldest_go_first_when_there_is_no_room() -> None:
    sessions = SessionCache(10_000)
    for number in range(100):
        sessions.put(b"%d" % number, session(bytes(1_000)))
    kept = [number for number in range(100) if sessions.get(b"%d" % number)]
    assert kept == list(range(100 - len(kept), 100))
    assert 6 <= len(kept) <= 9


def test_expired_sessions_make_room_by_themselves() -> None:
    clock = Clock()
    sessions = SessionCache(1 << 20, clock)
    for number in range(100):
        sessions.put(b"%d" % number, session(ttl=10))
    clock.now += 11
    sessions.put(b"new", session())
    assert len(sessions) == 1
    assert len(sessions._order) == 1


def test_removed_sessions_take_no_memory() -> None:
    sessions = SessionCache(1 << 20)
    sessions.put(b"old", session())
    for number in range(10_000):
        sessions.put(b"%d" % number, session())
        if number % 100:
            sessions.remove(b"%d" % number)
    assert len(sessions) == 101
    assert len(sessions._order) < 2_000
    sessions._limit = 0
    sessions.put(b"new", session())
    assert not len(sessions)


def test_storing_again_counts_once() -> None:
    sessions = SessionCache(1 << 20)
    for _ in range(10):
        sessions.put(b"key", session(bytes(1_000)))
    sessions.remove(b"key")
    assert sessions._bytes == 0


def test_a_session_removed_during_its_look_up_is_not_kept() -> None:
    """The lookup may have read the session before its removal."""
    sessions = SessionCache(1 << 20)
    since = sessions.removals
    sessions.remove(b"other")
    sessions.put(b"key", session(), since)
    assert sessions.get(b"key")
    since = sessions.removals
    sessions.remove(b"key")
    sessions.put(b"key", session(), since)
    assert sessions.get(b"key") is None


def test_a_look_up_without_a_live_stream_is_not_kept() -> None:
    """The mirror no longer remembers the removals since the lookup began."""
    sessions = SessionCache(1 << 20)
    since = sessions.removals
    for number in range(1_025):
        sessions.remove(b"%d" % number)
    sessions.put(b"key", session(), since)
    assert sessions.get(b"key") is None
    since = sessions.removals
    sessions.clear()
    sessions.put(b"key", session(), since)
    assert sessions.get(b"key") is None


def test_a_delayed_stream_does_not_restore_a_locally_removed_session() -> None:
    """The stream can deliver the Put after the frontend has removed the session."""
    sessions = SessionCache(1 << 20)
    sessions.remove(b"removed")
    sessions.clear()
    for key in (b"removed", b"another"):
        sessions.put(key, session())
    assert (sessions.get(b"removed"), sessions.get(b"another")) == (None, b"value")


def test_a_purge_ends_sessions_with_an_earlier_or_unknown_issue_time() -> None:
    """A lookup that began before the purge must not restore a purged session."""
    sessions = SessionCache(1 << 20)
    since = sessions.removals
    sessions.apply(
        [Change(b"before", session(), 999.9), Change(b"then", session(), 1_000.0), Change(b"told", session())]
    )
    sessions.put(b"found", session(), since)
    sessions.apply([Change(b"", None, 1_000.0)])
    assert [key for key in (b"before", b"then", b"told", b"found") if sessions.get(key)] == [b"then"]
    sessions.put(b"late", session(), since)
    assert sessions.get(b"late") is None
    sessions.apply([Change(b"", None, 1.0)])
    assert sessions.get(b"then") == b"value"
    sessions.apply([Change(b"")])
    assert not len(sessions)
    assert sessions._bytes == 0


def test_a_change_shows_neither_a_key_nor_a_value() -> None:
    """A repr may end in a log."""
    changes = [Change(b"secret", session(b"secret"), 1.0), Change(b"secret"), Change(b"", None, 2.0)]
    assert str(changes) == "[Change(stored, time=1.0), Change(removed, time=None), Change(purged, time=2.0)]"


@pytest.mark.parametrize("issued", [-(2.0**62), 2.0**62])
def test_a_session_may_be_said_to_be_issued_whenever(issued: float) -> None:
    """The issue time comes from an untrusted server."""
    sessions = SessionCache(1 << 20)
    sessions.apply([Change(b"key", session(), issued)])
    assert sessions.get(b"key") == b"value"


def test_memory_over_the_value_is_at_most_200_bytes() -> None:
    """The key, one object, and its entries in the dictionary and the order."""
    sessions = SessionCache(1 << 40)
    number = 100_000
    for each in range(number):
        sessions.put(each.to_bytes(32, "big"), session(bytes(240)))
    tables = sys.getsizeof(sessions._values) + sys.getsizeof(sessions._order)
    entries = sum(sys.getsizeof(key) + sys.getsizeof(entry) for key, entry in sessions._values.items())
    assert (tables + entries) / number - 240 <= 200


class Stream:
    """A Watch stream and its server, both controlled by the test."""

    target = "a test"
    resumed_from_position = False
    confirmed = float("inf")
    """Time up to which the stream is complete."""

    def __init__(self) -> None:
        self._news: queue.Queue[WatchBatch | None] = queue.Queue()
        self._taken: queue.Queue[None] = queue.Queue()
        self.cancelled = 0

    def watch(self, _position: bytes) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, *changes: tuple[bytes, StoredSession | None], live: bool = True) -> None:
        """Deliver a message and wait until the mirror has processed it."""
        self._news.put(WatchBatch([Change(*each) for each in changes], b"position", live))
        self._taken.get(timeout=20)

    def __iter__(self) -> Iterator[WatchBatch]:
        while (news := self._news.get()) is not None:
            yield news
            self._taken.put(None)
        raise resumed.StoreUnavailable("over")

    def cancel(self) -> None:
        self.cancelled += 1
        self._news.put(None)
        self._taken.put(None)


@pytest.fixture
def stream() -> Iterator[Stream]:
    stream = Stream()
    yield stream
    stream.cancel()


def test_it_answers_for_the_stated_time_after_the_last_word(stream: Stream) -> None:
    """Only a heartbeat that reports the stream as live extends the time."""
    clock = Clock()
    stream.confirmed = clock.now
    mirror = Mirror(stream, clock=clock)  # type: ignore[arg-type]  # as much of a store as is called
    mirror.follow()
    stream.tell((b"key", session()))
    clock.now += STALE_SECONDS - 0.001
    assert mirror.get(b"key") == b"value"
    stream.confirmed = clock.now
    stream.tell((b"other", session()), live=False)
    clock.now += 0.001
    assert not mirror.live
    stream.tell()
    assert mirror.get(b"key") == b"value"
    clock.now += STALE_SECONDS
    assert mirror.get(b"key") is None
    mirror.close()


def test_the_second_look_up_of_a_process_begins_the_stream(stream: Stream) -> None:
    """A server that forks a process for each connection opens no stream."""
    mirror = Mirror(stream)  # type: ignore[arg-type]  # as much of a store as is called
    for _ in range(3):
        mirror.after_fork_in_child()
        mirror.get(b"key")
        assert mirror._thread is None
    mirror.get(b"key")
    stream.tell((b"key", session()))
    assert mirror.get(b"key") == b"value"
    mirror.close()


def test_who_delays_the_stream_does_not_keep_it_alive(stream: Stream) -> None:
    """A heartbeat counts from the time of the ping that it answers."""
    clock = Clock()
    stream.confirmed = clock.now
    mirror = Mirror(stream, clock=clock)  # type: ignore[arg-type]
    mirror.follow()
    stream.tell((b"key", session()))
    assert mirror.get(b"key") == b"value"
    for _ in range(4):
        clock.now += 1.0
        stream.confirmed += 0.1
        stream.tell()
    assert mirror.get(b"key") is None
    mirror.close()


class Ending:
    """A store whose streams serve for a while and end: (seconds, error) each, the last one never."""

    target = "a test"
    resumed_from_position = True
    confirmed = float("inf")

    def __init__(self, clock: Clock, *ends: tuple[float, resumed.StoreError]) -> None:
        self._clock, self._ends = clock, iter(ends)
        self._seconds, self._error = 0.0, cast("resumed.StoreError | None", None)
        self.streams = 0
        self.over = threading.Event()

    def watch(self, _position: bytes) -> Self:
        self.streams += 1
        return self

    def __enter__(self) -> Self:
        self._seconds, self._error = next(self._ends, (0.0, None))
        if self._error is None:
            self.over.set()
        elif self._seconds == 0:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[WatchBatch]:
        if self._error is not None:
            self._clock.now += self._seconds
            raise self._error
        yield WatchBatch([], b"position", True)
        self.closed.wait(20)
        raise resumed.StoreUnavailable("over")

    closed: threading.Event

    def cancel(self) -> None:
        """End."""


GOING = resumed.StoreUnavailable("the store asked for another connection")


@pytest.mark.parametrize(
    ("ends", "pauses", "warnings"),
    [
        ([(600.0, GOING)] * 3, [0.0] * 3, 0),
        ([(0.25, GOING)] * 3, [0.75] * 3, 0),
        ([(600.0, GOING), (0.0, GOING), (0.0, GOING), (600.0, GOING)], [0.0, 1.0, 1.0, 0.0], 1),
        ([(600.0, resumed.StoreTimeout("silent"))], [1.0], 1),
        ([(600.0, resumed.LimitExceeded("too slow"))], [1.0], 1),
    ],
    ids=["aged", "short", "away", "silent", "cut-off"],
)
def test_a_stream_that_served_is_begun_anew_at_once(
    ends: list[tuple[float, resumed.StoreError]],
    pauses: list[float],
    warnings: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    store = Ending(clock, *ends)
    mirror = Mirror(store, clock=clock)  # type: ignore[arg-type]  # as much of a store as is called
    closed, paused = mirror._closed, []

    def wait(seconds: float) -> bool:
        paused.append(seconds)
        return False

    store.closed = threading.Event()
    mirror._closed = SimpleNamespace(wait=wait, is_set=closed.is_set, set=closed.set)  # type: ignore[assignment]
    mirror.follow()
    assert store.over.wait(20)
    assert paused == pytest.approx(pauses)
    assert len(caplog.records) == warnings
    mirror.close()
    store.closed.set()


def test_a_look_up_leaves_a_stream_alone_that_catches_up(stream: Stream) -> None:
    clock = Clock()
    mirror = Mirror(stream, clock=clock)  # type: ignore[arg-type]  # as much of a store as is called
    mirror.follow()
    stream.tell((b"key", session()))
    clock.now += STALE_SECONDS
    stream.tell((b"other", session()), live=False)
    assert mirror.get(b"key") is None
    assert stream.cancelled == 0
    stream.tell()
    assert mirror.get(b"key") == b"value"
    clock.now += STALE_SECONDS
    assert mirror.get(b"key") is None
    assert stream.cancelled == 1
    mirror.close()


def test_an_odd_failure_of_the_stream_does_not_end_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, raised = Stream(), iter([ValueError("odd")])
    monkeypatch.setattr("resumed._policy.mirror.RETRY_SECONDS", 0.0)

    def watch(_position: bytes) -> Stream:
        for error in raised:
            raise error
        return stream

    monkeypatch.setattr(stream, "watch", watch)
    mirror = Mirror(cast("resumed.StoreClient", stream))
    with monkeypatch.context() as patch:

        def no_thread(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", no_thread)
        mirror.follow()
    mirror.follow()
    stream.tell((b"key", session()))
    assert mirror.get(b"key") == b"value"
    mirror.close()


def test_a_mirror_that_is_closed_while_its_stream_begins_follows_nothing() -> None:
    """Otherwise its thread, connection and memory would leak."""
    stream, begins, closed = Stream(), threading.Event(), threading.Event()

    class Beginning:
        target = "a test"

        def watch(self, _position: bytes) -> Stream:
            begins.set()
            assert closed.wait(20)
            return stream

    mirror = Mirror(cast("resumed.StoreClient", Beginning()))
    mirror.follow()
    assert begins.wait(20)
    mirror.close()
    closed.set()
    assert mirror._thread
    mirror._thread.join(20)
    assert not mirror._thread.is_alive()
