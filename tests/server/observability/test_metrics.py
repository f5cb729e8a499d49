"""The shared metrics segment, the recorder, and the lag of watchers."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import pytest

from resumed_server.limits.config import LIMIT_NAMES, Limit
from resumed_server.observability.metrics.collector import STALE_SECONDS, MetricsCollector
from resumed_server.observability.metrics.instrumented_engine import InstrumentedEngine
from resumed_server.observability.metrics.recorder import BOUNDS, COLUMN, OTHER, OUTCOMES, Recorder
from resumed_server.observability.metrics.shared_segment import MAX_NAMESPACES, MetricsSegment
from resumed_server.observability.metrics.worker import WorkerMetrics
from resumed_server.storage.engine import (
    AlreadyExists,
    EngineFull,
    EngineUnavailable,
    Get,
    Put,
    Remove,
    StorageConnections,
    StoredSession,
    StoreTotals,
    Take,
)
from resumed_server.storage.expiry import Sweeper
from resumed_server.watch.hub import READ_SECONDS, WatchHub
from resumed_server.watch.subscription import LogPosition, Message, Subscription, Topic
from support.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumed_server.storage.engine import Engine, Operation, Outcome


class Ready:
    ready = True


def outcomes(recorder: Recorder, namespace: str) -> dict[tuple[str, str], int]:
    row = recorder.snapshot()["operations"].get(namespace, [0] * len(OUTCOMES))
    return {outcome: count for outcome, count in zip(OUTCOMES, row, strict=True) if count}


class TestBoard:
    def test_threads_that_admit_at_once_overwrite_nothing(self) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(20):
                board = MetricsSegment(1)
                with ThreadPoolExecutor(8) as pool:
                    names = [f"{thread}-{number}" for number in range(6) for thread in range(8)]
                    admitted = list(pool.map(board.register_namespace, names))
                assert all(admitted)
                assert sorted(board.namespaces()) == sorted(names)
        finally:
            sys.setswitchinterval(interval)

    def test_a_parent_reads_values_that_a_forked_process_wrote(self) -> None:
        board = MetricsSegment(2)
        for number in range(3):
            child = os.fork()
            if not child:
                board.write(1, {"number": number})
                os._exit(0)
            os.waitpid(child, 0)
        board.write(0, {"number": "mine"})
        assert board.read(1) == {"number": 2}
        assert board.read(0) == {"number": "mine"}

    def test_nothing_is_read_before_anything_was_pinned(self) -> None:
        board = MetricsSegment(2)
        board.write(0, {})
        assert board.read(1) is None

    def test_a_writer_that_dies_at_any_byte_leaves_what_was_there(self) -> None:
        board = MetricsSegment(1)
        board.write(0, {"turn": 1})
        old = board._memory[:]
        board.write(0, {"turn": 2})
        new = board._memory[:]
        changed = [at for at in range(len(new)) if old[at] != new[at]]
        for cut in changed:
            board._memory[:] = new[:cut] + old[cut:]
            assert board.read(0) == {"turn": 1}
            board.write(0, {"turn": 2})
            assert board.read(0) == {"turn": 2}

    def test_names_beyond_the_bound_get_no_place(self) -> None:
        board = MetricsSegment(2)
        child = os.fork()
        if not child:
            for number in range(MAX_NAMESPACES - 1):
                board.register_namespace(f"shop-{number}")
            os._exit(0)
        os.waitpid(child, 0)
        longest = "x" * 63
        assert board.register_namespace(longest)
        assert not board.register_namespace("one-too-many")
        assert board.register_namespace("shop-7")
        assert board.register_namespace(longest)

    def test_the_most_that_can_be_counted_fits(self) -> None:
        board = MetricsSegment(1)
        row = [2**53] * len(OUTCOMES)
        metrics = WorkerMetrics(board, 0, cast("Engine", Store()), readiness=Ready())
        metrics.recorder._operations |= {f"{number:063}": row for number in range(MAX_NAMESPACES)} | {OTHER: row}
        for method in ("Put", "Get", "Take", "Remove", "Batch", "Watch"):
            for code in range(17):
                metrics.recorder.on_failure(method, code)
        for number in range(1_000):
            for name in LIMIT_NAMES:
                metrics.recorder.on_limit(Limit(namespaces=(f"{number:063}", "x" * 63)), "", name)
        metrics.report(WatchHub(cast("Engine", Store())), Sweeper(cast("Engine", Store())))
        assert board.read(0)
        with pytest.raises(ValueError, match="exceed the slot"):
            board.write(0, {"x": "x" * 131_072})


class Store:
    """As much of an engine as is counted; fails with `error`."""

    error: Exception | None = None

    def batch(self, operations: Sequence[Operation]) -> list[Outcome]:
        if self.error:
            raise self.error
        found = {Get: None, Take: StoredSession(b"v", 1.0), Put: 1.0, Remove: True}
        return [cast("Outcome", found[type(each)]) for each in operations]

    def totals(self) -> StoreTotals:
        return StoreTotals(sessions=2, bytes=1_000, evicted=3, removals=4)

    def connections(self) -> StorageConnections:
        return StorageConnections(used=1, idle=2**53, maximum=2**53, opened=2**53)


class TestRecorder:
    def test_a_namespace_without_sessions_gets_no_place(self) -> None:
        """Callers choose namespaces, so an unused one must not occupy a place."""
        recorder = Recorder(lambda _: True)
        for _ in range(3):
            recorder.operation("made-up", COLUMN["get", "miss"])
        recorder.operation("shop", COLUMN["put", "stored"])
        recorder.operation("shop", COLUMN["get", "miss"])
        thread = threading.Thread(target=recorder.operation, args=("shop", COLUMN["get", "failed"]))
        thread.start()
        thread.join()
        assert outcomes(recorder, "shop") == {("put", "stored"): 1, ("get", "miss"): 1, ("get", "failed"): 1}
        assert outcomes(recorder, OTHER) == {("get", "miss"): 3}
        assert "made-up" not in recorder.snapshot()["operations"]

    def test_many_threads_lose_no_count(self) -> None:
        recorder, column = Recorder(lambda _: True), COLUMN["put", "stored"]

        def count() -> None:
            for _ in range(20_000):
                recorder.operation("shop", column)
                recorder.on_success("Get", 0.5)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=count) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        found = recorder.snapshot()
        assert outcomes(recorder, "shop") == {("put", "stored"): 80_000}
        assert (sum(found["calls"]["Get"][0]), found["calls"]["Get"][1]) == (80_000, 40_000.0)

    def test_namespaces_without_a_place_are_added_up(self) -> None:
        recorder = Recorder(lambda namespace: namespace == "shop")
        for namespace in ("shop", "pay", "mail"):
            recorder.operation(namespace, COLUMN["get", "hit"])
        assert outcomes(recorder, OTHER) == {("get", "hit"): 2}

    def test_a_call_counts_in_the_bucket_whose_bound_it_reaches(self) -> None:
        recorder = Recorder(lambda _: True)
        for seconds in (0.0, BOUNDS[0], BOUNDS[0] + 1e-9, BOUNDS[-1] + 1):
            recorder.on_success("Get", seconds)
        assert recorder.snapshot()["calls"]["Get"][0] == [2, 1, *[0] * 10, 1]

    def test_the_operations_of_a_batch_count_one_by_one(self) -> None:
        recorder, store = Recorder(lambda _: True), Store()
        engine = InstrumentedEngine(cast("Engine", store), recorder)
        operations: list[Operation] = [
            *(Put("shop", b"k", b"v", 1.0), Get("shop", b"k"), Take("shop", b"k"), Remove("shop", b"k"))
        ]
        engine.batch([*operations, operations[0]])
        store.error = EngineUnavailable("gone")
        with pytest.raises(EngineUnavailable):
            engine.batch(operations)
        assert outcomes(recorder, "shop") == {
            ("put", "stored"): 2,
            ("get", "miss"): 1,
            ("take", "hit"): 1,
            ("remove", "removed"): 1,
            **{(operation, "failed"): 1 for operation in ("put", "get", "take", "remove")},
        }

    @pytest.mark.parametrize(
        ("error", "outcome"),
        [(AlreadyExists("no"), "refused"), (EngineFull("no"), "full"), (EngineUnavailable("no"), "failed")],
    )
    def test_a_put_that_fails_counts_by_its_reason(self, error: Exception, outcome: str) -> None:
        """An operator reacts differently to a duplicate id, a full store and an outage."""

        class Failing:
            def put(self, *_: object, **__: object) -> float:
                raise error

        recorder = Recorder(lambda _: True)
        with pytest.raises(type(error)):
            InstrumentedEngine(cast("Engine", Failing()), recorder).put("shop", b"k", b"v", 1.0)
        assert outcomes(recorder, OTHER) == {("put", outcome): 1}


def samples(collector: MetricsCollector) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.labels in ({}, {"worker": "0"})
    }


class TestReport:
    def test_who_takes_a_dead_workers_place_goes_on_counting(self) -> None:
        board, clock = MetricsSegment(1), Clock()
        store = cast("Engine", Store())
        collector = MetricsCollector(board, {}, clock=clock)
        watchers, sweeper = WatchHub(store), Sweeper(store)
        sweeper.swept = 5
        for run in (1, 2):
            metrics = WorkerMetrics(board, 0, store, readiness=Ready(), clock=clock)
            metrics.recorder.on_success("Get", 0.1)
            metrics.recorder.on_failure("Get", 14)
            metrics.report(watchers, sweeper)
            found = samples(collector)
            assert found["resumed_worker_calls_total"] == 2 * run
            assert found["resumed_swept_entries_total"] == 5 * run
            assert found["resumed_evicted_sessions_total"] == 3, "the storage counts them, not its workers"
            assert found["resumed_lasting_removals"] == 4
            assert (found["resumed_worker_up"], found["resumed_engine_up"]) == (1, 1)
        clock.now += STALE_SECONDS
        found = samples(collector)
        assert (found["resumed_worker_up"], found["resumed_worker_ready"], found["resumed_engine_up"]) == (0, 0, 0)
        assert found["resumed_worker_calls_total"] == 4


class Log:
    """An engine with a log of changes that never moves."""

    def position(self) -> bytes:
        return b"end"


class TestLag:
    def test_it_is_the_age_of_the_oldest_message_that_waits(self) -> None:
        clock = Clock()
        subscription = Subscription(Topic("shop"), lambda: LogPosition(b"", 0.0), clock)
        assert subscription.lag() == 0
        for _ in range(3):
            subscription.enqueue(Message((), b"", clock.now))
            clock.now += 1.0
        assert subscription.lag() == 3.0
        next(subscription.messages())
        assert subscription.lag() == 2.0

    def test_a_log_that_is_not_read_is_lag_too(self) -> None:
        clock = Clock()
        watchers = WatchHub(cast("Engine", Log()), clock)
        assert watchers.stats() == (0, 0.0, 0)
        with watchers._lock:
            watchers._subscriptions[Subscription(Topic("shop"), lambda: watchers._progress, clock)] = None
            watchers._progress = LogPosition(b"end", clock.now)
        clock.now += READ_SECONDS
        assert watchers.stats() == (1, 0.0, 0)
        clock.now += 2.0
        assert watchers.stats().lag == pytest.approx(2.0)
