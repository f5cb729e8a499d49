"""Verify, before a server serves, that grpcio is as _grpcio_private.py expects.

With a single thread it makes a stream that stays open, a call without a message, a call, and a call whose rejection is
delayed. A server uses no private name of a grpcio with which any of them fails.
"""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from resumed_server.rpc._grpcio_private import HandlerArgs, missing_names
from resumed_server.rpc.delay_queue import DelayedRejection
from resumed_server.rpc.executor import CallExecutor

if TYPE_CHECKING:
    from collections.abc import Iterator

STEP_SECONDS = 10.0
"""Maximum duration of each step, which takes about a millisecond normally."""
_SERVICE = "resumed.SelfTest"
_REJECTED = b"reject after a delay"
_POLL_SECONDS = 0.001
_STOP_SECONDS = 1.0

_log = structlog.get_logger()


class IncompatibleGrpcio(Exception):
    """grpcio is not as expected; the message names the difference."""


def is_grpcio_compatible() -> bool:
    """Return whether the server can use the private names of grpcio; log once if not."""
    try:
        check_grpcio()
    except Exception as error:  # noqa: BLE001 - the server works without them, for any reason
        _log.critical(
            "this grpcio is not as expected: silent clients can occupy all threads; install another version",
            version=grpc.__version__,
            cause=str(error) if isinstance(error, IncompatibleGrpcio) else type(error).__name__,
        )
        return False
    return True


def check_grpcio() -> None:
    """Raise IncompatibleGrpcio, or another exception, if grpcio is not as expected."""
    if names := missing_names():
        raise IncompatibleGrpcio(f"no {', no '.join(names)}")
    executor, streams, stop = _CheckedExecutor(), ThreadPoolExecutor(1, "selftest"), threading.Event()
    server = grpc.server(
        executor,  # type: ignore[arg-type] # grpcio only submits to it
        handlers=[grpc.method_handlers_generic_handler(_SERVICE, _handlers(streams, stop))],
    )
    address = f"unix-abstract:resumed-{secrets.token_hex(16)}"  # leaves no file
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            _make_calls(channel, executor, stop)
    except grpc.RpcError as error:
        raise IncompatibleGrpcio(f"a call failed: {error.code().name}") from error
    finally:
        stop.set()
        server.stop(0).wait(_STOP_SECONDS)  # an incompatible grpcio may have lost the thread that stops it
        executor.shutdown()
        streams.shutdown(wait=False)


class _CheckedExecutor(CallExecutor):
    """An executor with one thread that records unknown arguments."""

    def __init__(self) -> None:
        super().__init__(1, max_awaiting_message=1)
        self.has_unknown_arguments = False

    def submit(self, function: Any, /, *arguments: Any) -> Any:  # type: ignore[override] # no Future
        """See CallExecutor."""
        self.has_unknown_arguments |= HandlerArgs.parse(arguments) is None
        return super().submit(function, *arguments)


def _handlers(streams: ThreadPoolExecutor, stop: threading.Event) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    def echo(request: bytes, _context: grpc.ServicerContext) -> bytes:
        if request == _REJECTED:
            raise DelayedRejection(
                _POLL_SECONDS, lambda context: context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "as expected")
            )
        return request

    def stream(request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        yield request
        stop.wait(STEP_SECONDS)

    stream.executor = streams  # type: ignore[attr-defined]
    return {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }


def _make_calls(channel: Any, executor: _CheckedExecutor, stop: threading.Event) -> None:
    path = f"/{_SERVICE}/Echo"
    echo = channel.unary_unary(path)
    next(channel.unary_stream(f"/{_SERVICE}/Stream")(b"stream", timeout=STEP_SECONDS))
    silent = channel.stream_unary(path).future(iter(stop.wait, True), timeout=STEP_SECONDS)
    end = time.monotonic() + STEP_SECONDS
    while executor.awaiting_message == 0:
        if executor.has_unknown_arguments or time.monotonic() > end:
            raise IncompatibleGrpcio("it passes unknown arguments to its executor")
        time.sleep(_POLL_SECONDS)
    # For a moment, this call is the second one that waits for its message, so it cancels the first one.
    if echo(b"call", timeout=STEP_SECONDS) != b"call":
        raise IncompatibleGrpcio("a call has another call's message")
    if silent.code() is not grpc.StatusCode.CANCELLED:
        raise IncompatibleGrpcio("a call without a message is not cancelled")
    try:
        echo(_REJECTED, timeout=STEP_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return
        raise
    raise IncompatibleGrpcio("a call whose rejection is delayed succeeds")
