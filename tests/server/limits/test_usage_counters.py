"""Counters of sessions and bytes: recounts of the engine, and entries admitted between them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from resumed.v1 import session_store_pb2 as pb
from resumed_server.auth.grants import Grants
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitEnforcer, LimitExceeded, SharedCounters
from resumed_server.limits.usage_counters import ENTRY_BYTES, UsageCounter, UsageCounters, UsageRecounter
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.lmdb.engine import LmdbEngine
from resumed_server.storage.registry import open_engine
from resumed_server.watch.hub import WatchHub
from support.clock import Clock
from support.redis import valkey_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumed_server.storage.engine import Engine

FILE = """
[[limit]]
namespaces = ["shop", "shop.*"]
sessions = 4
[[limit]]
namespaces = ["pay"]
bytes = 1512
"""
DEFAULTS = Limit(sessions=2)


CLOCK = Clock(1_800_000_000.0)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An LMDB engine with this clock."""
    engine = open_engine("lmdb:", capacity=16 << 20, clock=CLOCK)
    yield engine
    engine.close()


@pytest.fixture
def shared() -> SharedCounters:
    """Empty counters."""
    return SharedCounters.create()


@pytest.fixture
def enforcer(shared: SharedCounters) -> LimitEnforcer:
    """The limits of FILE."""
    grants: Any = SimpleNamespace(value=Grants.parse(FILE))
    return LimitEnforcer(DEFAULTS, grants, shared)


def admit(enforcer: LimitEnforcer, namespace: str, size: int = 10) -> None:
    """Admit a session, or raise LimitExceeded."""
    state = enforcer.for_namespace(namespace)
    assert state
    state.admit_entry(size)


def test_sessions_are_admitted_up_to_the_limit(enforcer: LimitEnforcer) -> None:
    """The namespaces of a limit count together; others have limits of their own."""
    for namespace in ("shop", "shop.eu", "shop.us", "shop"):
        admit(enforcer, namespace)
    with pytest.raises(LimitExceeded, match=r"shop, shop\.\* is at its limit of 4 sessions") as caught:
        admit(enforcer, "shop.new")
    assert (caught.value.limit, caught.value.retry) == ("sessions", None)
    for namespace in ("other", "another"):
        admit(enforcer, namespace)
        admit(enforcer, namespace)
        with pytest.raises(LimitExceeded):
            admit(enforcer, namespace)


def test_bytes_are_admitted_up_to_the_limit(enforcer: LimitEnforcer) -> None:
    """A smaller session may still fit. Each session counts more than its value, or small ones would use any space."""
    admit(enforcer, "pay", 900)
    with pytest.raises(LimitExceeded, match="1512 bytes"):
        admit(enforcer, "pay", 101)
    admit(enforcer, "pay", 100)
    with pytest.raises(LimitExceeded):
        admit(enforcer, "pay", 1)


def test_a_count_finds_the_entries_of_the_engine(
    engine: Engine, enforcer: LimitEnforcer, shared: SharedCounters
) -> None:
    """Including those of other and earlier servers, without expired and removed ones."""
    for number in range(3):
        engine.put("shop", b"%d" % number, b"v" * 100, 100)
    engine.put("shop.eu", b"key", b"v" * 100, 5)
    counting = UsageRecounter(engine, enforcer, shared.usage)
    counting.count()
    with pytest.raises(LimitExceeded):
        admit(enforcer, "shop")
    CLOCK.now += 6
    counting.count()
    admit(enforcer, "shop")
    with pytest.raises(LimitExceeded):
        admit(enforcer, "shop")


@pytest.mark.parametrize("end", ["take", "remove"])
def test_a_tombstone_counts_as_the_session_that_it_replaces(
    engine: Engine, enforcer: LimitEnforcer, shared: SharedCounters, end: str
) -> None:
    """Until it expires: storing and removing in turns frees no space."""
    for number in range(4):
        engine.put("shop", b"%d" % number, b"value", 5)
        getattr(engine, end)("shop", b"%d" % number)
    counting = UsageRecounter(engine, enforcer, shared.usage)
    counting.count()
    with pytest.raises(LimitExceeded):
        admit(enforcer, "shop")
    CLOCK.now += 6
    counting.count()
    admit(enforcer, "shop")


def test_entries_admitted_during_a_count_remain_counted(
    engine: Engine, enforcer: LimitEnforcer, shared: SharedCounters
) -> None:
    """Whether or not the count included them."""
    admit(enforcer, "shop")

    class Slow:
        """An engine that admits sessions during a count."""

        def usage(self, namespace: str | None) -> dict[str, Any]:
            counted = engine.usage(namespace)
            admit(enforcer, "shop")
            admit(enforcer, "shop")
            return counted

    UsageRecounter(Slow(), enforcer, shared.usage).count()  # type: ignore[arg-type] # as much as is called
    admit(enforcer, "shop")
    admit(enforcer, "shop")
    with pytest.raises(LimitExceeded):
        admit(enforcer, "shop")


