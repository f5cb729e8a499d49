"""All that this server uses of grpcio and grpcio promises to nobody.

grpcio passes every call to its executor, as a function that answers it and that function's arguments. What they are is
said here alone, and tests/server/rpc/test_grpcio_private.py pins it. A new grpcio may change it without a word: so each
server tries it out before it serves (selftest.py), and does without where it is not as expected (plain.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

_UNARY_REQUEST = "unary_request"
"""What grpcio calls the function that waits for the one message of a call."""
_NAMES = {
    "grpc._server": (
        *("_unary_response_in_pool", "_stream_response_in_pool", "_receive_message", "_is_rpc_state_active"),
        *("_abort", "_CLOSED", "_RECEIVE_MESSAGE_TOKEN"),
    ),
    "grpc._cython.cygrpc": ("ReceiveMessageOperation", "StatusCode"),
}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_server, _cygrpc = map(_import, _NAMES)
_HANDLER_FUNCTIONS = [getattr(_server, name, None) for name in ("_unary_response_in_pool", "_stream_response_in_pool")]


def missing_names() -> list[str]:
    """Return the names that are not there."""
    return [f"{name}.{each}" for name, names in _NAMES.items() for each in names if not hasattr(_import(name), each)]


class HandlerArgs(NamedTuple):
    """One of grpcio's functions that answer a call, and their arguments."""

    function: Callable[..., object]
    rpc_event: Any
    state: Any
    behaviour: Callable[..., object]
    request: Callable[[], object]
    deserializer: Any
    serializer: Any

    @classmethod
    def parse(cls, arguments: Sequence[Any]) -> Self | None:
        """Return the call that `arguments` of grpcio's executor are about, None if it is none or another grpcio's."""
        if len(arguments) != len(cls._fields):
            return None
        answering = cls(*arguments)
        return answering if answering.function in _HANDLER_FUNCTIONS else None

    @property
    def awaits_message(self) -> bool:
        """Whether the thread that answers the call would wait for its message."""
        return getattr(self.request, "__name__", "") == _UNARY_REQUEST

    def start_receiving(self, arrived: Callable[[], object]) -> Self:
        """Ask for the message of a call; call `arrived` when it is there, or will never be.

        Returns the call to answer then. It is what grpcio's `_unary_request` does, but that it waits for nothing.
        grpcio holds the lock of the call.
        """
        state, rpc = self.state, self.rpc_event.call
        received = _server._receive_message(state, rpc, self.deserializer)  # noqa: SLF001

        def receive(event: object) -> object:
            finished = received(event)
            arrived()
            return finished

        def request() -> object:
            with state.condition:
                if not _server._is_rpc_state_active(state):  # noqa: SLF001 - the client has given up meanwhile
                    return None
                message, state.request = state.request, None
                if message is None and state.client is _server._CLOSED:  # noqa: SLF001
                    code = _cygrpc.StatusCode.unimplemented
                    _server._abort(state, rpc, code, b"the call has no message")  # noqa: SLF001
                return message

        rpc.start_server_batch((_cygrpc.ReceiveMessageOperation(0),), receive)
        state.due.add(_server._RECEIVE_MESSAGE_TOKEN)  # noqa: SLF001
        return self._replace(request=request)

    def cancel(self) -> None:
        """End the call."""
        self.rpc_event.call.cancel()
