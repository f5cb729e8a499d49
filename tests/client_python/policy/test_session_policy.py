from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import resumed
from resumed._async.suspendable_handshake import SuspendableHandshake
from resumed._client.limits import BATCH_OPERATIONS
from resumed._client.store import Operation, Put, Remove, Result, StoreClient, StoredSession
from resumed._crypto.envelope import Envelope
from resumed._crypto.keyring import Keyring
from resumed._exceptions import UnsealError
from resumed._policy import write_queue
from resumed._policy.circuit_breaker import Breaker
from resumed._policy.served_names import Expected
from resumed._policy.session_policy import SessionPolicy
from resumed._policy.stats import BUCKETS, Recorder
from resumed._policy.write_queue import BUSY_OPERATIONS, QUEUE_BYTES, PendingWrite, WriteQueue
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from resumed._policy.lookups import LookupResult

PATIENCE = 10.0
NOT_FRESH = 11.0
"""Age in seconds up to which an unknown id is looked up again."""
KEYRING = Keyring.from_keys([os.urandom(32)])
NONCES = itertools.count()


class FakeStore(StoreClient):
    """A store in a dictionary, whose calls wait for `gate` and fail with `failure`."""

    def __init__(self, deadline: float = 5.0) -> None:
        super().__init__("fake:1", namespace="shop", deadline=deadline)
        self.kept: dict[bytes, bytes] = {}
        self.gets: list[bytes] = []
        self.batches: list[list[Operation]] = []
        self.sizes: list[int] = []
        """Operations of each Batch that has begun."""
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.refuses = False
        self.loses_answers = 0

    def _pass(self) -> None:
        assert self.gate.wait(PATIENCE)
        if self.failure:
            raise self.failure

    def get(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
        self.gets.append(key)
        self._pass()
        return StoredSession(self.kept[key], 1.0) if key in self.kept else None

    def take(self, key: bytes, *, deadline: float | None = None) -> StoredSession | None:
        self.gets.append(key)
        self._pass()
        value = self.kept.pop(key, None)
        return StoredSession(value, 1.0) if value is not None else None

    def batch(self, operations: Sequence[Operation], *, deadline: float | None = None) -> list[Result]:
        self.sizes.append(len(operations))
        self._pass()
        self.batches.append(list(operations))
        if self.loses_answers:
            self.loses_answers -= 1
            raise resumed.StoreTimeout("no answer")
        results: list[Result] = []
        for operation in operations:
            if self.refuses:
                results.append(resumed.AlreadyExists("no"))
            elif isinstance(operation, Put):
                self.kept[operation.key] = operation.value
                results.append(operation.ttl)
            else:
                results.append(self.kept.pop(operation.key, None) is not None)
        return results


class Clock:
    """A clock that a test moves by hand."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def shim_on(store: FakeStore, **options: Any) -> tuple[SessionPolicy, Clock]:
    clock = Clock()
    return SessionPolicy(store, KEYRING, clock=clock, **options), clock


FINGERPRINT = bytes(range(32))
ENVELOPE = Envelope(FINGERPRINT, 1.7e9, b"serialized")


def decode(serialized: bytes, remaining: float) -> int:
    return len(serialized) * 1_000_000 + int(remaining)


@dataclass
class Offer:
    session_id: bytes
    expected: Expected = Expected(FINGERPRINT)  # noqa: RUF009  # it is immutable
    decodes: Callable[[bytes, float], int] = decode

    def check(self, envelope: Envelope) -> None:
        self.decodes(envelope.session, 0.0)

    def decode(self, envelope: Envelope, remaining: float) -> int:
        return self.decodes(envelope.session, remaining)


def look_up(shim: SessionPolicy, offer: Offer, found: Future[LookupResult] | None = None) -> int | None:
    """Look a session up in a handshake of its own, for which that was prefetched."""
    handshake = shim.handshake()
    handshake._results |= {offer.session_id: found} if found else {}
    return shim.on_get_session(offer, handshake)


def prefetch(shim: SessionPolicy, offer: Offer) -> Future[LookupResult]:
    """Start the look-up of a handshake that can be suspended."""
    return shim.find(offer, shim.handshake(lambda: lambda: None), may_suspend=True)


def negotiate(shim: SessionPolicy, remaining: int = 7200) -> bytes:
    """Store a session of ten bytes and return its id."""
    session_id = shim.issue_id()
    shim.on_new_session(session_id, ENVELOPE, remaining, last=True)
    assert shim.flush(PATIENCE)
    return session_id


class TestIds:
    def test_an_id_tells_the_second_of_its_handshake(self) -> None:
        shim, clock = shim_on(FakeStore())
        for _ in range(3):
            clock.now += 0.7
            issued = {KEYRING.open_id("shop", shim.issue_id()) for _ in range(20)}
            assert issued == {int(clock.now)}

    def test_no_id_is_issued_twice(self) -> None:
        shim, _ = shim_on(FakeStore())
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda _: shim.issue_id(), range(2_000)))
        assert len(set(ids)) == 2_000
        shim.issue_id()
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.write(writer, shim.issue_id())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 32) not in [*ids, *(shim.issue_id() for _ in range(20))]
        os.close(reader)
        os.close(writer)

    @pytest.mark.parametrize("accept_foreign_ids", [False, True])
    def test_no_frontend_looks_up_an_id_that_is_issued_while_a_limit_is_used_up(self, accept_foreign_ids: bool) -> None:
        """Its session is not stored."""
        issuer, _ = shim_on(FakeStore())
        issuer._breaker.record_rate_limited()
        session_id = issuer.issue_id()
        issuer.on_new_session(session_id, ENVELOPE, 100, last=True)
        store = FakeStore()
        other, _ = shim_on(store, accept_foreign_ids=accept_foreign_ids)
        assert look_up(other, Offer(session_id)) is None
        assert (store.gets, other.stats.misses, issuer.stats.puts) == ([], {"expired-id": 1}, {"dropped": 1})


class TestPrefetch:
    def test_the_answer_is_used_and_nobody_is_asked_again(self) -> None:
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

    def test_what_needs_no_call_begins_none(self) -> None:
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

    def test_one_id_is_one_call_whoever_asks(self) -> None:
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

    def test_beyond_the_limit_nobody_is_asked(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, max_lookups=2)
        store.gate.clear()
        flights = [prefetch(shim, Offer(shim.issue_id())) for _ in range(3)]
        assert flights[2]
        assert flights[2].result(0) == (None, "too-many-lookups")
        store.gate.set()

    def test_who_waited_too_long_for_a_thread_does_not_ask(self) -> None:
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
    def test_what_was_negotiated_is_found_with_the_rest_of_its_life(self) -> None:
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

    def test_an_old_id_asks_nobody(self) -> None:
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
    def test_a_fresh_id_is_asked_for_again(self, asks: int) -> None:
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

    def test_an_id_that_is_not_fresh_is_asked_for_once(self) -> None:
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

    def test_what_is_removed_here_resumes_here_no_more(self) -> None:
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
    def test_an_id_of_another_time_is_asked_for_once(self, seconds: int, calls: int) -> None:
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


class TestEnds:
    @pytest.mark.parametrize("reason", [0, 294])
    def test_a_cut_connection_keeps_its_sessions(self, reason: int) -> None:
        """RFC 5246 section 7.2.1."""
        shim, _ = shim_on(FakeStore())
        session_id = negotiate(shim)
        shim.on_connection_failed([session_id], reason)
        assert shim.flush(PATIENCE)
        assert look_up(shim, Offer(session_id)) is not None
        assert shim.stats.removals == {"kept": 1}

    def test_a_fatal_alert_removes_them(self) -> None:
        """RFC 5246 section 7.2.2."""
        shim, clock = shim_on(FakeStore())
        ids = [negotiate(shim), negotiate(shim)]
        clock.now += NOT_FRESH
        shim.on_connection_failed(ids, 281)
        assert shim.flush(PATIENCE)
        assert [look_up(shim, Offer(each)) for each in ids] == [None, None]
        assert shim.stats.removals == {"fatal-error": 2}


class TestRemovals:
    def test_the_result_is_there_when_the_store_has_acknowledged_all(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        ids = [negotiate(shim), negotiate(shim)]
        store.gate.clear()
        removal = shim.remove(ids)
        assert not removal.done()
        assert not removal.cancel()
        store.gate.set()
        assert removal.result(PATIENCE) is True
        assert not store.kept
        assert shim.remove([]).result(0) is True

    def test_a_removal_that_the_store_refuses_is_not_true(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        session_id = negotiate(shim)
        store.refuses = True
        assert shim.remove([session_id]).result(PATIENCE) is False
        assert not shim.flush(PATIENCE)
        assert look_up(shim, Offer(session_id)) is None
        assert not store.gets
        store.refuses = False
        assert shim.remove([session_id]).result(PATIENCE) is True
        assert shim.flush(PATIENCE)
        assert shim.stats.removals == {"refused": 1, "application": 1}

    def test_a_removal_that_finds_no_room_is_not_true(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("resumed._policy.write_queue.QUEUE_BYTES", 0)
        shim, _ = shim_on(FakeStore())
        session_id = shim.issue_id()
        assert shim.remove([session_id]).result(0) is False
        assert not shim.flush(PATIENCE)
        assert look_up(shim, Offer(session_id)) is None
        assert shim.stats.removals == {"dropped": 1}

    def test_a_removal_that_is_given_up_is_not_true(self) -> None:
        store = FakeStore()
        store.failure = resumed.StoreUnavailable("down")
        shim, _ = shim_on(store)
        removal = shim.remove([shim.issue_id()])
        shim.close(0)
        assert removal.result(PATIENCE) is False
        assert shim.remove([shim.issue_id()]).result(0) is False

    def test_connections_are_remembered_and_not_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("resumed._policy.session_policy._MOST_RELATED", 4)
        store = FakeStore()
        shim, _ = shim_on(store)
        connections = [frozenset(shim.issue_id() for _ in range(2)) for _ in range(3)]
        for family in connections:
            for place, each in enumerate(family):
                last = place == 1
                shim.on_new_session(each, ENVELOPE, 100, last=last, family=family if last else ())
        assert shim.flush(PATIENCE)
        for family, left in zip(connections, (5, 3, 1), strict=True):
            assert shim.remove([min(family)]).result(PATIENCE)
            assert len(store.kept) == left

    def test_many_removals_are_remembered_and_not_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients can cause removals, so their number is bounded; a removal in flight is never dropped."""
        monkeypatch.setattr("resumed._policy.write_queue._MOST_REMOVED", 2)
        store = FakeStore()
        shim, _ = shim_on(store)
        ids = [shim.issue_id() for _ in range(4)]
        keys = [shim._store_keys.key(each) for each in ids]
        store.gate.clear()
        removal = shim.remove(ids)
        assert all(map(shim._write_queue.is_removed, keys))
        store.gate.set()
        assert removal.result(PATIENCE)
        assert shim.flush(PATIENCE)
        assert [shim._write_queue.is_removed(key) for key in keys] == [False, False, True, True]


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
    def test_failures_are_told_apart(self, failure: Exception, reason: str) -> None:
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
        shim._breaker._clock = lambda: now
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

    def test_what_a_limit_kept_from_being_sent_is_sent_later(self) -> None:
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

    def test_beyond_a_limit_a_new_session_is_one_that_nobody_asks_for(self) -> None:
        """The remaining operations serve stored sessions and their successors."""
        store, now = FakeStore(), 0.0
        shim, _ = shim_on(store)
        shim._breaker._clock = lambda: now
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


def no_thread(_thread: threading.Thread) -> None:
    """Replace Thread.start() on a machine that cannot start threads."""
    raise RuntimeError("can't start new thread")


def sealed(key: bytes, value: bytes, not_after: int) -> bytes:
    """Replace Keyring.seal(): each call uses another nonce."""
    return b"%d sealed %s" % (next(NONCES), value)


class TestSending:
    def sender(self, store: FakeStore) -> tuple[WriteQueue, Recorder, Clock]:
        """Return a sender, its recorder and its clock."""
        recorder, clock = Recorder(), Clock()
        return WriteQueue(store, recorder, clock, sealed), recorder, clock

    def test_the_tickets_of_one_handshake_are_one_batch(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store, puts="wait")
        for last in (False, True):
            shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=last)
        assert [len(batch) for batch in store.batches] == [2]

    def test_the_first_ticket_of_a_handshake_is_sent_with_the_last_one(self) -> None:
        store = FakeStore()
        shim, _ = shim_on(store)
        shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=False)
        assert shim._write_queue._thread is None
        shim.on_new_session(shim.issue_id(), ENVELOPE, 100, last=True)
        until(lambda: store.sizes == [2])

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

    def test_what_waits_does_not_live_longer(self) -> None:
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
            patch.setattr(threading.Thread, "start", no_thread)
            sender.submit(PendingWrite(b"a", b"value", int(clock.now) + 100, ""))
        sender.submit(PendingWrite(b"b", b"value", int(clock.now) + 100, ""))
        assert sender.flush(PATIENCE)
        assert recorder.snapshot().puts == {"stored": 2}

    def test_what_is_sent_again_is_sealed_once(self) -> None:
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

    def test_what_was_submitted_before_closing_is_sent_by_and_by(self) -> None:
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


@pytest.mark.parametrize(
    "options",
    [
        {"lifetime": 0},
        {"lifetime": 604_801},
        {"puts": "never"},
    ],
)
def test_arguments_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        shim_on(FakeStore(), **options)


def test_look_up_times_are_counted_by_bucket() -> None:
    recorder = Recorder()
    for seconds in (0.00005, 0.0001, 0.03, 9.0):
        recorder.observe_lookup(seconds)
    stats = recorder.snapshot()
    counts = dict(zip((*BUCKETS, float("inf")), stats.lookup_seconds, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {0.0001: 2, 0.05: 1, float("inf"): 1}
    assert stats.lookup_seconds_sum == pytest.approx(9.03015)
