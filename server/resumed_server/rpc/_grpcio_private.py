"""All private names of grpcio that this server uses.

grpcio passes every call to its executor, as a handler function with arguments. Only this module knows these functions
and arguments; tests/server/rpc/test_grpcio_private.py pins them. A new grpcio may change them without notice. So each
server verifies them before it serves (selftest.py), and works without them if they are different (grpc_server.py).
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

_UNARY_REQUEST = "unary_request"
"""The name of grpcio's function that waits for the one message of a call."""
_NAMES = {
    "grpc._server": (
        *("_unary_response_in_pool", "_stream_response_in_pool", "_receive_message", "_is_rpc_state_active"),
        *("_abort", "_CLOSED", "_RECEIVE_MESSAGE_TOKEN"),
    ),
    "grpc._cython.cygrpc": ("ReceiveMessageOperation", "StatusCode"),
}


class ConnectionCounter:
    """Counts the connections of the servers that are created after it in this process, by channelz of gRPC's core."""

    def __init__(self) -> None:
        self._others = frozenset(_server_ids() or ())

    def count(self) -> int | None:
        """Return the number of open connections; None without channelz."""
        servers = _server_ids()
        return None if servers is None else sum(_count_sockets(each) for each in servers if each not in self._others)


def _server_ids() -> list[int] | None:
    """Return the ids of all servers in this process; None without channelz."""
    try:
        return [int(each["ref"]["serverId"]) for each in json.loads(_cygrpc.channelz_get_servers(0)).get("server", ())]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _count_sockets(server: int) -> int:
    number, start = 0, 0
    while True:
        page = json.loads(_cygrpc.channelz_get_server_sockets(server, start, 0))
        sockets = page.get("socketRef", ())
        number += len(sockets)
        if page.get("end") or not sockets:
            return number
        start = int(sockets[-1]["socketId"]) + 1


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_server, _cygrpc = map(_import, _NAMES)
_HANDLER_FUNCTIONS = [getattr(_server, name, None) for name in ("_unary_response_in_pool", "_stream_response_in_pool")]


def missing_names() -> list[str]:
    """Return the names that this grpcio does not have."""
    return [f"{name}.{each}" for name, names in _NAMES.items() for each in names if not hasattr(_import(name), each)]


class HandlerArgs(NamedTuple):
    """A handler function of grpcio and its arguments."""

    function: Callable[..., object]
    rpc_event: Any
    state: Any
    behaviour: Callable[..., object]
    request: Callable[[], object]
    deserializer: Any
    serializer: Any

    @classmethod
    def parse(cls, arguments: Sequence[Any]) -> Self | None:
        """Return the arguments that grpcio passed to its executor; None if they are those of no known handler."""
        if len(arguments) != len(cls._fields):
            return None
        handler = cls(*arguments)
        return handler if handler.function in _HANDLER_FUNCTIONS else None

    @property
    def awaits_message(self) -> bool:
        """Whether the handler would wait for the message of the call."""
        return getattr(self.request, "__name__", "") == _UNARY_REQUEST

    def start_receiving(self, on_arrival: Callable[[], object]) -> Self:
        """Start to receive the message of a call; call `on_arrival` when it has arrived, or cannot arrive any more.

        Returns the arguments to run the handler with then. It does the same as grpcio's `_unary_request`, but does not
        wait. grpcio holds the lock of the call.
        """
        state, rpc = self.state, self.rpc_event.call
        on_message = _server._receive_message(state, rpc, self.deserializer)  # noqa: SLF001

        def receive(event: object) -> object:
            result = on_message(event)
            on_arrival()
            return result

        def request() -> object:
            with state.condition:
                if not _server._is_rpc_state_active(state):  # noqa: SLF001
                    return None
                message, state.request = state.request, None
                if message is None and state.client is _server._CLOSED:  # noqa: SLF001
                    code = _cygrpc.StatusCode.unimplemented
                    _server._abort(state, rpc, code, b"the call has no message")  # noqa: SLF001
                return message

        rpc.start_server_batch((_cygrpc.ReceiveMessageOperation(0),), receive)
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)  # noqa: SLF001
        return self._replace(request=request)

    def is_given_up(self) -> bool:
        """Return whether the client has given up the call."""
        with self.state.condition:
            return not _server._is_rpc_state_active(self.state)  # noqa: SLF001

    def cancel(self) -> None:
        """Cancel the call."""
        self.rpc_event.call.cancel()
