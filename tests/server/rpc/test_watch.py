"""Watch over the wire: the changes of a namespace arrive in order, through every worker."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

import resumed
from resumed import StoreClient
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.watch.hub import READ_CHANGES
from support.redis import redis_server, valkey_cluster, valkey_sentinels, valkey_server
from support.server import running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from resumed._client.store import Watch, WatchBatch

PATIENCE = 10.0


PATIENT = "?timeout_ms=5000"
"""A busy machine is no broken promise."""


@contextmanager
def on_lmdb(transport: str, workers: int) -> Iterator[list[str]]:
    """One server with a database of its own."""
    with running_server("--transport", transport, workers=workers) as server:
        yield [server.target]


@contextmanager
def on_redis(redis: Callable[[], AbstractContextManager[Any]]) -> Iterator[list[str]]:
    """Two servers on one Redis, Valkey, cluster or Sentinel."""
    with ExitStack() as held:
        url = held.enter_context(redis()).url
        yield [held.enter_context(running_server("--storage", url + PATIENT)).target for _ in range(2)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(partial(on_lmdb, "grpcio", 1), id="one process"),
        pytest.param(partial(on_lmdb, "grpcio", 2), id="two workers"),
        pytest.param(partial(on_lmdb, "native", 1), id="one native process"),
        pytest.param(partial(on_lmdb, "native", 2), id="two native workers"),
        pytest.param(partial(on_redis, valkey_server), id="two servers on Valkey"),
        pytest.param(partial(on_redis, redis_server), id="two servers on Redis"),
        pytest.param(partial(on_redis, valkey_cluster), id="two servers on a cluster"),
        pytest.param(partial(on_redis, valkey_sentinels), id="two servers behind Sentinels"),
    ],
)
def targets(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The addresses of the servers of one store."""
    with request.param() as targets:
        yield targets


@pytest.fixture
def connected(targets: list[str]) -> Iterator[Callable[..., StoreClient]]:
    """Connect to each server of the store in turn, and so, after some connections, to each worker."""
    turns = itertools.cycle(targets)
    with ExitStack() as held:

        def connected(namespace: str) -> StoreClient:
            return held.enter_context(closing(StoreClient(next(turns), namespace=namespace, deadline=PATIENCE)))

        yield connected


@pytest.fixture
def store(connected: Callable[..., StoreClient]) -> StoreClient:
    """A client of a namespace that only this test uses."""
    return connected(os.urandom(8).hex())


@pytest.fixture
def elsewhere(connected: Callable[..., StoreClient], store: StoreClient) -> Callable[[], StoreClient]:
    """Connect to the same namespace again."""
    return lambda: connected(store.namespace)


def read_until(watch: Watch, *last: tuple[bytes, bytes | None]) -> tuple[dict[bytes, list[bytes | None]], bytes]:
    """Read until the last change of each key in `last` has that value; return all changes, and the position."""
    changes: dict[bytes, list[bytes | None]] = {}
    position = b""
    for news in watch:
        for change in news.changes:
            changes.setdefault(change.key, []).append(change.session.value if change.session else None)
        position = news.position or position
        if all(changes.get(key, [b""])[-1] == value for key, value in last):
            break
    return changes, position


def test_changes_arrive_in_order(store: StoreClient, elsewhere: Callable[[], StoreClient]) -> None:
    """Put, Take and Remove over other connections. A Get and a repeated Put are not changes."""
    with store.watch() as watch:
        assert not watch.resumed_from_position
        for key in (b"a", b"b"):
            elsewhere().put(key, b"value " + key, 100)
        store.put(b"a", b"value a", 100)
        store.get(b"a")
        changes, _ = read_until(watch, (b"a", b"value a"), (b"b", b"value b"))
        assert changes == {b"a": [b"value a"], b"b": [b"value b"]}
        elsewhere().take(b"a")
        elsewhere().remove(b"b")
        store.remove(b"unknown")
        changes, _ = read_until(watch, (b"a", None), (b"b", None), (b"unknown", None))
        assert changes == {b"a": [None], b"b": [None], b"unknown": [None]}


def test_the_operations_of_a_batch_are_changes(store: StoreClient) -> None:
    with store.watch() as watch:
        store.batch([resumed.Put(b"a", b"1", 100), resumed.Get(b"a"), resumed.Take(b"a"), resumed.Put(b"c", b"2", 100)])
        changes, _ = read_until(watch, (b"a", None), (b"c", b"2"))
        assert changes in ({b"a": [None], b"c": [b"2"]}, {b"a": [b"1", None], b"c": [b"2"]})


def test_changes_of_other_namespaces_do_not_arrive(store: StoreClient, connected: Callable[..., StoreClient]) -> None:
    """A tenant receives its own sessions only."""
    with store.watch() as watch:
        connected("other").put(os.urandom(8), b"value", 100)
        store.put(b"mine", b"value", 100)
        assert read_until(watch, (b"mine", b"value"))[0] == {b"mine": [b"value"]}


