"""The Redis engine while its servers change: replicas, restarts, promotions, failovers, and slots that move."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from resumed_server.storage.engine import (
    AlreadyExists,
    Change,
    EngineError,
    EngineUnavailable,
    Get,
    Put,
    Remove,
    StoredSession,
    Take,
)
from resumed_server.storage.testing.fixtures import read_all_changes, read_removals
from support.processes import paused
from support.redis import RedisServer, valkey_cluster, valkey_sentinels, valkey_server
from support.redis_engine import PATIENT, catch_failure, engine_at, is_working
from support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# --- Replicas and clusters -----------------------------------------------------------------------------------------


def test_wait_refuses_what_no_replica_has(server: RedisServer) -> None:
    with engine_at(server.url, "wait_replicas=1&timeout_ms=200") as engine:
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
        engine_at(primary.url, f"wait_replicas=1&{PATIENT}") as engine,
    ):
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        engine.put("shop", b"k", b"value", 60.0)
        assert engine.take("shop", b"k")
        assert replica.client.get(b"resumed:shop:k") == b""
        assert engine.purge("shop", None) <= time.time()


def test_a_repeated_removal_without_replicas_is_not_acknowledged() -> None:
    """A repeated removal changes nothing, but must still wait for the replicas."""
    options = "wait_replicas=1&timeout_ms=200"
    with (
        valkey_server() as primary,
        valkey_server("--replicaof", f"127.0.0.1 {primary.port}") as replica,
        engine_at(primary.url, options) as one,
        engine_at(primary.url, options) as other,
    ):
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        one.put("shop", b"k", b"value", 60.0)
        moment = time.time() - 5.0
        with paused(replica.process):
            for engine in (one, one, other):
                with pytest.raises(EngineUnavailable, match="replicas"):
                    engine.remove("shop", b"k")
                with pytest.raises(EngineUnavailable, match="replicas"):
                    engine.purge("shop", moment)
        until(lambda: _acknowledged(lambda: other.remove("shop", b"k")))
        assert replica.client.get("resumed:shop:k") == b""


# --- Changed servers -------------------------------------------------------------------------------------------------


def test_a_redis_that_was_started_again_has_nothing_from_before(server: RedisServer) -> None:
    """Its snapshot may contain sessions that were removed, taken or purged after it was saved."""
    issued = time.time() - 1.0
    with engine_at(server.url, PATIENT) as engine:
        keys = [b"removed", b"taken", b"purged", b"there"]
        for key in keys:
            engine.put("pay" if key == b"purged" else "shop", key, b"value", 600.0)
        server.client.config_set("save", "3600 1")
        server.client.save()
        engine.remove("shop", b"removed")
        engine.take("shop", b"taken")
        engine.purge("pay", None)
        server.restart()
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
        engine_at(primary.url, PATIENT) as engine,
    ):
        until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        engine.put("shop", b"k", b"value", 60.0)
        move_ahead(primary, b"k", ahead)
        primary.client.wait(1, 5_000)
        replica.client.replicaof("no", "one")
        with engine_at(replica.url, PATIENT) as other:
            assert other.get("shop", b"k") is None
            other.put("shop", b"new", b"value", 60.0)
            assert other.get("shop", b"new")
        with engine_at(replica.url, PATIENT) as another:
            assert another.get("shop", b"new")


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1_800.0])
def test_a_purge_ends_earlier_sessions_independent_of_the_clock(server: RedisServer, ahead: float) -> None:
    """A clock that is set back must not bring purged sessions back, nor hide later ones."""
    with engine_at(server.url, PATIENT) as engine:
        engine.put("shop", b"k", b"value", 600.0)
        move_ahead(server, b"k", ahead)
        assert engine.get("shop", b"k")
        engine.purge("shop", None)
        assert engine.get("shop", b"k") is None
        assert engine.usage("shop")["shop"].sessions == 0
        engine.put("shop", b"new", b"value", 600.0)
        engine.purge("shop", time.time() - 60.0)
        assert engine.get("shop", b"new")


def test_a_demoted_primary_receives_no_more_calls(server: RedisServer) -> None:
    """The engine resolves the name again and continues with the new primary."""
    with valkey_server() as new, forward_to(server.port) as name, engine_at(name.url, PATIENT) as engine:
        new.client.replicaof("127.0.0.1", server.port)
        until(lambda: new.client.info("replication")["master_link_status"] == "up")
        engine.put("shop", b"k", b"value", 60.0)
        server.client.wait(1, 5_000)
        new.client.replicaof("no", "one")
        server.client.replicaof("127.0.0.1", 1)
        assert "is a replica" in str(catch_failure(lambda: engine.get("shop", b"k")))
        assert "is a replica" in str(catch_failure(engine.probe))
        name.port = new.port
        with contextlib.suppress(EngineUnavailable):
            engine.probe()
        engine.probe()
        assert engine.get("shop", b"k") is None
        engine.put("shop", b"new", b"value", 60.0)
        assert engine.get("shop", b"new")


def move_ahead(server: RedisServer, key: bytes, seconds: float) -> None:
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
def forward_to(port: int) -> Iterator[Name]:
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


def empty(server: RedisServer) -> None:
    server.client.flushall()


def roll_back(server: RedisServer) -> None:
    server.client.config_set("save", "3600 1")
    server.client.save()
    server.client.xadd(b"resumed:{0}", {"-": b"resumed:shop:lost"})
    server.restart()


def delete_log(server: RedisServer) -> None:
    server.client.delete(*server.client.keys("resumed:{*}"))


@pytest.mark.parametrize("lose", [empty, RedisServer.restart, roll_back, delete_log])
def test_a_position_from_before_a_loss_is_none(server: RedisServer, lose: Callable[[RedisServer], None]) -> None:
    with engine_at(server.url, PATIENT) as engine, engine_at(server.url, PATIENT) as other:
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
    with engine_at(server.url, PATIENT) as engine:
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
    with valkey_sentinels() as sentinels, engine_at(sentinels.url, PATIENT) as engine:
        engine.position()
        sentinels.fall_behind()
        engine.put("shop", b"lost", b"value", 60.0)
        position = engine.position()
        sentinels.primary.kill()
        until(lambda: not is_working(engine, wait=False))
        until(lambda: is_working(engine))
        for _ in range(20):
            engine.remove("shop", b"lost")
            assert engine.changes(position, engine.position(), 10) is None


def test_a_failover_is_followed() -> None:
    with valkey_sentinels() as sentinels, engine_at(sentinels.url, f"wait_replicas=1&{PATIENT}") as engine:
        engine.put("shop", b"k", b"value", 60.0)
        assert engine.take("shop", b"k")
        sentinels.primary.kill()
        until(lambda: not is_working(engine, wait=False))
        with engine_at(sentinels.url, PATIENT) as later:
            until(lambda: is_working(later))
            with pytest.raises(AlreadyExists):
                later.put("shop", b"k", b"value", 60.0)


def test_slots_move_under_calls() -> None:
    keys = [b"%d" % number for number in range(600)]
    with valkey_cluster() as cluster, engine_at(cluster.url, PATIENT) as engine:
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
    with (
        valkey_cluster() as cluster,
        engine_at(cluster.url, PATIENT) as engine,
        engine_at(cluster.url, PATIENT) as other,
    ):
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
    with (
        valkey_cluster() as cluster,
        engine_at(cluster.url, PATIENT) as engine,
        engine_at(cluster.url, PATIENT) as reader,
    ):
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
    with (
        valkey_cluster() as cluster,
        engine_at(cluster.url, PATIENT) as engine,
        engine_at(cluster.url, PATIENT) as reader,
    ):
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
