"""The native transport: shutdown, faults, and the fallback for streams."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from resumed_server.rpc.native_server import NativeServer
from resumed_server.rpc.server import grpc_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 10.0


class Handlers:
    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Return after the test has released the call."""
        self.reached.set()
        assert self.released.wait(PATIENCE)
        return b"answer"

    def fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Fail with an exception whose text contains a secret."""
        raise ValueError(request)

    def stream(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield request
        yield request


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
def server(handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NativeServer:
    """A server of them, at `target`; its private directory is in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def same(message: bytes) -> bytes:
        return message

    server = NativeServer(grpc_server(2, shared=False), 2, shared=False)
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


def test_a_call_under_way_is_answered_and_a_new_one_refused(
    server: NativeServer, handlers: Handlers, channel: Any
) -> None:
    wait = channel.unary_unary("/test.Service/Wait")
    under_way = wait.future(b"", timeout=PATIENCE)
    assert handlers.reached.wait(PATIENCE)
    stopped = server.stop(PATIENCE)
    with pytest.raises(grpc.RpcError) as refused:
        wait(b"", timeout=PATIENCE)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "ERROR_REASON_DRAINING" in str(refused.value.trailing_metadata())
    assert not stopped.is_set()
    handlers.released.set()
    assert under_way.result() == b"answer"
    assert stopped.wait(PATIENCE)


def test_without_grace_it_stops_at_once(server: NativeServer, handlers: Handlers, channel: Any) -> None:
    under_way = channel.unary_unary("/test.Service/Wait").future(b"", timeout=PATIENCE)
    assert handlers.reached.wait(PATIENCE)
    stopped = server.stop(10 * PATIENCE)
    assert server.stop(None) is stopped
    assert stopped.is_set()
    assert under_way.exception().code() is grpc.StatusCode.UNAVAILABLE
    handlers.released.set()


def test_a_fault_tells_the_caller_nothing(channel: Any) -> None:
    for _ in range(5):
        with pytest.raises(grpc.RpcError) as failed:
            channel.unary_unary("/test.Service/Fail")(b"secret", timeout=PATIENCE)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(failed.value)


def test_streams_are_served_behind_it_and_its_directory_goes(
    server: NativeServer, channel: Any, tmp_path: Path
) -> None:
    """The fallback server listens on a socket that other users cannot open."""
    assert list(channel.unary_stream("/test.Service/Stream")(b"news", timeout=PATIENCE)) == [b"news"] * 2
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o077 == 0
    assert os.listdir(directory)  # noqa: PTH208 - a socket
    assert server.stop(1).wait(PATIENCE)
    assert not list(tmp_path.iterdir())
