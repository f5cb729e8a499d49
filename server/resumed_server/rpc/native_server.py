"""The native front: unary calls that Rust takes from HTTP/2, outside the interpreter lock.

Whatever else is asked for (Watch, health, reflection) goes on to a grpcio server behind it, over a unix socket in a
private directory. There is no TLS, and so no peer whose name is known: it is for loopback addresses and unix sockets.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

from grpc_status import rpc_status
from pygrpc_native import NativeGrpcFront

from resumed_server.errors import Stopping
from resumed_server.rpc.executor import Held, Later
from resumed_server.rpc.handlers import MessageTooLarge, status_of
from resumed_server.rpc.session_service import MAX_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import grpc

    Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

_IO_THREADS = 1
"""Threads of Rust for each address; one keeps up with what the interpreter lock lets through."""
_POLL = 0.01
_FLUSH = 0.25
"""Seconds that answers get to leave: Rust sends them after respond(), tells nobody when, and drops them on close()."""


class NativeServer:
    """Serves the unary calls that are added to it, and passes on all others to the `grpc.Server` behind it.

    Args:
        behind: A server without addresses.
        threads: How many threads answer calls, for each address.
        shared: Whether several processes may have its ports.
        metadata: Whether methods are told what metadata a call came with.
    """

    def __init__(self, behind: grpc.Server, threads: int, *, shared: bool, metadata: bool = False) -> None:
        self._behind = behind
        self._threads = threads
        self._shared = shared
        self._metadata = metadata
        self._methods: dict[str, _Method] = {}
        self._fronts: list[NativeGrpcFront] = []
        self._later = Later()
        self._under_way: deque[None] = deque()  # appends and pops in one step
        self._stopping = False
        self._stopped = threading.Event()
        self._directory = tempfile.mkdtemp(prefix="resumed-")

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """See grpc.Server. Generated code adds a service in this way and the next."""
        self._behind.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """See grpc.Server."""
        self._behind.add_registered_method_handlers(service, handlers)
        self._methods |= {f"/{service}/{name}": _Method(each) for name, each in handlers.items() if each.unary_unary}

    def add_insecure_port(self, address: str) -> int:
        """See grpc.Server.

        Raises:
            RuntimeError: The address cannot be had.
        """
        try:
            front = NativeGrpcFront(
                address, [], io_threads=_IO_THREADS, reuse_port=self._shared, call_details=self._metadata
            )
        except OSError as error:
            raise RuntimeError(f"cannot listen on {address}") from error
        self._fronts.append(front)
        return front.bound_port

    def start(self) -> None:
        """See grpc.Server."""
        socket = f"{self._directory}/grpcio"
        self._behind.add_insecure_port(f"unix:{socket}")
        self._behind.start()
        methods = list(self._methods.values())
        for front in self._fronts:
            front.set_fallback(socket)
            front.add_methods([(path, False) for path in self._methods])
            front.start()
            for number in range(self._threads):
                threading.Thread(target=self._work, args=(front, methods), name=f"native-{number}", daemon=True).start()

    def stop(self, grace: float | None) -> threading.Event:
        """See grpc.Server."""
        self._stopping = True
        behind = self._behind.stop(grace)
        if grace is None:
            self._close()
        else:
            threading.Thread(target=self._finish, args=(behind, time.monotonic() + grace), daemon=True).start()
        return self._stopped

    def _finish(self, behind: threading.Event, deadline: float) -> None:
        while not self._stopped.is_set() and time.monotonic() < deadline:
            if behind.wait(_POLL) and not self._under_way:
                time.sleep(_FLUSH)
                break
        self._close()

    def _close(self) -> None:
        for front in self._fronts:
            front.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._stopped.set()

    def _work(self, front: NativeGrpcFront, methods: list[_Method]) -> None:
        # One call at a time: while the engine keeps this thread waiting, no other call waits behind it.
        receive: Callable[[int], list[Any] | None] = front.recv_batch_details if self._metadata else front.recv_batch
        while (events := receive(1)) is not None:
            for _, call, method, message, _, *details in events:
                context = _Context(details[0][0]) if details else _CONTEXT
                self._under_way.append(None)
                try:
                    self._answer(front, call, methods[method], cast("bytes", message), context)
                finally:
                    self._under_way.pop()

    def _answer(self, front: NativeGrpcFront, call: int, method: _Method, message: bytes, context: _Context) -> None:
        try:
            front.respond(call, self._answered(method, message, context))
        except Held as held:
            refuse = held.refuse
            self._later.after(held.seconds, lambda: self._refuse(front, call, refuse))
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a fixed text
            _fail(front, call, error)

    def _refuse(self, front: NativeGrpcFront, call: int, refuse: Callable[[Any], NoReturn]) -> None:
        try:
            refuse(_CONTEXT)
        except _Aborted as error:
            _fail(front, call, error)

    def _answered(self, method: _Method, message: bytes, context: _Context) -> bytes:
        if self._stopping:
            raise Stopping
        if len(message) > MAX_MESSAGE:
            raise MessageTooLarge
        return method.encode(method.answer(method.decode(message), context))


def _fail(front: NativeGrpcFront, call: int, error: Exception) -> None:
    status = error.status if isinstance(error, _Aborted) else rpc_status.to_status(status_of(error, None))
    front.fail(call, status.code.value[0], status.details, status.trailing_metadata)


class _Method:
    """How to answer calls of one method."""

    __slots__ = ("answer", "decode", "encode")

    def __init__(self, handler: grpc.RpcMethodHandler[Any, Any]) -> None:
        self.decode = cast("Callable[[bytes], Any]", handler.request_deserializer)
        self.answer = cast("Callable[[Any, Any], Any]", handler.unary_unary)
        self.encode = cast("Callable[[Any], bytes]", handler.response_serializer)


class _Aborted(Exception):
    """A call ends with `status`."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__()
        self.status = status


class _Context:
    """As much of a grpc.ServicerContext as an answer needs (see `errors` and `tracing`)."""

    def __init__(self, metadata: Metadata = ()) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        raise _Aborted(status)


_CONTEXT = _Context()
