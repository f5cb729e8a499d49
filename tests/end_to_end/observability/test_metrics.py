"""The metrics of a running server, summed over all workers."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from resumed import AlreadyExists, Get, InvalidRequest, Put, StoreClient
from resumed.v1 import session_store_pb2 as pb
from resumed.v1.session_store_pb2_grpc import SessionStoreServiceStub
from resumed_server.limits.config import Limit
from resumed_server.observability.metrics.recorder import Recorder
from support.metrics import Scrape, scrape, scraped_until
from support.mtls import Authority, Files, channel, grant
from support.ports import free_port
from support.redis import redis_server
from support.server import PATIENCE, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

LISTEN = ("--metrics-listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two workers with metrics, and a store that is soon full."""
    with running_server(*LISTEN, "--capacity", "1MiB", workers=2) as server:
        yield server


@contextlib.contextmanager
def store(server: RunningServer, namespace: str) -> Iterator[StoreClient]:
    with contextlib.closing(StoreClient(server.target, namespace=namespace, deadline=PATIENCE)) as store:
        yield store


def test_calls_and_operations_of_both_workers_add_up(server: RunningServer) -> None:
    keys = [os.urandom(32) for _ in range(20)]
    for key in keys:  # each by a connection of its own, so that both workers have some
        with store(server, "shop") as shop:
            shop.put(key, b"value", 60)
            shop.get(key)
            with pytest.raises(AlreadyExists):
                shop.put(key, b"other", 60)
    with store(server, "shop") as shop:
        shop.batch([Get(keys[0]), Get(b"unknown"), Put(keys[1], b"other", 60)])
        shop.take(keys[0])
        shop.remove(keys[0])
        with pytest.raises(InvalidRequest):
            shop.get(b"")
    found = scraped_until(server, lambda found: found.total("resumed_calls_total") == 64)

    def calls(method: str, code: str) -> float:
        return found.total("resumed_calls_total", method=method, code=code)

    assert (calls("Put", "OK"), calls("Put", "ALREADY_EXISTS")) == (20, 20)
    assert (calls("Get", "OK"), calls("Get", "INVALID_ARGUMENT")) == (20, 1)
    assert (calls("Batch", "OK"), calls("Take", "OK"), calls("Remove", "OK")) == (1, 1, 1)
    assert found.total("resumed_call_duration_seconds_count", method="Put") == 20
    assert found.total("resumed_call_duration_seconds_bucket", method="Put", le="+Inf") == 20
    assert 0 < found.total("resumed_call_duration_seconds_sum", method="Put") < 20 * PATIENCE
    assert found.labels("resumed_calls_total", "grpc_service") == {"resumed.v1.SessionStoreService"}
    assert found.value("resumed_call_wait_duration_seconds_count") >= 64
    assert found.value("resumed_calls_rejected_total") == 0
    assert found.value("resumed_storage_call_duration_seconds_count") == 63
    expected = {
        ("get", "hit"): 21,
        ("get", "miss"): 1,
        ("put", "stored"): 20,
        ("put", "refused"): 21,
        ("take", "hit"): 1,
        ("remove", "unknown"): 1,
    }
    assert {
        outcome: found.value(
            "resumed_operations_total", session_namespace="shop", operation=outcome[0], outcome=outcome[1]
        )
        for outcome in expected
    } == expected
    each = [found.value("resumed_worker_calls_total", worker=worker) for worker in ("0", "1")]
    assert sum(each) == found.total("resumed_calls_total")
    assert found.value("resumed_sessions") == 19 or scraped_until(
        server, lambda found: found.value("resumed_sessions") == 19
    )
    assert found.value("resumed_engine_up") == found.value("resumed_worker_ready", worker="1") == 1


def test_watchers_and_evictions_are_counted(server: RunningServer) -> None:
    with store(server, "tenant") as tenant:
        with tenant.watch():
            scraped_until(server, lambda found: found.value("resumed_watchers") == 1)
        scraped_until(server, lambda found: found.total("resumed_calls_total", method="Watch", code="CANCELLED") == 1)
        for _ in range(3):
            tenant.batch([Put(os.urandom(32), os.urandom(10_000), 600) for _ in range(50)])
    found = scraped_until(server, lambda found: found.value("resumed_evicted_sessions_total") > 0)
    found = scraped_until(server, lambda found: found.value("resumed_storage_bytes") > 900_000)
    assert found.value("resumed_storage_capacity_bytes") == 1 << 20


