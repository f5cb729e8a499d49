"""Decorators that turn the methods of a servicer into RPCs: errors become statuses, and an observer is notified.

They wrap at class creation, because an interceptor would add to the time of every call.
"""

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
    """Return an RPC that responds with the result of `behaviour`, or with the status of its exception."""
    method = behaviour.__name__

    @functools.wraps(behaviour)
    def rpc(servicer: _Servicer, request: _Request, context: ServicerContext) -> _Response:
        started = time.perf_counter()
        try:
            response = behaviour(servicer, request, context)
        except Exception as error:  # noqa: BLE001 - the caller gets a fixed text for any exception
            status = to_status(error, request)
            servicer.observer.on_failure(method, status.code, time.perf_counter() - started, request, context)
            _reject(context, status, error)
        servicer.observer.on_success(method, time.perf_counter() - started, request, response, context)
        return response

    return rpc


def stream_handler(
    behaviour: Callable[[_Servicer, _Request, ServicerContext], Iterator[_Response]],
) -> Callable[[_Servicer, _Request, ServicerContext], Iterator[_Response]]:
    """Return a streaming RPC of `behaviour`. It has an executor of its own, or streams would starve unary calls."""
    method = behaviour.__name__

    @functools.wraps(behaviour)
    def rpc(servicer: _Servicer, request: _Request, context: ServicerContext) -> Iterator[_Response]:
        code, started = _CANCELLED, time.perf_counter()
        try:
            yield from behaviour(servicer, request, context)
        except Exception as error:  # noqa: BLE001 - the caller gets a fixed text for any exception
            status = to_status(error, request)
            if not isinstance(error, Stopping):  # a rollout is not a failure of the server
                code = status.code
            _reject(context, status, error)
        finally:
            # A stream never completes with OK, so every end is recorded as a failure with its status code.
            servicer.observer.on_failure(method, code, time.perf_counter() - started, request, context)

    # A few threads more than watchers, which reject the calls beyond MAX_WATCHERS.
    rpc.executor = ThreadPoolExecutor(MAX_WATCHERS + 8, "watch")  # type: ignore[attr-defined]
    return rpc


def _reject(context: ServicerContext, status: Status, error: Exception) -> NoReturn:
    if isinstance(error, LimitExceeded) and error.delay:
        raise DelayedRejection(error.delay, lambda later: abort(later, status)) from None
    abort(context, status)
