"""A worker opens, serves and shuts down in order, without a process of its own."""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from resumed_server.config.types import Address
from resumed_server.lifecycle.worker import ListenAddresses, Worker
from resumed_server.limits.enforcer import SharedCounters
from resumed_server.preflight import verify_settings
from resumed_server.storage.engine import EngineBroken
from support.server import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

module: Any = importlib.import_module("resumed_server.lifecycle.worker")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps of the shutdown, in the order in which they end."""
    recorded: list[str] = []

    def record(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            recorded.append(name)
            return result

        return recording

    def open_recording(*arguments: Any, **options: Any) -> Any:
        engine = open_engine(*arguments, **options)
        monkeypatch.setattr(engine, "close", record("storage closed", engine.close))
        return engine

    open_engine = module.open_engine
    monkeypatch.setattr(module, "open_engine", open_recording)
    monkeypatch.setattr(module, "drain", record("clients drained", module.drain))
    monkeypatch.setattr(module, "stop_all", record("tasks stopped", module.stop_all))
    return recorded


def build(directory: Path, wait: Callable[[float], bool], *, supervisor: int | None = None) -> Worker:
    path = directory / "socket"
    settings = verify_settings(listen=[f"unix:{path}"], storage=f"lmdb://{directory}/store", shutdown_delay="0s")
    addresses = ListenAddresses([Address.parse(f"unix:{path}")])
    return Worker(settings, addresses, SharedCounters.create(), supervisor=supervisor, wait=wait)


def test_clients_go_first_and_the_storage_last(tmp_path: Path, events: list[str]) -> None:
    with capture_logs() as logged:
        status = build(tmp_path, lambda _: True).run()
    assert status == 0
    assert events == ["clients drained", "tasks stopped", "storage closed"]
    assert [line["event"] for line in logged if line["event"] != "ready"] == ["listening", "draining", "stopped"]


def test_during_the_shutdown_delay_health_says_so_while_calls_are_served(tmp_path: Path) -> None:
    seen: list[int] = []

    def status() -> int:
        with grpc.insecure_channel(f"unix:{tmp_path}/socket") as channel:
            request = health_pb2.HealthCheckRequest()
            return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE).status)

    def wait(_seconds: float) -> bool:
        seen.append(status())
        return len(seen) > 1 or not worker._readiness.ready

    worker = build(tmp_path, wait)
    worker.open()
    while not worker._readiness.ready:
        worker._loop.beat()
    worker.serve()
    worker.shutdown()
    assert seen[0] == health_pb2.HealthCheckResponse.SERVING
    assert seen[-1] == health_pb2.HealthCheckResponse.NOT_SERVING


def test_open_resources_are_closed_when_another_one_fails(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no such address")

    monkeypatch.setattr(module.rpc_server, "listen", refuse)
    with pytest.raises(OSError, match="no such address"):
        build(tmp_path, lambda _: True).run()
    assert events == ["tasks stopped", "storage closed"]


def test_a_broken_engine_ends_it_with_a_status_that_asks_for_a_restart(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = threading.Event()

    def probe(readiness: Any) -> float:
        readiness.broken = True
        probed.set()
        raise EngineBroken("damaged")

    monkeypatch.setattr(module.Readiness, "probe", probe)
    assert build(tmp_path, lambda _: not probed.wait(PATIENCE)).run() == 1
    assert events[-1] == "storage closed"


def test_a_worker_whose_supervisor_is_gone_stops_without_a_signal(tmp_path: Path, events: list[str]) -> None:
    assert build(tmp_path, lambda _: pytest.fail("it waits"), supervisor=1).run() == 0
    assert events[-1] == "storage closed"
