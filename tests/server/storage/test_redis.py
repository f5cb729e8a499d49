"""The Redis engine: the contract of every engine on every kind of URL, and behaviour specific to Redis."""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import signal
import socket
import socketserver
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import pytest
import trustme
from structlog.testing import capture_logs

from resumed_server.config.types import redacted
from resumed_server.lifecycle.health import Readiness
from resumed_server.storage.engine import (
    AlreadyExists,
    Change,
    Engine,
    EngineBroken,
    EngineError,
    EngineFull,
    EngineUnavailable,
    Get,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.redis.admission import MARK_DIGITS
from resumed_server.storage.redis.change_log import KEPT_SECONDS, KNOWN_POSITIONS
from resumed_server.storage.redis.topology import PERMISSIONS, NodeBackoff
from resumed_server.storage.redis.url import RedisUrl
from resumed_server.storage.registry import open_engine, verify_url
from resumed_server.storage.testing.contract import EngineContract, FakeClock, read_all_changes, read_removals
from resumed_server.storage.testing.state_machine import check_histories
from support.redis import redis_server, valkey_cluster, valkey_sentinels, valkey_server
from support.tls import CA, CERTIFICATE
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.storage.engine import Operation
    from resumed_server.storage.redis.engine import RedisEngine
    from support.redis import RedisServer

PATIENT = "timeout_ms=5000"
"""Generous, because tests run on loaded machines."""
DRIFT = 2.0
"""Seconds that a test may take on the engine's own clock."""


class Store(NamedTuple):
    """Something that a URL names, and the servers that keep its keys."""

    url: str
    servers: Sequence[RedisServer]

    def open(self, options: str = PATIENT) -> Engine:
        """Open an engine with keys of its own."""
        return open_engine(f"{self.url}?prefix={uuid.uuid4()}:&{options}", capacity=0)


@contextlib.contextmanager
def on_redis() -> Iterator[Store]:
    with redis_server() as server:
        yield Store(server.url, [server])


@contextlib.contextmanager
def on_valkey() -> Iterator[Store]:
    with valkey_server() as server:
        yield Store(server.url, [server])


@contextlib.contextmanager
def on_cluster() -> Iterator[Store]:
    with valkey_cluster() as cluster:
        yield Store(cluster.url, cluster.nodes)


@contextlib.contextmanager
def on_sentinels() -> Iterator[Store]:
    """A primary and its replica, found through Sentinels."""
    with valkey_sentinels() as sentinels:
        yield Store(sentinels.url, [sentinels.primary])


@pytest.fixture(scope="module", params=[on_redis, on_valkey, on_cluster, on_sentinels], ids=lambda on: on.__name__)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store of each kind that a URL can name."""
    with request.param() as store:
        yield store


_BRING_NEARER = """#!lua flags=allow-cross-slot-keys
local cursor = '0'
repeat
  local found = redis.call('SCAN', cursor, 'COUNT', 1000)
  cursor = found[1]
  for _, key in ipairs(found[2]) do
    redis.call('PEXPIRE', key, redis.call('PTTL', key) - ARGV[1])
    if redis.call('TYPE', key)['ok'] == 'zset' then
      local ends = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
      for at = 1, #ends, 2 do redis.call('ZADD', key, string.format('%.0f', ends[at + 1] - ARGV[1]), ends[at]) end
    end
  end
until cursor == '0'"""


class RedisClock(FakeClock):
    """Lets the time of servers, which begin empty, pass by bringing the ends of keys and removals nearer."""

    def __init__(self, servers: Sequence[RedisServer]) -> None:
        super().__init__()
        self._servers = servers
        for server in servers:
            server.client.flushall()

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for server in self._servers:
            server.client.eval(_BRING_NEARER, 0, round(seconds * 1_000))


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


def test_servers_share_one_log(store: Store) -> None:
    prefix = f"prefix={uuid.uuid4()}:&{PATIENT}"
    with opened(store.url, prefix) as one, opened(store.url, prefix) as other:
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
    with opened(store.url, prefix) as one, opened(store.url, prefix) as other, opened(store.url) as stranger:
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
    with opened(store.url, f"prefix={prefix}&{PATIENT}") as engine:

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
    with opened(store.url, f"prefix={prefix}&{PATIENT}") as engine:

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


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey_server() as server:
        yield server


def opened(url: str, options: str = "") -> contextlib.closing[Engine]:
    """Open an engine, to be closed at the end."""
    return contextlib.closing(open_engine(f"{url}?{options}", capacity=0))


def refusal(url: str) -> str:
    """Return the single line with which `resumed serve` rejects a URL (exit status 2)."""
    with pytest.raises((ValueError, EngineUnavailable)) as caught:
        open_engine(url, capacity=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- URLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://store", {"topology": "server", "tls": False, "hosts": (("store", 6379),), "database": 0}),
        ("redis://[::1]:7000/3", {"hosts": (("::1", 7000),), "database": 3}),
        ("rediss://u:p%40%2F@store?ca=/ca", {"tls": True, "user": "u", "password": "p@/", "ca": Path("/ca")}),
        ("redis://:p@store?prefix=tls:&timeout_ms=100", {"user": None, "prefix": "tls:", "timeout": 0.1}),
        ("redis://u@store?password_file=/run/p", {"user": "u", "password": None, "password_file": Path("/run/p")}),
        ("redis+cluster://a:1,b:2", {"topology": "cluster", "hosts": (("a", 1), ("b", 2))}),
        ("redis+sentinel://a,b:1/main/2?wait_replicas=1", {"hosts": (("a", 26379), ("b", 1)), "wait_replicas": 1}),
        ("rediss+sentinel://a/main", {"topology": "sentinel", "tls": True, "sentinel_name": "main", "database": 0}),
    ],
)
def test_a_url_says_where_redis_is(url: str, expected: dict[str, object]) -> None:
    parsed = RedisUrl.parse(url)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://", "needs hosts"),
        ("redis://store:0", "needs hosts"),
        ("redis://store:65536", "needs hosts"),
        ("redis://a,b", "accepts one host"),
        ("redis://user:sec/ret@store", "%2F"),
        ("redis://store/one", "number of the database"),
        ("redis://store/1/2", "number of the database"),
        ("redis://store#1", "not escaped.*%23"),
        ("redis://store?frob=1", "'frob' is not an option .* timeout_ms"),
        ("redis://store?prefix=a&prefix=b", "prefix is set twice"),
        ("redis://store?prefix={a}", "without spaces and braces"),
        ("redis://store?timeout_ms=0", "timeout_ms must be a whole number from 1 to"),
        ("redis://store?wait_replicas=x", "wait_replicas must be a whole number"),
        ("redis://store?ca=/ca", "'ca' is not an option"),
        ("rediss://store?cert=/c", "both cert and key"),
        ("rediss://store?ca=", "must not be empty"),
        ("redis://:secret@store?password_file=/p", "not in both"),
        ("redis+cluster://store/1", "only one database"),
        ("redis+sentinel://store", "name of the primary in the Sentinels"),
        ("redis+ssl://store", "unknown storage engine 'redis[+]ssl': use lmdb:.*redis://"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        verify_url(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@store:1/2?prefix=x:", "redis://user:***@store:1/2?prefix=x:"),
        ("rediss://:se:c@ret@store", "rediss://:***@store"),
        ("redis+sentinel://user:secret@a,b/main", "redis+sentinel://user:***@a,b/main"),
        ("redis://store", "redis://store"),
        ("lmdb:///var/lib/a:b@c", "lmdb:///var/lib/a:b@c"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown
    if url.startswith("redis"):
        assert "secret" not in repr(RedisUrl.parse(url.replace("se:c@ret", "secret")))


# --- What cannot be the store --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_a_wrong_password_is_refused(server: RedisServer, scheme: str) -> None:
    server.client.config_set("requirepass", "right")
    for credentials in ("", ":secret@", "somebody:secret@"):
        message = refusal(f"{scheme}://{credentials}127.0.0.1:{server.port}")
        assert re.search("rejects the user or the password", message), message
        assert "secret" not in message
    server.client.auth("right")
    server.client.config_set("requirepass", "")


def test_a_user_without_permissions_is_refused(server: RedisServer) -> None:
    server.client.execute_command("ACL SETUSER humble on >pass ~* +ping")
    assert "+eval +evalsha +script|load +get" in refusal(f"redis://humble:pass@127.0.0.1:{server.port}")


def test_the_permissions_that_are_asked_for_are_enough(server: RedisServer) -> None:
    """The error message for missing permissions lists exactly these."""
    server.client.execute_command(f"ACL SETUSER modest on >pass ~resumed:* {PERMISSIONS}")
    with opened(f"redis://modest:pass@127.0.0.1:{server.port}", PATIENT) as engine:
        engine.put("shop", b"k", b"value", 60.0)
        assert engine.get("shop", b"k")
        assert engine.take("shop", b"k")
        position = engine.position()
        assert not engine.remove("shop", b"other")
        assert not engine.remove("shop", b"lasting", ttl=60.0)
        assert engine.remove("shop", b"lasting", ttl=90.0) is None
        assert read_removals(engine, "shop").keys() == {b"lasting"}
        assert engine.last_purge("shop") is None
        engine.sweep(10)
        assert engine.changes(position, engine.position(), 2)
        engine.probe()
        server.client.script_flush()
        assert engine.usage("shop")["shop"].tombstones == 3


@pytest.mark.parametrize("running", [redis_server, valkey_server])
def test_a_user_with_the_permissions_of_an_older_version_is_told_which_are_missing(
    running: Callable[[], contextlib.AbstractContextManager[RedisServer]],
) -> None:
    """When they are needed: without lasting removals the older ones are enough."""
    older = PERMISSIONS.partition(" +zadd")[0]
    with running() as server:
        server.client.execute_command(f"ACL SETUSER modest on >pass ~resumed:* {older}")
        with opened(f"redis://modest:pass@127.0.0.1:{server.port}", PATIENT) as engine:
            assert engine.remove("shop", b"k") is False
            for call in (lambda: engine.remove("shop", b"k", ttl=600.0), lambda: read_removals(engine, "shop")):
                assert PERMISSIONS in str(failure(call))


def test_a_read_only_replica_is_refused(server: RedisServer) -> None:
    """A replica would serve lookups and reject all writes."""
    server.client.replicaof("127.0.0.1", 1)
    assert "replica, which is read-only; use its primary" in refusal(server.url)


def test_a_redis_too_old_is_refused() -> None:
    """Its scripts cannot declare that they may run when the memory is full."""
    with pretending(b"redis_version:6.2.14\r\nrole:master\r\n") as port:
        assert "too old (6.2.14); use Redis 7, Valkey 8" in refusal(f"redis://127.0.0.1:{port}")


def test_the_wrong_topology_is_refused(server: RedisServer, tmp_path: Path) -> None:
    assert "not a cluster; use redis://" in refusal(f"redis+cluster://127.0.0.1:{server.port}")
    assert "not a Sentinel" in refusal(f"redis+sentinel://127.0.0.1:{server.port}/main")
    with valkey_server("--cluster-enabled", "yes") as node:
        assert "node of a cluster; use redis+cluster://" in refusal(node.url)
    (tmp_path / "sentinel.conf").touch()
    with valkey_server(f"{tmp_path}/sentinel.conf", "--sentinel") as sentinel:
        assert "is a Sentinel; use redis+sentinel://" in refusal(sentinel.url)


def test_tls_is_verified_and_told_when_it_fails(tmp_path: Path) -> None:
    for name, blob in (
        ("ca", CA.cert_pem),
        ("other", trustme.CA().cert_pem),
        ("cert", CERTIFICATE.cert_chain_pems[0]),
        ("key", CERTIFICATE.private_key_pem),
    ):
        blob.write_to_path(tmp_path / name)
    options = [f"--tls-{of}-file" if of != "ca" else "--tls-ca-cert-file" for of in ("ca", "cert", "key")]
    files = itertools.chain(*zip(options, (f"{tmp_path}/{of}" for of in ("ca", "cert", "key")), strict=True))
    with redis_server("--tls-port", "{tls_port}", *files) as server:
        url = f"rediss://localhost:{server.tls_port}"
        identity = f"cert={tmp_path}/cert&key={tmp_path}/key&{PATIENT}"
        with opened(url, f"ca={tmp_path}/ca&{identity}") as engine:
            engine.put("shop", b"k", b"value", 60.0)
            assert engine.get("shop", b"k")
        assert "self-signed certificate" in refusal(f"{url}?ca={tmp_path}/other&{identity}")
        assert "cannot read" in refusal(f"{url}?ca={tmp_path}/missing")
        # In TLS 1.3 the server's alert comes after the handshake, and is lost if the connection is reset first.
        with capture_logs() as logs:
            try:
                open_engine(f"{url}?ca={tmp_path}/ca", capacity=0).close()
                complaint = logs[0]["cause"]
            except EngineUnavailable as error:
                complaint = str(error)
        assert "certificate required" in complaint or "if it requires a client certificate" in complaint
        for wrong, hint in (
            (f"rediss://localhost:{server.port}?ca={tmp_path}/ca", "if it does not use TLS, use redis:"),
            (f"redis://localhost:{server.tls_port}", "if it uses TLS, use rediss:"),
        ):
            with capture_logs() as logs, contextlib.closing(open_engine(wrong, capacity=0)) as engine:
                assert hint in logs[0]["cause"]
                with pytest.raises(EngineUnavailable):
                    engine.probe()


def test_a_password_file_is_read_for_every_connection(server: RedisServer, tmp_path: Path) -> None:
    """The password can then change while the server runs."""
    password = tmp_path / "password"
    password.write_text("one\n")
    server.client.config_set("requirepass", "one")
    with opened(server.url, f"password_file={password}&{PATIENT}") as engine:
        engine.put("shop", b"k", b"value", 60.0)
        password.write_text("two\n")
        server.client.auth("one")
        server.client.config_set("requirepass", "two")
        server.client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        assert engine.get("shop", b"k")
        server.client.auth("two")
        server.client.config_set("requirepass", "")


# --- Outages -------------------------------------------------------------------------------------------------------


def test_redis_may_come_later(server: RedisServer) -> None:
    server.kill()
    with capture_logs() as logs, opened(server.url, PATIENT) as engine:
        assert [line["event"] for line in logs] == ["storage not reached yet"]
        with pytest.raises(EngineUnavailable, match="Connection refused"):
            engine.probe()
        server.start()
        engine.probe()
        engine.put("shop", b"k", b"value", 60.0)


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_a_frozen_redis_costs_one_call_its_time_out(scheme: str) -> None:
    options = ("--cluster-enabled", "yes") if scheme == "redis+cluster" else ()
    with valkey_server(*options) as server:
        if options:
            server.client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            until(lambda: server.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        with opened(f"{scheme}://127.0.0.1:{server.port}", "timeout_ms=300") as engine:
            engine.put("shop", b"k", b"value", 60.0)
            server.signal(signal.SIGSTOP)
            try:
                causes = [str(failure(lambda: engine.get("shop", b"k"))) for _ in range(20)]
            finally:
                server.signal(signal.SIGCONT)
            assert "does not answer within 300 ms" in causes[0]
            assert sum("a moment ago" in cause for cause in causes) >= 15
            until(lambda: _works(engine))


def test_a_call_that_takes_long_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("resumed_server.storage.redis.topology.time.monotonic", lambda: now)
    backoff = NodeBackoff(RedisUrl.parse("redis://store?timeout_ms=40"))
    backoff.record_success()
    now += 0.03
    backoff.record_failure(late=True)
    backoff.check("store")
    now += 0.03
    backoff.record_failure(late=True)
    assert "a moment ago" in str(failure(lambda: backoff.check("store")))
    backoff.record_success()
    backoff.record_failure()
    assert "a moment ago" in str(failure(lambda: backoff.check("store")))


def test_a_restarted_redis_is_used_again_at_once(server: RedisServer) -> None:
    with opened(server.url, PATIENT) as engine:
        engine.put("shop", b"k", b"value", 60.0)
        server.kill()
        server.start()
        assert engine.get("shop", b"k") is None
        engine.batch([Put("shop", b"k", b"value", 60.0)])
        assert engine.get("shop", b"k")


def test_no_more_connections_than_threads_and_some(server: RedisServer) -> None:
    with contextlib.closing(open_engine(f"{server.url}?{PATIENT}", capacity=0, threads=8)) as engine:
        threads = [threading.Thread(target=_many_gets, args=(engine,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.client.client_list()) <= 8 + 1 + 1  # each thread's, the probe's, the test's


def test_scripts_go_by_their_hashes(server: RedisServer) -> None:
    def calls(command: str) -> int:
        return int(server.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])

    operations: list[Operation] = [Get("shop", b"k"), Take("shop", b"k"), Remove("shop", b"k")]
    with opened(server.url, PATIENT) as engine:
        before = calls("eval")
        for _ in range(3):
            engine.put("shop", b"other", b"value", 60.0)
            engine.batch([Put("shop", b"k", b"value", 60.0), *operations])
        assert calls("eval") == before
        assert calls("evalsha") >= 3 * 5
        server.client.script_flush()
        assert engine.get("shop", b"other")
        server.client.script_flush()
        assert [type(each) for each in engine.batch(operations)] == [type(None)] * 3
        assert calls("eval") == before + 4


def test_what_redis_had_forgotten_is_waited_for_as_well(server: RedisServer) -> None:
    with opened(server.url, "wait_replicas=1&timeout_ms=200") as engine:
        engine.put("shop", b"k", b"value", 60.0)
        server.client.script_flush()
        with pytest.raises(EngineUnavailable, match="replicas"):
            engine.remove("shop", b"k")


def replicas_missing(server: RedisServer, *, broken: bool) -> str:
    server.client.config_set("min-replicas-to-write", int(broken))
    return "too few replicas (NOREPLICAS); see its min-replicas-to-write"


def snapshots_failing(server: RedisServer, *, broken: bool) -> str:
    (server.break_snapshots if broken else server.mend_snapshots)()
    return "cannot save its snapshot (MISCONF); see its log"


@pytest.mark.parametrize("running", [redis_server, valkey_server])
@pytest.mark.parametrize("refuse", [replicas_missing, snapshots_failing])
def test_a_server_whose_redis_refuses_writes_is_not_serving(
    running: Callable[[], contextlib.AbstractContextManager[RedisServer]],
    refuse: Callable[..., str],
) -> None:
    """Redis answers INFO and PING all the same; the log names the cause and the remedy."""
    with running() as server, opened(server.url, PATIENT) as engine, capture_logs() as logs:
        readiness = Readiness(engine)
        readiness.probe()
        assert readiness.ready
        cause = refuse(server, broken=True)
        readiness.probe()
        assert not readiness.ready
        assert cause in logs[-1]["cause"]
        for call in (engine.get, engine.take, engine.remove):
            with pytest.raises(EngineUnavailable, match="refuses writes"):
                call("shop", b"k")
        refuse(server, broken=False)
        readiness.probe()
        assert readiness.ready


def test_whoever_closes_an_engine_need_not_wait_for_a_count(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(server.url, PATIENT) as engine:
        engine.batch([Put("shop", b"%d" % number, b"value", 60.0) for number in range(2_000)])
        monkeypatch.setattr("resumed_server.storage.redis.purges.time.sleep", lambda _: engine.close())
        with pytest.raises(EngineBroken, match="closed"):
            engine.usage(None)


def test_a_process_short_of_connections_takes_redis_for_well(server: RedisServer) -> None:
    with opened(server.url, PATIENT) as engine:
        pool = engine._nodes._client.connection_pool  # type: ignore[attr-defined]
        taken = [pool.get_connection() for _ in range(pool.max_connections)]
        for _ in range(3):
            with pytest.raises(EngineUnavailable, match=r"connections to Redis at .* are in use"):
                engine.get("shop", b"k")
        pool.release(taken.pop())
        assert engine.get("shop", b"k") is None
        for connection in taken:
            pool.release(connection)


def test_watchers_that_come_back_together_leave_connections_to_others(server: RedisServer) -> None:
    with contextlib.closing(open_engine(f"{server.url}?{PATIENT}", capacity=0, threads=1)) as engine:
        start = engine.position()
        for _ in range(4):
            engine.batch([Put("shop", uuid.uuid4().bytes, b"value", 60.0) for _ in range(256)])
        end = engine.position()

        def come_back(_: int) -> int:
            position, missed = start, 0
            while position != end:
                read = engine.changes(position, end, 1024)
                assert read
                position, missed = read[1], missed + len(read[0])
            return missed

        with ThreadPoolExecutor(40) as pool:
            missed = pool.map(come_back, range(40))
            for _ in range(100):
                engine.get("shop", b"k")
            assert list(missed) == [1024] * 40


def test_a_watcher_catches_up_in_however_many_steps(server: RedisServer) -> None:
    with opened(server.url, PATIENT) as engine:
        position = engine.position()
        engine.batch([Put("shop", b"%d" % number, b"value", 60.0) for number in range(KNOWN_POSITIONS + 100)])
        end, steps = engine.position(), 0
        while position != end:
            read = engine.changes(position, end, 1)
            assert read is not None, f"step {steps}"
            position, steps = read[1], steps + 1
        assert steps > KNOWN_POSITIONS


@pytest.mark.parametrize("running", [redis_server, valkey_server])
def test_a_full_redis_refuses_puts_only(running: Callable[[], contextlib.AbstractContextManager[RedisServer]]) -> None:
    with running() as server, opened(server.url, PATIENT) as engine:
        for key in (b"taken", b"removed", b"got"):
            engine.put("shop", key, b"value", 60.0)
        server.client.config_set("maxmemory", 1)
        with pytest.raises(EngineFull, match=r"is full \(OOM\); raise its maxmemory"):
            engine.put("shop", b"new", b"value", 60.0)
        engine.probe()  # health stays SERVING, or frontends would lose the calls that work as well
        assert engine.get("shop", b"got")
        assert engine.take("shop", b"taken")
        assert engine.remove("shop", b"removed")
        assert not engine.remove("shop", b"unknown")
        assert not engine.remove("shop", b"lasting", ttl=600.0)
        assert read_removals(engine, "shop").keys() == {b"lasting"}
        outcomes = engine.batch([Put("shop", b"new", b"value", 60.0), Get("shop", b"got"), Remove("shop", b"got")])
        assert [type(outcome) for outcome in outcomes] == [EngineFull, StoredSession, bool]
        server.client.config_set("maxmemory", 0)
        for key in (b"taken", b"removed", b"unknown"):
            with pytest.raises(AlreadyExists):
                engine.put("shop", key, b"value", 60.0)


def test_a_policy_that_evicts_is_warned_of(server: RedisServer) -> None:
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    with capture_logs() as logs, opened(server.url, PATIENT) as engine:
        assert not logs
        server.client.config_set("maxmemory", 1 << 30)
        engine.probe()
        engine.probe()
        assert [line["policy"] for line in logs] == ["allkeys-lru"]


@pytest.mark.parametrize("issued_at", [9_999_999_999.0, 10_000_000_000.0, 253_402_300_799.0])
def test_a_session_of_a_far_future_is_as_it_was_put(server: RedisServer, issued_at: float) -> None:
    with opened(server.url, PATIENT) as engine:
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
    with opened(server.url, PATIENT) as engine:
        position = engine.position()
        (stream,) = server.client.keys("resumed:{*}")
        server.client.xadd(stream, fields)
        end = engine.position()
        assert engine.changes(position, end, 10) is None
        engine.remove("shop", b"k")
        assert read_all_changes(engine, end)[0] == {("shop", b"k"): [None]}


def test_a_broken_redis_is_an_error_without_keys_and_values(server: RedisServer) -> None:
    secret = secrets.token_hex().encode()  # not a literal: a traceback shows the lines of this file
    with opened(server.url, PATIENT) as engine:
        server.client.lpush(b"resumed:shop:" + secret, b"no session")
        alone = failure(lambda: engine.put("shop", secret, secret, 60.0))
        for error in (alone, engine.batch([Get("eu", b"k"), Put("shop", secret, secret, 60.0)])[1]):
            assert isinstance(error, EngineUnavailable)
            assert "WRONGTYPE" in str(error)
            assert secret.decode() not in "".join(traceback.format_exception(error))


def test_a_lifetime_below_a_millisecond_is_over_at_once(server: RedisServer) -> None:
    with opened(server.url, PATIENT) as engine:
        assert engine.put("shop", b"k", b"value", 0.0005) == 0
        assert not server.client.keys("resumed:shop:*")


# --- Replicas and clusters -----------------------------------------------------------------------------------------


def test_wait_refuses_what_no_replica_has(server: RedisServer) -> None:
    with opened(server.url, "wait_replicas=1&timeout_ms=200") as engine:
        engine.put("shop", b"taken", b"value", 60.0)
        engine.put("shop", b"removed", b"value", 60.0)
        assert engine.get("shop", b"taken")
        for call, key in ((engine.take, b"taken"), (engine.remove, b"removed")):
            with pytest.raises(EngineUnavailable, match="replicas"):
                call("shop", key)
            assert engine.get("shop", key) is None
            with pytest.raises(EngineUnavailable, match="replicas"):
                engine.remove("shop", key, ttl=600.0)
        outcomes = engine.batch([Put("shop", b"k", b"value", 60.0), Take("shop", b"k"), Take("shop", b"k")])
        assert [type(outcome) for outcome in outcomes] == [float, EngineUnavailable, type(None)]
        # Otherwise a client that retries failed Batches would send nothing else until there is a replica.
        outcomes = engine.batch([Remove("shop", b"1"), Remove("shop", b"2")])
        assert all(isinstance(outcome, EngineUnavailable) for outcome in outcomes)
        with pytest.raises(EngineUnavailable, match="replicas"):
            engine.purge("shop", None)


def test_wait_is_content_with_a_replica() -> None:
    with (
        valkey_server() as primary,
        valkey_server("--replicaof", f"127.0.0.1 {primary.port}") as replica,
        opened(primary.url, f"wait_replicas=1&{PATIENT}") as engine,
    ):
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        engine.put("shop", b"k", b"value", 60.0)
        assert engine.take("shop", b"k")
        assert replica.client.get(b"resumed:shop:k") == b""
        assert engine.purge("shop", None) <= time.time()


def test_what_no_replica_has_is_not_acknowledged_when_it_is_repeated() -> None:
    """A repeated removal changes nothing, but must still wait for the replicas."""
    options = "wait_replicas=1&timeout_ms=200"
    with (
        valkey_server() as primary,
        valkey_server("--replicaof", f"127.0.0.1 {primary.port}") as replica,
        opened(primary.url, options) as one,
        opened(primary.url, options) as other,
    ):
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        one.put("shop", b"k", b"value", 60.0)
        replica.signal(signal.SIGSTOP)
        moment = time.time() - 5.0
        for engine in (one, one, other):
            with pytest.raises(EngineUnavailable, match="replicas"):
                engine.remove("shop", b"k")
            with pytest.raises(EngineUnavailable, match="replicas"):
                engine.purge("shop", moment)
        replica.signal(signal.SIGCONT)
        until(lambda: _acknowledged(lambda: other.remove("shop", b"k")))
        assert replica.client.get("resumed:shop:k") == b""


# --- Another process behind the name -------------------------------------------------------------------------------


def test_a_redis_that_was_started_again_has_nothing_from_before(server: RedisServer) -> None:
    """Its snapshot may contain sessions that were removed, taken or purged after it was saved."""
    issued = time.time() - 1.0
    with opened(server.url, PATIENT) as engine:
        keys = [b"removed", b"taken", b"purged", b"there"]
        for key in keys:
            engine.put("pay" if key == b"purged" else "shop", key, b"value", 600.0)
        server.client.config_set("save", "3600 1")
        server.client.save()
        engine.remove("shop", b"removed")
        engine.take("shop", b"taken")
        engine.purge("pay", None)
        restarted(server)
        assert engine.last_purge("new") is not None, "the frontends of fleet tickets must not trust older removals"
        assert len(server.client.keys("resumed:*:*")) == len(keys)
        for _ in range(2):
            for namespace, key in itertools.product(("shop", "pay"), keys):
                assert engine.get(namespace, key) is None
                assert engine.take(namespace, key) is None
            with pytest.raises(AlreadyExists):
                engine.put("pay", b"late", b"value", 60.0, issued)
            engine.put("shop", b"new", b"value", 60.0)
            assert engine.take("shop", b"new")
            engine.remove("shop", b"new")
            server.client.delete("resumed:shop:new")
        while engine.sweep(100):
            pass
        assert not server.client.keys("resumed:*:*")


@pytest.mark.parametrize("ahead", [0.0, 3_600.0])
def test_a_replica_that_is_promoted_has_nothing_from_before(ahead: float) -> None:
    """The replica may have missed a removal, and its clock may differ."""
    with (
        valkey_server() as primary,
        valkey_server("--replicaof", f"127.0.0.1 {primary.port}") as replica,
        opened(primary.url, PATIENT) as engine,
    ):
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        engine.put("shop", b"k", b"value", 60.0)
        stored_ahead(primary, b"k", ahead)
        primary.client.wait(1, 5_000)
        replica.client.replicaof("no", "one")
        with opened(replica.url, PATIENT) as other:
            assert other.get("shop", b"k") is None
            other.put("shop", b"new", b"value", 60.0)
            assert other.get("shop", b"new")
        with opened(replica.url, PATIENT) as another:
            assert another.get("shop", b"new")


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1_800.0])
def test_a_purge_ends_what_was_stored_before_it_whatever_the_clock_says(server: RedisServer, ahead: float) -> None:
    """A clock that is set back must not bring purged sessions back, nor hide later ones."""
    with opened(server.url, PATIENT) as engine:
        engine.put("shop", b"k", b"value", 600.0)
        stored_ahead(server, b"k", ahead)
        assert engine.get("shop", b"k")
        engine.purge("shop", None)
        assert engine.get("shop", b"k") is None
        assert engine.usage("shop")["shop"].sessions == 0
        engine.put("shop", b"new", b"value", 600.0)
        engine.purge("shop", time.time() - 60.0)
        assert engine.get("shop", b"new")


def test_a_primary_that_is_demoted_is_asked_no_more(server: RedisServer) -> None:
    """The engine resolves the name again and continues with the new primary."""
    with valkey_server() as new, forwarding(server.port) as name, opened(name.url, PATIENT) as engine:
        new.client.replicaof("127.0.0.1", server.port)
        until(lambda: new.client.info("replication")["master_link_status"] == "up")
        engine.put("shop", b"k", b"value", 60.0)
        server.client.wait(1, 5_000)
        new.client.replicaof("no", "one")
        server.client.replicaof("127.0.0.1", 1)
        assert "is a replica" in str(failure(lambda: engine.get("shop", b"k")))
        assert "is a replica" in str(failure(engine.probe))
        name.port = new.port
        with contextlib.suppress(EngineUnavailable):
            engine.probe()
        engine.probe()
        assert engine.get("shop", b"k") is None
        engine.put("shop", b"new", b"value", 60.0)
        assert engine.get("shop", b"new")


def stored_ahead(server: RedisServer, key: bytes, seconds: float) -> None:
    """Rewrite the session of a key as if it had been stored while the clock was ahead."""
    client, name = server.client, b"resumed:shop:" + key
    client.setrange(name, 0, b"%016d" % (int(client.getrange(name, 0, 15)) + round(seconds * 1e6)))


class Name:
    """A name that resolves to another Redis after a while, as that of a Kubernetes Service."""

    def __init__(self, port: int, listening: socket.socket) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{listening.getsockname()[1]}"
        self._listening = listening
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                other = socket.create_connection(("127.0.0.1", self.port))
                for ends in ((connection, other), (other, connection)):
                    threading.Thread(target=_pump, args=ends, daemon=True).start()


@contextlib.contextmanager
def forwarding(port: int) -> Iterator[Name]:
    """Give what listens at a port a name, for as long as the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Name(port, listening)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError), source, sink:
        while received := source.recv(65_536):
            sink.sendall(received)