def test_a_stream_continues_at_a_position(store: StoreClient, elsewhere: Callable[[], StoreClient]) -> None:
    """Any server sends the missed changes first. A session that was stored and removed is a removal."""
    with store.watch() as watch:
        store.put(b"a", b"1", 100)
        _, position = read_until(watch, (b"a", b"1"))
    store.put(b"b", b"2", 100)
    store.remove(b"a")
    store.put(b"c", b"3", 100)
    store.remove(b"c")
    for there in (elsewhere(), elsewhere()):
        with there.watch(position) as watch:
            assert watch.resumed_from_position
            news: list[WatchBatch] = []
            for each in watch:
                news.append(each)
                if each.live:
                    break
        changes = [(change.key, change.session and change.session.value) for each in news for change in each.changes]
        assert sorted(changes) == [(b"a", None), (b"b", b"2"), (b"c", None)]
        assert [each.live for each in news] == [False] * (len(news) - 1) + [True]


@pytest.mark.parametrize("position", [b"nonsense", bytes(16), b"\xff" * 16, b"x" * 64])
def test_an_unknown_position_starts_a_new_stream(store: StoreClient, position: bytes) -> None:
    """As does the position of another store."""
    with store.watch(position) as watch:
        assert not watch.resumed_from_position


@pytest.mark.parametrize(("namespace", "position"), [("Shop", b""), ("shop", bytes(65))])
def test_an_invalid_field_is_named(connected: Callable[..., StoreClient], namespace: str, position: bytes) -> None:
    with pytest.raises(resumed.InvalidRequest), connected(namespace).watch(position):
        pass


def test_a_stream_without_changes_has_heartbeats(store: StoreClient) -> None:
    """About one a second; another stream can continue at its position."""
    with store.watch() as watch:
        assert next(iter(watch)).live
        changes, position, live = next(iter(watch))
        assert not changes
        assert live
    with store.watch(position) as watch:
        assert watch.resumed_from_position


def test_fifty_watchers_delay_no_call(store: StoreClient, elsewhere: Callable[[], StoreClient]) -> None:
    """They have threads of their own, and all receive the change."""
    with ExitStack() as open_streams:
        watches = [open_streams.enter_context(elsewhere().watch()) for _ in range(50)]
        store.put(b"key", b"value", 100)
        assert store.get(b"key", deadline=5)
        for watch in watches:
            assert read_until(watch, (b"key", b"value"))[0] == {b"key": [b"value"]}


# --- Removals ------------------------------------------------------------------------------------------------------


class Tenant:
    """A namespace of its own, at each server of the store in turn."""

    def __init__(self, channels: Iterator[grpc.Channel], targets: list[str]) -> None:
        self._channels, self._targets = channels, targets
        self.namespace = os.urandom(8).hex()

    def remove(self, *keys: bytes, ttl: int | None = 600) -> None:
        """Remove sessions, by a lasting removal unless `ttl` is None."""
        lasting = None if ttl is None else Duration(seconds=ttl)
        removes = [pb.RemoveRequest(namespace=self.namespace, key=key, ttl=lasting) for key in keys]
        for start in range(0, len(removes), 256):
            operations = [pb.BatchOperation(remove=each) for each in removes[start : start + 256]]
            results = self._stub().Batch(pb.BatchRequest(operations=operations), timeout=PATIENCE).results
            assert not any(each.HasField("error") for each in results)

    def put(self, *keys: bytes) -> None:
        """Store sessions."""
        for key in keys:
            put = pb.PutRequest(namespace=self.namespace, key=key, value=b"value", ttl=Duration(seconds=600))
            self._stub().Put(put, timeout=PATIENCE)

    def purge(self, issued_before: float | None = None) -> float:
        """Purge the namespace, and return the time up to which it is purged."""
        with resumed.Admin(self._targets[0], deadline=PATIENCE) as admin:
            return admin.purge(self.namespace, issued_before)

    def watch(self, position: bytes = b"", *, removals_only: bool = True) -> Iterator[pb.WatchResponse]:
        """Open a stream."""
        request = pb.WatchRequest(namespace=self.namespace, position=position, removals_only=removals_only)
        stream: Iterator[pb.WatchResponse] = self._stub().Watch(request, timeout=60.0)
        return stream

    def _stub(self) -> SessionStoreServiceStub:
        return SessionStoreServiceStub(next(self._channels))


@pytest.fixture
def tenant(targets: list[str]) -> Iterator[Tenant]:
    with ExitStack() as held:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each, and so each worker in its turn
        channels = [held.enter_context(grpc.insecure_channel(target, options)) for target in targets * 2]
        yield Tenant(itertools.cycle(channels), targets)


def read_until_live(stream: Iterator[pb.WatchResponse]) -> tuple[list[pb.WatchEvent], bytes]:
    """Return the events up to the first live response, and its position."""
    events: list[pb.WatchEvent] = []
    for response in stream:
        events += response.events
        if response.live:
            return events, response.position
    pytest.fail("the stream ended")


def read_until_removed(stream: Iterator[pb.WatchResponse], key: bytes) -> list[pb.WatchEvent]:
    """Return the events up to the removal of `key`."""
    events: list[pb.WatchEvent] = []
    for response in stream:
        events += response.events
        if any(each.removed.key == key for each in response.events):
            return events
    pytest.fail("the stream ended")