def test_forked_processes_count_together() -> None:
    """Although each has an enforcer of its own. The fork is in a process without gRPC."""
    script = """
import os
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import LimitEnforcer, LimitExceeded, SharedCounters
shared = SharedCounters.create()
def admit():
    LimitEnforcer(Limit(sessions=4), shared=shared).for_namespace("shop").admit_entry(10)
child = os.fork()
if not child:
    for _ in range(3):
        admit()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
admit()
try:
    admit()
except LimitExceeded:
    pass
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_size_limits_nothing_is_counted(shared: SharedCounters) -> None:
    """A count takes time."""

    class Untouched:
        """An engine without methods."""

    UsageRecounter(Untouched(), LimitEnforcer(Limit(watchers=1)), shared.usage).count()  # type: ignore[arg-type]


class Abort(Exception):
    """The service ended the call with an error."""


class Context:
    """The part of a grpc.ServicerContext that a rejected call uses."""

    def abort_with_status(self, _status: object) -> None:
        raise Abort


def test_only_stored_sessions_count() -> None:
    """Calls beyond the rate, retries and rejected Puts do not."""
    shared = SharedCounters.create(lambda: 0.0)
    enforcer = LimitEnforcer(Limit(operations_per_second=1, sessions=10), shared=shared)
    with contextlib.closing(LmdbEngine(None, capacity=1 << 20)) as engine:
        service = SessionStoreService(engine, WatchHub(engine), 600.0, enforcer=enforcer)
        state = enforcer.for_namespace("shop")
        assert state is not None
        assert state.usage is not None

        def put(key: bytes, value: bytes) -> pb.PutRequest:
            return pb.PutRequest(namespace="shop", key=key, value=value, ttl=Duration(seconds=60))

        operations = [put(b"1", b"value"), put(b"1", b"value"), put(b"1", b"other"), put(b"2", b"value")]
        request = pb.BatchRequest(operations=[pb.BatchOperation(put=each) for each in operations])
        context: Any = Context()
        service.Batch(request, context)
        assert (state.usage.entries, state.usage.bytes) == (2, 10 + 2 * ENTRY_BYTES)
        with pytest.raises(Abort):
            service.Put(put(b"3", b"value"), context)
        with pytest.raises(Abort):
            service.Batch(request, context)
        assert (state.usage.entries, state.usage.bytes) == (2, 10 + 2 * ENTRY_BYTES)


@pytest.fixture(params=["lmdb", "redis"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[SessionStoreService, Engine]]:
    """A service with a limit of two sessions in each namespace, and its engine."""
    with contextlib.ExitStack() as stack:
        url = "lmdb:" if request.param == "lmdb" else stack.enter_context(valkey_server()).url + "?timeout_ms=5000"
        engine = stack.enter_context(contextlib.closing(open_engine(url, capacity=1 << 20)))
        yield SessionStoreService(engine, WatchHub(engine), 600.0, enforcer=LimitEnforcer(Limit(sessions=2))), engine


def test_removes_of_unknown_keys_are_limited(served: tuple[SessionStoreService, Engine]) -> None:
    """Each leaves one tombstone. Beyond the limit it is rejected, but a Remove of a session still succeeds."""
    (service, engine), context = served, Context()

    def remove(*keys: bytes, namespace: str = "shop") -> list[int]:
        operations = [pb.BatchOperation(remove=pb.RemoveRequest(namespace=namespace, key=key)) for key in keys]
        answer = service.Batch(pb.BatchRequest(operations=operations), context)  # type: ignore[arg-type] # enough of one
        return [-result.error.code if result.HasField("error") else result.remove.removed for result in answer.results]

    refused = -grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    engine.put("shop", b"there", b"value", 60.0)
    assert remove(b"1", b"1", b"1") == [False] * 3
    assert remove(b"2", b"3", b"there", b"1") == [False, refused, True, False]
    with pytest.raises(Abort):
        service.Remove(pb.RemoveRequest(namespace="shop", key=b"4"), context)  # type: ignore[arg-type]
    assert engine.usage("shop")["shop"].tombstones == 3
    assert remove(b"1", namespace="pay") == [False]
    put = pb.PutRequest(namespace="pay", key=b"k", value=b"value", ttl=Duration(seconds=60))
    assert service.Put(put, context).ttl.seconds > 0  # type: ignore[arg-type]


def test_a_name_without_entries_releases_its_slot() -> None:
    counters = UsageCounters()
    for number in range(20_000):
        counter = UsageCounter(counters, f"{number}")
        assert (counter.entries, counter.bytes) == (0, 0)
        if number % 100 == 0:
            counter.add(7)
            assert (counter.entries, counter.bytes) == (1, 7 + ENTRY_BYTES)
    assert len(counters.snapshot()) == 200
    counters.replace({}, counters.snapshot())
    assert not counters.snapshot()
    assert counter.entries == 0
