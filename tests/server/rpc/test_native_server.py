"""The native transport alone: its shutdown, errors and forwarded calls."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from resumed_server.rpc.native_server import NativeServer
from resumed_server.rpc.server import build_grpc_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 10.0


class Handlers:
    """One method that waits for `release`, one that fails, and one that streams."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Return once released."""
        self.reached.set()
        assert self.released.wait(PATIENCE)
        return b"answer"

    def fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Raise an exception with a secret."""
        raise ValueError(request)

    def stream(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield two responses."""
        yield request
        yield request


@pytest.fixture
def handlers() -> Handlers:
    """The methods of the server."""
    return Handlers()


@pytest.fixture
def server(handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NativeServer:
    """A server with these methods, at `target`; its private directory is in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def same(message: bytes) -> bytes:
        return message

    server = NativeServer(build_grpc_server(2, shared=False), 2, shared=False)
    server.add_registered_method_handlers(
        "test.Service",
        {
            "Wait": grpc.unary_unary_rpc_method_handler(handlers.wait, same, same),
            "Fail": grpc.unary_unary_rpc_method_handler(handlers.fail, same, same),
            "Stream": grpc.unary_stream_rpc_method_handler(handlers.stream, same, same),
        },
    )
    return server


@pytest.fixture
def channel(server: NativeServer) -> Iterator[Any]:
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    assert server.stop(None).wait(PATIENCE)


def test_a_call_in_flight_ends_before_the_server_and_a_new_one_is_rejected(
    server: NativeServer, handlers: Handlers, channel: Any
) -> None:
    wait = channel.unary_unary("/test.Service/Wait")
    in_flight = wait.future(b"", timeout=PATIENCE)
    assert handlers.reached.wait(PATIENCE)
    stopped = server.stop(PATIENCE)
    with pytest.raises(grpc.RpcError) as refused:
        wait(b"", timeout=PATIENCE)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "ERROR_REASON_DRAINING" in str(refused.value.trailing_metadata())
    assert not stopped.is_set()
    handlers.released.set()
    assert in_flight.result() == b"answer"
    assert stopped.wait(PATIENCE)


def test_without_grace_it_stops_at_once(server: NativeServer, handlers: Handlers, channel: Any) -> None:
    """Even during a stop with a grace period."""
    in_flight = channel.unary_unary("/test.Service/Wait").future(b"", timeout=PATIENCE)
    assert handlers.reached.wait(PATIENCE)
    stopped = server.stop(10 * PATIENCE)
    assert server.stop(None) is stopped
    assert stopped.is_set()
    assert in_flight.exception().code() is grpc.StatusCode.UNAVAILABLE
    handlers.released.set()


def test_the_error_of_a_failed_call_contains_no_secret(channel: Any) -> None:
    """The threads survive: more calls fail than there are threads."""
    for _ in range(5):
        with pytest.raises(grpc.RpcError) as failed:
            channel.unary_unary("/test.Service/Fail")(b"secret", timeout=PATIENCE)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(failed.value)


def test_streams_are_forwarded_and_the_directory_is_removed(server: NativeServer, channel: Any, tmp_path: Path) -> None:
    """Only the user of the server can access the socket in it."""
    assert list(channel.unary_stream("/test.Service/Stream")(b"news", timeout=PATIENCE)) == [b"news"] * 2
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o077 == 0
    assert os.listdir(directory)  # noqa: PTH208 - a socket
    assert server.stop(1).wait(PATIENCE)
    assert not list(tmp_path.iterdir())
