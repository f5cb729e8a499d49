"""The thread pool for RPCs: every call runs, and each end is reported to grpcio exactly once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from resumed_server.rpc import server as front
from resumed_server.rpc.executor import MOST_HELD, CallPool, Later
from support.waiting import until

if TYPE_CHECKING:
    from resumed_server.rpc.parting import PartingServer

PATIENCE = 20.0


def test_every_call_runs_with_its_arguments_and_its_end_is_told_once() -> None:
    pool, told, all_told = CallPool(4), [], threading.Event()

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
    pool, ended = CallPool(1), threading.Event()

    def fail() -> None:
        raise error("secret")

    with capture_logs() as logged:
        pool.submit(fail)
        pool.submit(int).add_done_callback(lambda _call: ended.set())
        assert ended.wait(10)
    assert [(line["event"], line["error"]) for line in logged] == [("call failed", error.__name__)]
    assert "secret" not in str(logged)


def test_a_call_whose_client_has_given_up_is_not_carried_out() -> None:
    """The client no longer waits for the result."""
    busy, free, served = threading.Event(), threading.Event(), list[int]()

    def behaviour(request: Duration, _context: object) -> Duration:
        served.append(request.seconds)
        if request.seconds == 1:
            busy.set()
            assert free.wait(PATIENCE)
        return request

    server = cast("PartingServer", front.grpc_server(1, shared=False))
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
        until(lambda: server._pool.under_way == 3)  # so it knows how the second one ended, on the same connection
        free.set()
        assert (first.result(PATIENCE).seconds, third.result(PATIENCE).seconds) == (1, 3)
    assert served == [1, 3]
    server.stop(None)


def test_how_busy_it_is_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, away = list[float](), list[int]()

    class Told:
        def waited(self, seconds: float) -> None:
            waits.append(seconds)

        def turned_away(self) -> None:
            away.append(1)

    busy, free = threading.Event(), threading.Event()

    def behaviour(request: Duration, _context: object) -> Duration:
        busy.set()
        assert free.wait(PATIENCE)
        return request

    monkeypatch.setattr(front, "_MAX_QUEUED_CALLS", 2)
    server = front.grpc_server(1, shared=False, load=Told())
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
        refused = time.monotonic()  # by now the second call has been waiting for a while
        call.future(Duration(seconds=4)).exception(PATIENCE)
        waited = time.monotonic() - refused
        free.set()
        for each in calls:
            each.result(PATIENCE)
    assert len(waits) == len(away) == 2
    assert waits[1] > waited
    server.stop(None)


def test_what_is_held_back_leaves_places_for_other_calls() -> None:
    later, due, next_one, latest = Later(), threading.Event(), threading.Event(), threading.Event()
    later.after(0, due.set)
    assert due.wait(10)
    later.after(1_800, next_one.set)
    for _ in range(MOST_HELD - 1):
        later.after(3_600, latest.set)
    assert not next_one.is_set()
    later.after(3_600, latest.set)
    assert next_one.is_set()
    assert not latest.is_set()
    assert MOST_HELD < front._MAX_QUEUED_CALLS