def _acknowledged(call: Callable[[], object]) -> bool:
    try:
        call()
    except EngineUnavailable:
        return False
    return True


def emptied(server: RedisServer) -> None:
    server.client.flushall()


def restarted(server: RedisServer) -> None:
    server.kill()
    server.start()


def rolled_back(server: RedisServer) -> None:
    server.client.config_set("save", "3600 1")
    server.client.save()
    server.client.xadd(b"resumed:{0}", {"-": b"resumed:shop:lost"})
    restarted(server)


def without_log(server: RedisServer) -> None:
    server.client.delete(*server.client.keys("resumed:{*}"))


@pytest.mark.parametrize("lose", [emptied, restarted, rolled_back, without_log])
def test_a_position_from_before_a_loss_is_none(server: RedisServer, lose: Callable[[RedisServer], None]) -> None:
    with opened(server.url, PATIENT) as engine, opened(server.url, PATIENT) as other:
        engine.position()
        engine.put("shop", b"k", b"value", 60.0)
        position = engine.position()
        lose(server)
        for log in (other, engine):
            log.position()
            log.put("shop", secrets.token_bytes(8), b"value", 60.0)
            assert log.changes(position, log.position(), 10) is None


def test_a_clock_that_is_put_back_hides_nothing(server: RedisServer) -> None:
    """Stream ids continue after the last one."""
    with opened(server.url, PATIENT) as engine:
        engine.position()
        (stream,) = server.client.keys("resumed:{*}")
        hour = 3_600_000
        server.client.xadd(stream, {".": ""}, id=f"{int(time.time() * 1_000) + hour}-0")
        position = engine.position()
        server.client.pexpire(stream, 5_000)
        engine.remove("shop", b"k")
        assert read_all_changes(engine, position)[0] == {("shop", b"k"): [None]}
        assert server.client.pttl(stream) > 5_000


