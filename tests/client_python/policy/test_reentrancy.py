"""OpenSSL's remove callback can run inside any method of the client, when the garbage collector frees a connection."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import resumed
from resumed._client.store import StoreClient, StoredSession
from resumed._policy.mirror import SessionCache
from resumed._policy.stats import Recorder
from resumed._policy.write_queue import PendingWrite, WriteQueue
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

PATIENCE = 20.0
ROUNDS = 300


@contextlib.contextmanager
def at_each_collection(callback: Callable[[], object], threshold: int = 1) -> Iterator[None]:
    """Call back at each garbage collection, in any thread, and collect at nearly every allocation."""
    begun, ended = list[None](), list[None]()

    def called(phase: str, _info: object) -> None:
        if phase == "start":
            begun.append(None)
            callback()
            ended.append(None)

    thresholds = gc.get_threshold()
    gc.freeze()  # or each collection would look at all that the test process has
    gc.callbacks.append(called)
    gc.set_threshold(threshold)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(called)
        gc.unfreeze()
    until(lambda: len(ended) == len(begun))  # another thread may be within the callback


def in_time(step: Callable[[], object]) -> None:
    """Repeat a step in a thread and fail if it hangs."""
    done = threading.Event()

    def steps() -> None:
        for _ in range(ROUNDS):
            step()
        done.set()

    threading.Thread(target=steps, daemon=True).start()
    assert done.wait(PATIENCE), "it hangs"


class Kept:
    """An object that the collector tracks, so that making some of them makes it run."""

    def __init__(self) -> None:
        self.itself = self


def test_counting_within_a_snapshot_does_not_deadlock() -> None:
    recorder, called = Recorder(), itertools.count()

    def count() -> None:
        next(called)
        recorder.count("removals", "kept")

    def step() -> None:
        Kept()
        recorder.snapshot()
        recorder.observe_lookup(0.001)

    with at_each_collection(count):
        in_time(step)
    assert next(called) == recorder.snapshot().removals["kept"] > ROUNDS
    assert sum(recorder.snapshot().lookup_seconds) == ROUNDS


def test_a_removal_within_a_change_of_the_mirror_is_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = SessionCache._make_room

    def collect_and_make_room(sessions: SessionCache) -> None:
        gc.collect(0)
        make_room(sessions)

    monkeypatch.setattr(SessionCache, "_make_room", collect_and_make_room)
    sessions, numbers = SessionCache(1 << 16), itertools.count()
    put: list[bytes] = [bytes(32)]

    def step() -> None:
        put[0] = next(numbers).to_bytes(32, "big")
        sessions.put(put[0], StoredSession(bytes(10), 100.0))

    with at_each_collection(lambda: sessions.remove(put[0]), threshold=1 << 30):
        in_time(step)
    assert len(sessions._recent) == ROUNDS
    for key in list(sessions._recent):
        assert sessions.get(key) is None
    assert sessions._bytes == sum(195 + len(each) for each in sessions._values.values())


def test_a_removal_within_the_sender_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = StoreClient("fake:1", namespace="shop", deadline=5.0)
    sent: list[Any] = []

    def batch(operations: list[Any], *, deadline: float) -> list[Any]:
        assert deadline
        sent.extend(operations)
        return [None] * len(operations)

    monkeypatch.setattr(store, "batch", batch)
    recorder = Recorder()
    sender = WriteQueue(store, recorder, time.time, lambda _key, value, _not_after: value)
    submitted = itertools.count()

    def remove() -> None:
        next(submitted)
        sender.submit(PendingWrite(b"removed", None, 0, "fatal-error"))

    with at_each_collection(remove):
        in_time(lambda: (Kept(), sender.submit(PendingWrite(b"put", b"value", 1 << 40, "", 1.0))))
    assert sender.flush(PATIENCE)
    total = next(submitted)
    assert recorder.snapshot().removals["fatal-error"] + recorder.snapshot().removals["dropped"] == total
    assert isinstance(sent[0], resumed.Put | resumed.Remove)
    sender.close(0)
