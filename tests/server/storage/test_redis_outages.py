"""The Redis engine when Redis is slow, full, away or short of connections."""

from __future__ import annotations

import contextlib
import secrets
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from resumed_server.lifecycle.health import Readiness
from resumed_server.storage.engine import (
    AlreadyExists,
    Engine,
    EngineBroken,
    EngineFull,
    EngineUnavailable,
    Get,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.redis.change_log import KNOWN_POSITIONS
from resumed_server.storage.redis.topology import NodeBackoff
from resumed_server.storage.redis.url import RedisUrl
from resumed_server.storage.registry import open_engine
from resumed_server.storage.testing.fixtures import read_removals
from support.processes import paused
from support.redis import redis_server, valkey_server
from support.redis_engine import PATIENT, catch_failure, engine_at, is_working
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.storage.engine import Operation
    from support.redis import RedisServer


def test_redis_may_come_later(server: RedisServer) -> None:
    server.kill()
    with capture_logs() as logs, engine_at(server.url, PATIENT) as engine:
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
        with engine_at(f"{scheme}://127.0.0.1:{server.port}", "timeout_ms=300") as engine:
            engine.put("shop", b"k", b"value", 60.0)
            with paused(server.process):
                causes = [str(catch_failure(lambda: engine.get("shop", b"k"))) for _ in range(20)]
            assert "does not answer within 300 ms" in causes[0]
            assert sum("a moment ago" in cause for cause in causes) >= 15
            until(lambda: is_working(engine))


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
    assert "a moment ago" in str(catch_failure(lambda: backoff.check("store")))
    backoff.record_success()
    backoff.record_failure()
    assert "a moment ago" in str(catch_failure(lambda: backoff.check("store")))


def test_a_restarted_redis_is_used_again_at_once(server: RedisServer) -> None:
    with engine_at(server.url, PATIENT) as engine:
        engine.put("shop", b"k", b"value", 60.0)
        server.restart()
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
    with engine_at(server.url, PATIENT) as engine:
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


def test_wait_applies_after_a_flush_of_the_scripts(server: RedisServer) -> None:
    with engine_at(server.url, "wait_replicas=1&timeout_ms=200") as engine:
        engine.put("shop", b"k", b"value", 60.0)
        server.client.script_flush()
        with pytest.raises(EngineUnavailable, match="replicas"):
            engine.remove("shop", b"k")


def require_replicas(server: RedisServer, *, broken: bool) -> str:
    server.client.config_set("min-replicas-to-write", int(broken))
    return "too few replicas (NOREPLICAS); see its min-replicas-to-write"


def fail_snapshots(server: RedisServer, *, broken: bool) -> str:
    (server.break_snapshots if broken else server.mend_snapshots)()
    return "cannot save its snapshot (MISCONF); see its log"


@pytest.mark.parametrize("running", [redis_server, valkey_server])
@pytest.mark.parametrize("refuse", [require_replicas, fail_snapshots])
def test_a_server_whose_redis_refuses_writes_is_not_serving(
    running: Callable[[], contextlib.AbstractContextManager[RedisServer]],
    refuse: Callable[..., str],
) -> None:
    """Redis answers INFO and PING all the same; the log names the cause and the remedy."""
    with running() as server, engine_at(server.url, PATIENT) as engine, capture_logs() as logs:
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


def test_close_does_not_wait_for_a_count(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_at(server.url, PATIENT) as engine:
        engine.batch([Put("shop", b"%d" % number, b"value", 60.0) for number in range(2_000)])
        monkeypatch.setattr("resumed_server.storage.redis.purges.time.sleep", lambda _: engine.close())
        with pytest.raises(EngineBroken, match="closed"):
            engine.usage(None)


def test_a_process_short_of_connections_takes_redis_for_well(server: RedisServer) -> None:
    with engine_at(server.url, PATIENT) as engine:
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
    with engine_at(server.url, PATIENT) as engine:
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
    with running() as server, engine_at(server.url, PATIENT) as engine:
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
    with capture_logs() as logs, engine_at(server.url, PATIENT) as engine:
        assert not logs
        server.client.config_set("maxmemory", 1 << 30)
        engine.probe()
        engine.probe()
        assert [line["policy"] for line in logs] == ["allkeys-lru"]


def test_a_broken_redis_is_an_error_without_keys_and_values(server: RedisServer) -> None:
    secret = secrets.token_hex().encode()  # not a literal: a traceback shows the lines of this file
    with engine_at(server.url, PATIENT) as engine:
        server.client.lpush(b"resumed:shop:" + secret, b"no session")
        alone = catch_failure(lambda: engine.put("shop", secret, secret, 60.0))
        for error in (alone, engine.batch([Get("eu", b"k"), Put("shop", secret, secret, 60.0)])[1]):
            assert isinstance(error, EngineUnavailable)
            assert "WRONGTYPE" in str(error)
            assert secret.decode() not in "".join(traceback.format_exception(error))


def _many_gets(engine: Engine) -> None:
    for _ in range(200):
        engine.get("shop", b"k")