def test_a_stream_of_removals_begins_with_those_in_force_and_the_last_purge(tenant: Tenant) -> None:
    """In several responses, none of them live and none with a position, so that a stream cannot continue in between."""
    keys = {b"%d" % number for number in range(2 * READ_CHANGES + 1)}
    tenant.put(b"session", b"removed")
    tenant.remove(*keys)
    tenant.remove(b"removed", b"unknown", ttl=None)
    cutoff = tenant.purge()
    stream = tenant.watch()
    first = next(stream)
    assert first.removals_only
    assert (first.continued, first.live, first.position, len(first.events)) == (False, False, b"", 0)
    (purge, *removals), position = read_until_live(stream)
    assert not purge.purged.HasField("issued_before_time")
    assert purge.purged.purge_time.ToMicroseconds() == round(cutoff * 1e6)
    assert {each.removed.key for each in removals} == keys
    assert all(0 < each.removed.ttl.ToMilliseconds() <= 600_000 for each in removals)
    assert position


def test_a_stream_of_removals_has_lasting_removals_and_purges_only(tenant: Tenant) -> None:
    stream = tenant.watch()
    assert read_until_live(stream)[0] == []
    tenant.put(b"session", b"removed")
    tenant.remove(b"removed", ttl=None)
    tenant.remove(b"session", ttl=300)
    tenant.purge(1_000_000_000.0)
    tenant.remove(b"last", ttl=30 * 86_400)
    events = read_until_removed(stream, b"last")
    removal, last = (each for each in events if each.HasField("removed"))
    (purge,) = (each for each in events if each.HasField("purged"))
    assert removal.removed.key == b"session"
    assert 590_000 < removal.removed.ttl.ToMilliseconds() <= 600_000, "the session itself would have lasted longer"
    assert purge.purged.issued_before_time.ToMicroseconds() == 10**15
    assert purge.purged.purge_time.ToMicroseconds() > 10**15
    assert 6.9 * 86_400 < last.removed.ttl.seconds <= 7 * 86_400


def test_a_stream_of_removals_continues_at_a_position(tenant: Tenant) -> None:
    """Any server sends the removals and purges that were missed."""
    tenant.remove(b"before")
    _, position = read_until_live(tenant.watch())
    tenant.put(b"session")
    tenant.remove(b"missed", b"session")
    tenant.remove(b"other", ttl=None)
    tenant.purge(1_000_000_000.0)
    for _ in range(2):
        stream = tenant.watch(position)
        first = next(stream)
        assert (first.continued, first.removals_only, first.live, len(first.events)) == (True, True, False, 0)
        events, _ = read_until_live(stream)
        assert {each.removed.key for each in events if each.HasField("removed")} >= {b"missed", b"session"}
        assert b"other" not in {each.removed.key for each in events}
        assert not any(each.HasField("stored") for each in events)
        assert sum(each.HasField("purged") for each in events) >= 1


def test_an_unknown_position_of_removals_starts_with_all_of_them(tenant: Tenant) -> None:
    tenant.remove(b"k")
    stream = tenant.watch(b"nonsense")
    first = next(stream)
    assert (first.continued, first.removals_only) == (False, True)
    (removal,), _ = read_until_live(stream)
    assert removal.removed.key == b"k"


def test_no_removal_is_missed_between_the_snapshot_and_the_stream(tenant: Tenant) -> None:
    """Each is in one or the other."""
    keys = [b"%d" % number for number in range(1_000)]

    def remove_all() -> None:
        for key in keys:
            tenant.remove(key)

    removing = threading.Thread(target=remove_all)
    removing.start()
    streams = [tenant.watch() for _ in range(8)]
    removing.join()
    tenant.remove(b"last")
    for stream in streams:
        assert {each.removed.key for each in read_until_removed(stream, b"last")} == {*keys, b"last"}


def test_a_watcher_of_all_changes_receives_lasting_removals_as_such(tenant: Tenant) -> None:
    """And purges with their time."""
    stream = tenant.watch(removals_only=False)
    first = next(stream)
    assert (first.removals_only, first.live) == (False, True)
    tenant.remove(b"plain", ttl=None)
    tenant.purge()
    tenant.remove(b"last")
    events = read_until_removed(stream, b"last")
    plain, last = (each for each in events if each.HasField("removed"))
    (purge,) = (each for each in events if each.HasField("purged"))
    assert not plain.removed.HasField("ttl")
    assert purge.purged.HasField("purge_time")
    assert 590 < last.removed.ttl.seconds <= 600


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_the_end_of_the_server_ends_the_stream(transport: str) -> None:
    """With UNAVAILABLE, so the client continues at another server."""
    with running_server("--transport", transport) as server:
        store = StoreClient(server.target, namespace="shop", deadline=PATIENCE)
        with store.watch() as watch:
            threading.Thread(target=server.stop).start()
            with pytest.raises(resumed.StoreUnavailable):
                read_until(watch, (b"never", b"stored"))
