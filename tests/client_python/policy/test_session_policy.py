from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import resumed
from resumed._policy.stats import BUCKETS, Recorder
from support.session_policy import (
    ENVELOPE,
    KEYRING,
    NOT_FRESH,
    PATIENCE,
    FakeStore,
    Offer,
    look_up,
    negotiate,
    shim_on,
)


class TestIds:
    def test_an_id_contains_the_second_of_its_handshake(self) -> None:
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
