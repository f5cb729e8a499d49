"""CallExecutor: every call runs, and grpcio is notified of its end exactly once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from resumed_server.rpc import server as front
from resumed_server.rpc.executor import CallExecutor
from support.waiting import until

if TYPE_CHECKING:
    from resumed_server.rpc.grpc_server import GrpcServer

PATIENCE = 20.0


def test_every_call_runs_with_its_arguments_and_its_callback_once() -> None:
    """The callback may be added before or after the call ends."""
    pool, told, all_told = CallExecutor(4), [], threading.Event()

    def tell(_call: object) -> None:
        told.append(1)
        if len(told) == 10_000:
            all_told.set()

    results: list[int] = []
    for number in range(10_000):
        pool.submit(results.append, number).add_done_callback(tell)
    assert all_told.wait(10)
    assert sorted(results) == list(range(10_000))
    assert len(told) == 10_000


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_call_that_raises_ends_no_thread(error: type[BaseException]) -> None:
    """The error is logged, the callback runs, and the only thread serves the next call."""
    pool, ended = CallExecutor(1), threading.Event()

    def fail() -> None:
        raise error("secret")

    with capture_logs() as logged:
        pool.submit(fail)
        pool.submit(int).add_done_callback(lambda _call: ended.set())
        assert ended.wait(10)
    assert [(line["event"], line["error"]) for line in logged] == [("call failed", error.__name__)]
    assert "secret" not in str(logged)


@pytest.mark.parametrize(("seconds", "open_calls"), [(3_600.0, 1), (0.001, 0)])
def test_a_call_whose_client_has_given_up_is_not_executed_and_stays_open_for_a_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, open_calls: int
) -> None:
    """It waited too long for a thread."""
    monkeypatch.setattr("resumed_server.rpc.executor.GIVEN_UP_SECONDS", (seconds, seconds))
    busy, free, served = threading.Event(), threading.Event(), list[int]()

    def behaviour(request: Duration, _context: object) -> Duration:
        served.append(request.seconds)
        if request.seconds == 1:
            busy.set()
            assert free.wait(PATIENCE)
        return request

    server = cast("GrpcServer", front.build_grpc_server(1, shared=False))
    executor = server._executor
    assert executor
    handler = grpc.unary_unary_rpc_method_handler(behaviour, Duration.FromString, Duration.SerializeToString)
    server.add_registered_method_handlers("test.Service", {"Call": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test.Service/Call", Duration.SerializeToString, Duration.FromString)
        first = call.future(Duration(seconds=1))
        assert busy.wait(PATIENCE)
        with pytest.raises(grpc.RpcError):
            call(Duration(seconds=2), timeout=0.05)
        third = call.future(Duration(seconds=3))
        until(lambda: executor.in_flight == 3)  # so the end of the second one, on the same connection, was received
        free.set()
        assert (first.result(PATIENCE).seconds, third.result(PATIENCE).seconds) == (1, 3)
    assert served == [1, 3]
    until(lambda: executor.in_flight == open_calls)
    server.stop(None)


def test_waits_and_rejections_are_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPC itself rejects the calls beyond the limit."""
    waits, away = list[float](), list[int]()

    class Told:
        def on_wait(self, seconds: float) -> None:
            waits.append(seconds)

        def on_rejection(self) -> None:
            away.append(1)

    busy, free = threading.Event(), threading.Event()

    def behaviour(request: Duration, _context: object) -> Duration:
        busy.set()
        assert free.wait(PATIENCE)
        return request

    monkeypatch.setattr(front, "_MAX_CALLS", 2)
    server = front.build_grpc_server(1, shared=False, load=Told())
    handler = grpc.unary_unary_rpc_method_handler(behaviour, Duration.FromString, Duration.SerializeToString)
    server.add_registered_method_handlers("test.Service", {"Call": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test.Service/Call", Duration.SerializeToString, Duration.FromString)
        calls = [call.future(Duration(seconds=1))]
        assert busy.wait(PATIENCE)
        calls.append(call.future(Duration(seconds=2)))
        with pytest.raises(grpc.RpcError) as caught:
            call(Duration(seconds=3), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        refused = time.monotonic()  # the second call has been waiting since before
        call.future(Duration(seconds=4)).exception(PATIENCE)
        waited = time.monotonic() - refused
        free.set()
        for each in calls:
            each.result(PATIENCE)
    assert len(waits) == len(away) == 2
    assert waits[1] > waited
    server.stop(None)