def test_a_worker_that_is_replaced_takes_no_count_back(server: RunningServer) -> None:
    before = scrape(server)
    started = before.value("resumed_worker_process_start_time_seconds", worker="0")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    os.kill(min(map(int, children.split())), signal.SIGKILL)
    after = scraped_until(
        server, lambda found: found.value("resumed_worker_process_start_time_seconds", worker="0") > started
    )
    for (name, labels), value in before.samples.items():
        if name.endswith(("_total", "_count", "_bucket")):
            assert after.samples[name, labels] >= value, name


def test_silent_clients_do_not_block_other_scrapes(server: RunningServer) -> None:
    (address,) = server.log_lines("listening")[0]["metrics"]
    host, port = address.rsplit(":", 1)
    silent = [socket.create_connection((host, int(port))) for _ in range(8)]
    assert scrape(server).value("resumed_engine_up") == 1
    for connection in silent:
        connection.close()


def test_slow_clients_hold_up_neither_a_scrape_nor_the_end() -> None:
    with running_server("--metrics-listen", "127.0.0.1:0") as server, contextlib.ExitStack() as stack:
        (address,) = server.log_lines("listening")[0]["metrics"]
        host, _, port = address.rpartition(":")
        slow = [stack.enter_context(socket.create_connection((host, int(port)), PATIENCE)) for _ in range(40)]
        for connection in slow:
            with contextlib.suppress(OSError):  # closed by now
                connection.sendall(b"GET / HTTP/1.1\r\nSlow: ")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
            assert b"resumed_worker_up" in answer.read()
        assert slow[0].recv(1) == b""
        assert server.stop() == 0


def test_a_request_that_makes_no_sense_is_refused_and_logged_once(server: RunningServer) -> None:
    (address,) = server.log_lines("listening")[0]["metrics"]
    accept = {"Accept": "application/openmetrics-text; version=1.x"}
    for _ in range(20):
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(
                urllib.request.Request(f"http://{address}/metrics", headers=accept), timeout=PATIENCE
            )
    lines = len(server.wait_for_log("failed to render metrics"))
    assert 1 <= lines <= 4  # of each worker, and again after ten seconds


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/metrics", 200), ("GET", "/metrics?x=1", 200), ("HEAD", "/metrics", 200), ("GET", "/", 404),
     ("HEAD", "/other", 404), ("GET", "/metrics/", 404), ("POST", "/metrics", 501)],
)  # fmt: skip
def test_only_the_path_of_metrics_is_served(server: RunningServer, method: str, path: str, status: int) -> None:
    (address,) = server.log_lines("listening")[0]["metrics"]
    with contextlib.closing(http.client.HTTPConnection(address, timeout=PATIENCE)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
    assert answer.status == status
    assert bool(body) is (method != "HEAD")


def test_a_server_that_was_scraped_and_killed_starts_again_on_its_ports() -> None:
    """The server closes the connection of a scrape first, so that its end of it stays in TIME_WAIT."""
    listen, metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
    for _ in range(3):
        with running_server("--metrics-listen", metrics, listen=listen) as server:
            assert scrape(server).value("resumed_worker_up", worker="0") == 1
            server.kill()


LIMITED = """
[[limit]]
namespaces = ["shop", "shop.*"]
sessions = 2

[[limit]]
identity = "spiffe://example.org/*"
operations_per_second = 100
watchers = 16
"""


def test_limits_their_use_and_their_rejections_are_metrics(tmp_path: Path) -> None:
    authority, identity = Authority(), "spiffe://example.org/shop"
    grants = grant(identity, ["*"], ["put", "get"]) + LIMITED
    files = Files(tmp_path).write(authority.server(), authority.pem, grants)
    with (
        running_server(*files.options, *LISTEN, "--namespace-sessions", "1") as server,
        channel(server.target, authority.pem, authority.issue(identity)) as connection,
    ):
        stub = SessionStoreServiceStub(connection)

        def put(namespace: str, key: bytes) -> pb.PutRequest:
            return pb.PutRequest(namespace=namespace, key=key, value=b"value", ttl=Duration(seconds=60))

        for key in (b"1", b"2"):
            stub.Put(put("shop", key), timeout=PATIENCE)
        stub.Put(put("pay", b"1"), timeout=PATIENCE)
        for namespace in ("shop.eu", "pay", "made-up"):
            with contextlib.suppress(grpc.RpcError):
                stub.Put(put(namespace, b"3"), timeout=PATIENCE)
            with contextlib.suppress(grpc.RpcError):
                stub.Put(put(namespace, b"4"), timeout=PATIENCE)
        batch = stub.Batch(pb.BatchRequest(operations=[pb.BatchOperation(put=put("shop", b"5"))]), timeout=PATIENCE)
        assert batch.results[0].error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]

        def rejections(found: Scrape, subject: str) -> float:
            return found.value("resumed_limit_rejections_total", subject=subject, limit="sessions")

        found = scraped_until(server, lambda found: rejections(found, "shop, shop.*") == 3)
        assert rejections(found, "pay") == 2
    assert found.value("resumed_limit", subject="shop, shop.*", limit="sessions") == 2
    assert found.value("resumed_limit_used", subject="shop, shop.*", limit="sessions") == 2
    assert found.value("resumed_limit", subject="pay", limit="sessions") == 1
    assert found.value("resumed_limit_used", subject="pay", limit="sessions") == 1
    assert found.value("resumed_limit", subject="spiffe://example.org/*", limit="operations_per_second") == 100
    assert found.value("resumed_limit", subject="spiffe://example.org/*", limit="watchers") == 16


