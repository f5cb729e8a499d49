"""Tries out, before a server serves, whether grpcio is what private_grpcio.py takes it for.

On one thread: a stream that lasts, a call that sends nothing, a call, and one that is refused later. All of them must
go as they do in the server. A grpcio with which they do not is used without its private names (see plain.py).
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
"""Seconds that each step may take, which takes about a millisecond where all is well."""
_SERVICE = "resumed.SelfTest"
_REFUSED = b"refused later"
_POLL = 0.001
_END_SECONDS = 1.0

_log = structlog.get_logger()


class IncompatibleGrpcio(Exception):
    """grpcio is not what it is taken for; the message says in what."""


def is_grpcio_compatible() -> bool:
    """Return whether the private names of grpcio may be relied on; log once if not."""
    try:
        check_grpcio()
    except Exception as error:  # noqa: BLE001 - whatever it is, there is a way that works without
        _log.critical(
            "this grpcio is not as expected: clients that send nothing can hold threads; install another version",
            version=grpc.__version__,
            cause=str(error) if isinstance(error, IncompatibleGrpcio) else type(error).__name__,
        )
        return False
    return True


def check_grpcio() -> None:
    """Raise IncompatibleGrpcio, or whatever else happens, if grpcio is not as expected."""
    if names := missing_names():
        raise IncompatibleGrpcio(f"there is no {' and no '.join(names)}")
    pool, streams, over = _CheckedExecutor(), ThreadPoolExecutor(1, "selftest"), threading.Event()
    server = grpc.server(
        pool,  # type: ignore[arg-type] # grpcio only submits to it
        handlers=[grpc.method_handlers_generic_handler(_SERVICE, _handlers(streams, over))],
    )
    address = f"unix-abstract:resumed-{secrets.token_hex(16)}"  # leaves no file
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            _make_calls(channel, pool, over)
    except grpc.RpcError as error:
        raise IncompatibleGrpcio(f"a call failed: {error.code().name}") from error
    finally:
        over.set()
        server.stop(0).wait(_END_SECONDS)  # a fault may have ended the thread that stops it
        pool.shutdown()
        streams.shutdown(wait=False)


class _CheckedExecutor(CallExecutor):
    """A pool of one thread that notes what grpcio submits and should not."""

    def __init__(self) -> None:
        super().__init__(1, max_awaiting_message=1)
        self.unknown_arguments = False

    def submit(self, function: Any, /, *arguments: Any) -> Any:  # type: ignore[override] # no Future
        """See CallExecutor."""
        self.unknown_arguments |= HandlerArgs.parse(arguments) is None
        return super().submit(function, *arguments)


def _handlers(streams: ThreadPoolExecutor, over: threading.Event) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    def answer(request: bytes, _context: grpc.ServicerContext) -> bytes:
        if request == _REFUSED:
            raise DelayedRejection(
                _POLL, lambda context: context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "as expected")
            )
        return request

    def follow(request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        yield request
        over.wait(STEP_SECONDS)

    follow.threads = streams  # type: ignore[attr-defined]
    return {
        "Answer": grpc.unary_unary_rpc_method_handler(answer),
        "Follow": grpc.unary_stream_rpc_method_handler(follow),
    }


def _make_calls(channel: Any, pool: _CheckedExecutor, over: threading.Event) -> None:
    path = f"/{_SERVICE}/Answer"
    answer = channel.unary_unary(path)
    next(channel.unary_stream(f"/{_SERVICE}/Follow")(b"stream", timeout=STEP_SECONDS))
    awaiting_message = channel.stream_unary(path).future(iter(over.wait, True), timeout=STEP_SECONDS)
    end = time.monotonic() + STEP_SECONDS
    while pool.awaiting_message == 0:
        if pool.unknown_arguments or time.monotonic() > end:
            raise IncompatibleGrpcio("what it passes to its executor is not known")
        time.sleep(_POLL)
    # Beside them, and as the second one that waits for its message for a moment.
    if answer(b"call", timeout=STEP_SECONDS) != b"call":
        raise IncompatibleGrpcio("a call has another call's message")
    if awaiting_message.code() is not grpc.StatusCode.CANCELLED:
        raise IncompatibleGrpcio("a call that sends nothing is not ended")
    try:
        answer(_REFUSED, timeout=STEP_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return
        raise
    raise IncompatibleGrpcio("a call that is to be refused later is answered")
