from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import resumed
from resumed._client.limits import BATCH_OPERATIONS
from resumed._client.store import Put, Remove, StoredSession
from resumed._crypto.keyring import Keyring
from resumed._policy import write_queue
from resumed._policy.session_policy import SessionPolicy
from resumed._policy.stats import Recorder
from resumed._policy.write_queue import BUSY_OPERATIONS, QUEUE_BYTES, PendingWrite, WriteQueue
from support.clock import Clock
from support.session_policy import (
    ENVELOPE,
    NONCES,
    PATIENCE,
    START,
    FakeStore,
    shim_on,
)
from support.waiting import until

if TYPE_CHECKING:
    import pytest


def fail_to_start(_thread: threading.Thread) -> None:
    """Replace Thread.start() on a machine that cannot start threads."""
    raise RuntimeError("can't start new thread")


def seal_with_new_nonce(key: bytes, value: bytes, not_after: int) -> bytes:
    """Replace Keyring.seal(): each call uses another nonce."""
    return b"%d sealed %s" % (next(NONCES), value)


class TestSending:
    def sender(self, store: FakeStore) -> tuple[WriteQueue, Recorder, Clock]:
        """Return a sender, its recorder and its clock."""
        recorder, clock = Recorder(), Clock(START)
        return WriteQueue(store, recorder, clock, seal_with_new_nonce), recorder, clock

    def test_the_tickets_of_one_handshake_are_one_batch(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, puts="wait")
        for last in (False, True):
            shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=last)
        assert [len(batch) for batch in store.batches] == [2]

    def test_the_first_ticket_of_a_handshake_is_sent_with_the_last_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(write_queue, "BUSY_PAUSE", 10 * PATIENCE)
        store = FakeStore()
        shim, _ = shim_on(store)
        for last in (False, True):
            shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=last)
        until(lambda: store.sizes == [2])

    def test_the_first_ticket_of_a_handshake_that_issues_no_other_is_sent_too(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=False)
        until(lambda: store.sizes == [1])

    def test_a_write_is_sent_at_once_and_those_behind_it_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(write_queue, "BUSY_PAUSE", PATIENCE)
        store = FakeStore()
        sender, _, clock = self.sender(store)
        store.gate.clear()
        for number in range(BUSY_OPERATIONS):
            sender.submit(PendingWrite(b"%d" % number, b"value", int(clock.now) + 100, ""))
            until(lambda: store.sizes == [1])
        store.gate.set()
        until(lambda: store.sizes == [1, BUSY_OPERATIONS - 1])
        until(lambda: sender._idle)

    def test_under_load_writes_gather_for_a_pause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(write_queue, "BUSY_PAUSE", 10 * PATIENCE)
        store = FakeStore()
        sender, _, clock = self.sender(store)

        def submit(number: int) -> int:
            return sender.submit(PendingWrite(b"%d" % number, b"value", int(clock.now) + 100, ""))

        store.gate.clear()
        submit(0)
        until(lambda: store.sizes == [1])
        for number in range(BUSY_OPERATIONS):
            submit(1 + number)
        store.gate.set()
        until(lambda: len(store.kept) == 1 + BUSY_OPERATIONS)
        assert not sender.wait(submit(9), 0.1)
        for number in range(BATCH_OPERATIONS - 1):
            submit(10 + number)
        until(lambda: store.sizes == [1, BUSY_OPERATIONS, BATCH_OPERATIONS])

    def test_waiting_ends_when_the_sessions_are_stored(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, puts="wait")
        shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=True)
        assert len(store.kept) == 1

    def test_plaintext_keyrings_wait_by_default(self) -> None:
        """Only a sealed id carries the time that marks it as fresh."""
        store = FakeStore()
        shim = SessionPolicy(store, Keyring.plaintext())
        shim.on_new_session(os.urandom(32), ENVELOPE, 100, last=True)
        assert len(store.kept) == 1

    def test_waiting_does_not_extend_a_lifetime(self) -> None:
        """The ttl is computed when the Put is sent."""
        store = FakeStore()
        sender, recorder, clock = self.sender(store)
        store.failure = resumed.StoreUnavailable("down")
        sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, "", 7.5), more=True)
        sender.submit(PendingWrite(b"b", b"value", int(clock.now) + 10, ""))
        clock.now += 60
        store.failure = None
        assert sender.flush(PATIENCE)
        [[put]] = store.batches
        assert isinstance(put, Put)
        assert (put.key, put.ttl, put.issued) == (b"a", 40.0, 7.5)
        assert recorder.snapshot().puts == {"stored": 1, "expired": 1}

    def test_a_thread_that_cannot_start_now_starts_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = FakeStore()
        sender, recorder, clock = self.sender(store)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail_to_start)
            sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, ""))
        sender.submit(PendingWrite(b"b", b"value", int(clock.now) + 100, ""))
        assert sender.flush(PATIENCE)
        assert recorder.snapshot().puts == {"stored": 2}

    def test_a_repeated_write_is_sealed_once(self) -> None:
        """The server may have stored the first attempt, and rejects a second value for the same key."""
        store = FakeStore(deadline=0.01)
        sender, recorder, clock = self.sender(store)
        store.loses_answers = 2
        sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, ""))
        assert sender.flush(PATIENCE)
        assert len(store.batches) == 3
        assert store.batches[0] == store.batches[1] == store.batches[2]
        assert recorder.snapshot().puts == {"stored": 1}

    def test_order_is_kept_over_an_outage(self) -> None:
        """A removal must not overtake the Put before it."""
        store = FakeStore()
        sender, recorder, clock = self.sender(store)
        store.failure = resumed.StoreUnavailable("down")
        for number in range(300):
            sender.submit(PendingWrite(b"%d" % number, b"value", int(clock.now) + 100, ""))
        sender.submit(PendingWrite(b"7", None, 0, "fatal-error"))
        store.failure = None
        assert sender.flush(PATIENCE)
        assert b"7" not in store.kept
        assert len(store.kept) == 299
        assert recorder.snapshot().puts["stored"] == 300
        assert recorder.snapshot().removals == {"fatal-error": 1}

    def test_the_queue_is_bounded(self) -> None:
        store = FakeStore()
        sender, recorder, clock = self.sender(store)
        store.gate.clear()
        value = bytes(65_000)
        fitting = QUEUE_BYTES // (len(value) + 256)
        for number in range(fitting + 5):
            sender.submit(PendingWrite(b"%d" % number, value, int(clock.now) + 100, ""))
        assert recorder.snapshot().puts == {"dropped": 5}
        store.gate.set()
        assert sender.flush(PATIENCE)
        assert len(store.kept) == fitting

    def test_refusals_are_counted_and_not_repeated(self) -> None:
        store = FakeStore()
        store.refuses = True
        sender, recorder, clock = self.sender(store)
        sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, ""))
        assert sender.flush(PATIENCE)
        assert recorder.snapshot().puts == {"refused": 1}
        assert len(store.batches) == 1

    def test_closing_gives_up_after_its_time(self) -> None:
        store = FakeStore()
        store.failure = resumed.StoreUnavailable("down")
        sender, _, clock = self.sender(store)
        sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, ""))
        sender.close(PATIENCE)
        assert sender.submit(PendingWrite(b"b", b"value", int(clock.now) + 100, "")) == 0
        thread = sender._thread
        assert thread is not None
        thread.join(PATIENCE)
        assert not thread.is_alive()

    def test_writes_submitted_before_closing_are_sent(self) -> None:
        store = FakeStore()
        sender, _, clock = self.sender(store)
        store.gate.clear()
        sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, ""))
        sender.close(0)
        thread = sender._thread
        assert thread is not None
        store.gate.set()
        thread.join(PATIENCE)
        assert b"a" in store.kept

    def test_nothing_of_a_session_is_shown(self) -> None:
        shown = repr(
            [PendingWrite(b"KEY", b"VALUE", 1, ""), PendingWrite(b"KEY", None, 1, ""), StoredSession(b"VALUE", 1.0)]
        )
        shown += repr([Put(b"KEY", b"VALUE", 1.0), Remove(b"KEY")])
        assert "KEY" not in shown
        assert "VALUE" not in shown
