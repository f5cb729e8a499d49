"""Usage of limited namespaces: periodic counts plus the Puts accepted since."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from resumed.v1 import session_store_pb2 as pb
from resumed_server.auth.grants import Grants
from resumed_server.limits.config import Limit
from resumed_server.limits.enforcer import Budgets, LimitExceeded, Shared
from resumed_server.limits.usage_counters import ENTRY_BYTES, Counting, Tallies, Tally
from resumed_server.rpc.session_service import SessionStoreService
from resumed_server.storage.lmdb.engine import EmbeddedEngine
from resumed_server.storage.registry import open_engine
from resumed_server.watch.hub import Watchers
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


class Clock:
    """A clock that a test moves by hand."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = open_engine("lmdb:", capacity=16 << 20, clock=CLOCK)
    yield engine
    engine.close()


@pytest.fixture
def shared() -> Shared:
    """Shared memory in which nothing is counted yet."""
    return Shared.fresh()


@pytest.fixture
def budgets(shared: Shared) -> Budgets:
    grants: Any = SimpleNamespace(value=Grants.parse(FILE))
    return Budgets(DEFAULTS, grants, shared)


def admit(budgets: Budgets, namespace: str, size: int = 10) -> None:
    budget = budgets.of_namespace(namespace)
    assert budget
    budget.admit_entry(size)


def test_sessions_are_let_in_up_to_the_limit(budgets: Budgets) -> None:
    for namespace in ("shop", "shop.eu", "shop.us", "shop"):
        admit(budgets, namespace)
    with pytest.raises(LimitExceeded, match=r"shop, shop\.\* is at its limit of 4 sessions") as caught:
        admit(budgets, "shop.new")
    assert (caught.value.limit, caught.value.retry) == ("sessions", None)
    for namespace in ("other", "another"):
        admit(budgets, namespace)
        admit(budgets, namespace)
        with pytest.raises(LimitExceeded):
            admit(budgets, namespace)


def test_bytes_are_let_in_up_to_the_limit(budgets: Budgets) -> None:
    """Each session counts for more than its value; otherwise small sessions could fill any storage."""
    admit(budgets, "pay", 900)
    with pytest.raises(LimitExceeded, match="1512 bytes"):
        admit(budgets, "pay", 101)
    admit(budgets, "pay", 100)
    with pytest.raises(LimitExceeded):
        admit(budgets, "pay", 1)


def test_a_count_finds_what_is_there(engine: Engine, budgets: Budgets, shared: Shared) -> None:
    for number in range(3):
        engine.put("shop", b"%d" % number, b"v" * 100, 100)
    engine.put("shop.eu", b"key", b"v" * 100, 5)
    counting = Counting(engine, budgets, shared.tallies)
    counting.count()
    with pytest.raises(LimitExceeded):
        admit(budgets, "shop")
    CLOCK.now += 6
    counting.count()
    admit(budgets, "shop")
    with pytest.raises(LimitExceeded):
        admit(budgets, "shop")


@pytest.mark.parametrize("end", ["take", "remove"])
def test_a_tombstone_counts_as_the_session_whose_place_it_takes(
    engine: Engine, budgets: Budgets, shared: Shared, end: str
) -> None:
    """Otherwise a client could gain room by storing and removing in turns."""
    for number in range(4):
        engine.put("shop", b"%d" % number, b"value", 5)
        getattr(engine, end)("shop", b"%d" % number)
    counting = Counting(engine, budgets, shared.tallies)
    counting.count()
    with pytest.raises(LimitExceeded):
        admit(budgets, "shop")
    CLOCK.now += 6
    counting.count()
    admit(budgets, "shop")


def test_what_is_let_in_during_a_count_is_not_forgotten(engine: Engine, budgets: Budgets, shared: Shared) -> None:
    admit(budgets, "shop")

    class Slow:
        """An engine in which something happens while it counts."""

        def usage(self, namespace: str | None) -> dict[str, Any]:
            counted = engine.usage(namespace)
            admit(budgets, "shop")
            admit(budgets, "shop")
            return counted

    Counting(Slow(), budgets, shared.tallies).count()  # type: ignore[arg-type] # as much as is called
    admit(budgets, "shop")
    admit(budgets, "shop")
    with pytest.raises(LimitExceeded):
        admit(budgets, "shop")


