"""A store and its clients of another version: a proxy in front of a store that changes every message on its way.

Behind `older` they have the contract's first version: the proxy removes newer fields from every message, and
serves no newer call. Behind `stored` they have the version before fleet tickets. Behind `newer` they have a future
version: the proxy adds an unknown field to every message and submessage.
"""

from __future__ import annotations

import contextlib
from concurrent import futures
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import grpc
from google.protobuf.message_factory import GetMessageClass

from resumed.v1 import admin_pb2, session_store_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

Version: TypeAlias = Literal["older", "stored", "newer"]

_TICKETS: dict[str, tuple[str, ...]] = {
    "resumed.v1.PutRequest": ("pinned",),
    "resumed.v1.RemoveRequest": ("ttl",),
    "resumed.v1.WatchRequest": ("removals_only",),
    "resumed.v1.WatchResponse": ("removals_only",),
    "resumed.v1.SessionRemoved": ("ttl",),
    "resumed.v1.NamespacePurged": ("purge_time",),
}
_ADDED: dict[Version, dict[str, tuple[str, ...]]] = {
    "older": _TICKETS | {"resumed.v1.PutRequest": ("issue_time", "pinned"), "resumed.v1.WatchEvent": ("purged",)},
    "stored": _TICKETS,
}
"""Fields that came later, by their messages."""
_ADDED_CALLS = ("/resumed.v1.AdminService/", "/resumed.v1.SessionStoreService/Watch")
_TO_COME = b"\xc2\x3e\x05later"  # field 1000, a string
_METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (session_store_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@contextlib.contextmanager
def other_version(version: Version, target: str) -> Iterator[str]:
    """Return where the store at `target` can be reached as if it and its clients were of that version."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options=options) as channel, futures.ThreadPoolExecutor(16) as threads:
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers([_Proxy(version, channel)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


class _Proxy(grpc.GenericRpcHandler):
    """Passes calls on."""

    def __init__(self, version: Version, channel: Any) -> None:
        self._version, self._channel = version, channel

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return what passes a call on; None for one that this version does not know."""
        path = handler_call_details.method
        if path not in _METHODS or (self._version == "older" and path.startswith(_ADDED_CALLS)):
            return None
        method = _METHODS[path]

        def unary(request: bytes, context: grpc.ServicerContext) -> Any:
            with _errors_of(context):
                answer = self._channel.unary_unary(path)(self._convert(method.input_type, request), timeout=10)
                return self._convert(method.output_type, answer)

        def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            with _errors_of(context):
                answers = self._channel.unary_stream(path)(self._convert(method.input_type, request))
                context.add_callback(answers.cancel)
                for answer in answers:
                    yield self._convert(method.output_type, answer)

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    def _convert(self, kind: Any, encoded: bytes) -> bytes:
        message = GetMessageClass(kind).FromString(encoded)
        for each in _all_in(message):
            if self._version == "newer":
                each.MergeFromString(_TO_COME)
            else:
                for field in _ADDED[self._version].get(each.DESCRIPTOR.full_name, ()):
                    each.ClearField(field)
        return message.SerializeToString()


def _all_in(message: Message) -> Iterator[Message]:
    """Yield a message and all that are in it."""
    for field, value in message.ListFields():
        if field.message_type:
            for each in value if field.is_repeated else (value,):
                yield from _all_in(each)
    yield message


@contextlib.contextmanager
def _errors_of(context: grpc.ServicerContext) -> Iterator[None]:
    """Answer with the error that the store answered with."""
    try:
        yield
    except grpc.RpcError as error:
        context.set_trailing_metadata(error.trailing_metadata())  # type: ignore[arg-type] # any type
        context.abort(error.code(), error.details() or "")
