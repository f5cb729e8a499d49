"""The one table from exceptions to gRPC errors.

Every error has two texts: a fixed, harmless one for the caller, and the cause, which only the log gets.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar

import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import ServicerContext, StatusCode
from grpc_status import rpc_status

from resumed.v1 import session_store_pb2 as pb
from resumed_server.auth.authorizer import NotGranted, Unauthenticated
from resumed_server.errors import Stopping, described, is_news
from resumed_server.limits.enforcer import LimitExceeded
from resumed_server.rpc.executor import Held
from resumed_server.storage.engine import AlreadyExists, EngineError, EngineFull, EngineUnavailable
from resumed_server.watch.hub import MAX_WATCHERS, TooManyWatchers, WatcherTooSlow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

DOMAIN = "resumed.github.io"
"""Of all reasons: a name that belongs to the project and carries no version (AIP-193)."""

_Servicer = TypeVar("_Servicer", bound="Observed")
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

log = structlog.get_logger()


class Observer(Protocol):
    """Is told of every call, by the request, the answer and the context that its method had."""

    def answered(self, method: str, seconds: float, request: Any, response: Any, context: ServicerContext, /) -> None:
        """Note a call of `method` that was answered after `seconds`."""

    def failed(self, method: str, code: int, seconds: float, request: Any, context: ServicerContext, /) -> None:
        """Note a call that ended with the status `code`, by its number."""

    def limited(self, operation: str, namespace: str, /) -> None:
        """Note an operation (get, put, take or remove), alone or of a Batch, that a limit of its namespace refused."""


class Unobserved:
    """An observer who notes nothing."""

    def answered(self, *_: object) -> None:
        """See Observer."""

    def failed(self, *_: object) -> None:
        """See Observer."""

    def limited(self, *_: object) -> None:
        """See Observer."""


class Observed(Protocol):
    """A servicer whose calls are observed."""

    observer: Observer


class InvalidField(Exception):
    """A field of a request is outside its limits; `field` is its path in the request."""

    def __init__(self, field: str, limit: str) -> None:
        super().__init__(f"{field} {limit}")
        self.field = field
        self.limit = limit

    def below(self, path: str) -> InvalidField:
        """Return the same error of a request that has this one's request at `path`."""
        return InvalidField(f"{path}.{self.field}", self.limit)


class MessageTooLarge(Exception):
    """A request has more bytes than any legal one."""


