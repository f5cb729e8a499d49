"""The native transport: unary calls that a Rust library receives, outside the interpreter lock.

All other calls (Watch, health, reflection) are forwarded to a grpcio server, over a unix socket in a private directory.
It has no TLS, and so no client certificates: use it for loopback addresses and unix sockets.
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
from resumed_server.rpc.delay_queue import DelayedRejection, DelayQueue
from resumed_server.rpc.status import MessageTooLarge, to_status
from resumed_server.rpc.validation import MAX_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import grpc

    Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

_IO_THREADS = 1
"""Threads of Rust per address. One saturates the interpreter lock."""
_POLL_SECONDS = 0.01
_FLUSH_SECONDS = 0.25
"""Time for responses to leave: Rust sends them after respond(), without a notification, and drops them on close()."""


class NativeServer:
    """Serves the unary calls that are added to it, and forwards all others to another server.

    Args:
        fallback_server: The other server; it has no address yet.
        threads: Threads per address that run calls.
        shared: Whether several processes may listen at its addresses.
        metadata: Whether methods get the metadata of their calls.
    """

    def __init__(self, fallback_server: grpc.Server, threads: int, *, shared: bool, metadata: bool = False) -> None:
        self._fallback_server = fallback_server
        self._threads = threads
        self._shared = shared
        self._metadata = metadata
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._listeners: list[NativeGrpcFront] = []
        self._delay_queue = DelayQueue()
        self._in_flight: deque[None] = deque()  # a counter: append() and pop() are atomic
        self._stopping = False
        self._stopped = threading.Event()
        self._directory = tempfile.mkdtemp(prefix="resumed-")

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """See grpc.Server. Generated code adds a service with this method and the next."""
        self._fallback_server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """See grpc.Server."""
        self._fallback_server.add_registered_method_handlers(service, handlers)
        self._methods |= {f"/{service}/{name}": each for name, each in handlers.items() if each.unary_unary}

    def add_insecure_port(self, address: str) -> int:
        """See grpc.Server.

        Raises:
            RuntimeError: It cannot listen at the address.
        """
        try:
            listener = NativeGrpcFront(
                address, [], io_threads=_IO_THREADS, reuse_port=self._shared, call_details=self._metadata
            )
        except OSError as error:
            raise RuntimeError(f"cannot listen on {address}") from error
        self._listeners.append(listener)
        return listener.bound_port

    def start(self) -> None:
        """See grpc.Server."""
        socket = f"{self._directory}/grpcio"
        self._fallback_server.add_insecure_port(f"unix:{socket}")
        self._fallback_server.start()
        methods = list(self._methods.values())
        for listener in self._listeners:
            listener.set_fallback(socket)
            listener.add_methods([(path, False) for path in self._methods])
            listener.start()
            for number in range(self._threads):
                arguments = (listener, methods)
                threading.Thread(target=self._work, args=arguments, name=f"native-{number}", daemon=True).start()

    def stop(self, grace: float | None) -> threading.Event:
        """See grpc.Server."""
        self._stopping = True
        fallback_stopped = self._fallback_server.stop(grace)
        if grace is None:
            self._close()
        else:
            arguments = (fallback_stopped, time.monotonic() + grace)
            threading.Thread(target=self._finish, args=arguments, name="stop", daemon=True).start()
        return self._stopped

    def _finish(self, fallback_stopped: threading.Event, deadline: float) -> None:
        while not self._stopped.is_set() and time.monotonic() < deadline:
            if fallback_stopped.wait(_POLL_SECONDS) and not self._in_flight:
                time.sleep(_FLUSH_SECONDS)
                break
        self._close()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._stopped.set()

    def _work(self, listener: NativeGrpcFront, methods: list[Any]) -> None:
        # Receive one call at a time: a second one would wait for this thread while the engine blocks it.
        receive: Callable[[int], list[Any] | None] = (
            listener.recv_batch_details if self._metadata else listener.recv_batch
        )
        while (events := receive(1)) is not None:
            for _, call, method, message, _, *details in events:
                context = _Context(details[0][0]) if details else _CONTEXT
                self._in_flight.append(None)
                try:
                    self._respond(listener, call, methods[method], cast("bytes", message), context)
                finally:
                    self._in_flight.pop()

    def _respond(self, listener: NativeGrpcFront, call: int, method: Any, message: bytes, context: _Context) -> None:
        try:
            listener.respond(call, self._run(method, message, context))
        except DelayedRejection as rejection:
            reject = rejection.reject
            self._delay_queue.schedule(rejection.seconds, lambda: self._reject(listener, call, reject))
        except Exception as error:  # noqa: BLE001 - the caller gets a fixed text for any exception
            _fail(listener, call, error)

    def _reject(self, listener: NativeGrpcFront, call: int, reject: Callable[[Any], NoReturn]) -> None:
        try:
            reject(_CONTEXT)
        except _Aborted as error:
            _fail(listener, call, error)

    def _run(self, method: Any, message: bytes, context: _Context) -> bytes:
        """Return the encoded response of a method, a grpc.RpcMethodHandler."""
        if self._stopping:
            raise Stopping
        if len(message) > MAX_MESSAGE:
            raise MessageTooLarge
        response = method.unary_unary(method.request_deserializer(message), context)
        return cast("bytes", method.response_serializer(response))


def _fail(listener: NativeGrpcFront, call: int, error: Exception) -> None:
    status = error.status if isinstance(error, _Aborted) else rpc_status.to_status(to_status(error, None))
    listener.fail(call, status.code.value[0], status.details, status.trailing_metadata)


class _Aborted(Exception):
    """A call ends with `status`."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__()
        self.status = status


class _Context:
    """The part of a grpc.ServicerContext that a method uses (see status.py and observability/tracing.py)."""

    def __init__(self, metadata: Metadata = ()) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        raise _Aborted(status)


_CONTEXT = _Context()