def test_a_namespace_that_was_made_up_has_no_counter_of_its_own() -> None:
    recorder = Recorder(lambda _: True)
    for number in range(1_000):
        recorder.on_limit(Limit(sessions=1), f"made-up-{number}", "sessions")
    assert recorder.snapshot()["limited"] == [["other", "sessions", 1_000]]


def test_a_file_that_cannot_be_used_shows_until_it_is_corrected(tmp_path: Path) -> None:
    authority = Authority()
    files = Files(tmp_path).write(authority.server(), authority.pem, grant("dns:shop", ["shop"], ["get"]))
    with running_server(*files.options, *LISTEN, workers=2) as server:

        def state(found: Scrape, file: str) -> float:
            return found.value("resumed_config_last_reload_successful", file=file)

        before = scraped_until(server, lambda found: state(found, "grants") == state(found, "tls") == 1)
        files.write(grants="not a table")
        scraped_until(server, lambda found: state(found, "grants") == 0 and state(found, "tls") == 1)
        files.write(grants=grant("dns:shop", ["shop"], ["get", "put"]))
        after = scraped_until(server, lambda found: state(found, "grants") == 1)
        moment = "resumed_config_last_reload_success_timestamp_seconds"
        assert after.value(moment, file="grants") > before.value(moment, file="grants")
        assert after.value(moment, file="tls") == before.value(moment, file="tls")
        begins = after.value("resumed_certificate_not_before_timestamp_seconds")
        assert after.value("resumed_certificate_expiry_timestamp_seconds") - begins == 49 * 3600


def test_the_connections_of_all_workers_to_redis_are_counted() -> None:
    with redis_server() as redis, running_server(*LISTEN, "--storage", redis.url, workers=2) as server:
        found = scraped_until(server, lambda found: found.total("resumed_storage_connections") >= 2)
        assert found.value("resumed_storage_connections_opened_total") >= found.total("resumed_storage_connections")
        assert found.value("resumed_storage_max_connections") > found.total("resumed_storage_connections")


def test_a_local_database_has_no_connections(server: RunningServer) -> None:
    assert "resumed_storage_connections" not in scrape(server).text


def test_the_metrics_of_processes_have_their_usual_names(server: RunningServer) -> None:
    found = scrape(server)
    assert found.value("process_resident_memory_bytes") == pytest.approx(
        found.total("resumed_worker_process_resident_memory_bytes")
    )
    assert 0 < found.value("process_open_fds") < found.value("process_max_fds")
    assert found.value("process_start_time_seconds") > 1e9


def test_the_native_front_is_counted_alike() -> None:
    with running_server(*LISTEN, "--transport", "native") as server, store(server, "shop") as shop:
        shop.put(b"key", b"value", 60)
        with pytest.raises(AlreadyExists):
            shop.put(b"key", b"other", 60)
        assert shop.get(b"key")
        found = scraped_until(server, lambda found: found.total("resumed_calls_total") == 3)
    assert found.total("resumed_calls_total", method="Put", code="ALREADY_EXISTS") == 1
    assert found.value("resumed_build_info", engine="lmdb", transport="native", version=version("resumed")) == 1


def test_no_metric_contains_a_key_or_value(server: RunningServer) -> None:
    secret = b"secret-of-a-session-0123456789abc"
    with store(server, "shop") as shop:
        shop.put(secret, secret, 60)
    found: Scrape = scrape(server)
    assert "secret" not in found.text
    assert found.labels("resumed_operations_total", "session_namespace") <= {"shop", "tenant", "other"}
