"""Purge and Stats over the wire, on every transport and engine, and through every worker."""

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

from resumed import Admin, AlreadyExists, Get, NamespaceStats, Put, StoreClient
from resumed._client.store import Change
from resumed.v1 import admin_pb2 as pb
from resumed.v1 import session_store_pb2
from resumed.v1.admin_pb2_grpc import AdminServiceStub
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.mtls import Authority, Files, channel, grant
from support.redis import valkey_cluster, valkey_server
from support.server import running_server
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 10.0
PATIENT = "?timeout_ms=5000"
"""Generous, because tests run on loaded machines."""


@pytest.fixture(
    scope="module",
    params=["one process", "two native workers", "two servers on Valkey", "two servers on a cluster"],
)
def targets(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The addresses of the servers of one store."""
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
def connected(targets: list[str]) -> Iterator[Callable[[], StoreClient]]:
    """Connect to a namespace that only this test uses, at the last server, through any of its workers."""
    namespace = os.urandom(8).hex()
    with ExitStack() as held:
        yield lambda: held.enter_context(closing(StoreClient(targets[-1], namespace=namespace, deadline=PATIENCE)))


@pytest.fixture
def store(connected: Callable[[], StoreClient]) -> StoreClient:
    """A client of that namespace."""
    return connected()


def test_after_a_purge_no_server_and_no_worker_returns_an_earlier_session(
    admin: Admin, connected: Callable[[], StoreClient]
) -> None:
    """Ten connections reach every worker. Sessions stored after the purge exist for all of them."""
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


def test_a_put_that_arrives_after_the_purge_of_its_session_is_rejected(
    admin: Admin, connected: Callable[[], StoreClient]
) -> None:
    """By every worker, alone and in a Batch. A Put without an issue time counts as issued when it arrives."""
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


def test_a_purge_up_to_a_time_keeps_later_sessions(admin: Admin, store: StoreClient) -> None:
    """A second purge up to an earlier time changes nothing."""
    moment = round(time.time()) - 100.0
    for key, seconds in ((b"before", -0.001), (b"then", 0.0), (b"after", 50.0)):
        store.put(key, b"value", 60.0, issued=moment + seconds)
    assert admin.purge(store.namespace, moment) == moment
    assert [key for key in (b"before", b"then", b"after") if store.get(key)] == [b"then", b"after"]
    assert admin.purge(store.namespace, moment - 50.0) == moment


def assert_purge(change: Change, cutoff: float) -> None:
    """Check that a change is a purge of everything, about at a time."""
    assert change == Change(b"", purged=change.purged)
    assert change.purged == pytest.approx(cutoff, abs=PATIENCE)


def test_watchers_receive_the_purge_and_the_log_names_the_caller(
    admin: Admin, store: StoreClient, connected: Callable[[], StoreClient]
) -> None:
    """The purge is a change without a key. No earlier change follows it, and later ones do."""
    store.put(b"old", b"value", 60.0)
    with connected().watch() as watch:
        cutoff = admin.purge(store.namespace)
        store.put(b"new", b"value", 60.0)
        told: list[Change] = []
        for news in watch:
            told += news.changes
            if any(change.key == b"new" for change in told):
                break
    (at,) = (number for number, change in enumerate(told) if not change.key)
    assert_purge(told[at], cutoff)
    assert all(change.key != b"old" for change in told[at:])


def test_watchers_receive_the_time_of_the_purge_and_issue_times(
    admin: Admin, store: StoreClient, connected: Callable[[], StoreClient]
) -> None:
    """So a mirror keeps the sessions that the purge does not cover."""
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


def test_a_watcher_that_reconnects_receives_the_purge(
    admin: Admin, store: StoreClient, connected: Callable[[], StoreClient]
) -> None:
    """It reconnects with its last position, or with the one that it began at."""
    with connected().watch() as watch:
        position = next(iter(watch)).position
    cutoff = admin.purge(store.namespace)
    with connected().watch(position) as watch:
        if watch.resumed_from_position:
            (purge,) = next(changes for changes, *_ in watch if changes)
            assert_purge(purge, cutoff)


def test_stats_count_a_namespace_or_all(admin: Admin, store: StoreClient) -> None:
    """They include sessions that are purged but not yet deleted; these are deleted in the background."""
    assert admin.stats(store.namespace) == {store.namespace: NamespaceStats(0, 0, 0, 0, None)}
    store.batch([Put(b"%d" % number, b"v" * 50, 600.0) for number in range(20)])
    store.remove(b"1")
    assert admin.stats(store.namespace) == {store.namespace: NamespaceStats(19, 950, 1, 0, None)}
    assert admin.stats()[store.namespace].sessions == 19
    mark = admin.purge(store.namespace)
    stats = admin.stats(store.namespace)[store.namespace]
    assert (stats.sessions, stats.value_bytes, stats.tombstones, stats.issued_before) == (0, 0, 1, mark)
    until(lambda: admin.stats(store.namespace)[store.namespace].purged == 0)


def test_stats_have_pages(targets: list[str], connected: Callable[[], StoreClient]) -> None:
    """Pages are ordered by name; the last one has no token."""
    names = sorted(f"{connected().namespace}-{number}" for number in range(5))
    with ExitStack() as held, grpc.insecure_channel(targets[0]) as channel:
        for name in names:
            store = held.enter_context(closing(StoreClient(targets[-1], namespace=name, deadline=PATIENCE)))
            store.put(b"k", b"value", 60.0)
        stats, pages, request = AdminServiceStub(channel).Stats, list[list[str]](), pb.StatsRequest(page_size=2)
        request.page_token = names[0][:-1]  # follows all names that sort before it
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
def test_an_invalid_field_is_named(targets: list[str], method: str, request_: Any, field: str) -> None:
    """The call purges and stores nothing."""
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
    """It has the namespace and the time: an operator must find out why a fleet makes full handshakes."""
    with running_server() as server, Admin(server.target, deadline=PATIENCE) as admin:
        admin.purge("shop", 1_700_000_000.0)
        (line,) = server.wait_for_log("namespace purged")
        assert (line["namespace"], line["issued_before"]) == ("shop", "2023-11-14T22:13:20+00:00")
        assert line["identity"] == "anonymous"
        assert line["peer"].startswith("ipv4:127.0.0.1:")


@pytest.mark.parametrize("with_grants", [True, False])
def test_the_line_of_a_purge_has_the_identity_of_the_caller(tmp_path: Any, with_grants: bool) -> None:
    authority, identity = Authority(), "spiffe://example.org/operators/anna"
    files = Files(tmp_path).write(authority.server(), authority.pem)
    if with_grants:
        files.write(grants=grant("spiffe://example.org/operators/*", ["shop"], ["purge"]))
    with (
        running_server(*files.options) as server,
        channel(server.target, authority.pem, authority.issue(identity)) as connection,
    ):
        AdminServiceStub(connection).Purge(pb.PurgeRequest(namespace="shop"), timeout=PATIENCE)
        (line,) = server.wait_for_log("namespace purged")
    assert line["identity"] == identity


def test_a_purge_survives_a_restart(tmp_path: Any) -> None:
    """The database contains its cutoff, whether the server was killed or stopped."""
    issued = time.time() - 10.0
    url = f"lmdb://{tmp_path}/db"
    with running_server("--storage", url) as server:
        with Admin(server.target, deadline=PATIENCE) as admin:
            admin.purge("shop")
        server.kill()
    with (
        running_server("--storage", url) as server,
        closing(StoreClient(server.target, namespace="shop", deadline=PATIENCE)) as store,
        pytest.raises(AlreadyExists),
    ):
        store.put(b"late", b"value", 60.0, issued=issued)
