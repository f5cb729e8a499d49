from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from resumed._policy.circuit_breaker import Breaker
from support.session_policy import (
    ENVELOPE,
    PATIENCE,
    FakeStore,
    Offer,
    look_up,
    negotiate,
    shim_on,
)
from support.waiting import until

if TYPE_CHECKING:
    from resumed._client.store import StoredSession


class TestOutages:
    def test_the_breaker_opens_and_closes_by_itself(self, caplog: pytest.LogCaptureFixture) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.failure = resumed.StoreUnavailable("down")
        with caplog.at_level(logging.WARNING, "resumed"):
            assert [look_up(shim, Offer(session_id)) for _ in range(5)] == [None] * 5
        assert shim.stats.misses == {"unavailable": 3, "breaker-open": 2}
        assert shim.breaker_open
        assert len(caplog.records) == 1
        store.failure = None
        end = time.monotonic() + PATIENCE
        while shim.breaker_open:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert look_up(shim, Offer(session_id)) is not None

    @pytest.mark.parametrize(
        ("failure", "reason"),
        [
            (resumed.StoreTimeout("x"), "timeout"),
            (resumed.StoreUnavailable("x"), "unavailable"),
            (resumed.StoreError("x"), "rejected"),
        ],
    )
    def test_failures_are_distinguished(self, failure: Exception, reason: str) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        store.failure = failure
        look_up(shim, Offer(shim.issue_id()))
        assert shim.stats.misses == {reason: 1}

    def test_after_a_call_that_failed_no_handshake_waits_for_its_put(self) -> None:
        """The late lookup has used up the deadline of the handshake."""
        store = FakeStore(deadline=1_000.0)
        shim, _ = shim_on(store, puts="wait")
        store.failure = resumed.StoreTimeout("late")
        assert look_up(shim, Offer(shim.issue_id())) is None
        store.gate.clear()
        store.failure = None
        negotiated = partial(shim.on_new_session, last=True)
        negotiation = threading.Thread(target=negotiated, args=(shim.issue_id(), ENVELOPE, 100), daemon=True)
        negotiation.start()
        negotiation.join(PATIENCE)
        assert not negotiation.is_alive()
        assert not store.kept
        store.gate.set()
        assert shim.flush(PATIENCE)
        assert len(store.kept) == 1

    def test_a_limit_is_a_miss_and_no_outage(self) -> None:
        store, now = FakeStore(), 0.0
        shim, _ = shim_on(store)
        shim._breaker.now = lambda: now
        session_id = negotiate(shim)
        store.failure = resumed.LimitExceeded("at its limit")
        for rest in (0.05, 0.1, 0.2, 0.4, 0.8, 0.8):
            asked = len(store.gets)
            assert [look_up(shim, Offer(session_id)) for _ in range(5)] == [None] * 5
            assert len(store.gets) == asked + 1, "only the first one asked"
            now += rest
        assert shim.stats.misses == {"limited": 30}
        assert not shim.breaker_open
        store.failure = None
        assert look_up(shim, Offer(session_id)) is not None
        store.failure = resumed.LimitExceeded("at its limit")
        look_up(shim, Offer(session_id))
        now += 0.05
        store.failure = None
        assert look_up(shim, Offer(session_id)) is not None, "the next limit begins with a short rest"

    def test_writes_that_a_limit_delayed_are_sent_later(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, puts="wait")
        session_id = shim.issue_id()
        store.failure = resumed.LimitExceeded("at its limit")
        assert look_up(shim, Offer(shim.issue_id())) is None
        shim.on_new_session(session_id, ENVELOPE, 100, last=True)
        assert not store.kept
        store.failure = None
        assert shim.flush(PATIENCE)
        assert shim.stats.puts == {"stored": 1}
        assert not shim.breaker_open

    def test_beyond_a_limit_new_ids_are_not_looked_up(self) -> None:
        """The remaining operations serve stored sessions and their successors."""
        store, now = FakeStore(), 0.0
        shim, _ = shim_on(store)
        shim._breaker.now = lambda: now
        stored = negotiate(shim)
        store.failure = resumed.LimitExceeded("at its limit")
        look_up(shim, Offer(stored))
        store.failure = None
        now += 4.9
        asked = len(store.gets)
        shed = negotiate(shim)
        assert look_up(shim, Offer(shed)) is None
        assert len(store.gets) == asked
        assert shim.stats.misses == {"limited": 1, "expired-id": 1}
        assert shim.stats.puts == {"stored": 1, "dropped": 1}
        following = shim.issue_id(resumed=True)
        shim.on_new_session(following, ENVELOPE, 100, last=True)
        assert shim.flush(PATIENCE)
        assert look_up(shim, Offer(following)) is not None
        now += 0.2
        assert look_up(shim, Offer(negotiate(shim))) is not None

    def test_a_refusal_that_is_held_back_is_no_outage(self) -> None:
        now = 0.0
        breaker = Breaker(clock=lambda: now)
        breaker.record_rate_limited()
        for _ in range(9):
            now += 0.5
            breaker.failed(now, late=True)
            assert breaker.closed
            assert breaker.rate_limited
        for _ in range(3):
            now += 0.5
            breaker.failed(now, late=True)
        assert not breaker.closed

    def test_batches_that_succeed_do_not_hide_that_look_ups_are_late(self) -> None:
        """A server may be fast enough for Batches and too slow for handshakes."""
        store = FakeStore()
        shim, _ = shim_on(store)
        for _ in range(3):
            store.failure = None
            negotiate(shim)
            store.failure = resumed.StoreTimeout("late")
            assert look_up(shim, Offer(shim.issue_id())) is None
        assert shim.breaker_open

    def test_batches_that_fail_do_not_keep_handshakes_from_asking(self) -> None:
        """A server with a full disk still serves lookups."""

        class Full(FakeStore):
            def batch(self, operations: Any, *, deadline: float | None = None) -> Any:
                self.batches.append(list(operations))
                raise resumed.StoreUnavailable("the disk is full")

        store = Full()
        shim, _ = shim_on(store)
        shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=True)
        until(lambda: len(store.batches) > 3)
        assert not shim.breaker_open
        assert look_up(shim, Offer(shim.issue_id())) is None
        assert store.gets
        shim.close(0)

    def test_a_forked_child_finds_out_by_itself_that_the_store_is_back(self) -> None:
        """The prober is a thread, which a forked child does not inherit."""
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.failure = resumed.StoreUnavailable("down")
        for _ in range(3):
            look_up(shim, Offer(session_id))
        assert shim.breaker_open
        shim._prober.close()  # as good as gone
        until(lambda: shim._prober._thread is None)
        shim._prober._closed.clear()
        shim._prober.after_fork_in_child()
        store.failure = None
        until(lambda: look_up(shim, Offer(session_id)) is not None)

    def test_once_closed_by_a_trial_a_single_failure_opens_it_again(self) -> None:
        breaker = Breaker()
        for _ in range(3):
            assert breaker.closed
            breaker.failed(breaker.now())
        assert not breaker.closed
        breaker.succeeded()
        assert breaker.closed
        breaker.failed(breaker.now())
        assert not breaker.closed
        breaker.succeeded()
        breaker.succeeded()
        breaker.failed(breaker.now())
        assert breaker.closed

    def test_calls_that_fail_together_count_once(self) -> None:
        """One stall makes all calls in flight late."""
        now = 0.0
        breaker = Breaker(clock=lambda: now)
        for began in (0.0, 1.0, 2.0):
            now = began + 0.5
            for _ in range(10):
                breaker.failed(began)
            assert breaker.closed is (began < 2.0)
            now += 0.1

    def test_a_store_is_tried_soon_and_then_less_often(self) -> None:
        now = 100.0
        breaker = Breaker(failures=1, clock=lambda: now)
        breaker.failed(now)
        assert [breaker.next_probe_delay() for _ in range(6)] == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
        for seconds, pause in ((9.0, 0.5), (9.0, 0.5), (11.0, 0.05), (1.0, 0.1)):
            breaker.succeeded()
            breaker.succeeded()
            now += seconds
            breaker.failed(now)
            assert breaker.next_probe_delay() == pause

    def test_a_further_ask_that_is_late_is_no_failure_of_the_store(self) -> None:
        """The server answered this lookup before, and the retry had little time left."""

        class Slower(FakeStore):
            def get(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
                if key in self.gets:
                    raise resumed.StoreTimeout("no answer")
                return super().get(key, deadline=deadline)

        shim, _ = shim_on(Slower())
        for _ in range(5):
            assert look_up(shim, Offer(shim.issue_id())) is None
        assert shim.stats.misses == {"timeout": 5}