class UnknownMethod(Exception):
    """There is no method `name` in a service of this server."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class _Answer(NamedTuple):
    code: StatusCode
    reason: int
    text: str


_CANCELLED: int = StatusCode.CANCELLED.value[0]
_INTERNAL = _Answer(StatusCode.INTERNAL, pb.ERROR_REASON_INTERNAL, "the server has a fault; its log says which")
_ANSWERS: dict[type[Exception], _Answer] = {
    InvalidField: _Answer(
        StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_FIELD, "a field of the request is outside its limits"
    ),
    Unauthenticated: _Answer(
        StatusCode.UNAUTHENTICATED,
        pb.ERROR_REASON_UNAUTHENTICATED,
        "this server serves callers with a client certificate that has a SPIFFE id or a DNS name",
    ),
    NotGranted: _Answer(StatusCode.PERMISSION_DENIED, pb.ERROR_REASON_NOT_GRANTED, "no grant allows this"),
    AlreadyExists: _Answer(
        StatusCode.ALREADY_EXISTS,
        pb.ERROR_REASON_WRITE_ONCE,
        "the key holds another value, or its session was removed, taken or purged",
    ),
    EngineFull: _Answer(StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_STORE_FULL, "the store is full"),
    EngineUnavailable: _Answer(
        StatusCode.UNAVAILABLE, pb.ERROR_REASON_ENGINE_UNAVAILABLE, "the storage does not answer now, try again later"
    ),
    WatcherTooSlow: _Answer(
        StatusCode.ABORTED, pb.ERROR_REASON_WATCHER_TOO_SLOW, "events were not read fast enough, watch again"
    ),
    TooManyWatchers: _Answer(
        StatusCode.UNAVAILABLE,
        pb.ERROR_REASON_TOO_MANY_WATCHERS,
        "the server has as many watchers as it takes, watch another replica",
    ),
    LimitExceeded: _Answer(StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_LIMIT_EXCEEDED, "a limit is used up"),
    Stopping: _Answer(StatusCode.UNAVAILABLE, pb.ERROR_REASON_DRAINING, "the server is stopping, call another one"),
    DecodeError: _Answer(
        StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_MALFORMED_REQUEST, "the request is no message of this method"
    ),
    UnknownMethod: _Answer(StatusCode.UNIMPLEMENTED, pb.ERROR_REASON_UNIMPLEMENTED, "this server has no such method"),
    # grpcio refuses it before the call gets here, so there are no details (see the contract).
    MessageTooLarge: _Answer(
        StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_UNSPECIFIED, "the request is larger than any may be"
    ),
}
_NOT_LOGGED = (DecodeError, Stopping)
"""Their cause is the caller, or is in the log already."""


def answered(
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
            status = status_of(error, request)
            servicer.observer.failed(method, status.code, time.perf_counter() - started, request, context)
            _refuse(context, status, error)
        servicer.observer.answered(method, time.perf_counter() - started, request, response, context)
        return response

    return rpc


def streamed(
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
            status = status_of(error, request)
            if not isinstance(error, Stopping):  # to those who watch the server a rollout is no failure
                code = status.code
            _refuse(context, status, error)
        finally:
            # No stream ends otherwise.
            servicer.observer.failed(method, code, time.perf_counter() - started, request, context)

    # A few more than there may be watchers, to tell the others that there are too many.
    rpc.threads = ThreadPoolExecutor(MAX_WATCHERS + 8, "watch")  # type: ignore[attr-defined]
    return rpc


def status_of(error: Exception, request: Any) -> Status:
    """Return what the caller of `request` is told of `error`, and log what only the operator may know."""
    answer = next((_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS), _INTERNAL)
    if answer.reason == pb.ERROR_REASON_UNSPECIFIED:
        return Status(code=answer.code.value[0], message=answer.text)
    details: list[Message] = []
    metadata = {}
    text = answer.text
    if isinstance(error, InvalidField):
        text = str(error)
        metadata["field"] = error.field
        details.append(
            BadRequest(field_violations=[BadRequest.FieldViolation(field=error.field, description=error.limit)])
        )
    elif isinstance(error, LimitExceeded):
        text = str(error)
        metadata |= {"of": error.of, "limit": error.limit}
        if error.retry is not None:
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(round(1e3 * max(error.retry, error.hold)) + 1)
            details.append(retry)
        _log(answer, error)
    elif isinstance(error, NotGranted):
        text = str(error)
        metadata |= vars(error)
        _log(answer, error)
    elif isinstance(error, AlreadyExists):
        metadata["namespace"] = request.namespace
    elif isinstance(error, UnknownMethod):
        metadata["method"] = error.name
    elif not isinstance(error, _NOT_LOGGED):
        _log(answer, error)
    details.insert(0, ErrorInfo(reason=pb.ErrorReason.Name(answer.reason), domain=DOMAIN, metadata=metadata))
    return Status(code=answer.code.value[0], message=text, details=map(_packed, details))


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _refuse(context: ServicerContext, status: Status, error: Exception) -> NoReturn:
    if isinstance(error, LimitExceeded) and error.hold:
        raise Held(error.hold, lambda later: abort(later, status)) from None
    abort(context, status)


def abort(context: ServicerContext, status: Status) -> NoReturn:
    """End a call with a status."""
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError  # abort_with_status always raises, its stubs do not say so


def cause_of(error: Exception) -> dict[str, str]:
    """Return what the log may say of `error`."""
    if isinstance(error, NotGranted):
        return dict(vars(error))
    if isinstance(error, LimitExceeded):
        return {"of": error.of, "limit": error.limit}
    # These promise that their messages carry no key and no value; nobody promises that for other exceptions.
    return {"cause": str(error)} if isinstance(error, EngineError | Unauthenticated) else described(error)


def _log(answer: _Answer, error: Exception) -> None:
    """Log the cause of an error that the operator has to see, unless the same was logged a moment ago."""
    cause = cause_of(error)
    # Not by namespace: of those a caller can make up as many as they want.
    rule = error.rule if isinstance(error, LimitExceeded) else ""
    named = (rule, *(cause.get(name, "") for name in ("where", "identity", "operation", "limit")))
    if is_news(type(error).__qualname__, *named):
        (log.error if answer is _INTERNAL else log.warning)(
            answer.text if answer is not _INTERNAL else "internal error", **cause
        )