def test_a_failover_begins_a_new_log() -> None:
    with valkey_sentinels() as sentinels, opened(sentinels.url, PATIENT) as engine:
        engine.position()
        sentinels.fall_behind()
        engine.put("shop", b"lost", b"value", 60.0)
        position = engine.position()
        sentinels.primary.kill()
        until(lambda: not _works(engine, wait=False))
        until(lambda: _works(engine))
        for _ in range(20):
            engine.remove("shop", b"lost")
            assert engine.changes(position, engine.position(), 10) is None


def test_a_failover_is_followed() -> None:
    with valkey_sentinels() as sentinels, opened(sentinels.url, f"wait_replicas=1&{PATIENT}") as engine:
        engine.put("shop", b"k", b"value", 60.0)
        assert engine.take("shop", b"k")
        sentinels.primary.kill()
        until(lambda: not _works(engine, wait=False))
        with opened(sentinels.url, PATIENT) as later:
            until(lambda: _works(later))
            with pytest.raises(AlreadyExists):
                later.put("shop", b"k", b"value", 60.0)


def test_slots_move_under_calls() -> None:
    keys = [b"%d" % number for number in range(600)]
    with valkey_cluster() as cluster, opened(cluster.url, PATIENT) as engine:
        engine.batch([Put("shop", key, b"value", 600.0) for key in keys])
        moving = threading.Thread(target=cluster.move_slots, args=(threading.Event(),), daemon=True)
        moving.start()
        taken: list[bytes] = []
        for turn, start in enumerate(range(0, len(keys), 20)):
            chunk = keys[start : start + 20]
            assert all(isinstance(each, StoredSession) for each in engine.batch([Get("shop", key) for key in chunk]))
            if turn % 2:
                took = engine.batch([Take("shop", key) for key in chunk])
            else:
                took = [engine.take("shop", key) for key in chunk]
            taken += [key for key, session in zip(chunk, took, strict=True) if isinstance(session, StoredSession)]
        moving.join(60)
        assert taken == keys
        assert not any(engine.batch([Get("shop", key) for key in keys]))


