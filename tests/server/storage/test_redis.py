"""The Redis engine: the contract of every engine on every kind of URL, and behaviour specific to Redis."""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import TYPE_CHECKING, ClassVar, cast

import pytest

from resumed_server.storage.engine import (
    Engine,
    Remove,
)
from resumed_server.storage.redis.admission import MARK_DIGITS
from resumed_server.storage.redis.change_log import KEPT_SECONDS
from resumed_server.storage.testing.contract import EngineContract
from resumed_server.storage.testing.fixtures import FakeClock, read_all_changes, read_removals
from resumed_server.storage.testing.state_machine import check_histories
from support.redis_engine import (
    DRIFT,
    PATIENT,
    RedisClock,
    Store,
    engine_at,
    on_cluster,
    on_redis,
    on_sentinels,
    on_valkey,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resumed_server.storage.redis.engine import RedisEngine
    from support.redis import RedisServer


@pytest.fixture(scope="module", params=[on_redis, on_valkey, on_cluster, on_sentinels], ids=lambda on: on.__name__)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store of each kind that a URL can name."""
    with request.param() as store:
        yield store


class TestRedis(EngineContract):
    tick: ClassVar[float] = DRIFT
    sweeps: ClassVar[bool] = False

    @pytest.fixture
    def clock(self, store: Store) -> FakeClock:
        return RedisClock(store.servers)

    @pytest.fixture
    def present(self) -> Callable[[], float]:
        """The clock of the suite, which does not move with the expiry of keys."""
        return time.time

    @pytest.fixture
    def engine(self, store: Store) -> Iterator[Engine]:
        with contextlib.closing(store.open()) as engine:
            yield engine

    @pytest.fixture
    def raw_values(self, store: Store, engine: RedisEngine) -> Callable[[], dict[tuple[str, bytes], bytes]]:
        """The keys of all servers."""

        def raw_values() -> dict[tuple[str, bytes], bytes]:
            values = {}
            for server in store.servers:
                for name in server.client.scan_iter(engine._prefix + b"[a-z0-9]*", count=1_000):
                    if value := server.client.get(name):
                        namespace, _, key = name[len(engine._prefix) :].partition(b":")
                        values[namespace.decode(), key] = value[MARK_DIGITS:]
            return values

        return raw_values

    @pytest.fixture
    def kept(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> tuple[int, int]:
        """Redis trims the stream of each primary by whole nodes of 100 entries."""
        monkeypatch.setattr("resumed_server.storage.redis.change_log.MOST_CHANGES", 1_000)
        return 900, 1_300 * len(store.servers)


def test_in_any_history_it_behaves_like_a_dictionary(store: Store) -> None:
    check_histories(
        lambda _clock: store.open(), lambda: RedisClock(store.servers), sweeps=False, tick=10.0, examples=30
    )


def test_it_counts_its_connections(store: Store) -> None:
    """A call opens one if none is idle, and leaves it idle; those that another call uses count as used."""
    with engine_at(store.url, f"prefix={uuid.uuid4()}:&{PATIENT}") as opened:
        engine = cast("RedisEngine", opened)
        engine.get("shop", b"key")
        before = engine.connections()
        assert before.used == 0
        assert 0 < before.idle < before.maximum
        assert before.opened >= before.idle
        pools = list(engine._nodes._pools())
        taken = [pool.get_connection() for pool in pools]
        assert engine.connections().used == len(pools)
        for pool, connection in zip(pools, taken, strict=True):
            pool.release(connection)
            pool.disconnect()
        engine.get("shop", b"key")
        after = engine.connections()
        assert after.used == 0
        assert after.opened > before.opened


def test_servers_share_one_log(store: Store) -> None:
    prefix = f"prefix={uuid.uuid4()}:&{PATIENT}"
    with engine_at(store.url, prefix) as one, engine_at(store.url, prefix) as other:
        _, position = read_all_changes(one, one.position())
        for number in range(100):
            other.put("shop", b"%d" % number, b"value", 60.0)
        changes, position = read_all_changes(one, position)
        assert changes == {("shop", b"%d" % number): [b"value"] for number in range(100)}
        for number in range(100):
            one.take("shop", b"%d" % number)
        changes, _ = read_all_changes(other, position)
        assert {("shop", b"%d" % number): [None] for number in range(100)} == changes


def test_servers_share_lasting_removals(store: Store) -> None:
    """Whichever server carries them out. No index is scanned for another prefix."""
    prefix = f"prefix={uuid.uuid4()}:&{PATIENT}"
    with engine_at(store.url, prefix) as one, engine_at(store.url, prefix) as other, engine_at(store.url) as stranger:
        keys = [b"%d" % number for number in range(300)]
        one.batch([Remove("shop", key, 600.0) for key in keys[:200]])
        for key in keys[100:]:
            other.remove("shop", key, ttl=900.0)
        for engine in (one, other):
            found = read_removals(engine, "shop")
            assert found.keys() == set(keys)
            assert {key for key, ttl in found.items() if ttl > 700.0} == set(keys[100:])
        assert read_removals(stranger, "shop") == {}


def test_the_index_of_lasting_removals_is_trimmed_and_expires(store: Store) -> None:
    """By later removals, by sweeping, and as a whole with its last removal."""
    prefix, clock = f"{uuid.uuid4()}:", RedisClock(store.servers)
    with engine_at(store.url, f"prefix={prefix}&{PATIENT}") as engine:

        def entries() -> int:
            keys = ((server, key) for server in store.servers for key in server.client.scan_iter(f"{prefix}*~shop"))
            return sum(server.client.zcard(key) for server, key in keys)

        keys = [b"long %d" % number for number in range(60)]
        engine.batch([Remove("shop", b"%d" % number, 70.0) for number in range(300)])
        engine.batch([Remove("shop", key, 600.0) for key in keys[:50]])
        clock.advance(70.0)
        assert entries() == 350
        for key in keys[50:]:
            engine.remove("shop", key, ttl=600.0)
        assert 60 < entries() < 330
        assert read_removals(engine, "shop").keys() == set(keys)
        engine.sweep(1)
        assert entries() == 60
        clock.advance(600.0)
        assert not [key for server in store.servers for key in server.client.scan_iter(f"{prefix}*~*")]
        engine.sweep(1)


def test_only_what_is_read_is_logged(store: Store) -> None:
    prefix = f"{uuid.uuid4()}:"
    with engine_at(store.url, f"prefix={prefix}&{PATIENT}") as engine:

        def streams() -> list[bytes]:
            return [key for server in store.servers for key in server.client.scan_iter(f"{prefix}{{*}}", count=1_000)]

        engine.put("shop", b"k", b"value", 60.0)
        assert engine.take("shop", b"k")
        assert not streams()
        position = engine.position()
        assert streams()
        engine.remove("shop", b"other")
        assert read_all_changes(engine, position)[0] == {("shop", b"other"): [None]}
        RedisClock(store.servers).advance(KEPT_SECONDS)
        assert not streams()
        assert engine.changes(position, engine.position(), 10) is None


@pytest.mark.parametrize("issued_at", [9_999_999_999.0, 10_000_000_000.0, 253_402_300_799.0])
def test_a_session_of_a_far_future_is_as_it_was_put(server: RedisServer, issued_at: float) -> None:
    with engine_at(server.url, PATIENT) as engine:
        for _ in range(2):
            assert engine.put("shop", b"k", b"value", 60.0, issued_at) > 0
        found = engine.get("shop", b"k")
        assert found is not None
        assert found.value == b"value"
        engine.purge("shop", None)
        assert engine.get("shop", b"k") is None


@pytest.mark.parametrize("fields", [{"+": "resumed:shop:k", "more": "x"}, {"?": "resumed:shop:k"}])
def test_a_log_entry_that_means_nothing_ends_the_log(server: RedisServer, fields: dict[str, str]) -> None:
    """A later version may have written it."""
    with engine_at(server.url, PATIENT) as engine:
        position = engine.position()
        (stream,) = server.client.keys("resumed:{*}")
        server.client.xadd(stream, fields)
        end = engine.position()
        assert engine.changes(position, end, 10) is None
        engine.remove("shop", b"k")
        assert read_all_changes(engine, end)[0] == {("shop", b"k"): [None]}


def test_a_lifetime_below_a_millisecond_is_over_at_once(server: RedisServer) -> None:
    with engine_at(server.url, PATIENT) as engine:
        assert engine.put("shop", b"k", b"value", 0.0005) == 0
        assert not server.client.keys("resumed:shop:*")
