"""Several stateless servers on one Redis or Valkey, and their diagnostics for it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

import resumed
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from support.redis import valkey_server
from support.server import running_server, start_server
from support.tls import STACKS, VERSIONS, Client, Frontend
from support.waiting import until

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from support.redis import RedisServer
    from support.server import RunningServer

PATIENT = "?timeout_ms=5000"
"""Generous, because tests run on loaded machines."""
RACERS, SESSIONS, AT_ONCE = 16, 5_000, 64


@pytest.fixture
def valkey() -> Iterator[RedisServer]:
    with valkey_server() as server:
        yield server


@contextlib.contextmanager
def two_servers(valkey: RedisServer) -> Iterator[list[RunningServer]]:
    with contextlib.ExitStack() as held:
        yield [held.enter_context(running_server("--storage", valkey.url + PATIENT)) for _ in range(2)]


def test_sixteen_clients_take_five_thousand_sessions_from_two_servers_once_each(valkey: RedisServer) -> None:
    keys = [os.urandom(32) for _ in range(SESSIONS)]
    taken: list[bytes] = []
    together = threading.Barrier(RACERS)

    with two_servers(valkey) as servers:
        targets = [server.target for server in servers]

        def call(target: str, operations: list[pb.BatchOperation]) -> list[pb.BatchResult]:
            return list(stubs[target].Batch(pb.BatchRequest(operations=operations)).results)

        def race(racer: int) -> None:
            target = targets[racer % 2]
            mine = random.Random(racer).sample(keys, SESSIONS)
            together.wait()
            if racer % 4 == 0:
                alone, mine = mine[:500], mine[500:]
                takes = [pb.TakeRequest(namespace="shop", key=key) for key in alone]
                taken.extend(take.key for take in takes if stubs[target].Take(take).HasField("session"))
            for start in range(0, len(mine), AT_ONCE):
                chunk = mine[start : start + AT_ONCE]
                operations = [pb.BatchOperation(take=pb.TakeRequest(namespace="shop", key=key)) for key in chunk]
                results = call(target, operations)
                assert all(result.WhichOneof("result") == "take" for result in results)
                won = zip(chunk, results, strict=True)
                taken.extend(key for key, result in won if result.take.HasField("session"))

        with contextlib.ExitStack() as held:
            stubs = {t: SessionStoreServiceStub(held.enter_context(grpc.insecure_channel(t))) for t in targets}
            for start in range(0, SESSIONS, 250):
                puts = [
                    pb.PutRequest(namespace="shop", key=key, value=b"sealed", ttl=Duration(seconds=600))
                    for key in keys[start : start + 250]
                ]
                results = call(targets[0], [pb.BatchOperation(put=put) for put in puts])
                assert all(result.WhichOneof("result") == "put" for result in results)
            threads = [threading.Thread(target=race, args=(racer,)) for racer in range(RACERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert Counter(taken) == Counter(keys)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_a_session_that_one_server_stored_resumes_through_the_other(
    valkey: RedisServer, version: ssl.TLSVersion
) -> None:
    keyring = resumed.Keyring.from_keys([os.urandom(32)])
    with two_servers(valkey) as servers, contextlib.ExitStack() as held:
        frontends = [Frontend(stack, server.target, keyring) for stack, server in zip(STACKS, servers, strict=True)]
        for frontend in frontends:
            held.callback(frontend.shim.uninstall)
        client = Client(version)
        first = client.visit(frontends[0])
        assert frontends[0].shim.flush(10)
        assert client.visit(frontends[1], first.session).reused


def test_readiness_follows_the_engine(valkey: RedisServer) -> None:
    with (
        running_server("--storage", valkey.url + PATIENT) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        valkey.kill()
        until(
            lambda: health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        )
        assert "Connection refused" in server.wait_for_log("not ready")[0]["cause"]
        with pytest.raises(grpc.RpcError) as caught:
            SessionStoreServiceStub(channel).Get(pb.GetRequest(namespace="shop", key=b"k"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        valkey.start()
        until(lambda: health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("setting", "url", "complaint"),
    [
        (
            "CONFIG SET requirepass right",
            "redis://:hush-hush@{}",
            "Redis at {} rejects the user or the password of the URL",
        ),
        ("REPLICAOF 127.0.0.1 1", "redis://{}", "Redis at {} is a replica, which is read-only; use its primary"),
        ("PING", "redis+cluster://{}", "Redis at {} is not a cluster; use redis:// for a single server"),
        ("PING", "redis+sentinel://{}/main", "{} is not a Sentinel; use the addresses of Sentinels, or redis://"),
    ],
    ids=["password", "replica", "no cluster", "no Sentinel"],
)
def test_an_unusable_redis_is_one_line_and_exit_status_2(
    valkey: RedisServer, setting: str, url: str, complaint: str, workers: str
) -> None:
    valkey.client.execute_command(setting)
    host = f"127.0.0.1:{valkey.port}"
    server = start_server("--listen", "127.0.0.1:0", "--workers", workers, "--storage", url.format(host) + PATIENT)
    assert server.wait() == 2
    lines = server.log_lines()
    assert [line["problem"] for line in lines if "problem" in line] == [f"--storage: {complaint.format(host)}"]
    assert server.log_lines("starting")[0]["storage"] == url.format(host).replace("hush-hush", "***") + PATIENT
    assert "hush-hush" not in str(lines)


def test_a_worker_that_starts_while_redis_is_no_primary_ends_no_other(valkey: RedisServer) -> None:
    """During a failover an error that is fatal at the first start is temporary."""
    with (
        running_server("--storage", valkey.url + PATIENT, workers=2) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        valkey.client.replicaof("127.0.0.1", 1)
        os.kill(server.wait_for_log("ready", 2)[0]["process"], signal.SIGKILL)
        statuses = [line["status"] for line in server.wait_for_log("worker died", 2)]
        assert statuses == [-signal.SIGKILL, 2]
        valkey.client.replicaof("NO", "ONE")
        server.wait_for_log("listening", 3)
        request = pb.PutRequest(namespace="shop", key=b"k", value=b"sealed", ttl=Duration(seconds=600))
        assert SessionStoreServiceStub(channel).Put(request, wait_for_ready=True).HasField("ttl")