def test_a_purge_holds_while_slots_move() -> None:
    keys = [b"%d" % number for number in range(300)]
    issued = time.time() - 1.0
    with valkey_cluster() as cluster, opened(cluster.url, PATIENT) as engine, opened(cluster.url, PATIENT) as other:
        engine.batch([Put("shop", key, b"value", 600.0, issued) for key in keys])
        moving = threading.Thread(target=cluster.move_slots, args=(threading.Event(), 0.002), daemon=True)
        moving.start()
        engine.purge("shop", None)
        while moving.is_alive():
            for asked in (engine, other):
                found = asked.batch([Get("shop", key) for key in keys])
                assert not any(isinstance(session, StoredSession) for session in found)
            late = [b"late %d" % number for number in range(50)]
            stored = other.batch([Put("shop", key, b"value", 600.0, issued) for key in late])
            assert not any(isinstance(outcome, float) for outcome in stored)
        moving.join(60)
        assert other.batch([Get("shop", key) for key in keys]) == [None] * len(keys)


def test_no_removal_is_missed_while_slots_move() -> None:
    keys = [b"%d" % number for number in range(600)]
    with valkey_cluster() as cluster, opened(cluster.url, PATIENT) as engine, opened(cluster.url, PATIENT) as reader:
        engine.batch([Put("shop", key, b"value", 600.0) for key in keys])
        position, known = reader.position(), set(keys)

        def caught_up() -> bool:
            nonlocal position, known
            with contextlib.suppress(EngineUnavailable):  # slots of the log are moving, so readers wait
                end = reader.position()
                while position != end:
                    read = reader.changes(position, end, 10)
                    if read is None:
                        known, read = {key for key in keys if reader.get("shop", key)}, ([], end)
                    known -= {change.key for change in read[0] if isinstance(change, Change)}
                    position = read[1]
                return True
            return False

        moving = threading.Thread(target=cluster.move_slots, args=(threading.Event(),), daemon=True)
        moving.start()
        for key in keys:
            assert engine.take("shop", key)
            until(caught_up)
            assert key not in known
        moving.join(60)


