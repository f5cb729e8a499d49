"""A server that shuts down: at once when it is idle, otherwise after the calls in flight."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from resumed._transport.channel import Channel, Method
from resumed_server.rpc.parting import QUIET_SECONDS
from resumed_server.rpc.server import grpc_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE, HOUR = 20.0, 3_600.0


class Served:
    """A server with one method of either kind, which does what `behaviour` says, and a client of this project."""

    def __init__(self, kind: str, behaviour: Callable[..., Any]) -> None:
        self.server = grpc_server(2, shared=False)
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            behaviour, Duration.FromString, Duration.SerializeToString
        )
        self.server.add_registered_method_handlers("test.Service", {"Call": handler})
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.method = Method("/test.Service/Call", repeatable=False)
        self.channel = Channel(f"127.0.0.1:{port}")


@pytest.fixture
def held() -> threading.Event:
    return threading.Event()


def test_idle_clients_hold_nobody_up() -> None:
    """An idle client reads the GOAWAY frame only before its next call."""
    served = Served("unary_unary", lambda _request, _context: Duration(seconds=1))
    assert served.channel.call(served.method, b"", PATIENCE)
    assert served.server.stop(HOUR).wait(PATIENCE)
    served.channel.close()


def test_a_call_under_way_is_answered(held: threading.Event) -> None:
    reached = threading.Event()

    def answer(_request: Any, _context: Any) -> Duration:
        reached.set()
        assert held.wait(PATIENCE)
        return Duration(seconds=1)

    served = Served("unary_unary", answer)
    with ThreadPoolExecutor(1) as thread:
        answered = thread.submit(served.channel.call, served.method, b"", PATIENCE)
        assert reached.wait(PATIENCE)
        stopped = served.server.stop(HOUR)
        assert not stopped.wait(2 * QUIET_SECONDS)
        held.set()
        assert Duration.FromString(answered.result(PATIENCE)).seconds == 1
        assert stopped.wait(PATIENCE)
    served.channel.close()


def test_a_stream_under_way_is_ended_by_those_who_answer_it(held: threading.Event) -> None:
    def answer(_request: Any, _context: Any) -> Iterator[Duration]:
        yield Duration(seconds=1)
        assert held.wait(PATIENCE)
        yield Duration(seconds=2)

    served = Served("unary_stream", answer)
    stream = iter(served.channel.stream(served.method, b"", PATIENCE))
    assert next(stream)
    stopped = served.server.stop(HOUR)
    assert not stopped.wait(2 * QUIET_SECONDS)
    held.set()
    assert Duration.FromString(next(stream)).seconds == 2
    assert stopped.wait(PATIENCE)
    served.channel.close()


def test_without_a_grace_period_it_ends_at_once(held: threading.Event) -> None:
    served = Served("unary_stream", lambda _request, _context: iter([Duration()] if held.wait(PATIENCE) else []))
    served.channel.stream(served.method, b"", PATIENCE)
    assert served.server.stop(None).wait(PATIENCE)
    held.set()
    served.channel.close()