def test_forked_processes_count_together(budgets: Budgets) -> None:
    child = os.fork()
    if not child:
        for _ in range(3):
            admit(budgets, "shop")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    admit(budgets, "shop.eu")
    with pytest.raises(LimitExceeded):
        admit(budgets, "shop.eu")


def test_nothing_is_counted_where_nothing_is_limited(shared: Shared) -> None:
    class Untouched:
        """An engine that fails the test when it is called."""

    Counting(Untouched(), Budgets(Limit(watchers=1)), shared.tallies).count()  # type: ignore[arg-type]


class Abort(Exception):
    """A call ends with an error."""


class Refused:
    """As much of a grpc.ServicerContext as a refusal needs."""

    def abort_with_status(self, _status: object) -> None:
        raise Abort


def test_only_what_is_stored_counts() -> None:
    shared = Shared.fresh(lambda: 0.0)
    budgets = Budgets(Limit(operations_per_second=1, sessions=10), shared=shared)
    with contextlib.closing(EmbeddedEngine(None, capacity=1 << 20)) as engine:
        service = SessionStoreService(engine, Watchers(engine), 600.0, budgets=budgets)
        budget = budgets.of_namespace("shop")
        assert budget is not None
        assert budget.tally is not None

        def put(key: bytes, value: bytes) -> pb.PutRequest:
            return pb.PutRequest(namespace="shop", key=key, value=value, ttl=Duration(seconds=60))

        operations = [put(b"1", b"value"), put(b"1", b"value"), put(b"1", b"other"), put(b"2", b"value")]
        request = pb.BatchRequest(operations=[pb.BatchOperation(put=each) for each in operations])
        context: Any = Refused()
        service.Batch(request, context)
        assert (budget.tally.sessions, budget.tally.bytes) == (2, 10 + 2 * ENTRY_BYTES)
        with pytest.raises(Abort):
            service.Put(put(b"3", b"value"), context)
        with pytest.raises(Abort):
            service.Batch(request, context)
        assert (budget.tally.sessions, budget.tally.bytes) == (2, 10 + 2 * ENTRY_BYTES)


@pytest.fixture(params=["lmdb", "redis"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[SessionStoreService, Engine]]:
    """Return the bytes that a client reads; TLS 1.3 reports a rejected certificate only after the handshake."""
    with contextlib.ExitStack() as stack:
        url = "lmdb:" if request.param == "lmdb" else stack.enter_context(valkey_server()).url + "?timeout_ms=5000"
        engine = stack.enter_context(contextlib.closing(open_engine(url, capacity=1 << 20)))
        yield SessionStoreService(engine, Watchers(engine), 600.0, budgets=Budgets(Limit(sessions=2))), engine


def test_removals_of_what_is_not_there_are_within_limits(served: tuple[SessionStoreService, Engine]) -> None:
    (service, engine), context = served, Refused()

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


def test_nobody_can_choose_names_that_share_a_slot() -> None:
    """The key of the hash is random for each server, and its workers share it."""
    one, other = Shared.fresh(), Shared.fresh()
    for name in ("tallies", "rates"):
        numbers = [getattr(shared, name).number("pay.example") for shared in (one, one, other)]
        assert numbers[0] == numbers[1] != numbers[2]


def test_a_name_of_which_nothing_is_left_gives_its_slot_back() -> None:
    """Otherwise thousands of short-lived names would share slots with the names in use."""
    tallies = Tallies()
    for number in range(20_000):
        tally = Tally(tallies, f"{number}")
        assert (tally.sessions, tally.bytes) == (0, 0)
        if number % 100 == 0:
            tally.add(7)
            assert (tally.sessions, tally.bytes) == (1, 7 + ENTRY_BYTES)
    assert len(tallies.snapshot()) == 200
    tallies.replace({}, tallies.snapshot())
    assert not tallies.snapshot()
    assert tally.sessions == 0