def test_no_lasting_removal_is_missed_while_slots_move() -> None:
    """Neither by a reader of the index, nor by one of the log."""
    keys = [b"%d" % number for number in range(600)]
    with valkey_cluster() as cluster, opened(cluster.url, PATIENT) as engine, opened(cluster.url, PATIENT) as reader:
        engine.batch([Put("shop", key, b"value", 600.0) for key in keys[::2]])
        moving = threading.Thread(target=cluster.move_slots, args=(threading.Event(), 0.002), daemon=True)
        moving.start()
        removed: set[bytes] = set()

        def is_complete() -> bool:
            with contextlib.suppress(EngineUnavailable):  # slots of the index are moving, so readers wait
                return read_removals(reader, "shop").keys() >= removed
            return False

        for start in range(0, len(keys), 20):
            chunk = keys[start : start + 20]
            outcomes = engine.batch([Remove("shop", key, 600.0) for key in chunk])
            removed |= {
                key for key, outcome in zip(chunk, outcomes, strict=True) if not isinstance(outcome, EngineError)
            }
            until(is_complete)
        moving.join(60)
        assert removed == set(keys)
        assert read_removals(reader, "shop").keys() == removed


def failure(call: Callable[[], object]) -> EngineUnavailable:
    """Return the type of the error of a call."""
    with pytest.raises(EngineUnavailable) as caught:
        call()
    return caught.value


def _works(engine: Engine, *, wait: bool = True) -> bool:
    time.sleep(0.02 if wait else 0)
    try:
        engine.probe()
        engine.put("shop", uuid.uuid4().bytes, b"value", 60.0)
    except EngineError:
        return False
    return True


def _many_gets(engine: Engine) -> None:
    for _ in range(200):
        engine.get("shop", b"k")


@contextlib.contextmanager
def pretending(info: bytes) -> Iterator[int]:
    """Run a server that answers every command with `info`, since no old Redis is available; yield its port."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True  # or one answer would wait until the one before is acknowledged

        def handle(self) -> None:
            for line in self.rfile:
                if line.strip() in {b"INFO", b"SETINFO"}:  # the last word of a command without arguments, or near it
                    self.wfile.write(b"$%d\r\n%b\r\n" % (len(info), info))
                elif line.startswith(b"#!lua"):  # as before version 7
                    self.wfile.write(b"-ERR Error compiling script (new function): unexpected symbol near '#'\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()
