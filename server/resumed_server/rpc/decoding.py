"""A gRPC server that is no larger after a request that cannot be decoded, and says why it knows no method.

grpcio (1.85, and likely all before) never lets go of a call whose request its deserializer refused: about 19 KB that
anybody who can connect may add as often as they like. So requests are decoded where nothing is refused, and what is no
message ends its call as any other bad request does: from the method.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from resumed_server.rpc.handlers import UnknownMethod, abort, status_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping

_UNDECODABLE = object()
_LONGEST_NAME = 64
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class DecodingServer(grpc.Server):
    """Does all that the `server` does which it is made of."""

    def __init__(self, server: grpc.Server) -> None:
        self._server = server
        self._services: set[str] = set()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Do nothing: generated code adds the same methods as registered ones too."""

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Add the methods of a service."""
        self._services.add(service_name)
        decoding = {name: _decoding(handler) for name, handler in method_handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, decoding),))
        self._server.add_registered_method_handlers(service_name, decoding)

    def add_insecure_port(self, address: str) -> int:
        """See grpc.Server."""
        return self._server.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """See grpc.Server."""
        return self._server.add_secure_port(address, server_credentials)

    def start(self) -> None:
        """See grpc.Server."""
        self._server.add_generic_rpc_handlers((_Unknown(self._services),))  # handlers are asked in their order
        self._server.start()

    def stop(self, grace: float | None) -> threading.Event:
        """See grpc.Server."""
        return self._server.stop(grace)

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """See grpc.Server."""
        return self._server.wait_for_termination(timeout)


class _Unknown(grpc.GenericRpcHandler):
    """Answers for the methods that `services` do not have; grpcio by itself gives no reason."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = services

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return a method that refuses the call; whatever is sent to it does not have to come first."""
        _, service, method = f"{handler_call_details.method}//".split("/")[:3]
        if service not in self._services:
            return None

        def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            abort(context, status_of(UnknownMethod(method[:_LONGEST_NAME]), None))

        return grpc.stream_unary_rpc_method_handler(refuse)


def kind_of(handler: grpc.RpcMethodHandler[Any, Any]) -> str:
    """Return the attribute that has the method of a handler."""
    return next(kind for kind in _KINDS if getattr(handler, kind))


def _decoding(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a method that is called with what cannot be decoded too, and refuses it."""
    kind = kind_of(handler)
    method, decode = getattr(handler, kind), handler.request_deserializer
    assert decode is not None  # noqa: S101 - generated code always gives one

    # grpcio finds at the method what is special about it, such as that it takes one argument more.
    @functools.wraps(method)
    def unary(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
        return method(_decoded(request, context), context, *more)

    @functools.wraps(method)
    def stream(requests: Iterator[Any], context: grpc.ServicerContext, *more: Any) -> Any:
        return method((_decoded(request, context) for request in requests), context, *more)

    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        stream if handler.request_streaming else unary, functools.partial(_decode, decode), handler.response_serializer
    )


def _decode(decode: Callable[[bytes], Any], encoded: bytes) -> Any:
    try:
        return decode(encoded)
    except DecodeError:
        return _UNDECODABLE


def _decoded(request: Any, context: grpc.ServicerContext) -> Any:
    if request is _UNDECODABLE:
        abort(context, status_of(DecodeError(), None))
    return request
