"""A server that receives messages it cannot decode."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc._server import _RPCState

from resumed_server.rpc.server import grpc_server

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_MESSAGE = b"\xff" * 100
METHODS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def answer(_request: Any, _context: grpc.ServicerContext) -> Duration:
    return Duration(seconds=1)


def answers(_request: Any, _context: grpc.ServicerContext) -> Iterator[Duration]:
    """Return whether a server accepts connections."""
    yield from [Duration(seconds=1)] * 2


def answer_all(requests: Iterator[Any], _context: grpc.ServicerContext) -> Duration:
    return Duration(seconds=len(list(requests)))


def answer_each(requests: Iterator[Any], _context: grpc.ServicerContext) -> Iterator[Duration]:
    yield from requests


BEHAVIOURS = dict(zip(METHODS, (answer, answers, answer_all, answer_each), strict=True))


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """A connection to a server with a method of each kind."""
    server = grpc_server(2, shared=False)
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
    method = getattr(channel, kind)(f"/test.Service/{kind}")
    given = iter([message]) if kind.startswith("stream") else message
    answered = method(given, timeout=10)
    return list(answered) if kind.endswith("stream") else [answered]


@pytest.mark.parametrize("kind", METHODS)
def test_a_message_is_answered(channel: grpc.Channel, kind: str) -> None:
    one = Duration(seconds=1).SerializeToString()
    assert call(channel, kind, one) == [one] * (2 if kind == "unary_stream" else 1)


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_no_message_is_refused_and_leaves_nothing_behind(channel: grpc.Channel, kind: str) -> None:
    """Without the wrapper, grpcio leaks 19 KB for each such call."""
    for _ in range(50):
        with pytest.raises(grpc.RpcError) as refused:
            call(channel, kind, NO_MESSAGE)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == "the request is no message of this method"
    gc.collect()
    # One for each method that waits to be called, and for a few that end just now.
    assert sum(isinstance(each, _RPCState) for each in gc.get_objects()) < 25 + threading.active_count()
