"""A grpc.Server with two patches, and a reason for each method that it does not have.

1. grpcio (1.85, and probably all earlier versions) never frees a call whose request its deserializer rejected: about
   19 KB, which every client that can connect may add as often as it likes. Here the deserializer never fails; the
   method rejects an invalid request instead, as it rejects all other bad requests.
2. When a server stops, grpcio sends a GOAWAY and a ping on every connection (RFC 9113 section 6.8) and waits for the
   answers. A client without a reading thread, such as the Python one, answers with its next call only, so its idle
   connections would delay the stop for the whole grace period. Here a server stops as soon as it has no calls.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from resumed_server.rpc.delay_queue import DelayedRejection
from resumed_server.rpc.status import UnknownMethod, abort, to_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from resumed_server.rpc.executor import CallExecutor

IDLE_SECONDS = 0.25
"""A stopping server ends once it had no calls for this long: responses leave, calls that crossed the GOAWAY arrive."""
_POLL_SECONDS = 0.02
_INVALID_MESSAGE = object()
_MAX_NAME = 64
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class GrpcServer(grpc.Server):
    """Wraps a `server` of grpcio.

    Args:
        server: The server; it has no methods yet.
        executor: The executor of its calls. None if it has one of concurrent.futures, for a grpcio whose private names
            are not as expected (see selftest.py). Then a client that opens a call and sends no message occupies a
            thread, rejections are never delayed, and idle connections delay the stop.
    """

    def __init__(self, server: grpc.Server, executor: CallExecutor | None) -> None:
        self._server, self._executor = server, executor
        self._services: set[str] = set()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code adds the same methods with add_registered_method_handlers()."""

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Add the methods of a service."""
        self._services.add(service_name)
        handlers = dict(method_handlers)
        if self._executor is None:
            handlers = {name: _without_executor(handler) for name, handler in handlers.items()}
        handlers = {name: _leak_free(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, handlers),))
        self._server.add_registered_method_handlers(service_name, handlers)

    def add_insecure_port(self, address: str) -> int:
        """See grpc.Server."""
        return self._server.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """See grpc.Server."""
        return self._server.add_secure_port(address, server_credentials)

    def start(self) -> None:
        """See grpc.Server."""
        self._server.add_generic_rpc_handlers((_Unknown(self._services),))  # grpcio queries handlers in their order
        self._server.start()

    def stop(self, grace: float | None) -> threading.Event:
        """Reject new calls, and end the calls in progress after `grace` seconds."""
        stopped = self._server.stop(grace)
        if grace and self._executor:
            threading.Thread(
                target=self._stop_when_idle, args=(stopped, self._executor), name="stop", daemon=True
            ).start()
        return stopped

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """See grpc.Server."""
        return self._server.wait_for_termination(timeout)

    def _stop_when_idle(self, stopped: threading.Event, executor: CallExecutor) -> None:
        idle_since = time.monotonic()
        while not stopped.wait(_POLL_SECONDS):
            now = time.monotonic()
            if executor.in_flight:
                idle_since = now
            elif now - idle_since >= IDLE_SECONDS:
                self._server.stop(None)
                return


class _Unknown(grpc.GenericRpcHandler):
    """Rejects calls of methods that `services` do not have; grpcio itself would give no reason."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = services

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return a method that rejects the call. It takes a stream, so it does not wait for a message."""
        _, service, method = f"{handler_call_details.method}//".split("/")[:3]
        if service not in self._services:
            return None

        def reject(_requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            abort(context, to_status(UnknownMethod(method[:_MAX_NAME]), None))

        return grpc.stream_unary_rpc_method_handler(reject)


def _kind_of(handler: grpc.RpcMethodHandler[Any, Any]) -> str:
    """Return the name of the attribute that holds the method of a handler."""
    return next(kind for kind in _KINDS if getattr(handler, kind))


def _make_handler(kind: str, *arguments: Any) -> grpc.RpcMethodHandler[Any, Any]:
    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(*arguments)


def _leak_free(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler whose deserializer never fails, and whose method rejects invalid messages."""
    kind = _kind_of(handler)
    method, decode = getattr(handler, kind), handler.request_deserializer
    assert decode is not None  # noqa: S101 - generated code always gives one

    # wraps() copies the attributes that grpcio reads from a method, such as that it takes one more argument.
    @functools.wraps(method)
    def unary(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
        return method(_valid(request, context), context, *more)

    @functools.wraps(method)
    def stream(requests: Iterator[Any], context: grpc.ServicerContext, *more: Any) -> Any:
        return method((_valid(request, context) for request in requests), context, *more)

    return _make_handler(
        kind,
        stream if handler.request_streaming else unary,
        functools.partial(_decode, decode),
        handler.response_serializer,
    )


def _decode(decode: Callable[[bytes], Any], encoded: bytes) -> Any:
    try:
        return decode(encoded)
    except DecodeError:
        return _INVALID_MESSAGE


def _valid(request: Any, context: grpc.ServicerContext) -> Any:
    """Return a request, or reject its call if it is invalid."""
    if request is _INVALID_MESSAGE:
        abort(context, to_status(DecodeError(), None))
    return request


def _without_executor(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that needs no CallExecutor: it rejects calls at once, and grpcio starts its threads."""
    kind = _kind_of(handler)
    method = getattr(handler, kind)

    @functools.wraps(method)
    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        except DelayedRejection as rejection:
            rejection.reject(context)

    @functools.wraps(method)
    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request, context)
        except DelayedRejection as rejection:
            rejection.reject(context)

    behaviour: Any = stream if handler.response_streaming else unary
    behaviour.experimental_thread_pool = getattr(method, "executor", None)  # grpcio ignores None
    return _make_handler(kind, behaviour, handler.request_deserializer, handler.response_serializer)
