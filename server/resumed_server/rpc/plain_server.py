"""A server without grpcio's private names: for a grpcio that is not as expected (see selftest.py).

It serves as any other, with what gRPC's threads cost: a client that opens a call and sends nothing holds one of them,
what is to be refused later is refused at once, and idle connections hold up the end of the server.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import grpc

from resumed_server.rpc.decoding import DecodingServer, kind_of
from resumed_server.rpc.executor import Held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class PlainServer(DecodingServer):
    """Does all that the `server` does which it is made of, whose calls run in an executor of concurrent.futures."""

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Add the methods of a service."""
        handlers = {name: _plain(handler) for name, handler in method_handlers.items()}
        super().add_registered_method_handlers(service_name, handlers)


def _plain(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a method that needs nothing of CallPool."""
    kind = kind_of(handler)
    method = getattr(handler, kind)

    @functools.wraps(method)
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        except Held as held:
            held.refuse(context)

    @functools.wraps(method)
    def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request, context)
        except Held as held:
            held.refuse(context)

    behaviour: Any = answers if handler.response_streaming else answer
    behaviour.experimental_thread_pool = getattr(method, "threads", None)  # grpcio ignores None
    make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
