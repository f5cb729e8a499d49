from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from resumed._async.suspendable_handshake import SuspendableHandshake
from resumed._exceptions import UnsealError
from resumed._policy.served_names import Expected
from support.session_policy import (
    ENVELOPE,
    NOT_FRESH,
    PATIENCE,
    FakeStore,
    Offer,
    look_up,
    negotiate,
    prefetch,
    shim_on,
)

if TYPE_CHECKING:
    from resumed._client.store import StoredSession


class TestPrefetch:
    def test_a_prefetched_result_is_used_without_another_call(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        for session_id, found in ((negotiate(shim), 10_007_200), (shim.issue_id(), None)):
            flight = prefetch(shim, Offer(session_id))
            assert flight
            flight.result(PATIENCE)
            asked = len(store.gets)
            assert look_up(shim, Offer(session_id), flight) == found
            assert len(store.gets) == asked
        assert shim.stats.hits == {"store": 1}
        assert shim.stats.misses == {"unknown": 1}

    def test_a_look_up_without_a_call_begins_none(self) -> None:
        store = FakeStore()
        shim, clock = shim_on(store, lifetime=100)
        session_id = negotiate(shim)
        assert prefetch(shim, Offer(os.urandom(32))).result(0) == (None, "foreign-id")
        clock.now += 101
        assert prefetch(shim, Offer(session_id)).result(0) == (None, "expired-id")
        shim._breaker.closed = False
        resting = prefetch(shim, Offer(shim.issue_id()))
        assert resting
        assert resting.result(0) == (None, "breaker-open")
        assert not store.gets
        assert not shim._lookups._threads._threads

    def test_concurrent_look_ups_of_an_id_share_one_call(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.gate.clear()
        one, other = prefetch(shim, Offer(session_id)), prefetch(shim, Offer(session_id))
        assert one
        assert other
        waiting = threading.Thread(
            target=look_up,
            args=(
                shim,
                Offer(session_id),
            ),
        )
        waiting.start()
        [flight] = shim._lookups._flights.values()
        while len(flight._done_callbacks) < 2:  # type: ignore[attr-defined]
            time.sleep(0)
        store.gate.set()
        waiting.join(PATIENCE)
        assert look_up(shim, Offer(session_id), one) == look_up(shim, Offer(session_id), other) == 10_007_200
        assert shim.stats.hits == {"store": 1, "coalesced": 2}
        assert len(store.gets) == 1

    def test_a_single_use_is_not_shared(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, single_use=True)
        session_id = negotiate(shim)
        flights = [prefetch(shim, Offer(session_id)) for _ in range(4)]
        found = [flight.result(PATIENCE)[0] for flight in flights if flight]
        assert len(found) == 4
        assert found.count(None) == 3

    def test_an_answer_that_is_not_there_is_late(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.gate.clear()
        flight = prefetch(shim, Offer(session_id))
        assert look_up(shim, Offer(session_id), flight) is None
        assert shim.stats.misses == {"timeout": 1}
        store.gate.set()

    def test_beyond_the_limit_there_is_no_call(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, max_lookups=2)
        store.gate.clear()
        flights = [prefetch(shim, Offer(shim.issue_id())) for _ in range(3)]
        assert flights[2]
        assert flights[2].result(0) == (None, "too-many-lookups")
        store.gate.set()

    def test_a_look_up_that_waited_too_long_for_a_thread_makes_no_call(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        flight, mine = shim._lookups._join_or_start(b"key")
        assert mine
        shim._lookups._run(flight, b"key", lambda _: (None, "unknown"), end=time.monotonic() - 0.001)
        assert flight.result(0) == (None, "too-many-lookups")
        assert not store.gets

    def test_a_closed_shim_finds_nothing(self) -> None:
        shim, _ = shim_on(FakeStore())
        session_id = negotiate(shim)
        shim.close()
        flight = prefetch(shim, Offer(session_id))
        assert flight
        assert flight.result(0) == (None, "unavailable")
        assert shim._lookups._in_flight == 0

    def test_a_defect_is_a_miss(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.failure = ZeroDivisionError()
        flight = prefetch(shim, Offer(session_id))
        assert flight
        assert flight.result(PATIENCE) == (None, "internal-error")


class TestLookUps:
    def test_a_negotiated_session_is_found_with_its_remaining_lifetime(self) -> None:
        shim, clock = shim_on(FakeStore())
        session_id = negotiate(shim)
        clock.now += 200
        assert look_up(shim, Offer(session_id)) == 10_007_000
        assert shim.stats.hits == {"store": 1}

    def test_a_session_of_a_resumed_connection_keeps_the_rest_it_had(self) -> None:
        """The remaining time that OpenSSL reports is used, up to the lifetime."""
        shim, _ = shim_on(FakeStore())
        assert look_up(shim, Offer(negotiate(shim, remaining=50))) == 10_000_050
        assert look_up(shim, Offer(negotiate(shim, remaining=10**6))) == 10_007_200

    @pytest.mark.parametrize("remaining", [0, -1])
    def test_a_session_with_no_life_left_is_not_stored(self, remaining: int) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        negotiate(shim, remaining)
        assert not store.batches
        assert shim.stats.puts == {"unresumable": 1}

    def test_an_old_id_makes_no_call(self) -> None:
        store = FakeStore()
        shim, clock = shim_on(store, lifetime=100)
        session_id = negotiate(shim)
        clock.now += 101
        assert look_up(shim, Offer(session_id)) is None
        assert not store.gets
        assert shim.stats.misses == {"expired-id": 1}

    def test_clocks_that_differ_by_minutes_resume(self) -> None:
        """A frontend whose clock is ahead issued the id."""
        shim, clock = shim_on(FakeStore())
        session_id = negotiate(shim)
        clock.now -= 300
        assert look_up(shim, Offer(session_id)) is not None

    @pytest.mark.parametrize("asks", [1, 4])
    def test_the_look_up_of_a_fresh_id_is_repeated(self, asks: int) -> None:
        """Its Put may still be in flight."""
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = shim.issue_id()
        get = store.get

        def late(key: bytes, *, deadline: float | None = None) -> StoredSession | None:
            found = get(key)
            if len(store.gets) == asks:
                shim.on_new_session(session_id, ENVELOPE, 100, last=True)
                assert shim.flush(PATIENCE)
            return found

        store.get = late  # type: ignore[method-assign]
        assert look_up(shim, Offer(session_id)) is not None
        assert shim.stats.hits == {"retried": 1}

    def test_the_look_up_of_an_older_id_is_not_repeated(self) -> None:
        store = FakeStore()
        shim, clock = shim_on(store)
        session_id = shim.issue_id()
        clock.now += NOT_FRESH
        assert look_up(shim, Offer(session_id)) is None
        assert len(store.gets) == 1
        assert shim.stats.misses == {"unknown": 1}

    def test_concurrent_look_ups_of_one_id_are_one_call(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.gate.clear()
        found: list[int | None] = []
        threads = [threading.Thread(target=lambda: found.append(look_up(shim, Offer(session_id)))) for _ in range(8)]
        for thread in threads:
            thread.start()
        while not store.gets:
            time.sleep(0)
        [flight] = shim._lookups._flights.values()
        while len(flight._done_callbacks) < 7:  # type: ignore[attr-defined]
            time.sleep(0)
        store.gate.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(store.gets) == 1
        assert len([each for each in found if each]) == 8
        assert shim.stats.hits == {"store": 1, "coalesced": 7}

    def test_single_use_look_ups_are_never_shared(self) -> None:
        store = FakeStore()
        shim, clock = shim_on(store, single_use=True)
        session_id = negotiate(shim)
        clock.now += NOT_FRESH
        found: list[int | None] = []
        threads = [threading.Thread(target=lambda: found.append(look_up(shim, Offer(session_id)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len([each for each in found if each]) == 1

    @pytest.mark.parametrize("ahead", [False, True], ids=["in the callback", "ahead of it"])
    def test_a_session_that_does_not_fit_is_not_taken(self, ahead: bool) -> None:
        """It stays stored for the connection that it belongs to."""
        shim, _ = shim_on(FakeStore(), single_use=True)
        session_id = negotiate(shim)

        def refuse(_serialized: bytes, _remaining: float) -> int:
            raise UnsealError("server-name-mismatch")

        for offer in Offer(session_id, Expected(bytes(32))), Offer(session_id, decodes=refuse):
            found = prefetch(shim, offer) if ahead else None
            if found:
                found.result(PATIENCE)
            assert look_up(shim, offer, found) is None
        assert shim.stats.misses == {"context-mismatch": 1, "server-name-mismatch": 1}
        assert look_up(shim, Offer(session_id)) is not None
        assert look_up(shim, Offer(session_id)) is None

    def test_a_session_of_another_context_is_a_miss(self) -> None:
        shim, _ = shim_on(FakeStore())
        assert look_up(shim, Offer(negotiate(shim), Expected(bytes(32)))) is None
        assert shim.stats.misses == {"context-mismatch": 1}
        assert not shim.stats.hits

    def test_a_context_that_is_not_known_costs_no_call(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        unknown = Expected(None, "context-unknown")
        session_id = negotiate(shim)
        for offered in session_id, os.urandom(32):
            assert prefetch(shim, Offer(offered, unknown)).result(0)[0] is None
            assert look_up(shim, Offer(offered, unknown)) is None
        assert not store.gets
        assert shim.stats.misses == {"context-unknown": 1, "foreign-id": 1}

    @pytest.mark.parametrize("suspended", [False, True])
    def test_all_look_ups_of_a_handshake_share_one_deadline(self, suspended: bool) -> None:
        """A ClientHello has room for a thousand ids of the fleet."""

        class Slow(FakeStore):
            def get(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
                assert deadline
                deadlines.append(deadline)
                now[0] += 2.0
                return super().get(key)

        deadlines: list[float] = []
        now = [0.0]
        shim, clock = shim_on(Slow(5.0))
        offers = [Offer(shim.issue_id()) for _ in range(10)]
        clock.now += NOT_FRESH
        resume = (lambda: lambda: None) if suspended else (lambda: None)
        handshake = SuspendableHandshake(5.0, resume, clock=lambda: now[0])
        for offer in offers if suspended else ():
            shim.find(offer, handshake, may_suspend=True).result(PATIENCE)
        assert [shim.on_get_session(offer, handshake) for offer in offers] == [None] * 10
        assert len(deadlines) == 3
        assert all(deadline <= limit for deadline, limit in zip(deadlines, [4.5, 2.7, 0.9], strict=True))
        assert shim.stats.misses == {"unknown": 3, "timeout": 1, "too-many-lookups": 6}
        assert not shim.breaker_open

    @pytest.mark.parametrize("single_use", [False, True])
    def test_a_client_that_offers_a_session_twice_is_answered_twice(self, single_use: bool) -> None:
        """HelloRetryRequest (RFC 8446 section 4.1.4): one lookup and one hit."""
        store = FakeStore()
        shim, _ = shim_on(store, single_use=single_use)
        session_id, handshake = negotiate(shim), shim.handshake()
        assert [shim.on_get_session(Offer(session_id), handshake) for _ in range(2)] == [10_007_200] * 2
        assert shim.stats.hits == {"store": 1}
        assert len(store.gets) == 1 + single_use

    def test_a_session_removed_here_does_not_resume_here(self) -> None:
        """Even before the server has received the removal, and during a lookup."""
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        before = prefetch(shim, Offer(session_id))
        assert before
        assert before.result(PATIENCE)[0], "it was found, by a handshake that is not over"
        store.gate.clear()
        assert prefetch(shim, Offer(session_id))
        shim.remove([session_id])
        assert prefetch(shim, Offer(session_id)).result(0) == (None, "unknown")
        assert look_up(shim, Offer(session_id)) is None
        assert shim.stats.misses == {"unknown": 1}
        store.gate.set()
        assert shim.flush(PATIENCE)
        assert look_up(shim, Offer(session_id)) is None
        assert look_up(shim, Offer(session_id), before) is None

    @pytest.mark.parametrize(("seconds", "calls"), [(-300, 1), (300, 1), (-5, 5), (5, 5)])
    def test_the_look_up_of_an_id_of_another_time_is_not_repeated(self, seconds: int, calls: int) -> None:
        store = FakeStore(0.2)
        shim, clock = shim_on(store)
        session_id = shim.issue_id()
        clock.now += seconds
        assert look_up(shim, Offer(session_id)) is None
        assert (len(store.gets) > 1) is (calls > 1)

    def test_look_ups_in_flight_are_bounded(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, max_lookups=1)
        one, other = negotiate(shim), negotiate(shim)
        store.gate.clear()
        thread = threading.Thread(
            target=look_up,
            args=(
                shim,
                Offer(one),
            ),
        )
        thread.start()
        while not store.gets:
            time.sleep(0)
        assert look_up(shim, Offer(other)) is None
        store.gate.set()
        thread.join(PATIENCE)
        assert shim.stats.misses == {"too-many-lookups": 1}
        assert look_up(shim, Offer(other)) is not None

    def test_an_undecodable_session_is_a_miss(self) -> None:
        shim, _ = shim_on(FakeStore())

        def refuse(_serialized: bytes, _remaining: float) -> int:
            raise UnsealError("undecodable")

        assert look_up(shim, Offer(negotiate(shim), decodes=refuse)) is None
        assert shim.stats.misses == {"undecodable": 1}
