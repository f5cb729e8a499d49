"""Purge and Stats over the wire, with every transport and engine, through every worker."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status

from resumed import Admin, AlreadyExists, Get, NamespaceStats, Put, SessionStore
from resumed._client.store import Change
from resumed.v1 import admin_pb2 as pb
from resumed.v1 import session_store_pb2
from resumed.v1.admin_pb2_grpc import AdminServiceStub
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.redis import valkey_cluster, valkey_server
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 10.0
PURGED = Change(b"", None, None)
PATIENT = "?timeout_ms=5000"
"""Generous, because tests run on loaded machines."""


@pytest.fixture(
    scope="module",
    params=["one process", "two native workers", "two servers on Valkey", "two servers on a cluster"],
)
def targets(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    with ExitStack() as held:
        if "servers" not in request.param:
            front, workers = ("native", 2) if "native" in request.param else ("grpcio", 1)
            yield [held.enter_context(running_server("--transport", front, workers=workers)).target]
            return
        storage: Any = held.enter_context(valkey_cluster() if "cluster" in request.param else valkey_server())
        yield [held.enter_context(running_server("--storage", storage.url + PATIENT)).target for _ in range(2)]


@pytest.fixture
def admin(targets: list[str]) -> Iterator[Admin]:
    with Admin(targets[0], deadline=PATIENCE) as admin:
        yield admin


@pytest.fixture
def connected(targets: list[str]) -> Iterator[Callable[[], SessionStore]]:
    """Make a handshake, read the server's first gRPC frame, which follows its tickets, and close.

    Returns whether `session` was resumed, and the session to resume next.
    """
    namespace = os.urandom(8).hex()
    with ExitStack() as held:
        yield lambda: held.enter_context(closing(SessionStore(targets[-1], namespace=namespace, deadline=PATIENCE)))


@pytest.fixture
def store(connected: Callable[[], SessionStore]) -> SessionStore:
    """A real server, shared by all tests that do not harm it."""
    return connected()


def test_once_a_purge_is_answered_no_server_and_no_worker_returns_what_was_stored(
    admin: Admin, connected: Callable[[], SessionStore]
) -> None:
    stores = [connected() for _ in range(10)]
    for number, store in enumerate(stores):
        store.put(b"%d" % number, b"value", 60.0)
    began = time.time()
    mark = admin.purge(stores[0].namespace)
    assert began - 1.0 < mark < time.time() + 1.0
    for store in stores:
        assert store.batch([Get(b"%d" % number) for number in range(10)]) == [None] * 10
        assert store.get(b"1") is None
        assert store.take(b"2") is None
    stores[0].put(b"new", b"value", 60.0)
    assert all(store.get(b"new") for store in stores)


def test_a_put_that_arrives_after_the_purge_of_its_session_is_refused(
    admin: Admin, connected: Callable[[], SessionStore]
) -> None:
    issued = time.time() - 5.0
    admin.purge(connected().namespace)
    for _ in range(5):
        store = connected()
        with pytest.raises(AlreadyExists):
            store.put(b"late", b"value", 60.0, issued=issued)
        (outcome,) = store.batch([Put(b"late", b"value", 60.0, issued)])
        assert isinstance(outcome, AlreadyExists)
        assert store.get(b"late") is None
    store.put(b"untimed", b"value", 60.0)
    assert store.get(b"untimed")


def test_a_purge_up_to_a_time_spares_what_was_issued_since(admin: Admin, store: SessionStore) -> None:
    moment = round(time.time()) - 100.0
    for key, seconds in ((b"before", -0.001), (b"then", 0.0), (b"after", 50.0)):
        store.put(key, b"value", 60.0, issued=moment + seconds)
    assert admin.purge(store.namespace, moment) == moment
    assert [key for key in (b"before", b"then", b"after") if store.get(key)] == [b"then", b"after"]
    assert admin.purge(store.namespace, moment - 50.0) == moment


def test_whoever_watches_is_told_and_the_log_says_who_purged(
    admin: Admin, store: SessionStore, connected: Callable[[], SessionStore]
) -> None:
    store.put(b"old", b"value", 60.0)
    with connected().watch() as watch:
        admin.purge(store.namespace)
        store.put(b"new", b"value", 60.0)
        told: list[Change] = []
        for news in watch:
            told += news.changes
            if any(change.key == b"new" for change in told):
                break
    assert PURGED in told
    assert all(change.key != b"old" for change in told[told.index(PURGED) :])


def test_whoever_watches_is_told_up_to_when_and_when_sessions_were_issued(
    admin: Admin, store: SessionStore, connected: Callable[[], SessionStore]
) -> None:
    moment = round(time.time()) - 100.0
    with connected().watch() as watch:
        store.put(b"k", b"value", 60.0, issued=moment)
        admin.purge(store.namespace, moment - 50.0)
        admin.purge(store.namespace, moment)
        told: list[Change] = []
        for news in watch:
            told += news.changes
            if len(told) >= 3:
                break
    assert [(change.key, change.time) for change in told] == [(b"k", moment), (b"", moment - 50.0), (b"", moment)]


def test_a_watcher_that_was_away_learns_of_the_purge(
    admin: Admin, store: SessionStore, connected: Callable[[], SessionStore]
) -> None:
    with connected().watch() as watch:
        position = next(iter(watch)).position
    admin.purge(store.namespace)
    with connected().watch(position) as watch:
        if watch.continued:
            told = next(changes for changes, _, _ in watch if changes)
            assert told == [PURGED]


def test_stats_count_a_namespace_or_all(admin: Admin, store: SessionStore) -> None:
    assert admin.stats(store.namespace) == {store.namespace: NamespaceStats(0, 0, 0, 0, None)}
    store.batch([Put(b"%d" % number, b"v" * 50, 600.0) for number in range(20)])
    store.remove(b"1")
    assert admin.stats(store.namespace) == {store.namespace: NamespaceStats(19, 950, 1, 0, None)}
    assert admin.stats()[store.namespace].sessions == 19
    mark = admin.purge(store.namespace)
    stats = admin.stats(store.namespace)[store.namespace]
    assert (stats.sessions, stats.value_bytes, stats.tombstones, stats.issued_before) == (0, 0, 1, mark)
    until(lambda: admin.stats(store.namespace)[store.namespace].purged == 0)


def test_stats_come_in_pages(targets: list[str], connected: Callable[[], SessionStore]) -> None:
    names = sorted(f"{connected().namespace}-{number}" for number in range(5))
    with ExitStack() as held, grpc.insecure_channel(targets[0]) as channel:
        for name in names:
            store = held.enter_context(closing(SessionStore(targets[-1], namespace=name, deadline=PATIENCE)))
            store.put(b"k", b"value", 60.0)
        stats, pages, request = AdminServiceStub(channel).Stats, list[list[str]](), pb.StatsRequest(page_size=2)
        request.page_token = names[0][:-1]  # behind all others that sort before
        while not pages or request.page_token:
            answer = stats(request, timeout=PATIENCE)
            pages.append([each.namespace for each in answer.namespaces if each.namespace in names])
            assert len(answer.namespaces) <= 2
            request.page_token = answer.next_page_token
    assert [name for page in pages for name in page] == names
    assert pages[:2] == [names[:2], names[2:4]]


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Purge", pb.PurgeRequest(), "namespace"),
        ("Purge", pb.PurgeRequest(namespace="Shop"), "namespace"),
        ("Purge", pb.PurgeRequest(namespace="*"), "namespace"),
        ("Purge", pb.PurgeRequest(namespace="shop", issued_before_time=Timestamp(seconds=-1)), "issued_before_time"),
        ("Purge", pb.PurgeRequest(namespace="shop", issued_before_time=Timestamp(seconds=2**40)), "issued_before_time"),
        ("Purge", pb.PurgeRequest(namespace="shop", issued_before_time=Timestamp(seconds=2**32)), "issued_before_time"),
        ("Stats", pb.StatsRequest(namespace="*"), "namespace"),
        ("Stats", pb.StatsRequest(namespace="n" * 64), "namespace"),
        ("Stats", pb.StatsRequest(page_size=-1), "page_size"),
        ("Stats", pb.StatsRequest(page_token="n" * 64), "page_token"),
        ("Put", session_store_pb2.PutRequest(issue_time=Timestamp(seconds=-1)), "issue_time"),
        ("Put", session_store_pb2.PutRequest(issue_time=Timestamp(nanos=1_000_000_000)), "issue_time"),
    ],
)
def test_a_field_outside_its_limits_is_named(targets: list[str], method: str, request_: Any, field: str) -> None:
    if method == "Put":
        request_.MergeFrom(session_store_pb2.PutRequest(namespace="shop", key=b"k", value=b"v"))
        request_.ttl.seconds = 60
    with grpc.insecure_channel(targets[0]) as channel:
        stub: Any = SessionStoreServiceStub(channel) if method == "Put" else AdminServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, method)(request_, timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)
    assert status is not None
    violations = BadRequest()
    assert any(detail.Unpack(violations) for detail in status.details)
    assert [violation.field for violation in violations.field_violations] == [field]


def test_the_log_has_a_line_for_each_purge() -> None:
    with running_server() as server, Admin(server.target, deadline=PATIENCE) as admin:
        admin.purge("shop", 1_700_000_000.0)
        (line,) = server.wait_for_log("namespace purged")
        assert (line["namespace"], line["issued_before"]) == ("shop", "2023-11-14T22:13:20+00:00")


def test_a_purge_holds_after_a_restart(tmp_path: Any) -> None:
    issued = time.time() - 10.0
    url = f"lmdb://{tmp_path}/db"
    with running_server("--storage", url) as server:
        with Admin(server.target, deadline=PATIENCE) as admin:
            admin.purge("shop")
        server.kill()
    with (
        running_server("--storage", url) as server,
        closing(SessionStore(server.target, namespace="shop", deadline=PATIENCE)) as store,
        pytest.raises(AlreadyExists),
    ):
        store.put(b"late", b"value", 60.0, issued=issued)
