"""The two patches of GrpcServer: invalid messages leave nothing in memory, and a stop waits for calls only."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc._server import _RPCState

from resumed._transport.channel import Channel, Method
from resumed_server.rpc.grpc_server import IDLE_SECONDS
from resumed_server.rpc.server import build_grpc_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE, HOUR = 20.0, 3_600.0
NO_MESSAGE = b"\xff" * 100
METHODS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def respond(_request: Any, _context: grpc.ServicerContext) -> Duration:
    """Return one response."""
    return Duration(seconds=1)


def respond_twice(_request: Any, _context: grpc.ServicerContext) -> Iterator[Duration]:
    """Yield two responses."""
    yield from [Duration(seconds=1)] * 2


def count(requests: Iterator[Any], _context: grpc.ServicerContext) -> Duration:
    """Return the number of requests."""
    return Duration(seconds=len(list(requests)))


def echo(requests: Iterator[Any], _context: grpc.ServicerContext) -> Iterator[Duration]:
    """Yield each request."""
    yield from requests


BEHAVIOURS = dict(zip(METHODS, (respond, respond_twice, count, echo), strict=True))


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """A channel to a server with a method of each kind."""
    server = build_grpc_server(2, shared=False)
    server.add_registered_method_handlers(
        "test.Service",
        {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(
                behaviour, Duration.FromString, Duration.SerializeToString
            )
            for kind, behaviour in BEHAVIOURS.items()
        },
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(None).wait()


def call(channel: grpc.Channel, kind: str, message: bytes) -> list[bytes]:
    """Call a method with one message."""
    method = getattr(channel, kind)(f"/test.Service/{kind}")
    given = iter([message]) if kind.startswith("stream") else message
    answered = method(given, timeout=10)
    return list(answered) if kind.endswith("stream") else [answered]


@pytest.mark.parametrize("kind", METHODS)
def test_a_valid_message_gets_a_response(channel: grpc.Channel, kind: str) -> None:
    one = Duration(seconds=1).SerializeToString()
    assert call(channel, kind, one) == [one] * (2 if kind == "unary_stream" else 1)


@pytest.mark.parametrize("kind", METHODS)
def test_an_invalid_message_is_rejected_and_leaves_nothing_in_memory(channel: grpc.Channel, kind: str) -> None:
    """Grpcio itself never frees the 19 KB of such a call."""
    for _ in range(50):
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, kind, NO_MESSAGE)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == "the request is not a valid message of this method"
    gc.collect()
    # One for each method that waits for a call, and for a few calls that are ending.
    assert sum(isinstance(each, _RPCState) for each in gc.get_objects()) < 25 + threading.active_count()


# --- Stopping ------------------------------------------------------------


class Served:
    """A server with one method of either kind, which runs `behaviour`, and a client of this project."""

    def __init__(self, kind: str, behaviour: Callable[..., Any]) -> None:
        self.server = build_grpc_server(2, shared=False)
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            behaviour, Duration.FromString, Duration.SerializeToString
        )
        self.server.add_registered_method_handlers("test.Service", {"Call": handler})
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.method = Method("/test.Service/Call", repeatable=False)
        self.channel = Channel(f"127.0.0.1:{port}")


@pytest.fixture
def release() -> threading.Event:
    """The event that behaviours wait for."""
    return threading.Event()


def test_idle_clients_do_not_delay_the_stop() -> None:
    """They read the GOAWAY on a connection only with their next call."""
    served = Served("unary_unary", lambda _request, _context: Duration(seconds=1))
    assert served.channel.call(served.method, b"", PATIENCE)
    assert served.server.stop(HOUR).wait(PATIENCE)
    served.channel.close()


def test_a_call_in_flight_ends_before_the_server(release: threading.Event) -> None:
    """The server waits for it during the whole grace period."""
    reached = threading.Event()

    def respond(_request: Any, _context: Any) -> Duration:
        reached.set()
        assert release.wait(PATIENCE)
        return Duration(seconds=1)

    served = Served("unary_unary", respond)
    with ThreadPoolExecutor(1) as thread:
        answered = thread.submit(served.channel.call, served.method, b"", PATIENCE)
        assert reached.wait(PATIENCE)
        stopped = served.server.stop(HOUR)
        assert not stopped.wait(2 * IDLE_SECONDS)
        release.set()
        assert Duration.FromString(answered.result(PATIENCE)).seconds == 1
        assert stopped.wait(PATIENCE)
    served.channel.close()


def test_a_stream_in_flight_ends_before_the_server(release: threading.Event) -> None:
    """Its method ends it, as Watch does with a reason."""

    def respond(_request: Any, _context: Any) -> Iterator[Duration]:
        yield Duration(seconds=1)
        assert release.wait(PATIENCE)
        yield Duration(seconds=2)

    served = Served("unary_stream", respond)
    stream = iter(served.channel.stream(served.method, b"", PATIENCE))
    assert next(stream)
    stopped = served.server.stop(HOUR)
    assert not stopped.wait(2 * IDLE_SECONDS)
    release.set()
    assert Duration.FromString(next(stream)).seconds == 2
    assert stopped.wait(PATIENCE)
    served.channel.close()


def test_without_a_grace_period_the_server_cancels_calls(release: threading.Event) -> None:
    served = Served("unary_stream", lambda _request, _context: iter([Duration()] if release.wait(PATIENCE) else []))
    served.channel.stream(served.method, b"", PATIENCE)
    assert served.server.stop(None).wait(PATIENCE)
    release.set()
    served.channel.close()
