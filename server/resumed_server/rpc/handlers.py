"""Decorators that make RPCs of methods: exceptions become statuses, and an observer is told of each call."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn, TypeVar

from grpc import ServicerContext, StatusCode

from resumed_server.errors import Stopping
from resumed_server.limits.enforcer import LimitExceeded
from resumed_server.rpc.delay_queue import DelayedRejection
from resumed_server.rpc.status import abort, to_status
from resumed_server.watch.hub import MAX_WATCHERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.rpc.status_pb2 import Status

    from resumed_server.rpc.observer import HasObserver

_CANCELLED: int = StatusCode.CANCELLED.value[0]

_Servicer = TypeVar("_Servicer", bound="HasObserver")
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def unary_handler(
    behaviour: Callable[[_Servicer, _Request, ServicerContext], _Response],
) -> Callable[[_Servicer, _Request, ServicerContext], _Response]:
    """Make an RPC of `behaviour`, whose exceptions reach the caller as the table says.

    It wraps at class creation, since an interceptor would cost every call its time.
    """
    method = behaviour.__name__

    @functools.wraps(behaviour)
    def rpc(servicer: _Servicer, request: _Request, context: ServicerContext) -> _Response:
        started = time.perf_counter()
        try:
            response = behaviour(servicer, request, context)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a fixed text
            status = to_status(error, request)
            servicer.observer.on_failure(method, status.code, time.perf_counter() - started, request, context)
            _refuse(context, status, error)
        servicer.observer.on_success(method, time.perf_counter() - started, request, response, context)
        return response

    return rpc


def stream_handler(
    behaviour: Callable[[_Servicer, _Request, ServicerContext], Iterator[_Response]],
) -> Callable[[_Servicer, _Request, ServicerContext], Iterator[_Response]]:
    """Make a streaming RPC of `behaviour`, on threads of its own: on those of the unary calls it would starve them."""
    method = behaviour.__name__

    @functools.wraps(behaviour)
    def rpc(servicer: _Servicer, request: _Request, context: ServicerContext) -> Iterator[_Response]:
        code, started = _CANCELLED, time.perf_counter()
        try:
            yield from behaviour(servicer, request, context)
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a fixed text
            status = to_status(error, request)
            if not isinstance(error, Stopping):  # to those who watch the server a rollout is no failure
                code = status.code
            _refuse(context, status, error)
        finally:
            # No stream ends otherwise.
            servicer.observer.on_failure(method, code, time.perf_counter() - started, request, context)

    # A few more than there may be watchers, to tell the others that there are too many.
    rpc.threads = ThreadPoolExecutor(MAX_WATCHERS + 8, "watch")  # type: ignore[attr-defined]
    return rpc


def _refuse(context: ServicerContext, status: Status, error: Exception) -> NoReturn:
    if isinstance(error, LimitExceeded) and error.hold:
        raise DelayedRejection(error.hold, lambda later: abort(later, status)) from None
    abort(context, status)
